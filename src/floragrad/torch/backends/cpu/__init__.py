"""The C++ kernels for CPUs: float32 and bfloat16, all but Gaussian projections, whole tensors and shards of rows."""
