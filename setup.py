"""The native kernels: one build for each instruction set, each left out where there is no compiler for it."""

import os
import platform

from setuptools import Extension, setup

SOURCES = "src/floragrad/torch/native"
HEADERS = ("buckets", "fold", "lanes", "random", "rows", "scratch", "step", "tensor", "threads")
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}

# Of `make sanitize`: reads and writes beyond what was handed over, and undefined behaviour, end the process.
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
is_sanitized = os.environ.get("FLORAGRAD_SANITIZE") == "1"

setup(
    ext_modules=[
        Extension(
            f"floragrad.torch.native._{name}",
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
    ]
)
