"""``floragrad compare``: the same training run with several methods, one after another."""
