"""``floragrad compare``: the same training run with several optimizers, one after another."""
