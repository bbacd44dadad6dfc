"""Flora's rows: its work on tensors in closed form, around the passes of the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from floragrad.cli.plan.trace import FOLD, Moments, Trace, Tracer
from floragrad.cli.plan.tracker import Moment, moment_of
from floragrad.policy import AccumulatorPlan, plan_accumulator
from floragrad.torch import Flora
from floragrad.torch.temporaries import decode_bytes, fold_bytes, norm_bytes, step_bytes


@dataclass(frozen=True)
class _Entry:
    """A parameter under accumulation."""

    name: str
    param: Tensor
    group: dict[str, Any]

    @property
    def plan(self) -> AccumulatorPlan:
        return plan_accumulator(self.param.shape, kind=self.group["kind"])

    @property
    def update_bytes(self) -> int:
        """Temporaries of its update alone."""
        return step_bytes([{**self.group, "params": [self.param]}])


def flora_trace(tracer: Tracer, optimizer: Flora, accumulate: int, clip: bool | None) -> Trace:
    """Return a step of Flora.

    Args:
        tracer: Of the model.
        optimizer: Of the same model's parameters, on any device.
        accumulate: Micro-batches of a step.
        clip: Of :class:`floragrad.GradientAccumulator` with the default options; None without it.
    """
    entries = [
        _Entry(name, param, group)
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if param.requires_grad
    ]
    parameters, state = tracer.parameter_bytes, optimizer.report().state_bytes
    sketches = 0
    if clip is None:
        gradients = sum(entry.param.nbytes for entry in entries)
        update = moment_of(
            "update", parameters=parameters, gradients=gradients, temporaries=step_bytes(optimizer.param_groups)
        )
        steady = (*tracer.accumulated(accumulate), *tracer.clipping, update)
    else:
        if accumulate > 1 or clip:
            sketches = sum(entry.plan.state_bytes for entry in entries)
        folds = {each.name: fold_bytes(each.plan, each.param.dtype) for each in entries}
        folded = _with_temporaries(tracer.passes, folds)
        if clip:
            steady = (*folded * accumulate, *_end(entries, parameters))
        else:
            updated = {
                each.name: max(decode_bytes(each.plan, adds=True) if accumulate > 1 else 0, each.update_bytes)
                for each in entries
            }
            last = _with_temporaries(tracer.passes, updated)
            renamed = (replace(each, name=each.name.replace(FOLD, "update of ")) for each in last)
            steady = (*folded * (accumulate - 1), *renamed)
    lasting = {"optimizer_state": state, "accumulation": sketches}
    return Trace((), tuple(moment.plus(**lasting) for moment in steady), (parameters, state, sketches))


def _end(entries: Sequence[_Entry], parameters: int) -> Iterator[Moment]:
    """Yield the clipping by the norm of the sketches, and the decoding and updating of one tensor after the other."""
    norm = max(norm_bytes(entry.plan) for entry in entries) + 8 * len(entries)
    yield moment_of("clipping", parameters=parameters, temporaries=norm)
    for entry in entries:
        temporaries = max(decode_bytes(entry.plan, adds=False), entry.update_bytes)
        name, gradient = f"update of {entry.name}", entry.param.nbytes
        yield moment_of(name, parameters=parameters, gradients=gradient, temporaries=temporaries)


def _with_temporaries(moments: Moments, nbytes: dict[str, int]) -> Moments:
    """Add temporaries, by parameter, to the moments at which gradients are there."""
    return tuple(
        each.plus(temporaries=nbytes[each.name.removeprefix(FOLD)]) if each.name.startswith(FOLD) else each
        for each in moments
    )
