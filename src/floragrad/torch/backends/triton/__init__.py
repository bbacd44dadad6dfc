"""GPU kernels in Triton: a few launches for all tensors of equal shape, dtypes and options.

``kernels/`` holds the kernels, ``geometry.py`` their grids and tiles, ``launches.py`` and ``passes.py`` the order of
launches. Kernels take only pointers and scalars, so the interpreter of Triton (``TRITON_INTERPRET=1``) runs them on CPU
tensors.
"""
