"""Check and time floragrad on a GPU, within ten minutes: numbers, checkpoints, step times, folds, memory, NCCL.

    python -m benchmarks.gpu --out runs/gpu
    python -m benchmarks.gpu --out runs/gpu --only step,fold
    python -m benchmarks.gpu --out runs/gpu --device cpu

The last runs every section to its end without a GPU, the Triton kernels in their interpreter and on tiny tensors; its
times mean nothing. Every section writes ``NAME.md`` into the folder, and ``gpu.md`` holds all of them. The exit status
is 1 where a check failed.

Times are medians over interleaved rounds with quartiles, and the card is named. The bandwidth that they are compared
with is that of a copy in the same rounds.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import LR, Group

ROUNDS = 15


@dataclass
class Report:
    """One section's page.

    Attributes:
        device: Where it runs.
        tiny: Whether tensors are tiny, as in the interpreter.
        failures: Checks that failed.
        lines: Of Markdown.
    """

    device: torch.device
    tiny: bool
    failures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def table(self, *heads: str) -> None:
        """Begin a table."""
        self.lines += ["", "| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]

    def row(self, *cells: object) -> None:
        """Add a row."""
        self.lines.append("| " + " | ".join(map(str, cells)) + " |")

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Add a row that says whether a check has passed."""
        self.row(name, "yes" if passed else "**no**", detail)
        if not passed:
            self.failures.append(f"{name}: {detail}")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def cases(report: Report) -> None:
    """Run every row of the table of cases against the float64 oracle."""
    import numpy as np

    from floragrad import Flora
    from tests.torch.cases import CASES
    from tests.torch.oracle import TOLERANCE, reference_trajectory

    report.table("case", "equals the oracle", "largest relative error")
    chosen = [case for case in CASES if case.options.get("projection") != "gaussian"]
    steps = 11 if report.tiny else 25  # a change of projection at 10, or two
    for case in chosen[::12] if report.tiny else chosen:
        gradients = case.gradients(steps)
        param = torch.nn.Parameter(case.parameter().detach().to(report.device))
        optimizer = Flora([param], **case.all_options())
        worst = 0.0
        for grad, expected in zip(gradients, reference_trajectory(case, gradients), strict=True):
            param.grad = grad.to(report.device)
            optimizer.step()
            found = param.detach().cpu().double().numpy().reshape(expected.shape)
            worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
        report.check(f"{case} ({optimizer.report().rows[0].path})", worst < TOLERANCE, f"{worst:.1e}")


def resume(report: Report) -> None:
    """Save on the CPU, go on on the device, and back: the same state, and the same random bits."""
    from floragrad import Flora

    report.table("state", "holds", "detail")
    shape = (12, 72) if report.tiny else (1024, 1536)
    for state_dtype in ("float32", "bfloat16", "int8", "int4"):
        make = partial(Flora, lr=1e-2, ratio=4, kappa=4, state_dtype=state_dtype)
        gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for step in range(9)]
        here = torch.nn.Parameter(torch.ones(shape))
        first = make([here])
        with _native(report):
            _train([here], first, gradients[:3])
        there = torch.nn.Parameter(here.detach().to(report.device))
        second = make([there])
        second.load_state_dict(first.state_dict())
        same = all(torch.equal(value, second.state[there][key].cpu()) for key, value in first.state[here].items())
        report.check(f"{state_dtype}, loaded on the device", same, "bit for bit")
        with _native(report):
            _train([here], first, gradients[3:6])
        _train([there], second, gradients[3:6])
        error = float((here - there.cpu()).detach().abs().max() / here.detach().abs().max())
        # A rounding that a last bit decides is off by a step of the grid, which 1 / (1 - beta1) steps remember.
        report.check(
            f"{state_dtype}, three steps on", error < (1e-5 if state_dtype == "float32" else 1e-2), f"{error:.1e}"
        )
        back = torch.nn.Parameter(there.detach().cpu())
        third = make([back])
        third.load_state_dict(second.state_dict())
        same = all(torch.equal(value.cpu(), third.state[back][key]) for key, value in second.state[there].items())
        report.check(f"{state_dtype}, loaded back on the CPU", same, "bit for bit")
        again = torch.nn.Parameter(there.detach().clone())
        fourth = make([again])
        fourth.load_state_dict(second.state_dict())
        _train([there], second, gradients[6:])
        _train([again], fourth, gradients[6:])
        same = torch.equal(there, again)
        report.check(f"{state_dtype}, resumed on the same device", same, "bit for bit")


