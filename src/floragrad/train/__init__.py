"""The training run behind the command line: ``floragrad train`` and ``floragrad compare``.

``config`` says what a run is, ``sources`` and ``corpus`` what it reads, ``run`` does it with the ``engine`` of one
framework, ``recorder`` watches it, ``folder`` keeps it, and ``compare`` does it several times. The PyTorch engine is
``trainer``, with its ``models``, ``optimizers`` and ``callbacks``; the JAX engine is the package ``jax``.
"""
