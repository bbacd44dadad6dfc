// The C interface that library.py calls; no torch headers, so one build serves every version of torch.
#include "fold.hpp"
#include "step.hpp"

using floragrad::Fold;
using floragrad::Step;
using floragrad::TensorFold;
using floragrad::TensorStep;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Tensors without elements are skipped.
template <class Given>
static bool is_empty(const Given& given) {
  return given.batch * given.rows * given.columns == 0;
}

// Sizes of the argument structs, which the caller compares with its own.
EXPORT int64_t floragrad_step_size() { return sizeof(Step); }
EXPORT int64_t floragrad_fold_size() { return sizeof(Fold); }

// Bytes of scratch, which several steps can share, and of the memory that a step keeps between its passes. No pointer is
// dereferenced.
EXPORT int64_t floragrad_scratch_bytes(const Step* step) { return is_empty(*step) ? 0 : TensorStep(*step).scratch_bytes(); }
EXPORT int64_t floragrad_kept_bytes(const Step* step) { return is_empty(*step) ? 0 : TensorStep(*step).kept_bytes(); }
EXPORT int64_t floragrad_fold_bytes(const Fold* fold) {
  return is_empty(*fold) ? 0 : TensorFold(*fold).scratch_bytes();
}

// Runs a pass of some steps, one after the other.
template <class Pass>
static void for_each_step(const Step* steps, int64_t count, const Pass& pass) {
  for (int64_t i = 0; i < count; ++i)
    if (!is_empty(steps[i])) pass(TensorStep(steps[i]));
}
EXPORT void floragrad_statistics(const Step* steps, int64_t count) {
  for_each_step(steps, count, [](const TensorStep& step) { step.statistics(); });
}
EXPORT void floragrad_normalise(const Step* steps, int64_t count) {
  for_each_step(steps, count, [](const TensorStep& step) { step.normalise(); });
}
EXPORT void floragrad_direction(const Step* steps, int64_t count) {
  for_each_step(steps, count, [](const TensorStep& step) { step.direction(); });
}
EXPORT void floragrad_apply(const Step* steps, int64_t count) {
  for_each_step(steps, count, [](const TensorStep& step) { step.apply(); });
}
// All passes of a whole tensor, then those of the next; they may share what is kept between passes.
EXPORT void floragrad_all_passes(const Step* steps, int64_t count) {
  for_each_step(steps, count, [](const TensorStep& step) {
    step.statistics();
    step.normalise();
    step.direction();
    step.apply();
  });
}

// One power iteration of a step that learns its weights.
EXPORT void floragrad_power_iteration(const Step* step, const float* learner, float* product) {
  if (!is_empty(*step)) TensorStep(*step).power_iteration(learner, product);
}

EXPORT void floragrad_fold(const Fold* fold) {
  if (!is_empty(*fold)) TensorFold(*fold).add();
}