@contextmanager
def _native(report: Report) -> Iterator[None]:
    """Step tensors on the CPU by its own kernels, where the interpreter has them otherwise."""
    from floragrad.torch.backends.triton import step as kernels

    kernels.DEVICES.discard("cpu")
    yield
    if report.tiny:
        kernels.DEVICES.add("cpu")


def _train(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]) -> None:
    for grad in gradients:
        for param in params:
            param.grad = grad.to(param.device, param.dtype)
        optimizer.step()


Makes = dict[str, Callable[[list[Group]], list[Any]]]


def _optimizers() -> Makes:
    from floragrad import Flora

    return {
        peers.FUSED: peers.PEERS[peers.FUSED],
        "floragrad Flora, int8, ratio 8": lambda groups: [Flora(groups, lr=LR, ratio=8)],
        "floragrad Flora, int4, ratio 2": lambda groups: [Flora(groups, lr=LR, ratio=2, state_dtype="int4")],
        "floragrad Flora, int8, ratio 8, a tensor at a time": lambda groups: [_Released(Flora(groups, lr=LR, ratio=8))],
        **{name: peers.PEERS[name] for name in peers.FOR_GPUS},
        "FlashOptim AdamW": peers.FLASH_OPTIM,
    }


class _Released:
    """Flora, stepped a parameter at a time."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self.state = optimizer, optimizer.state

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                self._optimizer.step_parameter(param)


def _models(tiny: bool) -> Iterator[tuple[str, list[tuple[int, ...]], torch.dtype]]:
    """Yield names, shapes of all tensors, and the dtype of their weights."""
    if tiny:
        yield "tiny layers", [(12, 40), (40,)], torch.bfloat16
        return
    for name, width, inner, layers, gated, dtype in (
        ("GPT-2 small, layers", 768, 3072, 12, False, torch.float32),
        ("Llama 350M, layers", 1024, 2736, 24, True, torch.bfloat16),
        ("Llama-3-8B, 4 of 32 layers", 4096, 14336, 4, True, torch.bfloat16),
    ):
        keys = width // 4 if width == 4096 else width
        attention = [(width, width), (keys, width), (keys, width), (width, width)]
        if not gated:
            attention = [(width, 3 * width), (width, width)]
        mlp = [(inner, width)] * (2 if gated else 1) + [(width, inner)]
        yield name, (attention + mlp + [(width,), (width,)]) * layers, dtype


def step(report: Report) -> None:
    """Time a step, count its launches and its temporary bytes, beside every peer that is installed."""
    for name, shapes, dtype in _models(report.tiny):
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        report.lines += ["", f"**{name}**: {numbers / 1e6:.1f}M parameters, {str(dtype).removeprefix('torch.')}"]
        report.table(
            "optimizer", "ms a step", "of fused AdamW", "of the copy", "launches", "temporary bytes", "state bytes"
        )
        rows: dict[str, _Timed] = {"copy of gradient and parameter": _Timed(_copy(shapes, dtype, report.device))}
        for label, make in _optimizers().items():
            if label == peers.GALORE and numbers > 5e8:
                report.row(label, "left out: its first step takes an SVD of each matrix, minutes", *[""] * 5)
                continue
            try:
                rows[label] = _Timed(*_prepared(make, shapes, dtype, report))
            except Exception as error:
                if report.tiny and label.startswith(("floragrad", "torch ")):
                    raise
                report.row(label, f"not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}", *[""] * 5)
        _time(rows, 2 if report.tiny else ROUNDS, report)
        copied, fused = rows["copy of gradient and parameter"], rows.get("torch AdamW, fused")
        for label, row in rows.items():
            low, middle, high = quantiles(row.seconds)
            ratios = [f"{middle / quantiles(each.seconds)[1]:.2f}" if each else "" for each in (fused, copied)]
            shown = f"{middle * 1e3:.2f} ({low * 1e3:.2f} – {high * 1e3:.2f})"
            report.row(label, shown, *ratios, row.launches, row.temporaries, row.state)


@dataclass
class _Timed:
    """Work that is timed, and what is known of it."""

    work: Callable[[], Any]
    launches: object = ""
    temporaries: object = ""
    state: object = ""
    seconds: list[float] = field(default_factory=list)


def _copy(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """Move as many bytes as a step must: gradient and parameter read, the parameter written."""
    half = sum(torch.Size(shape).numel() for shape in shapes) * 3 // 2
    source, target = torch.ones(half, dtype=dtype, device=device), torch.zeros(half, dtype=dtype, device=device)
    return lambda: target.copy_(source)


def _prepared(
    make: Callable[[list[Group]], list[Any]], shapes: list[tuple[int, ...]], dtype: torch.dtype, report: Report
) -> tuple[Callable[[], Any], object, object, object]:
    """Make an optimizer and step it, until nothing is compiled or allocated any more."""
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape, device=report.device).to(dtype)) for shape in shapes]
    gradients = [torch.randn(param.shape, device=report.device).to(dtype) for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    groups = [
        {"params": [param for param in params if (param.dim() == 2) == (kind == "matrix")], "kind": kind}
        for kind in ("matrix", "vector")
    ]
    optimizers = make(groups)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    for _ in range(1 if report.tiny else 4):
        step()
    report.synchronize()
    size = peers.state_bytes(optimizers, [*params, *gradients])
    if report.device.type != "cuda":
        return step, "", "", size
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return step, sum(event.count for event in profile.key_averages()), peak, size


def _time(rows: dict[str, _Timed], rounds: int, report: Report) -> None:
    """Time all rows in turns."""
    for turn in range(rounds + 1):
        for row in rows.values():
            report.synchronize()
            started = time.perf_counter()
            row.work()
            report.synchronize()
            if turn:
                row.seconds.append(time.perf_counter() - started)


def fold(report: Report) -> None:
    """Time a gradient's fold into a sketch beside the sum that it replaces."""
    from floragrad.policy import plan_accumulator
    from floragrad.torch.accumulation.sketch import GradientSketch

    shape = (12, 96) if report.tiny else (4096, 14336)
    dtype = torch.float32 if report.tiny else torch.bfloat16
    grad = torch.randn(shape, device=report.device).to(dtype)
    total = torch.zeros(shape, device=report.device)
    rows = {"float32 sum, .grad += G": _Timed(lambda: total.add_(grad))}
    for state_dtype, ratio in (("int4", 1), ("int8", 1), ("int4", 2)):
        plan = plan_accumulator(shape, state_dtype=state_dtype, ratio=ratio, kind="matrix")  # type: ignore[arg-type]
        sketch = GradientSketch(plan, "sign", 0, 0, report.device)
        work = partial(sketch.add, grad, 1.0, 0, measure_noise=False)
        rows[f"fold, {state_dtype}, ratio {ratio}"] = _Timed(work)
    _time(rows, 2 if report.tiny else ROUNDS, report)
    report.table(f"{shape[0]} × {shape[1]}", "ms", "of the sum")
    plain = quantiles(next(iter(rows.values())).seconds)[1]
    for label, row in rows.items():
        low, middle, high = quantiles(row.seconds)
        report.row(label, f"{middle * 1e3:.3f} ({low * 1e3:.3f} – {high * 1e3:.3f})", f"{middle / plain:.2f}")


