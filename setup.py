"""The native kernels: one build for each instruction set, each left out where there is no compiler for it."""

import copy
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "src/floragrad/torch/backends/cpu"
HEADERS = ("buckets", "fold", "lanes", "random", "rows", "scratch", "step", "tensor", "threads")
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

# Of `make sanitize`: reads and writes beyond what was handed over, and undefined behaviour, end the process.
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
is_sanitized = os.environ.get("FLORAGRAD_SANITIZE") == "1"


class BuildApart(build_ext):
    """Build the kernels at once, each with object files of its own: all are made of one source."""

    def initialize_options(self) -> None:
        """Start a compiler for each of them; an option of setup() would be lost in an editable installation."""
        super().initialize_options()
        self.parallel = len(INSTRUCTION_SETS)

    def build_extension(self, ext: Extension) -> None:
        """Build one of them in a folder of its own."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name.rpartition(".")[2])
        super(BuildApart, own).build_extension(ext)


setup(
    cmdclass={"build_ext": BuildApart},
    ext_modules=[
        Extension(
            f"floragrad.torch.backends.cpu._{name}",
            [f"{SOURCES}/native.cpp"],
            depends=[f"{SOURCES}/{header}.hpp" for header in HEADERS],
            extra_compile_args=[
                *("-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
                *("-fvisibility=hidden", "-Wall", "-Wextra", *flags),
                # Python's own flags may ask for debug information, 85% of each file.
                *(SANITIZERS if is_sanitized else ["-g0"]),
            ],
            extra_link_args=["-fsanitize=address,undefined"] if is_sanitized else [],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
)
