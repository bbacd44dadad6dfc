"""``floragrad train``: a training run from its options to its summary.

``config`` says what a run is, ``sources`` and ``corpus`` what it reads, ``run`` does it with the ``engine`` of one
framework, ``recorder`` watches it and ``folder`` keeps it. The PyTorch engine is
``trainer``, with its ``models``, ``optimizers`` and ``callbacks``; the JAX engine is the package ``jax``.
"""