def peak(report: Report) -> None:
    """Compare the planned peak of a training step with the allocator's, with and without updates layer by layer."""
    import transformers

    from floragrad import Flora, GradientAccumulator, param_groups
    from floragrad.cli.plan.engine import plan

    report.table("model", "optimizer", "planned", "measured", "measured / planned")
    sizes = {
        "GPT-2 small": transformers.AutoConfig.for_model("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        "Llama 1B": transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=32, vocab_size=32000
        ),
    }
    if report.tiny:
        sizes = {
            "tiny Llama": transformers.LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=32
            )
        }
    sequence = 8 if report.tiny else 1024
    for name, config in sizes.items():
        rows = {"adamw": False, "flora": False, "flora+release": True}
        with _native(report):
            planned = plan(config, sequence=sequence, optimizers=tuple(rows))
        for row, releases in rows.items():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).to(report.device)
            ids = torch.randint(0, config.vocab_size, (1, sequence), device=report.device)
            if row == "adamw":
                optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
            else:
                optimizer = Flora(param_groups(model, lr=LR))
            accumulator = GradientAccumulator(optimizer, steps=1) if releases else None
            measured: object = ""
            for _ in range(2):
                if report.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                loss = model(input_ids=ids, labels=ids).loss
                if accumulator is not None:
                    accumulator.backward(loss)
                    accumulator.step()
                else:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                del loss
            expected = planned.optimizers[row].peak  # type: ignore[index]
            if report.device.type == "cuda":
                measured = torch.cuda.max_memory_allocated()
            ratio = f"{measured / expected:.3f}" if isinstance(measured, int) else ""
            report.row(name, row, expected, measured, ratio)
            if accumulator is not None:
                accumulator.close()
            del model, optimizer, accumulator


