// The C interface that library.py calls; no torch headers, so one build serves every version of torch.
#include "fold.hpp"
#include "step.hpp"

using floragrad::Fold;
using floragrad::Step;
using floragrad::TensorFold;
using floragrad::TensorStep;

#define EXPORT extern "C" __attribute__((visibility("default")))

// The size of what is handed over, for the caller to compare with its own.
EXPORT int64_t floragrad_step_size() { return sizeof(Step); }
EXPORT int64_t floragrad_fold_size() { return sizeof(Fold); }

// Bytes of scratch that they need; no pointer is followed.
EXPORT int64_t floragrad_step_bytes(const Step* step) { return TensorStep(*step).scratch_bytes(); }
EXPORT int64_t floragrad_fold_bytes(const Fold* fold) { return TensorFold(*fold).scratch_bytes(); }

EXPORT void floragrad_statistics(const Step* step) { TensorStep(*step).statistics(); }

EXPORT void floragrad_grow(const Step* step, const float* learner, float* grown) {
  TensorStep(*step).grow(learner, grown);
}

EXPORT void floragrad_update(const Step* step) { TensorStep(*step).update(); }

EXPORT void floragrad_fold(const Fold* fold) { TensorFold(*fold).add(); }
