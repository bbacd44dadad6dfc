"""What was compressed, what was not, why, and in how many bytes."""

from collections import Counter
from dataclasses import dataclass
from typing import Final

from floragrad._text import format_bytes, format_table
from floragrad.policy import MatrixView, Momentum

FROZEN: Final = "frozen: no state"
"""The reason of a tensor that is not trained."""


@dataclass(frozen=True)
class ReportRow:
    """One tensor.

    Attributes:
        name: Its name where the optimizer was given named parameters, else its position.
        shape: Its global shape.
        view: Its matrix view, None where it has none.
        ratio: ρ, 1 where every column is kept.
        momentum: ``"sketch"``, ``"whole"`` or ``"none"``.
        state_bytes: Bytes of its state.
        adamw_bytes: Bytes of AdamW's state for it: ``torch.optim``'s or ``optax``'s.
        adafactor_bytes: Bytes of Adafactor's with momentum: Hugging Face's or ``optax``'s.
        reason: Why its momentum is no sketch; empty where it is one.
        path: Which code updates it: ``"native (…)"`` with the instruction set, or ``"eager (…)"`` with
            what stands in the native kernels' way. Empty where there is no choice.
    """

    name: str
    shape: tuple[int, ...]
    view: MatrixView | None
    ratio: int
    momentum: Momentum
    state_bytes: int
    adamw_bytes: int
    adafactor_bytes: int
    reason: str
    path: str = ""


@dataclass(frozen=True)
class Report:
    """One row per tensor, and totals; ``str`` gives a table.

    Attributes:
        rows: The tensors.
        shared_bytes: Bytes of state that belong to no tensor: counts of steps.
    """

    rows: tuple[ReportRow, ...]
    shared_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.shared_bytes + sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes of AdamW's state for the same parameters."""
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def adafactor_bytes(self) -> int:
        """Bytes of Adafactor's with momentum."""
        return sum(row.adafactor_bytes for row in self.rows)

    @property
    def compressed(self) -> int:
        """How many tensors keep their momentum as a sketch."""
        return sum(row.momentum == "sketch" for row in self.rows)

    def __str__(self) -> str:
        header = ("parameter", "shape", "view", "ρ", "state", "kept")
        cells = [header, *(_cells(row) for row in self.rows)]
        return "\n".join([*format_table(cells), "", *self._totals()])

    def _totals(self) -> list[str]:
        frozen = sum(row.reason == FROZEN for row in self.rows)
        trained = len(self.rows) - frozen
        tensors = ("1 tensor" if trained == 1 else f"{trained} tensors") + (
            f" ({frozen} more frozen)" if frozen else ""
        )
        lines = [f"{self.compressed} of {tensors} keep a sketch; state {format_bytes(self.state_bytes)}"]
        for name, peer in (("AdamW", self.adamw_bytes), ("Adafactor with momentum", self.adafactor_bytes)):
            if peer:
                lines.append(f"{name}: {format_bytes(peer)} ({self.state_bytes / peer:.1%} of it here)")
        paths = Counter(row.path for row in self.rows if row.path)
        if paths:
            lines.append("updated by: " + ", ".join(f"{path} {count}" for path, count in paths.most_common()))
        return lines


def _cells(row: ReportRow) -> tuple[str, ...]:
    view = "-"
    if row.view is not None:
        stack = f"{row.view.batch} x " if row.view.batch > 1 else ""
        view = f"{stack}{row.view.rows} x {row.view.columns}"
    ratio = str(row.ratio) if row.momentum == "sketch" else "-"
    kept = "sketch" if row.momentum == "sketch" else row.reason
    return (
        row.name,
        "x".join(map(str, row.shape)) or "scalar",
        view,
        ratio,
        format_bytes(row.state_bytes),
        kept,
    )
