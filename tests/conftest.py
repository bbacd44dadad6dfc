"""One thread per test process: pytest-xdist has one process on each core."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start as well
