// One step of one tensor, all of it here and contiguous: update.py's formulas in three passes over rows.
//
// Statistics; the norm of the update; the update. The last two compute the same numbers from a row of the gradient
// and a row of the sketch, 64 buckets at a time, so that nothing of them is held in between.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "buckets.hpp"
#include "lanes.hpp"
#include "random.hpp"
#include "rows.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace floragrad {

enum Momentum : int64_t { NONE = 0, WHOLE = 1, SKETCH = 2 };

// Mirrored by library.Step: every field takes eight bytes.
struct Step {
  int64_t batch, rows, columns, width;
  int64_t value_dtype, state_dtype, momentum;
  int64_t is_vector;  // no matrix view: one row of all numbers, its own random word for each
  int64_t factored, learnt;  // the second moment; the projection, whose signs are drawn if not
  int64_t stochastic, residual, opens_epoch;
  uint64_t seed, index, step, epoch;
  double beta1, beta2, eps, keep, size, clip_threshold;
  const void* grad;
  void* param;
  void* data;
  float* scale;
  float *row_var, *col_var, *variance;
  const float *weight, *previous;
  void* scratch;
  Parallel parallel;
  int (*thread_number)();
  int64_t threads;
};

class TensorStep {
 public:
  explicit TensorStep(const Step& given)
      : at(given),
        carries(given.opens_epoch && given.momentum == SKETCH),
        own(given.residual || given.momentum != SKETCH ? 1.f : 1 - static_cast<float>(given.beta1)),
        keep(static_cast<float>(given.keep)),
        together(given.factored && given.rows >= 4 ? 4 : 1),
        chunks(given.batch, given.rows),
        threads(given.parallel, given.thread_number,
                given.batch * given.rows * given.columns < SMALL ? 1 : given.threads),
        scratch(given.scratch) {
    lay_out();
  }

  int64_t scratch_bytes() const { return scratch.size(); }

  void statistics() const { at.value_dtype == FLOAT32 ? statistics_of<float>() : statistics_of<uint16_t>(); }

  void update() const { at.value_dtype == FLOAT32 ? update_of<float>() : update_of<uint16_t>(); }

  // grown = Vᵀ(V w) in every bucket, V = β₁ decode(M) + (1 − β₁) U, w the learner: one power iteration.
  void grow(const float* learner, float* grown) const {
    at.value_dtype == FLOAT32 ? grow_of<float>(learner, grown) : grow_of<uint16_t>(learner, grown);
  }

 private:
  const Step& at;
  const bool carries;      // M to another projection
  const float own;         // a of D = a U + decode(exchange)
  const float keep;        // of W, after its decay
  const int64_t together;  // rows in a group
  const Chunks chunks;
  const Threads threads;
  Scratch scratch;
  double *row_means, *chunk_sums;
  float *col_factors, *partial, *signs, *old_signs, *gram, *inverse, *carry, *rooms;
  uint32_t *state_words, *value_words;

  int64_t row_words() const { return at.is_vector ? at.columns : at.batch * at.rows; }
  bool rounds_state() const { return at.momentum != NONE && at.state_dtype != FLOAT32; }
  bool rounds_values() const { return at.value_dtype == BFLOAT16 && at.stochastic; }

  void lay_out() {
    const int64_t n = at.columns, k = at.width;
    const bool sketched = at.momentum == SKETCH, drawn = sketched && !at.learnt;
    row_means = scratch.take<double>(at.batch);
    chunk_sums = scratch.take<double>(chunks.count);
    col_factors = scratch.take<float>(at.factored ? at.batch * n : 0);
    partial = scratch.take<float>(at.factored || at.learnt ? chunks.count * n : 0);
    signs = scratch.take<float>(drawn ? n : 0);
    old_signs = scratch.take<float>(drawn && carries ? n : 0);
    gram = scratch.take<float>(sketched ? k : 0);
    inverse = scratch.take<float>(sketched ? k : 0);
    carry = scratch.take<float>(carries ? at.batch * k : 0);
    rooms = scratch.take<float>(sketched ? threads.count * 3 * together * whole_lanes(k) : 0);
    state_words = scratch.take<uint32_t>(rounds_state() ? row_words() + k : 0);
    value_words = scratch.take<uint32_t>(rounds_values() ? row_words() + (at.is_vector ? 1 : n) : 0);
  }

  Philox philox(uint64_t counter, Stream stream) const { return {{at.seed, at.index}, counter, stream}; }

  // Calls work(chunk, thread, matrix, first row, end) with rows counted through the whole stack.
  template <class Work>
  void for_each_rows(const Work& work) const {
    for_each_chunk(threads, chunks.count, [&](int64_t chunk, int64_t thread) {
      work(chunk, thread, chunks.matrix(chunk), chunks.top(chunk), chunks.end(chunk));
    });
  }

