// Rows encoded by a bucket projection: column j, times its weight, falls into bucket j mod k.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.hpp"

namespace floragrad {

inline int64_t whole_lanes(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Factor from a column's gradients to u, and weight from u to its share of the bucket; factors may include the sign.
struct SignedFactor {
  Floats factor;
  Floats share(Floats u) const { return u; }
};
struct FactorAndWeight {
  Floats factor, weight;
  Floats share(Floats u) const { return u * weight; }
};

// Independent sums of lanes of buckets, to hide the latency of additions.
constexpr int AT_ONCE = 4;

// Adds the shares of ``WIDE`` lanes of buckets to ``sums``, and the squares of u to ``squares``.
template <int WIDE, class Value, class Columns>
inline __attribute__((always_inline)) void add_to_buckets(const Value* grad, int64_t n, int64_t k, int64_t ahead,
                                                          int64_t bucket, int64_t count, const Columns& columns,
                                                          Floats (&squares)[AT_ONCE], Floats (&sums)[WIDE]) {
  const auto add = [&](int lane, int64_t column, int64_t some) __attribute__((always_inline)) {
    const auto each = columns(column, some);
    __builtin_prefetch(grad + ahead + column, 0, 2);
    const Floats u = load(grad + column, some) * each.factor;
    sums[lane] += each.share(u);
    squares[lane] += u * u;
  };
  int64_t column = bucket;
  for (; count >= WIDE * LANES && column + WIDE * LANES <= n; column += k) {
#pragma GCC unroll 4
    for (int lane = 0; lane < WIDE; ++lane) add(lane, column + lane * LANES, LANES);
  }
#pragma GCC unroll 4
  for (int lane = 0; lane < WIDE; ++lane)  // the last slice may end within them
    for (int64_t from = column + lane * LANES; from < n; from += k)
      add(lane, from, std::min({LANES, n - from, count - lane * LANES}));
}

// Calls take(bucket, sums) for lanes of buckets from ``first`` to ``end`` with their sums over a row; adds the squares of
// u to ``squares``. columns(column, count) returns factors and weights. Prefetches gradients ``ahead`` elements on.
template <class Value, class Columns, class Take>
inline __attribute__((always_inline)) void encode_row(const Value* grad, int64_t n, int64_t k, int64_t ahead,
                                                      int64_t first, int64_t end, const Columns& columns,
                                                      Floats (&squares)[AT_ONCE], const Take& take) {
  int64_t bucket = first;
  for (; bucket + AT_ONCE * LANES <= end; bucket += AT_ONCE * LANES) {
    Floats sums[AT_ONCE] = {};
    add_to_buckets(grad, n, k, ahead, bucket, AT_ONCE * LANES, columns, squares, sums);
#pragma GCC unroll 4
    for (int lane = 0; lane < AT_ONCE; ++lane) take(bucket + lane * LANES, sums[lane]);
  }
  for (; bucket < end; bucket += LANES) {
    const int64_t some = std::min(LANES, end - bucket);
    Floats sum[1] = {};
    add_to_buckets(grad, n, k, ahead, bucket, some, columns, squares, sum);
    take(bucket, sum[0]);
  }
}

}  // namespace floragrad
