"""Memory of a training step without allocating it: ``floragrad plan`` and :func:`floragrad.plan`.

``result`` and ``subject`` are the data that everything else speaks in: ``engine`` turns a subject and settings into
a plan, by ``trace`` (a training step on fake tensors, with the optimizers of ``optimizers``).
"""