  // The sum over chunks of every column's partial sum, given to take(matrix, column, sum).
  template <class Take>
  void sum_columns(const Take& take) const {
    constexpr int64_t SPAN = 512;
    const int64_t n = at.columns, spans = (n + SPAN - 1) / SPAN;
    for_each_chunk(threads, at.batch * spans, [&](int64_t item, int64_t) {
      const int64_t matrix = item / spans, first = item % spans * SPAN, end = std::min(first + SPAN, n);
      float sums[SPAN] = {};
      for (int64_t part = 0; part < chunks.per_matrix; ++part) {
        const float* from = partial + (matrix * chunks.per_matrix + part) * n;
        for (int64_t j = first; j < end; ++j) sums[j - first] += from[j];
      }
      for (int64_t j = first; j < end; ++j) take(matrix, j, sums[j - first]);
    });
  }

  template <class Value>
  void statistics_of() const {
    const int64_t n = at.columns;
    const float beta2 = static_cast<float>(at.beta2), fresh = 1 - beta2, eps = static_cast<float>(at.eps);
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

  const float* weight_of(int64_t matrix) const { return at.learnt ? at.weight + matrix * at.columns : signs; }
  const float* previous_of(int64_t matrix) const { return at.learnt ? at.previous + matrix * at.columns : old_signs; }
  // What D is decoded with: the paper's estimator reads M in the basis that it was written in.
  const float* reading_of(int64_t matrix) const {
    return at.opens_epoch && !at.residual ? previous_of(matrix) : weight_of(matrix);
  }
  void draw() const {
    const int64_t n = at.columns, k = at.width;
    if (rounds_state()) philox(at.step, STATE_ROUNDING).words(state_words, row_words() + k);
    if (rounds_values()) philox(at.step, PARAMETER_ROUNDING).words(value_words, row_words() + (at.is_vector ? 1 : n));
    if (at.momentum != SKETCH) return;
    for (int64_t j = 0; j < k; ++j) {
      gram[j] = at.learnt ? 1.f : static_cast<float>(n / k + (j < n % k));
      inverse[j] = 1 / gram[j];
    }
    if (!at.learnt) {
      philox(at.epoch, MOMENTUM).signs(signs, n);
      if (at.opens_epoch) philox(at.epoch - 1, MOMENTUM).signs(old_signs, n);
    }
    if (!carries) return;
    // Old and new projection deal the columns into the same buckets: one factor for each carries M over.
    for (int64_t matrix = 0; matrix < at.batch; ++matrix) {
      float* factors = carry + matrix * k;
      std::fill(factors, factors + k, 0.f);
      for (int64_t j = 0; j < n; ++j) factors[j % k] += weight_of(matrix)[j] * previous_of(matrix)[j];
      if (at.residual)
        for (int64_t j = 0; j < k; ++j) factors[j] *= inverse[j];
    }
  }

  Words words_in(const uint32_t* drawn) const {
    const uint32_t* rest = drawn + row_words();
    return at.is_vector ? Words{rest, drawn} : Words{drawn, rest};
  }

  Stored stored() const {
    return {at.data, at.scale, at.width, at.state_dtype, rounds_state() ? words_in(state_words) : Words{}};
  }

  // Neighbouring rows that are worked on together, so that what belongs to columns is fetched once for all.
  template <class Value, int ROWS>
  struct Group {
    const Value* grad;
    const float *col_factors, *variance;  // one of them
    const float *weight, *reading;
    float row_factors[ROWS];
    int64_t matrix, first;

    // What the columns of all rows are multiplied by for U; where each number has a second moment, a group is a row.
    Floats factors(int64_t column, int64_t count) const {
      if (col_factors) return load(col_factors + column, count);
      Floats factors = inverse_root(load(variance + column, count));
      for (int64_t i = count; i < LANES; ++i) factors[i] = 0;
      return factors;
    }
  };

  template <class Value, int ROWS>
  Group<Value, ROWS> group_of(int64_t matrix, int64_t first) const {
    const int64_t n = at.columns;
    Group<Value, ROWS> group{static_cast<const Value*>(at.grad) + first * n,
                             at.factored ? col_factors + matrix * n : nullptr,
                             at.factored ? nullptr : at.variance + first * n,
                             weight_of(matrix),
                             reading_of(matrix),
                             {1},
                             matrix,
                             first};
    for (int r = 0; at.factored && r < ROWS; ++r)
      group.row_factors[r] = 1 / std::sqrt(at.row_var[first + r] / static_cast<float>(row_means[matrix]));
    return group;
  }

  // Calls work(group) for the groups of some rows of a matrix.
  template <class Value, class Work>
  void for_each_group(int64_t matrix, int64_t top, int64_t end, const Work& work) const {
    int64_t row = top;
    for (; together == 4 && row + 4 <= end; row += 4) work(group_of<Value, 4>(matrix, row));
    for (; row < end; ++row) work(group_of<Value, 1>(matrix, row));
  }

  // Room of one thread for the buckets of a group's rows, each in whole lanes.
  struct Room {
    float *sketch, *read, *exchange;
    int64_t stride;
  };

  Room room(int64_t thread) const {
    const int64_t stride = whole_lanes(at.width);
    float* first = rooms + thread * 3 * together * stride;
    return {first, first + together * stride, first + 2 * together * stride, stride};
  }

  // encode(U) of each row, without the row's factor; the sum of the squares of U, with it.
  template <class Value, int ROWS>
  Floats encode(const Group<Value, ROWS>& group, const float* weight, float* sketch) const {
    Floats squares[ROWS] = {}, square = {};
    encode_rows<ROWS>(
        group.grad, at.columns, at.width, weight, [&](int64_t j, int64_t count) { return group.factors(j, count); },
        sketch, squares);
    for (int r = 0; r < ROWS; ++r) square += squares[r] * (group.row_factors[r] * group.row_factors[r]);
    return square;
  }

  // M of the rows on to the next step, stored if it is to be; leaves what is decoded of it in the room, ``size`` times.
  // Returns the squares of D = a U + decode(exchange).
  template <bool STORES, class Value, int ROWS>
  Floats move_on(const Group<Value, ROWS>& group, const Stored& rows, const Room& room, float size) const {
    Floats square = encode(group, group.weight, room.sketch) * (own * own);
    const bool reads_again = group.reading != group.weight;
    if (reads_again) encode(group, group.reading, room.read);
    const float beta1 = static_cast<float>(at.beta1), twice_own = 2 * own;
    const float* factors = carries ? carry + group.matrix * at.width : nullptr;
    const bool residual = at.residual;
    for (int r = 0; r < ROWS; ++r) {
      const float factor = group.row_factors[r];
      const float *sketch = room.sketch + r * room.stride, *read = room.read + r * room.stride;
      float* exchanges = room.exchange + r * room.stride;
      for (int64_t first = 0; first < at.width; first += BLOCK) {
        const int64_t count = std::min(BLOCK, at.width - first);
        alignas(64) float momentum[BLOCK];
        rows.load_block(group.first + r, first, count, momentum);
        for (int64_t j = 0; j < count; j += LANES) {
          const int64_t some = count - j, bucket = first + j;
          const Floats encoded = load(sketch + bucket, LANES) * factor, kept = load(momentum + j, LANES);
          const Floats change = beta1 * ((factors ? kept * load(factors + bucket, some) : kept) - encoded);
          const Floats exchange = residual ? change * load(inverse + bucket, some) : beta1 * kept;
          const Floats seen = reads_again ? load(read + bucket, LANES) * factor : encoded;
          square += exchange * (twice_own * seen + exchange * load(gram + bucket, some));
          store(exchanges + bucket, exchange * size, LANES);
          store(momentum + j, encoded + change, LANES);
        }
        if (STORES) rows.save_block(group.first + r, first, count, momentum);
      }
    }
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
  template <class Value, int ROWS>
  Floats squares(const Group<Value, ROWS>& group, const Stored& rows, const Room& room) const {
    if (at.momentum == SKETCH) return move_on<false>(group, rows, room, 1);
    return at.momentum == WHOLE ? walk<true, false>(group, rows, 0) : walk<false, false>(group, rows, 0);
  }

  // M on to the next step, and W by D.
  template <class Value, int ROWS>
  void move(const Group<Value, ROWS>& group, const Stored& rows, const Room& room, float size) const {
    if (at.momentum == SKETCH) {
      move_on<true>(group, rows, room, size);
      descend(group, room, size);
    } else if (at.momentum == WHOLE) {
      walk<true, true>(group, rows, size);
    } else {
      walk<false, true>(group, rows, size);
    }
  }

  // Without a projection D is U, or the next value of the whole momentum: its squares, or, moving, W by it.
  template <bool KEPT, bool MOVES, class Value, int ROWS>
  Floats walk(const Group<Value, ROWS>& group, const Stored& rows, float size) const {
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

  // W ← keep W − size (a U + decode(exchange)); the exchange in the room has been multiplied by size.
  template <class Value, int ROWS>
  void descend(const Group<Value, ROWS>& group, const Room& room, float size) const {
    const int64_t n = at.columns, k = at.width;
    const Value* grad = group.grad;
    const Floats kept = Floats{} + keep;
    Value* param = param_of<Value>(group.first);
    float sizes[ROWS];
    for (int r = 0; r < ROWS; ++r) sizes[r] = group.row_factors[r] * size * own;
    for (int64_t column = 0; column < n; column += k) {
      const int64_t count = std::min(k, n - column);
      for (int64_t i = 0; i < count; i += LANES) {
        const int64_t j = column + i, some = count - i;
        const Floats factors = group.factors(j, some), reading = load(group.reading + j, some);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Floats change = load(grad + r * n + j, some) * factors * sizes[r] +
                                reading * load(room.exchange + r * room.stride + i, LANES);
          Value* to = param + r * n + j;
          __builtin_prefetch(to + ROWS * n, 1, 2);
          write(to, load(to, some) * kept - change, group.first + r, j, some);
        }
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
        const Group<Value, 1> row = group_of<Value, 1>(matrix, number);
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
