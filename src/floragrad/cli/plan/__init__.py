"""What a training step holds in memory, before a byte is bought: ``floragrad plan`` and :func:`floragrad.plan`.

``result`` and ``subject`` are the data that everything else speaks in: ``engine`` turns a subject and settings into
a plan, by ``trace`` (a training step on fake tensors, with the optimizers of ``optimizers``).
"""
