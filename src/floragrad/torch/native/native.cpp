// The C interface that library.py calls; no torch headers, so one build serves every version of torch.
#include "fold.hpp"
#include "step.hpp"

using floragrad::Fold;
using floragrad::Step;
using floragrad::TensorFold;
using floragrad::TensorStep;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Without elements there are no rows to share among threads, nor to read ahead.
template <class Given>
static bool is_empty(const Given& given) {
  return given.batch * given.rows * given.columns == 0;
}

// The size of what is handed over, for the caller to compare with its own.
EXPORT int64_t floragrad_step_size() { return sizeof(Step); }
EXPORT int64_t floragrad_fold_size() { return sizeof(Fold); }

// Bytes of scratch that they need; no pointer is followed.
EXPORT int64_t floragrad_most_step_bytes(const Step* steps, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i)
    if (!is_empty(steps[i])) most = std::max(most, TensorStep(steps[i]).scratch_bytes());
  return most;
}
EXPORT int64_t floragrad_fold_bytes(const Fold* fold) {
  return is_empty(*fold) ? 0 : TensorFold(*fold).scratch_bytes();
}

EXPORT void floragrad_steps(Step* steps, int64_t count, void* scratch) {
  for (int64_t i = 0; i < count; ++i) {
    if (is_empty(steps[i])) continue;
    steps[i].scratch = scratch;
    const TensorStep step(steps[i]);
    step.statistics();
    step.update();
  }
}

// A step in parts, for what is learnt in between.
EXPORT void floragrad_statistics(const Step* step) { TensorStep(*step).statistics(); }

EXPORT void floragrad_grow(const Step* step, const float* learner, float* grown) {
  TensorStep(*step).grow(learner, grown);
}

EXPORT void floragrad_update(const Step* step) { TensorStep(*step).update(); }

EXPORT void floragrad_fold(const Fold* fold) {
  if (!is_empty(*fold)) TensorFold(*fold).add();
}
