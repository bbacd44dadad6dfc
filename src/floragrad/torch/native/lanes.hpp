// Sixteen numbers at a time, whatever the instruction set: so sums are taken in the same order on all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace floragrad {

constexpr int64_t LANES = 16;

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words16 = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

// ``count`` of them, the others zero; the fast way keeps nothing in memory.
template <class Vector, class Item>
inline Vector load_items(const Item* from, int64_t count) {
  if (__builtin_expect(count >= LANES, 1)) {
    Vector whole;
    std::memcpy(&whole, from, sizeof whole);
    return whole;
  }
  Vector some = {};
  std::memcpy(&some, from, count * sizeof(Item));
  return some;
}

template <class Vector, class Item>
inline void store_items(Item* to, Vector values, int64_t count) {
  if (__builtin_expect(count >= LANES, 1)) {
    std::memcpy(to, &values, sizeof values);
    return;
  }
  const Vector some = values;
  std::memcpy(to, &some, count * sizeof(Item));
}

inline Floats load(const float* from, int64_t count) { return load_items<Floats>(from, count); }
inline Words16 load(const uint32_t* from, int64_t count) { return load_items<Words16>(from, count); }
inline Floats load(const uint16_t* from, int64_t count) {
  const Words16 wide = __builtin_convertvector(load_items<Halves>(from, count), Words16);
  return reinterpret_cast<Floats>(wide << 16);
}

inline void store(float* to, Floats values, int64_t count) { store_items(to, values, count); }

inline Floats inverse_root(Floats values) {
  for (int64_t i = 0; i < LANES; ++i) values[i] = 1 / std::sqrt(values[i]);
  return values;
}

inline float sum(Floats values) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) values[i] += values[half + i];
  return values[0];
}

}  // namespace floragrad
