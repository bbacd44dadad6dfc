// C ← C + w·encode(G): the fold of a gradient into the sketch of one tensor, as in GradientSketch.add.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buckets.hpp"
#include "lanes.hpp"
#include "random.hpp"
#include "rows.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace floragrad {

// Mirrored by library.Fold: every field takes eight bytes.
struct Fold {
  int64_t batch, rows, columns, width;
  int64_t value_dtype, state_dtype;
  int64_t is_first, measures;
  int64_t all_row_words, first_row_word, matrix_row_words;  // as in Step
  uint64_t seed, tensor_id, window, counter;
  double weight;
  const void* grad;
  void* data;
  float* scale;
  const float* column_sizes;  // (batch, columns): divisors of columns, or null
  double* noise;              // receives the squared rounding error, if measured
  void* scratch;
  Parallel parallel;
  int (*thread_number)();
  int64_t threads;
};

class TensorFold {
 public:
  explicit TensorFold(const Fold& given)
      : args(given),
        chunks(given.batch, given.rows),
        threads(threads_for(given)),
        scratch(given.scratch) {
    const int64_t rows = args.batch * args.rows;
    errors = scratch.take<double>(chunks.count);
    signs = scratch.take<float>(projects() ? args.columns : 0);
    sketches = scratch.take<float>(projects() ? threads.count * whole_lanes(args.width) : 0);
    words = scratch.take<uint32_t>(args.state_dtype == FLOAT32 ? 0 : rows + whole_lanes(args.width));
  }

  int64_t scratch_bytes() const { return scratch.size(); }

  void add() const { args.value_dtype == FLOAT32 ? add_of<float>() : add_of<uint16_t>(); }

 private:
  const Fold& args;
  const Chunks chunks;
  const Threads threads;
  Scratch scratch;
  double* errors;
  float *signs, *sketches;
  uint32_t* words;

  bool projects() const { return args.width < args.columns; }

  Philox philox(uint64_t counter, Stream stream) const { return {{args.seed, args.tensor_id}, counter, stream}; }

  template <class Value>
  void add_of() const {
    const int64_t rows = args.batch * args.rows, n = args.columns;
    if (projects()) philox(args.window, ACCUMULATOR).signs(signs, n);
    if (args.state_dtype != FLOAT32) {
      const Philox source = philox(args.counter, ACCUMULATOR_ROUNDING);
      for (int64_t matrix = 0; matrix < args.batch; ++matrix)
        source.words(words + matrix * args.rows, args.rows, args.first_row_word + matrix * args.matrix_row_words);
      source.words(words + rows, args.width, args.all_row_words);
    }
    const Words drawn = args.state_dtype == FLOAT32 ? Words{} : Words{words, words + rows};
    const StoredRows stored{args.data, args.scale, args.width, args.state_dtype, drawn, rows_ahead(n)};
    for_each_chunk(threads, chunks.count, [&](int64_t chunk, int64_t thread) {
      float* sketch = sketches + thread * whole_lanes(args.width);
      const float* sizes = args.column_sizes ? args.column_sizes + chunks.matrix(chunk) * n : nullptr;
      double error = 0;
      for (int64_t row = chunks.top(chunk); row < chunks.end(chunk); ++row) {
        if (projects()) {
          encode<Value>(row, sketch);
          error += keep(stored[row], sketch, nullptr);
        } else {
          error += keep(stored[row], static_cast<const Value*>(args.grad) + row * n, sizes);
        }
      }
      errors[chunk] = error;
    });
    if (!args.measures) return;
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) total += errors[chunk];
    *args.noise = total;
  }

  template <class Value>
  void encode(int64_t row, float* sketch) const {
    Floats squares[AT_ONCE] = {};
    const auto columns = [&](int64_t j, int64_t count) { return SignedFactor{load(signs + j, count)}; };
    const Value* grad = static_cast<const Value*>(args.grad) + row * args.columns;
    const auto take = [&](int64_t bucket, Floats sum) { store(sketch + bucket, sum, LANES); };
    encode_row(grad, args.columns, args.width, args.columns, 0, args.width, columns, squares, take);
  }

  // Adds a row, divided by the columns' sizes if given; returns the squared error of its rounding.
  template <class Value>
  float keep(const StoredRow& stored, const Value* fresh, const float* sizes) const {
    const float weight = static_cast<float>(args.weight);
    Floats square = {};
    for (int64_t first = 0; first < args.width; first += BLOCK) {
      const int64_t count = std::min(BLOCK, args.width - first);
      alignas(64) float total[BLOCK], kept[BLOCK];
      if (!args.is_first) stored.load_block(first, count, total);
      for (int64_t j = 0; j < count; j += LANES) {
        const int64_t some = count - j;
        Floats added = load(fresh + first + j, some);
        if (sizes) added /= load_or_one(sizes + first + j, some);
        store(total + j, args.is_first ? added * weight : load(total + j, LANES) + added * weight, LANES);
      }
      stored.save_block(first, count, total);
      if (!args.measures) continue;
      stored.load_block(first, count, kept);
      for (int64_t j = 0; j < count; j += LANES) {
        Floats error = load(kept + j, LANES) - load(total + j, LANES);
        if (sizes) error *= load(sizes + first + j, count - j);
        square += error * error;
      }
    }
    return sum(square);
  }

  static Floats load_or_one(const float* from, int64_t count) {
    Floats loaded = load(from, count);
    for (int64_t i = count; i < LANES; ++i) loaded[i] = 1;
    return loaded;
  }
};

}  // namespace floragrad
