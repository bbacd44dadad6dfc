// Vectors of as many elements as a register of the instruction set holds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace floragrad {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

// Prefetch distance in rows of ``elements``.
inline int64_t rows_ahead(int64_t elements) { return (3072 + elements - 1) / elements; }

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Bytes = int8_t __attribute__((vector_size(LANES)));

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i first_lanes(int64_t count) {
  alignas(32) static const int32_t masks[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + LANES - count));
}
#endif

// Loads fewer elements than a register holds: the others are zero, and no memory beyond is accessed.
template <class Vector, class Item>
inline Vector load_some(const Item* from, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(Item) == 4) return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi32(mask, from));
  if constexpr (sizeof(Item) == 2) return reinterpret_cast<Vector>(_mm256_maskz_loadu_epi16(mask, from));
  if constexpr (sizeof(Item) == 1) return reinterpret_cast<Vector>(_mm_maskz_loadu_epi8(mask, from));
#elif defined(__AVX2__)
  if constexpr (sizeof(Item) == 4)
    return reinterpret_cast<Vector>(_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first_lanes(count)));
#endif
  Vector some = {};
  std::memcpy(&some, from, count * sizeof(Item));
  return some;
}

template <class Vector, class Item>
inline void store_some(Item* to, Vector values, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(Item) == 4) return _mm512_mask_storeu_epi32(to, mask, reinterpret_cast<__m512i>(values));
  if constexpr (sizeof(Item) == 2) return _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(values));
  if constexpr (sizeof(Item) == 1) return _mm_mask_storeu_epi8(to, mask, reinterpret_cast<__m128i>(values));
#elif defined(__AVX2__)
  if constexpr (sizeof(Item) == 4)
    return _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first_lanes(count), reinterpret_cast<__m256i>(values));
#endif
  std::memcpy(to, &values, count * sizeof(Item));
}

// Loads ``count`` elements; the others are zero.
template <class Vector, class Item>
inline Vector load_items(const Item* from, int64_t count) {
  if (__builtin_expect(count < LANES, 0)) return load_some<Vector>(from, count);
  Vector whole;
  std::memcpy(&whole, from, sizeof whole);
  return whole;
}

template <class Vector, class Item>
inline void store_items(Item* to, Vector values, int64_t count) {
  if (__builtin_expect(count < LANES, 0)) return store_some(to, values, count);
  std::memcpy(to, &values, sizeof values);
}

// Calls work(first, count) for lanes of ``count`` elements; whole ones with a constant count.
template <class Work>
inline __attribute__((always_inline)) void for_each_lanes(int64_t count, const Work& work) {
  const int64_t whole = count / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES) work(j, LANES);
  if (whole < count) work(whole, count - whole);
}

inline Floats load(const float* from, int64_t count) { return load_items<Floats>(from, count); }
inline Bits load(const uint32_t* from, int64_t count) { return load_items<Bits>(from, count); }
inline Floats load(const uint16_t* from, int64_t count) {
  const Bits wide = __builtin_convertvector(load_items<Halves>(from, count), Bits);
  return reinterpret_cast<Floats>(wide << 16);
}

inline Ints integers(const int8_t* from, int64_t count) {
  const Bytes bytes = load_items<Bytes>(from, count);
#if defined(__AVX512F__)
  // The compiler would convert by way of 16 bits.
  return reinterpret_cast<Ints>(_mm512_maskz_cvtepi8_epi32(0xFFFF, reinterpret_cast<__m128i>(bytes)));
#else
  return __builtin_convertvector(bytes, Ints);
#endif
}
inline Floats load(const int8_t* from, int64_t count) {
  return __builtin_convertvector(integers(from, count), Floats);
}

inline void store(float* to, Floats values, int64_t count) { store_items(to, values, count); }

// Clamps an average of squares that overflow has made infinite, so that later squares can decrease it.
constexpr float LARGEST_FLOAT = std::numeric_limits<float>::max();
inline float saturated(float average) { return average > LARGEST_FLOAT ? LARGEST_FLOAT : average; }
inline Floats saturated(Floats averages) {
  const Floats most = Floats{} + LARGEST_FLOAT;
  return averages > most ? most : averages;
}

inline Floats inverse_root(Floats values) {
  for (int64_t i = 0; i < LANES; ++i) values[i] = 1 / std::sqrt(values[i]);
  return values;
}

// Rounds down to integers; values out of range become the least integer.
inline Ints floored(Floats values) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_maskz_cvt_roundps_epi32(0xFFFF, values, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#elif defined(__AVX__)
  return reinterpret_cast<Ints>(_mm256_cvttps_epi32(_mm256_floor_ps(values)));
#else
  const Ints whole = __builtin_convertvector(values, Ints);
  return whole + (__builtin_convertvector(whole, Floats) > values);  // truncated to floored
#endif
}

// Rotates lanes by ``by`` places to the front.
template <int64_t by, class Vector>
inline Vector moved(Vector values) {
  Ints from;
  for (int64_t i = 0; i < LANES; ++i) from[i] = static_cast<int32_t>((i + by) % LANES);
  return __builtin_shuffle(values, from);
}

template <int64_t half = LANES / 2>
inline float sum(Floats values) {
  values += moved<half>(values);
  if constexpr (half > 1) return sum<half / 2>(values);
  return values[0];
}

template <int64_t half = LANES / 2>
inline int32_t largest(Ints values) {
  const Ints others = moved<half>(values);
  values = values > others ? values : others;
  if constexpr (half > 1) return largest<half / 2>(values);
  return values[0];
}

// values · signs
inline Floats with_signs(Floats values, Floats signs) {
  const Bits flipped = reinterpret_cast<Bits>(signs) & 0x80000000u;
  return reinterpret_cast<Floats>(reinterpret_cast<Bits>(values) ^ flipped);
}

// Bits of absolute values: in the order of the values, with infinity and NaN last.
inline Ints magnitude(Floats values) { return reinterpret_cast<Ints>(values) & 0x7FFFFFFF; }

}  // namespace floragrad
