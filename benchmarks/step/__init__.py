"""What a step of each optimizer costs, side by side: ``python -m benchmarks.step``, or ``make bench``.

``shapes`` and ``optimizers`` say what is measured, ``plan`` what is measured together. A ``worker`` is one optimizer
in a process of its own; ``processes`` starts and asks it; ``measure`` lets workers take turns, in ``batches`` that fit
into memory. ``figures`` makes ratios of seconds, ``goals`` holds them against what they should be, ``report`` and
``picture`` show them.
"""
