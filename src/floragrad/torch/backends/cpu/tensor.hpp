// State of one tensor's step: arguments, scratch, random words and signs, and iteration over its rows.
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

// update.BALANCE and update.LARGEST_MEAN.
constexpr float BALANCE = 0x1p36f;
constexpr double LARGEST_MEAN = 0x1p96;

enum Momentum : int64_t { NONE = 0, WHOLE = 1, SKETCH = 2 };

// Mirrored by library.Step: every field takes eight bytes.
struct Step {
  int64_t batch, rows, columns, width;
  int64_t value_dtype, state_dtype, momentum;
  int64_t is_vector;  // no matrix view: one row of all elements, with a random word for each
  int64_t factored, adaptive;  // second moment; projection, whose signs are drawn if it is not adaptive
  int64_t stochastic, residual, is_resample_step;
  // Of the whole tensor, of which this may be a shard of rows: rows of a matrix, elements, words of rows; the word of the
  // first local row, and the stride in words of local matrices.
  int64_t all_rows, all_elements, all_row_words, first_row_word, matrix_row_words;
  uint64_t seed, tensor_id, step, resample_index;
  double beta1, beta2, eps, keep, size, clip_threshold;
  const void* grad;
  void* param;
  void* data;
  float* scale;
  float *row_var, *col_var, *variance;
  const float *weight, *previous;
  // Kept between the passes; first the local shares of sums over all parts of the tensor, which the caller adds up:
  // column sums of G² (batch, columns), row totals (batch), ‖D‖²; then values derived from them.
  float* kept;
  void* scratch;
  Parallel parallel;
  int (*thread_number)();
  int64_t threads;
};

class StepTensor {
 public:
  explicit StepTensor(const Step& given)
      : args(given),
        transfers(given.is_resample_step && given.momentum == SKETCH),
        is_ordinary(given.residual && !transfers),
        update_weight(given.residual || given.momentum != SKETCH ? 1.f : static_cast<float>(1 - given.beta1)),
        fresh(static_cast<float>(1 - given.beta1)),
        keep(static_cast<float>(given.keep)),
        ahead(rows_ahead(given.columns)),
        chunks(given.batch, given.rows),
        threads(threads_for(given)),
        scratch(given.scratch),
        kept(given.kept) {
    lay_out();
  }

  int64_t scratch_bytes() const { return scratch.size(); }
  int64_t kept_bytes() const { return kept.size(); }

 protected:
  const Step& args;
  const bool transfers;       // M to another projection
  const bool is_ordinary;     // no transfer, and M is decoded by the projection that encodes it
  const float update_weight;  // a of D = a U + decode(correction)
  const float fresh;          // 1 − β₁, rounded once
  const float keep;           // factor of W from weight decay
  const int64_t ahead;        // rows from the current one to the prefetched one
  const Chunks chunks;
  const Threads threads;
  Scratch scratch, kept;
  float *sums, *row_sums, *row_roots, *col_scales;  // kept
  double* chunk_sums;
  float *col_factors, *decoder_factors, *partial, *signs, *old_signs, *gram, *inverse, *transfer_factors, *workspaces;
  uint32_t *state_words, *value_words;

  int64_t row_words() const { return args.is_vector ? args.columns : args.batch * args.rows; }
  bool rounds_state() const { return args.momentum != NONE && args.state_dtype != FLOAT32; }
  bool has_signed_factors() const { return args.factored && args.momentum == SKETCH && !args.adaptive; }
  bool rounds_values() const { return args.value_dtype == BFLOAT16 && args.stochastic; }

  void lay_out() {
    const int64_t n = args.columns, k = args.width;
    const bool sketched = args.momentum == SKETCH, drawn = sketched && !args.adaptive;
    const bool has_other_decoder = has_signed_factors() && args.is_resample_step && !args.residual;
    sums = kept.take<float>((args.factored ? args.batch * (n + 1) : 0) + 1);
    row_sums = kept.take<float>(args.factored ? args.batch * args.rows : 0);
    row_roots = kept.take<float>(args.factored ? args.batch : 0);
    col_scales = kept.take<float>(args.factored ? args.batch * n : 0);
    chunk_sums = scratch.take<double>(chunks.count);
    col_factors = has_signed_factors() ? scratch.take<float>(args.batch * n) : col_scales;
    decoder_factors = has_other_decoder ? scratch.take<float>(args.batch * n) : col_factors;
    partial = scratch.take<float>(args.factored || args.adaptive ? chunks.count * n : 0);
    signs = scratch.take<float>(drawn ? n : 0);
    old_signs = scratch.take<float>(drawn && transfers ? n : 0);
    gram = scratch.take<float>(sketched ? whole_lanes(k) : 0);
    inverse = scratch.take<float>(sketched ? whole_lanes(k) : 0);
    transfer_factors = scratch.take<float>(transfers ? args.batch * whole_lanes(k) : 0);
    workspaces = scratch.take<float>(sketched ? threads.count * 2 * whole_lanes(k) : 0);
    state_words = scratch.take<uint32_t>(rounds_state() ? row_words() + whole_lanes(k) : 0);
    value_words = scratch.take<uint32_t>(rounds_values() ? row_words() + (args.is_vector ? 1 : n) : 0);
  }

  float* row_totals() const { return sums + args.batch * args.columns; }
  float& square() const { return sums[args.factored ? args.batch * (args.columns + 1) : 0]; }

