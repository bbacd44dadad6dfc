"""What every test process has in common."""

import os
import signal

# One thread: pytest-xdist has one process on each core. The processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# Started in the background by a shell, pytest would ignore Ctrl-C, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
