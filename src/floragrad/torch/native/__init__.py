"""The step of contiguous tensors on the CPU, in C++."""
