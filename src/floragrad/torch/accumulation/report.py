"""Report of an accumulator: the sketch of each gradient, its bytes, and the reason for its format."""

from dataclasses import dataclass
from typing import ClassVar

from floragrad._table import TableReport
from floragrad._text import format_bytes
from floragrad.policy import AccumulatorPlan, StateDtype


@dataclass(frozen=True)
class AccumulatorRow:
    """Row of one tensor.

    Attributes:
        name: Its name where the optimizer was given named parameters, else its position.
        shape: Its shape.
        ratio: ρ; 1 keeps every column.
        state_dtype: Storage format of its sketch.
        state_bytes: Bytes of its sketch.
        exact_bytes: Bytes of its gradient in float32.
        reason: Reason for another format than asked for; empty without one.
    """

    name: str
    shape: tuple[int, ...]
    ratio: int
    state_dtype: StateDtype
    state_bytes: int
    exact_bytes: int
    reason: str


@dataclass(frozen=True)
class AccumulatorReport(TableReport[AccumulatorRow]):
    """Report with one row per tensor, and totals; ``str`` gives a table, and a notebook shows one."""

    header: ClassVar = ("parameter", "shape", "ρ", "stored as", "sketch", "note")
    rows: tuple[AccumulatorRow, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of all sketches."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def exact_bytes(self) -> int:
        """Bytes of all gradients in float32, which exact accumulation keeps."""
        return sum(row.exact_bytes for row in self.rows)

    def cells(self, row: AccumulatorRow) -> tuple[str, ...]:
        """Return a line of the table."""
        shape = "x".join(map(str, row.shape)) or "scalar"
        return row.name, shape, str(row.ratio), row.state_dtype, format_bytes(row.state_bytes), row.reason

    def totals(self) -> list[str]:
        """Return the line below the table."""
        total = f"sketches {format_bytes(self.state_bytes)}"
        if self.exact_bytes:
            share = self.state_bytes / self.exact_bytes
            total += f", {share:.1%} of the gradients in float32 ({format_bytes(self.exact_bytes)})"
        return [total]


def accumulator_row(
    name: str, plan: AccumulatorPlan, sketched: bool, held: bool, unreduced: AccumulatorPlan | None = None
) -> AccumulatorRow:
    """Return the row of one parameter.

    Args:
        name: Its name.
        plan: Of its sketch.
        sketched: False where no gradient is ever kept.
        held: True with a second copy of the sum, to drop a micro-batch.
        unreduced: Of the sketch of the whole tensor, beside that of the shard.
    """
    copy = sum(buffer.nbytes for key, buffer in plan.buffers.items() if key != "col_var") if held else 0
    copy += 0 if unreduced is None else unreduced.state_bytes
    return AccumulatorRow(
        name=name,
        shape=plan.shape if unreduced is None else unreduced.shape,
        ratio=plan.ratio,
        state_dtype=plan.state_dtype,
        state_bytes=plan.state_bytes + copy if sketched else 0,
        exact_bytes=plan.exact_bytes if unreduced is None else unreduced.exact_bytes,
        reason=plan.reason if sketched else "steps=1: nothing is kept",
    )
