"""Report of the optimizer state: compression, reasons and bytes of each tensor."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

from floragrad._table import TableReport
from floragrad._text import format_bytes
from floragrad.policy import MatrixView, Momentum

FROZEN: Final = "frozen: no state"
"""Reason of a tensor that is not trained."""


@dataclass(frozen=True)
class ReportRow:
    """One tensor.

    Attributes:
        name: Name, for an optimizer with named parameters; else the position.
        shape: Global shape.
        view: Matrix view; None without one.
        ratio: ρ, 1 without a projection.
        momentum: ``"sketch"``, ``"whole"`` or ``"none"``.
        state_bytes: Bytes of the optimizer state.
        adamw_bytes: Bytes of AdamW's state, of ``torch.optim`` or ``optax``.
        adafactor_bytes: Bytes of the state of Adafactor with momentum, of Hugging Face or ``optax``.
        reason: Reason for a momentum that is no sketch; empty for a sketch.
        path: Code that updates the tensor: ``"native (…)"`` with the instruction set, or ``"eager (…)"`` with the
            reason against the native kernels. Empty in JAX, which has one path.
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
class Report(TableReport[ReportRow]):
    """Rows of tensors, and totals; ``str`` gives a table, and a notebook shows one.

    Attributes:
        rows: One row for each tensor.
        shared_bytes: Bytes of state that belong to no tensor: counts of steps; default 0.
    """

    header: ClassVar = ("parameter", "shape", "view", "ρ", "state", "kept")
    rows: tuple[ReportRow, ...]
    shared_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of all tensors."""
        return self.shared_bytes + sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes of AdamW's state for the same parameters."""
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def adafactor_bytes(self) -> int:
        """Bytes of the state of Adafactor with momentum for the same parameters."""
        return sum(row.adafactor_bytes for row in self.rows)

    @property
    def compressed(self) -> int:
        """Number of tensors with a sketch as momentum."""
        return sum(row.momentum == "sketch" for row in self.rows)

    def totals(self) -> list[str]:
        """Return the lines below the table."""
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

    def cells(self, row: ReportRow) -> tuple[str, ...]:
        """Return a line of the table."""
        view = "-"
        if row.view is not None:
            stack = f"{row.view.batch} x " if row.view.batch > 1 else ""
            view = f"{stack}{row.view.rows} x {row.view.columns}"
        ratio = str(row.ratio) if row.momentum == "sketch" else "-"
        kept = "sketch" if row.momentum == "sketch" else row.reason
        shape = "x".join(map(str, row.shape)) or "scalar"
        return row.name, shape, view, ratio, format_bytes(row.state_bytes), kept


def low_compression_warning(hidden: Sequence[ReportRow]) -> str:
    """Return a warning with the remedy if less than half of the momentum is compressed, else an empty string.

    Args:
        hidden: Tensors whose momentum is meant to be compressed; frozen ones do not count.
    """
    trained = [row for row in hidden if row.reason != FROZEN]
    left = sorted((row for row in trained if row.momentum != "sketch"), key=lambda row: -prod(row.shape))
    total = sum(prod(row.shape) for row in trained)
    missing = sum(prod(row.shape) for row in left)
    if 2 * missing <= total:
        return ""
    compressed = "no momentum" if missing == total else f"{1 - missing / total:.0%} of the momentum of hidden tensors"
    reasons = ", ".join(f"{row.name} ({row.reason})" for row in left[:5])
    more = f", and {len(left) - 5} more" if len(left) > 5 else ""
    remedy = "a smaller rank compresses more, and ratio=1 keeps every column without this warning"
    if any(row.reason.startswith("vocabulary-like") for row in left):
        remedy = f"param_groups(model) tells embeddings from matrices by the model's modules; {remedy}"
    return f"Flora compresses {compressed} here: {reasons}{more}; {remedy}"
