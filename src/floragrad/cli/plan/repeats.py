"""The work on one tensor, run once for each layout, on few of its rows, and counted for every tensor.

Flora and its accumulator go through a tensor in blocks of rows, tens of thousands of them in a large model. What
they make on the way depends on the tensor's layout and on options alone; and with more rows it grows by the same
bytes for every block, since a block stays as high. So the code runs on a tensor with a few blocks and on one with a
block more, and the bytes of the whole tensor follow without an error.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from floragrad.cli.plan.tracker import MemoryTracker, Moment, Profiles, joined
from floragrad.policy import AccumulatorPlan, MatrixView, TensorPlan
from floragrad.torch import optimizer as flora
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.backends.cpu import step as cpu
from floragrad.torch.context import ParamUpdate
from floragrad.torch.param_info import initial_state
from floragrad.torch.part import Part
from floragrad.torch.step import step
from floragrad.torch.storage import block_elements, row_blocks

FEWEST_BLOCKS: Final = 5
"""Whole blocks of the smaller tensor: more than the pieces that a tensor is cut into at least."""

_NOT_OPTIONS: Final = ("params", "param_names")


@contextmanager
def repeated_work(tracker: MemoryTracker, profiles: Profiles) -> Iterator[None]:
    """Inside, updates, folds and decodings of Flora and its accumulator are counted, not done.

    Args:
        tracker: Where they are counted.
        profiles: Their bytes, as far as known.
    """

    def count_steps(updates: Iterable[ParamUpdate]) -> None:
        for update in updates:  # the kernels' batches need no more memory than the largest tensor alone
            count_step(update, is_native=cpu.supports(update))

    def count_step(whole: ParamUpdate, *, is_native: bool) -> None:
        param, grad, _, ctx = whole

        def work(plan: TensorPlan) -> Callable[[], None]:
            small = replace(ctx, plan=plan, part=Part.whole(plan.shape, plan.view))
            fresh = initial_state(plan, ctx.group, ctx.tensor_id, ctx.device)
            return partial(step, [ParamUpdate(_empty(plan, param), _empty(plan, grad), fresh, small)])

        tracker.touch(param)
        options = tuple(sorted((key, value) for key, value in ctx.group.items() if key not in _NOT_OPTIONS))
        key = ("update", is_native, param.dtype, grad.dtype, options, ctx.step == 1, ctx.is_resample_step)
        # What the native kernels hold is one buffer, whatever the rows.
        count(key, ctx.plan, work, by_rows=not is_native)

    def add_gradient(sketch: GradientSketch, grad: Tensor, weight: float, window: int, *, measure_noise: bool) -> None:
        def work(plan: AccumulatorPlan) -> Callable[[], None]:
            small, fresh = emptied(sketch, plan), _empty(plan, grad)
            return lambda: add(small, fresh, weight, window, measure_noise=measure_noise)

        key = ("fold", grad.dtype, sketch.folds == 0, measure_noise)
        count(key, sketch.plan, work, by_rows=not sketch._is_native(grad))
        sketch.folds += 1

    def decode_into(sketch: GradientSketch, grad: Tensor, window: int, own: float, factor: float | Tensor) -> None:
        def work(plan: AccumulatorPlan) -> Callable[[], None]:
            small, into = emptied(sketch, plan), _empty(plan, grad)
            return lambda: decode(small, into, window, own, factor)

        count(("decode", grad.dtype, bool(own), isinstance(factor, Tensor)), sketch.plan, work)

    def squared_norm(sketch: GradientSketch) -> Tensor:
        def work(plan: AccumulatorPlan) -> Callable[[], None]:
            small = emptied(sketch, plan)

            def discard() -> None:
                norm(small)

            return discard

        count(("norm",), sketch.plan, work)
        return torch.zeros((), dtype=torch.float32, device="cpu")

    def emptied(sketch: GradientSketch, plan: AccumulatorPlan) -> GradientSketch:
        small = GradientSketch(plan, sketch._kind, 0, 0, torch.device("cpu"))
        small.folds = sketch.folds
        return small

    def count(key: Hashable, plan: Any, work: Callable[[Any], Callable[[], None]], *, by_rows: bool = True) -> None:
        whole = (key, plan)
        if whole not in profiles:
            with tracker.paused():
                profiles[whole] = _profile(plan, work) if by_rows else _run(work(plan))
        tracker.repeat(profiles[whole])

    add, decode, norm = GradientSketch.add, GradientSketch.decode_into, GradientSketch.squared_norm
    with ExitStack() as stack:
        stack.enter_context(replaced(flora, "step", count_steps))
        stack.enter_context(replaced(GradientSketch, "add", add_gradient))
        stack.enter_context(replaced(GradientSketch, "decode_into", decode_into))
        stack.enter_context(replaced(GradientSketch, "squared_norm", squared_norm))
        yield


@contextmanager
def decoded_gradients(tracker: MemoryTracker) -> Iterator[None]:
    """Count the tensors that an accumulator decodes into as gradients."""
    decode = GradientSketch.decode_into

    def decode_into(sketch: GradientSketch, grad: Tensor, *args: Any) -> None:
        tracker.hold(grad, "gradients")
        decode(sketch, grad, *args)

    with replaced(GradientSketch, "decode_into", decode_into):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _profile(plan: Any, work: Callable[[Any], Callable[[], None]]) -> Moment:
    """Return the bytes that work on a whole tensor makes: at its highest moment, and each category at its own."""
    view = plan.view or MatrixView(1, 1, 1)
    few = _few_rows(view)
    if few is None:
        return _run(work(plan))
    rows, height = few
    less, more = (_run(work(_with_rows(plan, count))) for count in (rows, rows + height))
    blocks = (view.rows - rows) // height

    def ahead(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x + (y - x) * blocks for x, y in zip(a, b, strict=True))

    return Moment("", ahead(less.peak, more.peak), ahead(less.highest, more.highest))


def _run(work: Callable[[], None]) -> Moment:
    with MemoryTracker() as memory:
        work()
    return joined(memory.cut(), "")


def _few_rows(view: MatrixView) -> tuple[int, int] | None:
    """Rows of a smaller tensor that is cut into blocks of the same height, and the height; None where none is."""
    device = torch.device("cpu")
    elements = block_elements(view.numel, device)
    _, first = next(row_blocks(view, elements))
    height = first.stop - first.start
    rows = view.rows % height + FEWEST_BLOCKS * height
    small = view._replace(rows=rows)
    if rows + height >= view.rows or block_elements(small.numel, device) != elements:
        return None
    return rows, height


def _with_rows(plan: Any, rows: int) -> Any:
    """Return the plan of a tensor of fewer rows."""
    view, shape = plan.view, plan.shape
    is_matrices = (view.rows, view.columns) == shape[-2:]
    fewer = (*shape[:-2], rows, shape[-1]) if is_matrices else (rows, *shape[1:])
    return replace(plan, shape=fewer, view=view._replace(rows=rows))


def _empty(plan: Any, like: Tensor) -> Tensor:
    return torch.empty(plan.shape, dtype=like.dtype, device=like.device)
