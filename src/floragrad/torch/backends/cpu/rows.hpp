// Storage formats of parameters and state, and their unbiased rounding, as in storage.py.
#pragma once

#include <cmath>

#include "lanes.hpp"

namespace floragrad {

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr int64_t BLOCK = 64;  // policy.QUANTIZATION_BLOCK: elements that share a scale

// Random words for rounding, one for each row and each column; null to round to nearest.
struct Words {
  const uint32_t* rows;
  const uint32_t* columns;
};

// Sixteen random bits of each element, from the words of its row and its column: RoundingBits.integers.
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

// Calls work(first, count) for lanes of a block of ``count`` elements; most blocks are whole.
template <class Work>
inline __attribute__((always_inline)) void for_each_lanes_of_block(int64_t count, const Work& work) {
  if (count != BLOCK) return for_each_lanes(count, work);
#pragma GCC unroll 4
  for (int64_t j = 0; j < BLOCK; j += LANES) work(j, LANES);
}

// A stored row of a sketch, read and written in blocks of 64.
//
// Loads and stores of a block are inlined: a call would take a tenth of their time.
struct StoredRow {
  void* data;
  float* scale;
  int64_t width;
  int64_t dtype;
  uint32_t word;
  const uint32_t* columns;  // words, readable in whole lanes
  int64_t ahead;            // elements from the current row to the prefetched one

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
        int8_t integers[BLOCK];
        unpack(static_cast<const uint8_t*>(data) + first / 2, count, integers);
        const float step = *scale_of(first);
        for_each_lanes_of_block(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
          store(out + j, load(integers + j, some) * step, LANES);
        });
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
        return save_pairs(first, count, values);
    }
  }

 private:
  float* scale_of(int64_t first) const { return scale + static_cast<uint64_t>(first) / BLOCK; }

  template <class Item>
  void load_lanes(const Item* from, int64_t count, float step, float* __restrict out) const {
    constexpr int NEAR = sizeof(Item) == 4 ? 3 : 2;  // prefetch into L1 where the formats are widest
    for_each_lanes_of_block(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
      if (j * sizeof(Item) % 64 == 0) __builtin_prefetch(from + ahead + j, 1, NEAR);
      store(out + j, load(from + j, some) * step, LANES);
    });
  }

  // Columns 2j and 2j + 1 share byte j.
  __attribute__((always_inline)) void unpack(const uint8_t* from, int64_t count, int8_t* integers) const {
    __builtin_prefetch(from + ahead / 2, 1, 2);
    const auto pair = [&](int64_t j) __attribute__((always_inline)) {
      integers[2 * j] = static_cast<int8_t>(from[j] << 4) >> 4;
      integers[2 * j + 1] = static_cast<int8_t>(from[j]) >> 4;
    };
    if (count == BLOCK) {
      for (int64_t j = 0; j < BLOCK / 2; ++j) pair(j);
    } else {
      for (int64_t j = 0; j < (count + 1) / 2; ++j) pair(j);
    }
  }

  __attribute__((always_inline)) void save_pairs(int64_t first, int64_t count, const float* values) const {
    int8_t integers[BLOCK];
    quantize(first, count, values, 7, integers);
    if (count % 2) integers[count] = 0;
    uint8_t* to = static_cast<uint8_t*>(data) + first / 2;
    const auto pair = [&](int64_t j) __attribute__((always_inline)) {
      to[j] = (integers[2 * j] & 15) | static_cast<uint8_t>(static_cast<uint8_t>(integers[2 * j + 1]) << 4);
    };
    if (count == BLOCK) {
      for (int64_t j = 0; j < BLOCK / 2; ++j) pair(j);
    } else {
      for (int64_t j = 0; j < (count + 1) / 2; ++j) pair(j);
    }
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
      const Ints whole = floored(grid > least ? grid : least);  // NaN too
      store_items(integers + j, __builtin_convertvector(whole < greatest ? whole : greatest, Bytes), some);
    });
  }
};

// The rows of a sketch.
struct StoredRows {
  void* data;
  float* scale;
  int64_t width;
  int64_t dtype;
  Words words;
  int64_t ahead;  // rows from the current one to the prefetched one

  StoredRow operator[](int64_t row) const {
    const int64_t halves[] = {8, 4, 2, 1};  // half-bytes of each element
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
