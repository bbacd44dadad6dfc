"""Several processes with gloo, on the CPU."""
