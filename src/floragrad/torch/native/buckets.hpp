// Rows encoded by a bucket projection: column j, times its weight, falls into bucket j mod k.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.hpp"

namespace floragrad {

inline int64_t whole_lanes(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// What makes u of a column's gradients, and of u what falls into the bucket: nothing more where the factor has a sign.
struct SignedFactor {
  Floats factor;
  Floats share(Floats u) const { return u; }
};
struct FactorAndWeight {
  Floats factor, weight;
  Floats share(Floats u) const { return u * weight; }
};

// Calls take(bucket, count, sums) for lanes of buckets from ``first`` to ``end``, with the sums of what falls into them
// in each of ``ROWS`` rows; adds the squares of u. What belongs to columns, columns(column, count), is fetched once for
// all rows; the rows that come next are asked for meanwhile.
template <int ROWS, class Value, class Columns, class Take>
inline __attribute__((always_inline)) void encode_rows(const Value* grad, int64_t n, int64_t k, int64_t first,
                                                       int64_t end, const Columns& columns, Floats (&squares)[ROWS],
                                                       const Take& take) {
  for (int64_t bucket = first; bucket < end; bucket += LANES) {
    Floats sums[ROWS] = {};
    const auto add = [&](int64_t column, int64_t some) __attribute__((always_inline)) {
      const auto each = columns(column, some);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        __builtin_prefetch(grad + (ROWS + r) * n + column, 0, 2);
        const Floats u = load(grad + r * n + column, some) * each.factor;
        sums[r] += each.share(u);
        squares[r] += u * u;
      }
    };
    const int64_t some = std::min(LANES, end - bucket);
    int64_t column = bucket;
    for (; some == LANES && column + LANES <= n; column += k) add(column, LANES);
    for (; column < n; column += k) add(column, std::min(some, n - column));
    take(bucket, some, sums);
  }
}

}  // namespace floragrad
