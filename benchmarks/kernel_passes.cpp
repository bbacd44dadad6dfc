// Nanoseconds for each number that the native kernels take in a step, without Python and torch, on one thread.
//
//     folder=$(mktemp -d)
//     flags="-std=c++17 -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math"
//     g++ $flags -march=x86-64-v4 -mprefer-vector-width=512 benchmarks/kernel_passes.cpp -o $folder/kernel_passes
//     $folder/kernel_passes 3072 768 128 8 float32
//
// Rows, columns, k (0: no momentum), how many such tensors take turns (1: they stay in a cache), and the storage. Least
// of 12 rounds: for comparing two builds of the kernels, in turns, on one machine; no time is a claim.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../src/floragrad/torch/backends/cpu/native.cpp"

namespace {

struct Tensor {
  float *grad, *param, *momentum, *scale, *row_var, *col_var;
};

template <class Item>
Item* room(int64_t count) {
  const int64_t bytes = (count * sizeof(Item) + 4096) / 64 * 64;
  return static_cast<Item*>(std::memset(std::aligned_alloc(64, bytes), 0, bytes));
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

int main(int count, char** given) {
  if (count != 6) return std::puts("give rows, columns, k, tensors and float32, bfloat16, int8 or int4"), 2;
  const int64_t rows = std::atol(given[1]), columns = std::atol(given[2]), width = std::atol(given[3]);
  const std::vector<std::string> dtypes{"float32", "bfloat16", "int8", "int4"};
  const int64_t dtype = std::find(dtypes.begin(), dtypes.end(), given[5]) - dtypes.begin();
  std::vector<Tensor> tensors(std::atol(given[4]));
  for (Tensor& each : tensors) {
    each = {room<float>(rows * columns), room<float>(rows * columns), room<float>(rows * width),
            room<float>(rows * width),   room<float>(rows),           room<float>(columns)};
    for (int64_t i = 0; i < rows * columns; ++i) each.grad[i] = (std::rand() % 2001 - 1000) * 1e-6f;
  }
  double least[3] = {1e9, 1e9, 1e9};
  for (int round = 1; round <= 12; ++round) {
    double taken[3] = {0, 0, 0};
    for (Tensor& each : tensors) {
      Step step{};
      step.batch = 1, step.rows = step.all_rows = step.all_row_words = step.matrix_row_words = rows;
      step.columns = columns, step.width = width, step.all_elements = rows * columns;
      step.state_dtype = dtype, step.momentum = width ? floragrad::SKETCH : floragrad::NONE;
      step.factored = step.residual = step.stochastic = step.threads = 1, step.step = round;
      step.beta1 = 0.9, step.beta2 = 0.5, step.eps = 1e-30, step.keep = 1, step.size = 1e-4, step.clip_threshold = 1;
      step.grad = each.grad, step.param = each.param, step.data = each.momentum, step.scale = each.scale;
      step.row_var = each.row_var, step.col_var = each.col_var;
      step.kept = room<float>(floragrad_kept_bytes(&step) / sizeof(float));
      step.scratch = room<char>(floragrad_scratch_bytes(&step));
      const double start = now();
      floragrad_statistics(&step, 1);
      floragrad_normalise(&step, 1);
      const double measured = now();
      floragrad_direction(&step, 1);
      const double directed = now();
      floragrad_apply(&step, 1);
      taken[0] += measured - start, taken[1] += directed - measured, taken[2] += now() - directed;
      std::free(step.kept);
      std::free(step.scratch);
    }
    for (int pass = 0; pass < 3; ++pass) least[pass] = std::min(least[pass], taken[pass]);
  }
  const double each = 1e9 / static_cast<double>(rows * columns) / static_cast<double>(tensors.size());
  std::printf("statistics %.3f, direction %.3f, apply %.3f\n", least[0] * each, least[1] * each, least[2] * each);
}
