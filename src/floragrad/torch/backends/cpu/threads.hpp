// Parallel loops over torch's threads, in torch's own OpenMP runtime.
//
// Nothing here links an OpenMP library: the caller passes GOMP_parallel and omp_get_thread_num of the runtime that torch
// has loaded (libgomp's, which LLVM's and Intel's have as well), so there is never a second runtime.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace floragrad {

extern "C" {
using Body = void (*)(void*);
using Parallel = void (*)(Body, void*, unsigned, unsigned);
}

constexpr int64_t MOST_THREADS = 256;

struct Threads {
  Parallel parallel;
  int (*number)();  // omp_get_thread_num
  int64_t count;

  Threads(Parallel parallel, int (*number)(), int64_t count)
      : parallel(parallel), number(number), count(std::min(count, MOST_THREADS)) {}
};

// Smaller tensors are done before other threads have woken.
constexpr int64_t SMALL = 1 << 15;

// The threads for a step or a fold.
template <class Given>
Threads threads_for(const Given& given) {
  const bool is_small = given.batch * given.rows * given.columns < SMALL;
  return {given.parallel, given.thread_number, is_small ? 1 : given.threads};
}

// Calls work(chunk, thread) for every chunk. Each thread has neighbouring chunks, the same in every pass over a tensor,
// which stay in its cache; then it takes chunks of other threads. The result of a chunk must not depend on the thread, so
// that results are the same with any number of threads.
template <class Work>
void for_each_chunk(const Threads& threads, int64_t chunks, const Work& work) {
  struct alignas(64) Counter {
    std::atomic<int64_t> taken;
  };
  struct Job {
    const Work& work;
    const Threads& threads;
    int64_t chunks;
    Counter counters[MOST_THREADS];
  };
  const Body body = [](void* given) {
    Job& job = *static_cast<Job*>(given);
    const int64_t count = job.threads.count, own = job.threads.number();
    for (int64_t offset = 0; offset < count; ++offset) {
      const int64_t range = (own + offset) % count;
      const int64_t first = job.chunks * range / count, end = job.chunks * (range + 1) / count;
      for (;;) {
        const int64_t chunk = first + job.counters[range].taken++;
        if (chunk >= end) break;
        job.work(chunk, own);
      }
    }
  };
  if (threads.count == 1 || chunks == 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk, 0);
    return;
  }
  Job job{work, threads, chunks, {}};
  threads.parallel(body, &job, static_cast<unsigned>(threads.count), 0);
}

}  // namespace floragrad
