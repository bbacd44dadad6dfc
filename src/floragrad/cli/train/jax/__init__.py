"""The JAX backend of ``floragrad train``: the same job with flax NNX, optax and orbax.

``model`` is the Llama, ``weights`` its exchange with transformers, ``optimizers`` its optimizers, ``loop`` the
training, and ``checkpoint`` its checkpoints. No module of it imports torch.
"""