def nccl(report: Report) -> None:
    """Wrap a model with FSDP2 in one process, step it, and compare with the unwrapped one."""
    from torch import distributed, nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from floragrad import Flora

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29591", "RANK": "0", "WORLD_SIZE": "1"}
    backend = "nccl" if report.device.type == "cuda" else "gloo"
    distributed.init_process_group(backend)
    try:
        losses = []
        for wraps in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(report.device)
            if wraps:
                fully_shard(model, mesh=init_device_mesh(report.device.type, (1,)))
            optimizer = Flora(model.parameters(), lr=1e-2, ratio=4)
            for _ in range(3):
                loss = model(torch.ones(8, 64, device=report.device)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        report.table(f"{backend}, one process", "holds", "losses")
        report.check("FSDP2 equals the unwrapped model", abs(losses[0] - losses[1]) <= 1e-5 * losses[0], str(losses))
    finally:
        distributed.destroy_process_group()


SECTIONS = {"cases": cases, "resume": resume, "step": step, "fold": fold, "peak": peak, "nccl": nccl}


def _environment(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, Triton interpreted: times mean nothing"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    return f"{name}; torch {torch.__version__}, triton {version}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder that the pages are written into")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu", "xpu")
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    given = parser.parse_args(arguments)
    chosen = given.only.split(",")
    if unknown := set(chosen) - SECTIONS.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    device = torch.device(given.device)
    if device.type == "cpu":
        from floragrad.torch.backends.triton import step as kernels

        kernels.DEVICES.add("cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    pages, failures = [f"# floragrad on {_environment(device)}"], []
    for name in chosen:
        report = Report(device, tiny=device.type == "cpu")
        started = time.perf_counter()
        try:
            SECTIONS[name](report)
        except Exception as error:
            report.lines += ["", "```", *traceback.format_exc().splitlines()[-12:], "```"]
            report.failures.append(f"{name}: {type(error).__name__}")
        failures += report.failures
        title = f"## {name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}"
        page = "\n".join([title, *report.lines, "", f"{time.perf_counter() - started:.0f} s"])
        (given.out / f"{name}.md").write_text(page + "\n")
        print(page, flush=True)
        pages.append(page)
    pages.append("All checks passed." if not failures else "Failed: " + "; ".join(failures))
    (given.out / "gpu.md").write_text("\n\n".join(pages) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    if not torch.cuda.is_available() or "cpu" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
