// Rows of numbers in the formats of parameters and of state, and their unbiased rounding, as in quantize.py.
#pragma once

#include <cmath>

#include "lanes.hpp"

namespace floragrad {

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr int64_t BLOCK = 64;  // policy.QUANTIZATION_BLOCK: numbers that share a scale

// Words to round with, one for each row and each column; none where numbers round to the nearest.
struct Words {
  const uint32_t* rows;
  const uint32_t* columns;
};

// The sixteen random bits of each number, of its row's and its column's word: RoundingBits.numbers.
inline Ints random_bits(uint32_t row, Bits columns) {
  Bits words = columns + row;
  words ^= reinterpret_cast<Bits>(reinterpret_cast<Ints>(words) >> 16);
  return reinterpret_cast<Ints>(words * 0x9E3779B1u) >> 16;
}

inline Halves upper(Bits bits, Floats values) {
  const Bits rounded = bits >> 16;
  const Bits quiet = rounded * 0 + 0x7FC0;
  return __builtin_convertvector(values == values ? rounded : quiet, Halves);
}

inline Halves random_bfloat16(Floats values, uint32_t row, Bits columns) {
  const Bits noise = reinterpret_cast<Bits>(random_bits(row, columns)) & 0xFFFF;
  return upper(reinterpret_cast<Bits>(values) + noise, values);
}

inline Halves nearest_bfloat16(Floats values) {
  const Bits bits = reinterpret_cast<Bits>(values);
  return upper(bits + 0x7FFF + (bits >> 16 & 1), values);
}

// Calls work(first, count) for lanes of a block of ``count`` numbers; most blocks are whole.
template <class Work>
inline __attribute__((always_inline)) void for_each_lanes_of_block(int64_t count, const Work& work) {
  if (count != BLOCK) return for_each_lanes(count, work);
#pragma GCC unroll 4
  for (int64_t j = 0; j < BLOCK; j += LANES) work(j, LANES);
}

// A row of a sketch as it is stored, a block of 64 at a time.
//
// A load or a store of a block is part of each loop that has one: a call would take a tenth of what it does.
struct StoredRow {
  void* data;
  float* scale;
  int64_t width;
  int64_t dtype;
  uint32_t word;
  const uint32_t* columns;  // words, readable in whole lanes
  int64_t ahead;            // numbers until those of the row that is asked for

  // Whole lanes are written to ``out``: zeros beyond ``count``.
  __attribute__((always_inline)) void load_block(int64_t first, int64_t count, float* __restrict out) const {
    switch (dtype) {
      case FLOAT32:
        return load_lanes(static_cast<const float*>(data) + first, count, 1, out);
      case BFLOAT16:
        return load_lanes(static_cast<const uint16_t*>(data) + first, count, 1, out);
      case INT8:
        return load_lanes(static_cast<const int8_t*>(data) + first, count, *scale_of(first), out);
      default: {
        const int64_t half = (width + 1) / 2, low = low_count(first, count);
        const int8_t* from = static_cast<const int8_t*>(data) + first;
        const float step = *scale_of(first);
        const auto halves = [&](Ints here) { return __builtin_convertvector(here >> 28, Floats) * step; };
        __builtin_prefetch(from + ahead / 2, 1, 2);
        for_each_lanes(low, [&](int64_t j, int64_t some) { store(out + j, halves(integers(from + j, some) << 28), some); });
        for_each_lanes(count - low, [&](int64_t j, int64_t some) {
          store(out + low + j, halves(integers(from - half + low + j, some) << 24), some);
        });
        for (int64_t j = count; j % LANES; ++j) out[j] = 0;
      }
    }
  }

  // ``values`` has whole lanes, zeros beyond ``count``.
  __attribute__((always_inline)) void save_block(int64_t first, int64_t count, const float* __restrict values) const {
    switch (dtype) {
      case FLOAT32:
        return for_each_lanes(count, [&](int64_t j, int64_t some) {
          store(static_cast<float*>(data) + first + j, load(values + j, LANES), some);
        });
      case BFLOAT16:
        return for_each_lanes(count, [&](int64_t j, int64_t some) {
          const Halves rounded = random_bfloat16(load(values + j, LANES), word, load(columns + first + j, LANES));
          store_items(static_cast<uint16_t*>(data) + first + j, rounded, some);
        });
      case INT8:
        return quantize(first, count, values, 127, static_cast<int8_t*>(data) + first);
      default:
        return save_halves(first, count, values);
    }
  }

