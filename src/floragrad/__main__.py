"""``python -m floragrad``: the command ``floragrad``."""

import sys

from floragrad.cli import main

sys.exit(main())
