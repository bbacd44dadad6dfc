// Allocation from a buffer of the caller, and the division of rows among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace floragrad {

class Scratch {
 public:
  explicit Scratch(void* given) : first(reinterpret_cast<uintptr_t>(given)) {}

  template <class Item>
  Item* take(int64_t count) {
    Item* taken = reinterpret_cast<Item*>(first + bytes);
    bytes += (count * sizeof(Item) + 63) / 64 * 64;
    return taken;
  }

  int64_t size() const { return bytes; }

 private:
  uintptr_t first;
  int64_t bytes = 0;
};

// Chunks of neighbouring rows of a stack of matrices: enough for many threads, few enough that a row of partial sums of
// each stays small beside the tensor.
struct Chunks {
  int64_t rows, height, per_matrix, count;

  Chunks(int64_t batch, int64_t rows) : rows(rows) {
    const int64_t most = std::min(std::max<int64_t>(1, 64 / batch), std::max<int64_t>(1, rows / 32));
    height = (rows + most - 1) / most;
    per_matrix = (rows + height - 1) / height;
    count = batch * per_matrix;
  }

  int64_t matrix(int64_t chunk) const { return chunk / per_matrix; }
  // Rows are counted through the whole stack.
  int64_t top(int64_t chunk) const { return matrix(chunk) * rows + chunk % per_matrix * height; }
  int64_t end(int64_t chunk) const { return std::min(top(chunk) + height, (matrix(chunk) + 1) * rows); }
};

}  // namespace floragrad
