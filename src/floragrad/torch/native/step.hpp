// One step of one tensor: update.py's formulas in three passes over rows.
//
// Statistics; the norm of the update; the update. The last two compute the same numbers from a few rows of the gradient
// and of the sketch, so that nothing of them is held in between.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "buckets.hpp"
#include "lanes.hpp"
#include "rows.hpp"
#include "tensor.hpp"

namespace floragrad {

class TensorStep : public StepTensor {
 public:
  using StepTensor::StepTensor;

  void statistics() const { at.value_dtype == FLOAT32 ? statistics_of<float>() : statistics_of<uint16_t>(); }

  void update() const { at.value_dtype == FLOAT32 ? update_of<float>() : update_of<uint16_t>(); }

  // grown = Vᵀ(V w) in every bucket, V = β₁ decode(M) + (1 − β₁) U, w the learner: one power iteration.
  void grow(const float* learner, float* grown) const {
    at.value_dtype == FLOAT32 ? grow_of<float>(learner, grown) : grow_of<uint16_t>(learner, grown);
  }

 private:
  template <class Value>
  void statistics_of() const {
    const int64_t n = at.columns;
    const float beta2 = static_cast<float>(at.beta2), fresh = static_cast<float>(1 - at.beta2);
    const float eps = static_cast<float>(at.eps);
    if (!at.factored) {
      for_each_rows([&](int64_t, int64_t, int64_t, int64_t top, int64_t end) {
        const int64_t count = (end - top) * n;
        const Value* grad = static_cast<const Value*>(at.grad) + top * n;
        float* variance = at.variance + top * n;
        for (int64_t j = 0; j < count; j += LANES) {
          const Floats g = load(grad + j, count - j);
          store(variance + j, load(variance + j, count - j) * beta2 + (g * g + eps) * fresh, count - j);
        }
      });
      return;
    }
    for_each_rows([&](int64_t chunk, int64_t, int64_t, int64_t top, int64_t end) {
      std::fill(partial + chunk * n, partial + (chunk + 1) * n, 0.f);
      double total = 0;
      for (int64_t row = top; row < end; ++row) {
        // One row after the other: the processor foresees what is read in one line.
        const Value* grad = static_cast<const Value*>(at.grad) + row * n;
        float* columns = partial + chunk * n;
        Floats squares = {};
        for (int64_t j = 0; j < n; j += LANES) {
          const Floats g = load(grad + j, n - j), square = g * g;
          store(columns + j, load(columns + j, n - j) + square, n - j);
          squares += square;
        }
        float& average = at.row_var[row];
        average = average * beta2 + (sum(squares) / n + eps) * fresh;
        total += average;
      }
      chunk_sums[chunk] = total;
    });
    for (int64_t matrix = 0; matrix < at.batch; ++matrix) {
      double total = 0;
      for (int64_t part = 0; part < chunks.per_matrix; ++part) total += chunk_sums[matrix * chunks.per_matrix + part];
      row_means[matrix] = total / at.rows;
    }
    sum_columns([&](int64_t matrix, int64_t j, float sum) {
      float& average = at.col_var[matrix * n + j];
      average = average * beta2 + (sum / at.rows + eps) * fresh;
      col_factors[matrix * n + j] = 1 / std::sqrt(average);
    });
  }