  Philox philox(uint64_t counter, Stream stream) const { return {{args.seed, args.tensor_id}, counter, stream}; }

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
    const int64_t n = args.columns, spans = (n + SPAN - 1) / SPAN;
    for_each_chunk(threads, args.batch * spans, [&](int64_t item, int64_t) {
      const int64_t matrix = item / spans, first = item % spans * SPAN, end = std::min(first + SPAN, n);
      float sums[SPAN] = {};
      for (int64_t part = 0; part < chunks.per_matrix; ++part) {
        const float* from = partial + (matrix * chunks.per_matrix + part) * n;
        for (int64_t j = first; j < end; ++j) sums[j - first] += from[j];
      }
      for (int64_t j = first; j < end; ++j) take(matrix, j, sums[j - first]);
    });
  }

  const float* weight_of(int64_t matrix) const { return args.adaptive ? args.weight + matrix * args.columns : signs; }
  const float* previous_of(int64_t matrix) const {
    return args.adaptive ? args.previous + matrix * args.columns : old_signs;
  }
  // Decoder of D: the paper's estimator decodes M with the projection that encoded it.
  const float* decoder_of(int64_t matrix) const {
    return args.is_resample_step && !args.residual ? previous_of(matrix) : weight_of(matrix);
  }

  // Draws the words of the local rows, then those of the columns.
  void draw_words(Stream stream, int64_t columns, uint32_t* out) const {
    const Philox source = philox(args.step, stream);
    const int64_t matrices = args.is_vector ? 1 : args.batch, rows = args.is_vector ? args.columns : args.rows;
    for (int64_t matrix = 0; matrix < matrices; ++matrix)
      source.words(out + matrix * rows, rows, args.first_row_word + matrix * args.matrix_row_words);
    source.words(out + row_words(), columns, args.all_row_words);
  }

  void draw() const {
    const int64_t n = args.columns, k = args.width;
    if (rounds_state()) draw_words(STATE_ROUNDING, k, state_words);
    if (rounds_values()) draw_words(PARAMETER_ROUNDING, args.is_vector ? 1 : n, value_words);
    if (args.momentum != SKETCH) return;
    const int64_t slices = n / k, rest = n % k;
    for (int64_t j = 0; j < whole_lanes(k); ++j) {
      gram[j] = args.adaptive || j >= k ? 1.f : static_cast<float>(slices + (j < rest));
      inverse[j] = 1 / gram[j];
    }
    if (!args.adaptive) {
      philox(args.resample_index, MOMENTUM).signs(signs, n);
      if (args.is_resample_step) philox(args.resample_index - 1, MOMENTUM).signs(old_signs, n);
    }
    if (has_signed_factors()) {
      for (int64_t matrix = 0; matrix < args.batch; ++matrix) {
        const float* scales = col_scales + matrix * n;
        float *factors = col_factors + matrix * n, *decoder = decoder_factors + matrix * n;
        for (int64_t j = 0; j < n && decoder != factors; ++j) decoder[j] = scales[j] * decoder_of(matrix)[j];
        for (int64_t j = 0; j < n; ++j) factors[j] = scales[j] * signs[j];
      }
    }
    if (!transfers) return;
    // Old and new projection have the same buckets: a transfer of M is one factor for each.
    for (int64_t matrix = 0; matrix < args.batch; ++matrix) {
      float* factors = transfer_factors + matrix * whole_lanes(k);
      std::fill(factors, factors + whole_lanes(k), 0.f);
      for (int64_t j = 0; j < n; ++j) factors[j % k] += weight_of(matrix)[j] * previous_of(matrix)[j];
      if (args.residual)
        for (int64_t j = 0; j < k; ++j) factors[j] *= inverse[j];
    }
  }

  Words words_in(const uint32_t* drawn) const {
    const uint32_t* columns = drawn + row_words();
    return args.is_vector ? Words{columns, drawn} : Words{drawn, columns};
  }

  StoredRows stored() const {
    return {args.data, args.scale, args.width, args.state_dtype, rounds_state() ? words_in(state_words) : Words{}, ahead};
  }

  // ``SIGNS``: the columns' factors include their signs, and stand in place of weights.
  template <class Value, bool SIGNS>
  struct Row {
    int64_t number, matrix;
    float factor;
    const Value* grad;
    const float *col_factors, *variance;  // one of them
    const float *weight, *decoder;

    // Factors from G to U without the row's factor.
    Floats factors(int64_t column, int64_t count) const {
      if (col_factors) return load(col_factors + column, count);
      Floats factors = inverse_root(load(variance + column, count));
      for (int64_t i = count; i < LANES; ++i) factors[i] = 0;
      return factors;
    }
  };

  template <class Value, bool SIGNS>
  Row<Value, SIGNS> row_of(int64_t number, int64_t matrix) const {
    const int64_t n = args.columns;
    return {number,
            matrix,
            args.factored ? row_roots[matrix] / std::sqrt(args.row_var[number]) : 1.f,
            static_cast<const Value*>(args.grad) + number * n,
            args.factored ? col_factors + matrix * n : nullptr,
            args.factored ? nullptr : args.variance + number * n,
            SIGNS ? col_factors + matrix * n : weight_of(matrix),
            SIGNS ? decoder_factors + matrix * n : decoder_of(matrix)};
  }

  // Calls work(row) for some rows of a matrix.
  template <class Value, class Work>
  void for_each_row(int64_t matrix, int64_t top, int64_t end, const Work& work) const {
    const bool is_signed = has_signed_factors();
    for (int64_t number = top; number < end; ++number) {
      if (is_signed)
        work(row_of<Value, true>(number, matrix));
      else
        work(row_of<Value, false>(number, matrix));
    }
  }

  // Workspace of one thread for the buckets of a row, in whole lanes.
  struct Workspace {
    float *sketch, *correction;
  };

  Workspace workspace(int64_t thread) const {
    const int64_t elements = whole_lanes(args.width);
    float* first = workspaces + thread * 2 * elements;
    return {first, first + elements};
  }
};

}  // namespace floragrad
