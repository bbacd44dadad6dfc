// Work shared among the threads that torch was given, by torch's own OpenMP runtime.
//
// Nothing here is linked against an OpenMP library: the caller hands in GOMP_parallel of the runtime that torch has
// loaded (libgomp's entry point, which LLVM's and Intel's runtimes have as well), so there is never a second one.
#pragma once

#include <atomic>
#include <cstdint>

namespace floragrad {

extern "C" {
using Body = void (*)(void*);
using Parallel = void (*)(Body, void*, unsigned, unsigned);
}

struct Threads {
  Parallel parallel;
  int64_t count;
};

// Calls work(chunk, thread) for every chunk; a thread takes the next chunk when it is done with one. What a chunk
// gives must not depend on the thread, so that results are the same with any number of them.
template <class Work>
void for_each_chunk(const Threads& threads, int64_t chunks, const Work& work) {
  struct Job {
    const Work& work;
    int64_t chunks;
    std::atomic<int64_t> next_chunk{0};
    std::atomic<int64_t> next_thread{0};
  } job{work, chunks};
  const Body body = [](void* given) {
    Job& job = *static_cast<Job*>(given);
    const int64_t thread = job.next_thread++;
    for (int64_t chunk = job.next_chunk++; chunk < job.chunks; chunk = job.next_chunk++) job.work(chunk, thread);
  };
  if (threads.count == 1 || chunks == 1)
    body(&job);
  else
    threads.parallel(body, &job, static_cast<unsigned>(threads.count), 0);
}

}  // namespace floragrad