 private:
  float* scale_of(int64_t first) const { return scale + static_cast<uint64_t>(first) / BLOCK; }

  template <class Item>
  void load_lanes(const Item* from, int64_t count, float step, float* __restrict out) const {
    constexpr int NEAR = sizeof(Item) == 4 ? 3 : 2;  // the first cache where there is most of it
    for_each_lanes_of_block(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
      if (j * sizeof(Item) % 64 == 0) __builtin_prefetch(from + ahead + j, 1, NEAR);
      store(out + j, load(from + j, some) * step, LANES);
    });
  }

  // Not part of loops: alone its bytes are known to be no one else's.
  __attribute__((noinline)) void save_halves(int64_t first, int64_t count, const float* __restrict values) const {
    // The other halves of the bytes belong to another block, which may not have been read yet.
    int8_t integers[BLOCK];
    quantize(first, count, values, 7, integers);
    const int64_t half = (width + 1) / 2, low = low_count(first, count);
    uint8_t* __restrict to = static_cast<uint8_t*>(data);
    for (int64_t j = 0; j < low; ++j) to[first + j] = (to[first + j] & 0xF0) | (integers[j] & 15);
    for (int64_t j = low; j < count; ++j)
      to[first + j - half] = (to[first + j - half] & 15) | static_cast<uint8_t>(static_cast<uint8_t>(integers[j]) << 4);
  }

  // How many numbers of a block are in the lower halves of their bytes.
  int64_t low_count(int64_t first, int64_t count) const {
    const int64_t low = (width + 1) / 2 - first;
    return low < 0 ? 0 : low < count ? low : count;
  }

  __attribute__((always_inline)) void quantize(int64_t first, int64_t count, const float* values, int32_t largest,
                                               int8_t* integers) const {
    Ints sizes = {};
    for_each_lanes_of_block(count, [&](int64_t j, int64_t) __attribute__((always_inline)) {
      const Ints size = magnitude(load(values + j, LANES));
      sizes = size > sizes ? size : sizes;
    });
    const int32_t bits_of_most = floragrad::largest(sizes);
    float most;
    std::memcpy(&most, &bits_of_most, sizeof most);
    const float step = most / static_cast<float>(largest);
    const Floats divisor = Floats{} + (step == 0 ? 1.f : step), least = Floats{} - static_cast<float>(largest);
    const Ints greatest = Ints{} + largest;
    *scale_of(first) = step;
    for_each_lanes_of_block(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
      const Ints bits = random_bits(word, load(columns + first + j, LANES));
      const Floats uniform = __builtin_convertvector(bits, Floats) * 0x1p-16f + 32768.5f * 0x1p-16f;
      const Floats grid = load(values + j, LANES) / divisor + uniform;
      const Ints whole = floored(grid > least ? grid : least);  // and so is what is not a number
      store_items(integers + j, __builtin_convertvector(whole < greatest ? whole : greatest, Bytes), some);
    });
  }
};

// All of them.
struct StoredRows {
  void* data;
  float* scale;
  int64_t width;
  int64_t dtype;
  Words words;
  int64_t ahead;  // rows until the one that is asked for

  StoredRow operator[](int64_t row) const {
    const int64_t halves[] = {8, 4, 2, 1};  // of a byte, in each number
    const int64_t bytes = (width * halves[dtype] + 1) / 2;
    const bool rounds = words.columns != nullptr;
    return {static_cast<char*>(data) + row * bytes,
            scale + row * ((width + BLOCK - 1) / BLOCK),
            width,
            dtype,
            rounds ? words.rows[row] : 0,
            words.columns,
            ahead * width};
  }
};

}  // namespace floragrad
