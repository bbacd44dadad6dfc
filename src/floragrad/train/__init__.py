"""The training run behind the command line: ``floragrad train`` and ``floragrad compare``.

``config`` says what a run is, ``sources`` and ``corpus`` what it reads, ``models`` and ``optimizers`` what it
builds, ``run`` does it, ``callbacks`` watch it, ``folder`` keeps it, and ``compare`` does it several times.
"""
