"""``floragrad train``: a training run from its options to its summary.

``config`` configures a run, ``sources`` and ``corpus`` read its text, ``run`` does it with the ``engine`` of one
framework, ``recorder`` watches it and ``folder`` keeps it. The PyTorch engine is
``trainer``, with its ``models``, ``optimizers`` and ``callbacks``; the JAX engine is the package ``jax``.
"""
