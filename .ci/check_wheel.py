"""Check an installed wheel: every kernel of this machine's instruction sets is in it, and loads."""

import ctypes
import platform
from pathlib import Path

import floragrad

EXPECTED = {"x86_64": {"_baseline", "_avx2", "_avx512"}}.get(platform.machine(), {"_baseline"})
found = {path.name.partition(".")[0]: path for path in Path(floragrad.__file__).parent.rglob("torch/**/_*.so")}

assert set(found) == EXPECTED, f"expected {sorted(EXPECTED)}, found {sorted(found)}"
for path in found.values():
    ctypes.CDLL(str(path))
print(f"floragrad {floragrad.__version__}: {', '.join(sorted(found))}")
