// One step of one tensor: update.py's formulas in three passes over rows.
//
// Statistics; the norm of the update; the update. The last two compute the direction again from blocks of rows of the
// gradient and of the sketch, so that it is never stored.
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

  // Sums of G² along rows and columns, or the update of an unfactored second moment.
  void statistics() const { args.value_dtype == FLOAT32 ? statistics_of<float>() : statistics_of<uint16_t>(); }

  // Updates the factored second moment from sums over all parts of the tensor, and the factors from G to U.
  void normalise() const {
    if (!args.factored) return;
    const int64_t n = args.columns;
    const float beta2 = static_cast<float>(args.beta2), fresh = static_cast<float>(1 - args.beta2);
    const float eps = static_cast<float>(args.eps);
    for (int64_t row = 0; row < args.batch * args.rows; ++row)
      args.row_var[row] = saturated(args.row_var[row] * beta2 + (row_sums[row] / n + eps) * fresh);
    for (int64_t matrix = 0; matrix < args.batch; ++matrix) {
      const double mean = static_cast<double>(row_totals()[matrix]) / args.all_rows + eps * fresh;
      row_roots[matrix] = static_cast<float>(std::sqrt(mean > LARGEST_MEAN ? LARGEST_MEAN : mean) / BALANCE);
    }
    for (int64_t j = 0; j < args.batch * n; ++j) {
      const float moved = args.col_var[j] * beta2 + (sums[j] / args.all_rows + eps) * fresh;
      args.col_var[j] = saturated(moved);
      col_scales[j] = BALANCE / std::sqrt(moved);  // 0 where squares overflow
    }
  }

  // ‖D‖² of the local rows.
  void direction() const { args.value_dtype == FLOAT32 ? direction_of<float>() : direction_of<uint16_t>(); }

  // Updates the momentum and the parameter.
  void apply() const { args.value_dtype == FLOAT32 ? apply_of<float>() : apply_of<uint16_t>(); }

  // product = Vᵀ(V w) in every bucket, V = β₁ decode(M) + (1 − β₁) U, w the learner: one power iteration.
  void power_iteration(const float* learner, float* product) const {
    args.value_dtype == FLOAT32 ? power_iteration_of<float>(learner, product)
                                : power_iteration_of<uint16_t>(learner, product);
  }

 private:
  template <class Value>
  void statistics_of() const {
    const int64_t n = args.columns;
    const float beta2 = static_cast<float>(args.beta2), fresh = static_cast<float>(1 - args.beta2);
    const float eps = static_cast<float>(args.eps);
    if (!args.factored) {
      for_each_rows([&](int64_t, int64_t, int64_t, int64_t top, int64_t end) {
        const int64_t count = (end - top) * n;
        const Value* grad = static_cast<const Value*>(args.grad) + top * n;
        float* variance = args.variance + top * n;
        for (int64_t j = 0; j < count; j += LANES) {
          const Floats g = load(grad + j, count - j);
          store(variance + j, saturated(load(variance + j, count - j)) * beta2 + (g * g + eps) * fresh, count - j);
        }
      });
      return;
    }
    for_each_rows([&](int64_t chunk, int64_t, int64_t, int64_t top, int64_t end) {
      std::fill(partial + chunk * n, partial + (chunk + 1) * n, 0.f);
      double total = 0;
      for (int64_t row = top; row < end; ++row) {
        // Row by row: the hardware prefetcher follows sequential reads.
        const Value* grad = static_cast<const Value*>(args.grad) + row * n;
        float* columns = partial + chunk * n;
        Floats squares = {};
        for (int64_t j = 0; j < n; j += LANES) {
          const Floats g = load(grad + j, n - j), square = g * g;
          store(columns + j, load(columns + j, n - j) + square, n - j);
          squares += square;
        }
        row_sums[row] = sum(squares);
        // The new total of the rows, computed from sums, so that one sum over parts is enough.
        total += static_cast<double>(args.row_var[row]) * beta2 + static_cast<double>(row_sums[row]) / n * fresh;
      }
      chunk_sums[chunk] = total;
    });
    for (int64_t matrix = 0; matrix < args.batch; ++matrix) {
      double total = 0;
      for (int64_t part = 0; part < chunks.per_matrix; ++part) total += chunk_sums[matrix * chunks.per_matrix + part];
      row_totals()[matrix] = static_cast<float>(total);
    }
    sum_columns([&](int64_t matrix, int64_t j, float sum) { sums[matrix * n + j] = sum; });
  }

  // Calls take(bucket, sums) for lanes of encode(U) of a row, without the row's factor. ``MOVES`` prefetches the row
  // of W that is updated next, or the one after where a row takes less than the latency of memory.
  template <bool MOVES, class Value, bool SIGNS, class Take>
  __attribute__((always_inline)) void encode(const Row<Value, SIGNS>& row, const float* weight, int64_t first,
                                             int64_t end, Floats (&squares)[AT_ONCE], const Take& take) const {
    constexpr int64_t LONG = 8192 / sizeof(Value);
    const Value* param = param_of<Value>(row.number + (args.columns < LONG));
    const auto columns = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      if (MOVES) __builtin_prefetch(param + j, 1, 3);
      if constexpr (SIGNS)
        return SignedFactor{load(weight + j, count)};
      else
        return FactorAndWeight{row.factors(j, count), load(weight + j, count)};
    };
    encode_row(row.grad, args.columns, args.width, (MOVES ? 1 : ahead) * args.columns, first, end, columns, squares, take);
  }

  // Returns the squares of D = a U + decode(X); with ``STORES``, updates M of the row and leaves X / (a R) in the
  // workspace, since D = a R (G · C + decode(X / (a R))). All values here are divided by R. A block of buckets stays in
  // the L1 cache. Most steps are ``ORDINARY``, and cost nothing for the other cases.
  template <bool STORES, bool ORDINARY, class Value, bool SIGNS>
  double move_on(const Row<Value, SIGNS>& row, const StoredRow& stored, const Workspace& workspace) const {
    const bool encodes_twice = !ORDINARY && row.decoder != row.weight, residual = ORDINARY || args.residual;
    const float beta1 = static_cast<float>(args.beta1), a = ORDINARY ? 1.f : update_weight, over = 1 / row.factor;
    const float* transferred = !ORDINARY && transfers ? transfer_factors + row.matrix * whole_lanes(args.width) : nullptr;
    Floats squares[AT_ONCE] = {}, square = {};
    for (int64_t first = 0; first < args.width; first += BLOCK) {
      const int64_t end = std::min(first + BLOCK, args.width);
      alignas(64) float momentum[BLOCK], seen[BLOCK];
      stored.load_block(first, end - first, momentum);
      if (encodes_twice && !STORES) {
        Floats again[AT_ONCE] = {};
        encode<false>(row, row.decoder, first, end, again,
                      [&](int64_t bucket, Floats sum) { store(seen + bucket - first, sum, LANES); });
      }
      const auto move = [&](int64_t bucket, Floats encoded) __attribute__((always_inline)) {
        const int64_t j = bucket - first;
        const Floats kept = load(momentum + j, LANES) * over;
        const Floats old = transferred ? kept * load(transferred + bucket, LANES) : kept, behind = old - encoded;
        const Floats correction = residual ? beta1 * behind * load(inverse + bucket, LANES) : beta1 * kept;
        const Floats next_momentum = old - fresh * behind;
        if (STORES) {
          store(workspace.correction + bucket, ORDINARY ? correction : correction * (1 / a), LANES);
          store(momentum + j, next_momentum * row.factor, LANES);
        } else if (ORDINARY) {
          square += correction * (encoded + next_momentum);
        } else {
          const Floats decoder_sum = encodes_twice ? load(seen + j, LANES) : encoded;
          square += correction * (2 * a * decoder_sum + correction * load(gram + bucket, LANES));
        }
      };
      encode<STORES>(row, row.weight, first, end, squares, move);
      if (STORES) stored.save_block(first, end - first, momentum);
    }
    for (const Floats& each : squares) square += each * (a * a);
    return over_factor(square, row.factor);
  }

  // A row's sum of squares, times the square of its factor, which may overflow a float by itself.
  static double over_factor(const Floats& squares, double factor) { return sum(squares) * factor * factor; }

  template <class Value>
  void direction_of() const {
    draw();
    const StoredRows rows = stored();
    for_each_rows([&](int64_t chunk, int64_t thread, int64_t matrix, int64_t top, int64_t end) {
      double total = 0;
      const Workspace local = workspace(thread);
      for_each_row<Value>(matrix, top, end, [&](const auto& row) { total += squares(row, rows[row.number], local); });
      chunk_sums[chunk] = total;
    });
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) total += chunk_sums[chunk];
    square() = static_cast<float>(total);
  }

  template <class Value>
  void apply_of() const {
    draw();
    const StoredRows rows = stored();
    const double mean = static_cast<double>(square()) / args.all_elements;
    // Rounding may make a tiny square negative; NaN stays.
    const float ratio = static_cast<float>(std::sqrt(mean < 0 ? 0 : mean) / args.clip_threshold);
    const float size = static_cast<float>(args.size) / (ratio < 1 ? 1 : ratio);
    for_each_rows([&](int64_t, int64_t thread, int64_t matrix, int64_t top, int64_t end) {
      const Workspace local = workspace(thread);
      for_each_row<Value>(matrix, top, end, [&](const auto& row) { move(row, rows[row.number], local, size); });
    });
  }

  // The squares of D.
  template <class Value, bool SIGNS>
  double squares(const Row<Value, SIGNS>& row, const StoredRow& stored, const Workspace& workspace) const {
    if (SIGNS || args.momentum == SKETCH)
      return is_ordinary ? move_on<false, true>(row, stored, workspace) : move_on<false, false>(row, stored, workspace);
    return args.momentum == WHOLE ? walk<true, false>(row, stored, 0) : walk<false, false>(row, stored, 0);
  }

  // Updates M and W of a row.
  template <class Value, bool SIGNS>
  void move(const Row<Value, SIGNS>& row, const StoredRow& stored, const Workspace& workspace, float size) const {
    if (SIGNS || args.momentum == SKETCH) {
      is_ordinary ? move_on<true, true>(row, stored, workspace) : move_on<true, false>(row, stored, workspace);
      descend(row, workspace, size);
    } else if (args.momentum == WHOLE) {
      walk<true, true>(row, stored, size);
    } else {
      walk<false, true>(row, stored, size);
    }
  }

  // Without a projection D is U, or the next whole momentum: returns its squares, or with ``MOVES`` updates W.
  template <bool KEPT, bool MOVES, class Value, bool SIGNS>
  double walk(const Row<Value, SIGNS>& row, const StoredRow& stored, float size) const {
    const int64_t n = args.columns, span = KEPT ? BLOCK : n;
    const Floats kept = Floats{} + keep;
    Value* param = param_of<Value>(row.number);
    Floats square = {};
    for (int64_t first = 0; first < n; first += span) {
      const int64_t count = std::min(span, n - first);
      alignas(64) float momentum[BLOCK];
      if (KEPT) stored.load_block(first, count, momentum);
      for_each_lanes(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
        const int64_t column = first + j;
        Floats direction = load(row.grad + column, some) * row.factors(column, some) * row.factor;
        if (KEPT) {
          const Floats old = load(momentum + j, LANES);
          direction = old - fresh * (old - direction);
          store(momentum + j, direction, LANES);
        }
        if (MOVES) {
          write(param + column, load(param + column, some) * kept - size * direction, row.number, column, some);
        } else {
          square += direction * direction;
        }
      });
      if (MOVES && KEPT) stored.save_block(first, count, momentum);
    }
    return sum(square);
  }

  // W ← keep W − size D, with D = a R (G · C + decode(X / (a R))).
  template <class Value, bool SIGNS>
  void descend(const Row<Value, SIGNS>& row, const Workspace& workspace, float size) const {
    constexpr int64_t AHEAD = 6144 / sizeof(Value);
    const int64_t n = args.columns, k = args.width;
    const Floats kept = Floats{} + keep, sizes = Floats{} + row.factor * size * update_weight;
    Value* param = param_of<Value>(row.number);
    for (int64_t column = 0; column < n; column += k) {
      const auto move = [&](int64_t i, int64_t some) __attribute__((always_inline)) {
        const int64_t j = column + i;
        const Floats g = load(row.grad + j, some), share = load(workspace.correction + i, LANES);
        const Floats decoder = load(row.decoder + j, some);
        Floats direction;
        // Factors that include signs apply them to g but not to the correction: the sum is multiplied by signs.
        if constexpr (SIGNS)
          direction = with_signs(g * decoder + share, decoder);
        else
          direction = g * row.factors(j, some) + decoder * share;
        __builtin_prefetch(param + j + AHEAD, 1, 2);
        write(param + j, load(param + j, some) * kept - direction * sizes, row.number, j, some);
      };
      for_each_lanes(std::min(k, n - column), move);
    }
  }

  template <class Value>
  Value* param_of(int64_t row) const {
    return static_cast<Value*>(args.param) + row * args.columns;
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
    for (int64_t column = 0; column < args.columns; column += args.width) {
      const int64_t count = std::min(args.width, args.columns - column);
      for (int64_t i = 0; i < count; i += LANES) work(column, i, count - i);
    }
  }

  template <class Value>
  void power_iteration_of(const float* learner, float* product) const {
    const int64_t n = args.columns;
    const StoredRows rows = stored();
    const float beta1 = static_cast<float>(args.beta1);
    for_each_rows([&](int64_t chunk, int64_t thread, int64_t matrix, int64_t top, int64_t end) {
      float* columns = partial + chunk * n;
      const float* old = previous_of(matrix);
      const float* weight = learner + matrix * n;
      std::fill(columns, columns + n, 0.f);
      for (int64_t number = top; number < end; ++number) {
        const Row<Value, false> row = row_of<Value, false>(number, matrix);
        const float factor = fresh * row.factor;
        const Workspace local = workspace(thread);
        const StoredRow kept = rows[number];
        for (int64_t first = 0; first < args.width; first += BLOCK)
          kept.load_block(first, std::min(BLOCK, args.width - first), local.correction + first);
        const auto blended = [&](int64_t column, int64_t i, int64_t some) {
          return load(row.grad + column + i, some) * row.factors(column + i, some) * factor +
                 load(old + column + i, some) * (load(local.correction + i, LANES) * beta1);
        };
        std::fill(local.sketch, local.sketch + whole_lanes(args.width), 0.f);
        for_each_slice([&](int64_t column, int64_t i, int64_t some) {
          const Floats sum = load(local.sketch + i, LANES) + blended(column, i, some) * load(weight + column + i, some);
          store(local.sketch + i, sum, LANES);
        });
        for_each_slice([&](int64_t column, int64_t i, int64_t some) {
          const Floats product_here = blended(column, i, some) * load(local.sketch + i, LANES);
          store(columns + column + i, load(columns + column + i, some) + product_here, some);
        });
      }
    });
    sum_columns([&](int64_t matrix, int64_t j, float sum) { product[matrix * n + j] = sum; });
  }
};

}  // namespace floragrad
