"""Memory of a training step without allocating it: ``floragrad plan`` and :func:`floragrad.plan`.

``engine`` turns a model and settings into a plan: by ``trace``, passes of the model and updates of other optimizers on
fake tensors, and by ``flora``, Flora's own memory in closed form. All else speaks in the data of ``result``.
"""
