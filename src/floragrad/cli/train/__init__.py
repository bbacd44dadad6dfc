"""``floragrad train``: a training run from its options to its summary.

``config`` configures a run, a task of ``tasks`` prepares its ``data``, ``run`` does it with the engine of a framework,
``recorder`` watches it and ``folder`` keeps it. The PyTorch engine is ``trainer``, with its ``models``, ``optimizers``
and ``huggingface``, transformers' Trainer; the JAX engine is the package ``jax``.
"""
