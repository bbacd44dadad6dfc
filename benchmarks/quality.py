"""The command line that the benchmarks of whole runs have in common."""

import argparse
from collections.abc import Collection
from pathlib import Path


def parser(description: str | None, rows: Collection[str] = ()) -> argparse.ArgumentParser:
    """What reads the folder of a benchmark, and which of its rows to do, if it has any."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    if rows:
        made.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="do these rows only")
    return made
