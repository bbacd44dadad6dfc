"""Compile the launches of steps for GPUs that are not here, and print what each program takes as JSON.

A program of its own: the interpreter, in which other tests run, replaces what compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from floragrad.policy import plan_accumulator
from floragrad.torch.backends.triton import launches
from floragrad.torch.backends.triton.fold import decode_triton, fold_triton
from floragrad.torch.backends.triton.geometry import Geometry
from floragrad.torch.backends.triton.launch import Launch
from floragrad.torch.backends.triton.launches import Batch
from floragrad.torch.backends.triton.spec import Spec, StepScalars
from floragrad.torch.part import Part

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


POINTERS = {
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
COUNTED = ("seed", "tensor_id", "window", "counter")  # which the kernels of folds are not specialized for


@dataclass(frozen=True)
class Usage:
    """What one program of a kernel takes."""

    case: str
    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and promises of a launch, as Triton derives them from what it is called with."""
    names = launch.kernel.arg_names
    constants, types, promises = dict(launch.constants), {}, {}
    for place, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            promises[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif name in COUNTED:
            types[name] = "i64"
        elif value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32"
            if value % 16 == 0:
                promises[(place,)] = [["tt.divisibility", 16]]
    return types, constants, promises


def compiled(launch: Launch, target: GPUTarget) -> Any:
    types, constants, promises = signature_of(launch)
    source = ASTSource(launch.kernel, types, constants, promises)
    return triton.compile(source, target=target, options=launch.options)


def usage(case: str, launch: Launch, name: str) -> Usage:
    target = TARGETS[name]
    kernel = compiled(launch, target)
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            text = subprocess.run(
                [str(CUOBJDUMP), "-res-usage", file.name], check=True, capture_output=True, text=True
            ).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        registers, spills = found["REG"], found["STACK"] + found["LOCAL"]
    else:
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        # Bytes of memory. Scalars beyond the scalar registers go to lanes of vector registers, to no memory.
        spills = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        spills += int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return Usage(case, launch.kernel.__name__, name, launch.warps, registers, spills, kernel.metadata.shared)


def spec(rows: int, columns: int, width: int, **changes: Any) -> Spec:
    momentum = "sketch" if width < columns else "whole"
    plain = Spec(
        batch=1,
        rows=rows,
        columns=columns,
        width=width,
        all_rows=rows,
        numel=rows * columns,
        param_dtype=torch.bfloat16,
        grad_dtype=torch.bfloat16,
        state_dtype="int8",
        momentum=momentum,
        factored=True,
        adaptive=False,
        learns=False,
        residual=True,
        resamples=False,
        rounds=True,
        scales=False,
        is_split=False,
        aligned=True,
    )
    return replace(plain, **changes)


NUMBERS = StepScalars(0.9, 0.99, 1e-30, 1e-3, 1e-3, 1.0, 0.1, 1.0)


def launches_of(given: Spec) -> list[Launch]:
    batch = Batch(given, NUMBERS, Geometry.of(given), 12, torch.empty(1, dtype=torch.int64), torch.empty(1))
    made = [
        launches.statistics(batch),
        launches.between(batch),
        launches.directions(batch),
        launches.application(batch),
    ]
    if given.learns:
        made += [
            launches.learning_start(batch),
            launches.power_iteration(batch),
            launches.learning_end(batch, is_last=True),
        ]
    if given.is_split:
        made.append(launches.shard_factors(batch))
    return [launch for launch in made if launch is not None]


def folds_of(case: str) -> list[Launch]:
    """The launches of a fold with its noise, and of decoding, of a matrix of Llama-3-8B."""
    ratio, state_dtype = FOLDS[case]
    plan, made = plan_accumulator((14336, 4096), ratio=ratio, state_dtype=state_dtype, kind="matrix"), []
    buffers = {key: torch.empty(1, dtype=getattr(torch, each.dtype)) for key, each in plan.buffers.items()}
    grad, columns = torch.empty(1, dtype=torch.bfloat16), buffers["scale"] if ratio == 1 else None
    part, streams = Part.whole(plan.shape, plan.view), {"seed": 1, "tensor_id": 1, "window": 1}
    with mock.patch.object(Launch, "run", lambda launch: made.append(launch)):
        fold_triton(
            grad, buffers, plan, columns, part, is_first=False, weight=0.5, counter=1, measure_noise=True, **streams
        )
        decode_triton(grad, buffers, plan, columns, grad_weight=0, factor=grad, orthogonal=False, **streams)
    return made


FOLDS = {"fold-int8": (1, "int8"), "fold-ratio-2-int4": (2, "int4"), "fold-ratio-32": (32, "int8")}
FLOAT32 = {"param_dtype": torch.float32, "grad_dtype": torch.float32, "rounds": False}
# GPT-2 small and Llama-3-8B: rank 128, the default; and two columns of every number of the momentum.
CASES = {
    "gpt2-mlp": spec(3072, 768, 128),
    "gpt2-mlp-float32": spec(3072, 768, 128, **FLOAT32),
    "llama-up": spec(14336, 4096, 128),
    "llama-down-int4": spec(4096, 14336, 448, state_dtype="int4"),
    "llama-up-ratio-2-int4": spec(14336, 4096, 2048, state_dtype="int4"),
    "llama-up-float32": spec(14336, 4096, 128, **FLOAT32),
    "llama-embedding": spec(128256, 4096, 4096, momentum="none", state_dtype="float32"),
    "llama-whole": spec(4096, 4096, 4096),
    "llama-resamples": spec(14336, 4096, 128, resamples=True),
    "llama-paper": spec(14336, 4096, 128, resamples=True, residual=False),
    "llama-adaptive": spec(14336, 4096, 128, adaptive=True, learns=True, resamples=True),
    "llama-full-second-moment": spec(14336, 4096, 128, factored=False),
    "llama-shard": spec(1792, 4096, 128, all_rows=14336, is_split=True),
    "norm": spec(1, 4096, 4096, factored=False, momentum="whole", state_dtype="float32", all_rows=1),
}


def main(pairs: list[str]) -> None:
    """Compile each launch of each case for its target, ``case:target``; those that are the same once."""
    seen = set()
    for case, target in (pair.split(":") for pair in pairs):
        for launch in launches_of(CASES[case]) if case in CASES else folds_of(case):
            key = target, launch.kernel, str(signature_of(launch)), launch.warps
            if key not in seen:
                seen.add(key)
                print(json.dumps(asdict(usage(case, launch, target))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
