"""The kernels: functions of pointers and numbers, which know nothing of optimizers."""