  // Calls take(bucket, count, sums) for lanes of encode(U) of each row, without the row's factor. Where W is about to
  // move, its rows are asked for meanwhile.
  template <bool MOVES, class Value, int ROWS, bool SIGNS, class Take>
  __attribute__((always_inline)) void encode(const Group<Value, ROWS, SIGNS>& group, const float* weight, int64_t first,
                                             int64_t end, Floats (&squares)[ROWS], const Take& take) const {
    const Value* param = param_of<Value>(group.first);
    const auto columns = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; MOVES && r < ROWS; ++r) __builtin_prefetch(param + r * at.columns + j, 1, 2);
      if constexpr (SIGNS)
        return SignedFactor{load(weight + j, count)};
      else
        return FactorAndWeight{group.factors(j, count), load(weight + j, count)};
    };
    encode_rows<ROWS>(group.grad, at.columns, at.width, first, end, columns, squares, take);
  }

  // The squares of D = a U + decode(exchange); or, storing, M of the rows on to the next step, with the exchange left in
  // the room: over a R, as D is a R times all the rest, and the lanes of all rows together, those of one bucket after
  // another. A block of buckets passes from one to the next in the first cache.
  template <bool STORES, class Value, int ROWS, bool SIGNS>
  Floats move_on(const Group<Value, ROWS, SIGNS>& group, const Stored& rows, const Room& room) const {
    const bool reads_again = group.reading != group.weight;
    const float beta1 = static_cast<float>(at.beta1), twice_own = 2 * own;
    const float* carried = carries ? carry + group.matrix * at.width : nullptr;
    const bool residual = at.residual;
    Floats squares[ROWS] = {}, square = {};
    float over[ROWS];
    for (int r = 0; r < ROWS; ++r) over[r] = 1 / (group.row_factors[r] * own);
    for (int64_t first = 0; first < at.width; first += BLOCK) {
      const int64_t end = std::min(first + BLOCK, at.width);
      alignas(64) float momentum[ROWS][BLOCK], seen[ROWS][BLOCK];
      for (int r = 0; r < ROWS; ++r) rows.load_block(group.first + r, first, end - first, momentum[r]);
      if (reads_again && !STORES) {
        Floats again[ROWS] = {};
        encode<false>(group, group.reading, first, end, again, [&](int64_t bucket, int64_t, const Floats(&sums)[ROWS]) {
          for (int r = 0; r < ROWS; ++r) store(seen[r] + bucket - first, sums[r], LANES);
        });
      }
      const auto move = [&](int64_t bucket, int64_t some, const Floats(&sums)[ROWS]) __attribute__((always_inline)) {
        const int64_t j = bucket - first;
        const Floats shares = load(inverse + bucket, some), lengths = load(gram + bucket, some);
        const Floats carries_over = carried ? load(carried + bucket, some) : Floats{} + 1.f;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Floats encoded = sums[r] * group.row_factors[r], kept = load(momentum[r] + j, LANES);
          const Floats change = beta1 * (kept * carries_over - encoded);
          const Floats exchange = residual ? change * shares : beta1 * kept;
          if (STORES) {
            store(room.exchange + bucket * ROWS + r * LANES, exchange * over[r], LANES);
            store(momentum[r] + j, encoded + change, LANES);
          } else {
            const Floats own_share = reads_again ? load(seen[r] + j, LANES) * group.row_factors[r] : encoded;
            square += exchange * (twice_own * own_share + exchange * lengths);
          }
        }
      };
      encode<STORES>(group, group.weight, first, end, squares, move);
      for (int r = 0; STORES && r < ROWS; ++r) rows.save_block(group.first + r, first, end - first, momentum[r]);
    }
    for (int r = 0; r < ROWS; ++r)
      square += squares[r] * (group.row_factors[r] * group.row_factors[r] * own * own);
    return square;
  }

  template <class Value>
  void update_of() const {
    draw();
    const Stored rows = stored();
    for_each_rows([&](int64_t chunk, int64_t thread, int64_t matrix, int64_t top, int64_t end) {
      double total = 0;
      const Room mine = room(thread);
      for_each_group<Value>(matrix, top, end, [&](const auto& group) { total += sum(squares(group, rows, mine)); });
      chunk_sums[chunk] = total;
    });
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) total += chunk_sums[chunk];
    const double mean = total / static_cast<double>(at.batch * at.rows * at.columns);
    // Rounding may make the square of next to nothing negative; what is not a number stays so.
    const float ratio = static_cast<float>(std::sqrt(mean < 0 ? 0 : mean) / at.clip_threshold);
    const float size = static_cast<float>(at.size) / (ratio < 1 ? 1 : ratio);
    for_each_rows([&](int64_t, int64_t thread, int64_t matrix, int64_t top, int64_t end) {
      const Room mine = room(thread);
      for_each_group<Value>(matrix, top, end, [&](const auto& group) { move(group, rows, mine, size); });
    });
  }

  // The squares of D.
  template <class Value, int ROWS, bool SIGNS>
  Floats squares(const Group<Value, ROWS, SIGNS>& group, const Stored& rows, const Room& room) const {
    if (SIGNS || at.momentum == SKETCH) return move_on<false>(group, rows, room);
    return at.momentum == WHOLE ? walk<true, false>(group, rows, 0) : walk<false, false>(group, rows, 0);
  }

  // M on to the next step, and W by D.
  template <class Value, int ROWS, bool SIGNS>
  void move(const Group<Value, ROWS, SIGNS>& group, const Stored& rows, const Room& room, float size) const {
    if (SIGNS || at.momentum == SKETCH) {
      move_on<true>(group, rows, room);
      descend(group, room, size);
    } else if (at.momentum == WHOLE) {
      walk<true, true>(group, rows, size);
    } else {
      walk<false, true>(group, rows, size);
    }
  }

  // Without a projection D is U, or the next value of the whole momentum: its squares, or, moving, W by it.
  template <bool KEPT, bool MOVES, class Value, int ROWS, bool SIGNS>
  Floats walk(const Group<Value, ROWS, SIGNS>& group, const Stored& rows, float size) const {
    const int64_t n = at.columns, span = KEPT ? BLOCK : n;
    const float beta1 = static_cast<float>(at.beta1);
    const Floats kept = Floats{} + keep;
    Floats square = {};
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t first = 0; first < n; first += span) {
        const int64_t count = std::min(span, n - first);
        alignas(64) float momentum[BLOCK];
        if (KEPT) rows.load_block(group.first + r, first, count, momentum);
        for (int64_t j = 0; j < count; j += LANES) {
          const int64_t some = count - j, column = first + j;
          Floats direction =
              load(group.grad + r * n + column, some) * group.factors(column, some) * group.row_factors[r];
          if (KEPT) {
            direction += beta1 * (load(momentum + j, LANES) - direction);
            store(momentum + j, direction, LANES);
          }
          if (MOVES) {
            Value* to = param_of<Value>(group.first + r) + column;
            write(to, load(to, some) * kept - size * direction, group.first + r, column, some);
          } else {
            square += direction * direction;
          }
        }
        if (MOVES && KEPT) rows.save_block(group.first + r, first, count, momentum);
      }
    }
    return square;
  }

  // W ← keep W − size D, with D = a R (G · C + decode(what is in the room)); a row after the other, as rows that lie a
  // multiple of 4096 bytes apart would wait for each other.
  template <class Value, int ROWS, bool SIGNS>
  void descend(const Group<Value, ROWS, SIGNS>& group, const Room& room, float size) const {
    constexpr int64_t AHEAD = 6144 / sizeof(Value);
    const int64_t n = at.columns, k = at.width;
    const Floats kept = Floats{} + keep;
    for (int r = 0; r < ROWS; ++r) {
      const Value* grad = group.grad + r * n;
      const float* exchange = room.exchange + r * LANES;
      const Floats sizes = Floats{} + group.row_factors[r] * size * own;
      Value* param = param_of<Value>(group.first + r);
      for (int64_t column = 0; column < n; column += k) {
        const auto move = [&](int64_t i, int64_t some) __attribute__((always_inline)) {
          const int64_t j = column + i;
          const Floats g = load(grad + j, some), share = load(exchange + i * ROWS, LANES);
          const Floats reading = load(group.reading + j, some);
          Floats direction;
          // Factors with signs give g one too many, and its share none: their sum is given one.
          if constexpr (SIGNS)
            direction = with_signs(g * reading + share, reading);
          else
            direction = g * group.factors(j, some) + reading * share;
          __builtin_prefetch(param + j + AHEAD, 1, 2);
          write(param + j, load(param + j, some) * kept - direction * sizes, group.first + r, j, some);
        };
        const int64_t count = std::min(k, n - column), whole = count / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) move(i, LANES);
        if (whole < count) move(whole, count - whole);
      }
    }
  }

  template <class Value>
  Value* param_of(int64_t row) const {
    return static_cast<Value*>(at.param) + row * at.columns;
  }

  void write(float* to, Floats moved, int64_t, int64_t, int64_t count) const { store(to, moved, count); }
  void write(uint16_t* to, Floats moved, int64_t row, int64_t column, int64_t count) const {
    if (!rounds_values()) {
      store_items(to, nearest_bfloat16(moved), count);
      return;
    }
    const Words words = words_in(value_words);
    store_items(to, random_bfloat16(moved, words.rows[row], load(words.columns + column, count)), count);
  }

  // Calls work(column, bucket, count) for lanes of buckets in every slice of columns.
  template <class Work>
  void for_each_slice(const Work& work) const {
    for (int64_t column = 0; column < at.columns; column += at.width) {
      const int64_t count = std::min(at.width, at.columns - column);
      for (int64_t i = 0; i < count; i += LANES) work(column, i, count - i);
    }
  }

  template <class Value>
  void grow_of(const float* learner, float* grown) const {
    const int64_t n = at.columns;
    const Stored rows = stored();
    const float beta1 = static_cast<float>(at.beta1);
    for_each_rows([&](int64_t chunk, int64_t thread, int64_t matrix, int64_t top, int64_t end) {
      float* columns = partial + chunk * n;
      const float* old = previous_of(matrix);
      const float* weight = learner + matrix * n;
      std::fill(columns, columns + n, 0.f);
      for (int64_t number = top; number < end; ++number) {
        const Group<Value, 1, false> row = group_of<Value, 1, false>(matrix, number);
        const float factor = (1 - beta1) * row.row_factors[0];
        const Room mine = room(thread);
        for (int64_t first = 0; first < at.width; first += BLOCK)
          rows.load_block(number, first, std::min(BLOCK, at.width - first), mine.exchange + first);
        const auto blended = [&](int64_t column, int64_t i, int64_t some) {
          return load(row.grad + column + i, some) * row.factors(column + i, some) * factor +
                 load(old + column + i, some) * (load(mine.exchange + i, LANES) * beta1);
        };
        std::fill(mine.sketch, mine.sketch + whole_lanes(at.width), 0.f);
        for_each_slice([&](int64_t column, int64_t i, int64_t some) {
          const Floats sum = load(mine.sketch + i, LANES) + blended(column, i, some) * load(weight + column + i, some);
          store(mine.sketch + i, sum, LANES);
        });
        for_each_slice([&](int64_t column, int64_t i, int64_t some) {
          const Floats grown_here = blended(column, i, some) * load(mine.sketch + i, LANES);
          store(columns + column + i, load(columns + column + i, some) + grown_here, some);
        });
      }
    });
    sum_columns([&](int64_t matrix, int64_t j, float sum) { grown[matrix * n + j] = sum; });
  }
};

}  // namespace floragrad
