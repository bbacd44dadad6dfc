"""``python -m floragrad``: the command ``floragrad``."""

import sys

from floragrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
