"""GPU kernels in Triton: a few launches for all tensors of equal shape, dtypes and options.

What is computed is said once for each kernel (``kernels/``), how it is cut into programs in ``geometry.py``, and when
it is launched in ``work.py``. Kernels see pointers and numbers only, so the interpreter of Triton
(``TRITON_INTERPRET=1``) runs them on CPU tensors.
"""
