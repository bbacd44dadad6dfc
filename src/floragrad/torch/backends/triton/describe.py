"""Description of a parameter's step for the kernels, in plain values."""

from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from floragrad.torch.backends.triton.kernels import fields
from floragrad.torch.backends.triton.spec import Spec, StepScalars
from floragrad.torch.context import ParamUpdate, StepContext

STATE_KEYS: Final = ("exp_avg", "exp_avg_scale", "row_var", "col_var", "variance", "projection_weight")
"""State that the kernels read or write, in the order of the table's fields from DATA on."""

REGIONS: Final = range(fields.ROW_PARTIALS.value, fields.FIELDS.value)
"""The table's fields that are offsets in the workspace."""


class Located(NamedTuple):
    """Step of a tensor with its addresses.

    Attributes:
        update: The step.
        addresses: Of the gradient, the parameter and its state, in the order of the table's fields; 0 if missing.
        aligned: True if all of them are multiples of 16 bytes.
    """

    update: ParamUpdate
    addresses: tuple[int, ...]
    aligned: bool

    @classmethod
    def of(cls, update: ParamUpdate) -> "Located":
        """Return a step with the addresses of its tensors."""
        param, grad, state, _ = update
        found = (state.get(key) for key in STATE_KEYS)
        kept = (0 if value is None else value.data_ptr() for value in found)
        addresses = (grad.data_ptr(), param.data_ptr(), *kept)
        together = 0
        for address in addresses:
            together |= address
        return cls(update, addresses, together % 16 == 0)

    @property
    def key(self) -> Hashable:
        """Key of the batch of tensors that are stepped together; shape and group determine the plan."""
        param, grad, _, ctx = self.update
        part = ctx.part
        layout = ctx.plan.shape, part.view, part.mesh, bool(part.split), param.dtype, grad.dtype, self.aligned
        return id(ctx.group), ctx.step, param.device, layout

    def row(self) -> list[int]:
        """Return the tensor's row of the table, but for its regions in the workspace."""
        ctx = self.update.ctx
        words = ctx.part.row_words
        assert words is not None
        # The words of all rows come before those of the columns; a vector has a word for each element, and one more.
        count = ctx.part.row_count
        first_row, first_column = (words[0], count) if ctx.plan.view else (count, words[0])
        return [
            *self.addresses,
            ctx.group["seed"],
            ctx.tensor_id,
            ctx.step,
            ctx.resample_index,
            first_row,
            first_column,
        ]


def rows_of(tensors: Sequence[Located], offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Return the rows of a batch's table, (tensors, fields).

    Args:
        tensors: The batch.
        offsets: Of each of ``REGIONS``: where the first tensor's begins, and how far it is to the next one's.
    """
    rows = np.array([tensor.row() for tensor in tensors], dtype=np.int64)
    first, stride = np.array(offsets, dtype=np.int64).T
    return np.hstack([rows, first + stride * np.arange(len(tensors))[:, None]])


def spec_of(tensor: Located) -> Spec:
    """Return the compile-time description of a step."""
    param, grad, _, ctx = tensor.update
    plan, view = ctx.plan, ctx.plan.view
    batch, rows, columns = ctx.view if view else (1, 1, param.numel())
    return Spec(
        batch=batch,
        rows=rows,
        columns=columns,
        width=plan.width if view else columns,
        all_rows=view.rows if view else 1,
        numel=ctx.numel,
        param_dtype=param.dtype,
        grad_dtype=grad.dtype,
        state_dtype="float32" if plan.momentum == "none" else ctx.state_dtype,
        momentum=plan.momentum,
        factored=plan.factored,
        adaptive=ctx.is_adaptive,
        learns=ctx.learns_weights,
        residual=ctx.group["residual"] or not ctx.is_sketched,
        resamples=ctx.learns_weights if ctx.is_adaptive else ctx.is_sketched and ctx.is_resample_step,
        rounds=ctx.rounds_parameter(param.dtype),
        scales=ctx.group["scale_parameter"],
        is_split=bool(ctx.part.split),
        aligned=tensor.aligned,
    )


def scalars_of(ctx: StepContext) -> StepScalars:
    """Return the runtime scalars of a step."""
    group = ctx.group
    return StepScalars(
        beta1=group["beta1"] or 0.0,
        beta2=ctx.beta2,
        eps=group["eps"][0],
        least=group["eps"][1],
        lr=ctx.step_lr,
        sign=ctx.sign,
        decay=group["weight_decay"],
        clip_threshold=group["clip_threshold"],
    )
