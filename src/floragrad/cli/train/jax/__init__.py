"""The JAX backend of ``floragrad train``: the same job with flax NNX, optax and orbax.

``model`` is the Llama, ``weights`` its exchange with transformers, ``optimizers`` what steps it, ``loop`` the
training, and ``checkpoint`` what is saved. No module of it imports torch.
"""
