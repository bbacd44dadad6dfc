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

// Rows of a sketch as they are stored, a block of 64 at a time: storage.StoredRows.
struct Stored {
  void* data;
  float* scale;
  int64_t width;
  int64_t dtype;
  Words words;

  // Whole lanes are written to ``out``: zeros beyond ``count``.
  void load_block(int64_t row, int64_t first, int64_t count, float* __restrict out) const {
    switch (dtype) {
      case FLOAT32: {
        const float* from = static_cast<const float*>(data) + row * width + first;
        for (int64_t j = 0; j < count; j += LANES) {
          __builtin_prefetch(from + TOGETHER * width + j, 1, 2);
          store(out + j, load(from + j, count - j), LANES);
        }
        return;
      }
      case BFLOAT16: {
        const uint16_t* from = static_cast<const uint16_t*>(data) + row * width + first;
        for (int64_t j = 0; j < count; j += LANES) store(out + j, load(from + j, count - j), LANES);
        return;
      }
      case INT8: {
        const int8_t* __restrict from = static_cast<const int8_t*>(data) + row * width + first;
        const float step = scale[row * blocks() + first / BLOCK];
        for (int64_t j = 0; j < count; ++j) out[j] = from[j] * step;
        break;
      }
      default: {
        const int64_t half = (width + 1) / 2, low = low_count(first, count);
        const uint8_t* __restrict from = static_cast<const uint8_t*>(data) + row * half;
        const float step = scale[row * blocks() + first / BLOCK];
        for (int64_t j = 0; j < low; ++j) out[j] = (static_cast<int8_t>(from[first + j] << 4) >> 4) * step;
        for (int64_t j = low; j < count; ++j) out[j] = (static_cast<int8_t>(from[first + j - half]) >> 4) * step;
      }
    }
    for (int64_t j = count; j % LANES; ++j) out[j] = 0;
  }

  void save_block(int64_t row, int64_t first, int64_t count, const float* __restrict values) const {
    switch (dtype) {
      case FLOAT32: {
        float* to = static_cast<float*>(data) + row * width + first;
        for (int64_t j = 0; j < count; j += LANES) store(to + j, load(values + j, LANES), count - j);
        return;
      }
      case BFLOAT16: {
        uint16_t* to = static_cast<uint16_t*>(data) + row * width + first;
        const uint32_t* columns = words.columns + first;
        for (int64_t j = 0; j < count; j += LANES) {
          const Bits drawn = load(columns + j, count - j);
          store_items(to + j, random_bfloat16(load(values + j, LANES), words.rows[row], drawn), count - j);
        }
        return;
      }
      case INT8: {
        int8_t integers[BLOCK];
        quantize(row, first, count, values, 127.f, integers);
        std::memcpy(static_cast<int8_t*>(data) + row * width + first, integers, count);
        return;
      }
      default: {
        // The other halves of the bytes belong to another block, which may not have been read yet.
        int8_t integers[BLOCK];
        quantize(row, first, count, values, 7.f, integers);
        const int64_t half = (width + 1) / 2, low = low_count(first, count);
        uint8_t* __restrict to = static_cast<uint8_t*>(data) + row * half;
        for (int64_t j = 0; j < low; ++j) to[first + j] = (to[first + j] & 0xF0) | (integers[j] & 15);
        for (int64_t j = low; j < count; ++j)
          to[first + j - half] = (to[first + j - half] & 15) | static_cast<uint8_t>(static_cast<uint8_t>(integers[j]) << 4);
      }
    }
  }

 private:
  int64_t blocks() const { return (width + BLOCK - 1) / BLOCK; }

  // How many numbers of a block are in the lower halves of their bytes.
  int64_t low_count(int64_t first, int64_t count) const {
    const int64_t low = (width + 1) / 2 - first;
    return low < 0 ? 0 : low < count ? low : count;
  }

  // ``values`` has room for whole lanes, zero beyond ``count``.
  void quantize(int64_t row, int64_t first, int64_t count, const float* values, float largest, int8_t* integers) const {
    Ints sizes = {};
    for (int64_t j = 0; j < count; j += LANES) {
      const Ints size = magnitude(load(values + j, LANES));
      sizes = size > sizes ? size : sizes;
    }
    const int32_t bits_of_most = floragrad::largest(sizes);
    float most;
    std::memcpy(&most, &bits_of_most, sizeof most);
    const float step = most / largest;
    const float divisor = step == 0 ? 1.f : step;
    scale[row * blocks() + first / BLOCK] = step;
    for (int64_t j = 0; j < count; j += LANES) {
      const Ints bits = random_bits(words.rows[row], load(words.columns + first + j, count - j));
      const Floats uniform = __builtin_convertvector(bits, Floats) * 0x1p-16f + 32768.5f * 0x1p-16f;
      Floats grid = load(values + j, LANES) / divisor + uniform;
      grid = grid > -largest ? grid : -largest - Floats{};  // and so is what is not a number
      grid = grid < largest + 1 ? grid : largest + 1 - Floats{};
      Ints whole = __builtin_convertvector(grid, Ints);
      whole += __builtin_convertvector(whole, Floats) > grid;  // truncated to floored
      whole = whole > static_cast<int32_t>(largest) ? static_cast<int32_t>(largest) - Ints{} : whole;
      const Bytes bytes = __builtin_convertvector(whole, Bytes);
      std::memcpy(integers + j, &bytes, sizeof bytes);
    }
  }
};

}  // namespace floragrad
