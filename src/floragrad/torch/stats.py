"""Metrics of updates, on request: the eager backend computes an update before it is made, on a copy of the state."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from floragrad._checks import check_value, is_count
from floragrad.torch import update as pure
from floragrad.torch.backends import eager
from floragrad.torch.context import ParamUpdate
from floragrad.torch.part import Passes
from floragrad.torch.projection import BucketProjection
from floragrad.torch.step import step


class _Sums(NamedTuple):
    """Sums over one tensor, or over several."""

    grad: float = 0.0
    param: float = 0.0
    kept: float = 0.0
    sketched: float = 0.0
    direction: float = 0.0
    update: float = 0.0
    clipped: float = 0.0
    elements: float = 0.0
    tensors: float = 0.0


class StatsCollector:
    """Measures the updates of a step before it is made, for :meth:`floragrad.Flora.stats`.

    Args:
        every: Distance n of measured steps: 1, 1 + n, 1 + 2n, …

    Raises:
        ValueError: ``every`` is below 1.
    """

    def __init__(self, every: int) -> None:
        check_value("every", every, (is_count, "an integer >= 1, or 0 to measure nothing"))
        self._every = every
        self._measured: dict[Tensor, Tensor] = {}

    def collect(self, updates: Mapping[Tensor, ParamUpdate]) -> None:
        """Measure updates, if it is their turn; parameters and states are left as they are."""
        due = {param: update for param, update in updates.items() if (update.ctx.step - 1) % self._every == 0}
        found: dict[int, Tensor] = {}

        def passes_of(updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
            for update, words in eager.with_words(updates):
                yield _MeasuredStep(update, words, found).run()

        step(list(due.values()), passes_of)
        for param, update in due.items():
            if update.ctx.tensor_id in found:
                self._measured[param] = found[update.ctx.tensor_id]

    def summary(self, groups: Sequence[Mapping[str, Any]], *, by_group: bool) -> dict[str, float]:
        """Return the metrics of all parameters; see :meth:`floragrad.Flora.stats`."""
        sums = [self._group_sums(group) for group in groups]
        metrics = _metrics(sums)
        if by_group:
            for index, each in enumerate(sums):
                metrics |= {f"group{index}/{name}": value for name, value in _metrics([each]).items()}
        return metrics

    def _group_sums(self, group: Mapping[str, Any]) -> _Sums:
        measured = [self._measured[param] for param in group["params"] if param in self._measured]
        if not measured:
            return _Sums()
        together = torch.stack([each.to(measured[0].device) for each in measured])  # one copy to the host
        return _Sums(*map(sum, zip(*together.tolist(), strict=True)))


def _metrics(groups: Sequence[_Sums]) -> dict[str, float]:
    total = _Sums(*map(sum, zip(*groups, strict=True)))
    if not total.tensors:
        return {}
    metrics = {
        "grad_norm": total.grad**0.5,
        "param_norm": total.param**0.5,
        "update_norm": total.update**0.5,
        "update_rms": (total.direction / total.elements) ** 0.5,
        "clipped": total.clipped / total.tensors,
    }
    return metrics | ({"sketch_energy": total.kept / total.sketched} if total.sketched else {})


class _MeasuredStep(eager.EagerStep):
    """Step that measures its update and makes none; the state is a copy.

    Args:
        update: The update.
        words: Its random words.
        found: Result of each tensor, by its id: the numbers of :class:`_Sums`.
    """

    def __init__(self, update: ParamUpdate, words: eager.Words, found: dict[int, Tensor]) -> None:
        super().__init__(update._replace(state={name: value.clone() for name, value in update.state.items()}), words)
        zero = torch.zeros((), dtype=torch.float32, device=update.ctx.device)
        self._found, self._kept, self._sketched = found, zero, zero.clone()
        self._whole: list[Tensor] = []

    def run(self) -> Passes:
        """Measure."""
        ctx = self._ctx
        yield from super().run()
        squares = [pure.square_norm(self._grads), pure.square_norm(self._param), self._kept, self._sketched]
        local = torch.stack([square.float() for square in squares])
        yield [ctx.shard_sum(local)]
        count = local.new_tensor([ctx.numel, 1])
        self._found[ctx.tensor_id] = torch.cat([local, torch.stack(self._whole), count])

    def _encode(self, estimator: pure.Estimator) -> tuple[Tensor, Tensor]:
        sketches, square = super()._encode(estimator)
        if isinstance(estimator.projection, BucketProjection):
            self._sketched = square.clone()
        return sketches, square

    def _correct(self, sketches: Tensor, estimator: pure.Estimator, *, moves: bool) -> Tensor:
        if isinstance(estimator.projection, BucketProjection):
            kept = (sketches.square() / estimator.projection.gram).sum()
            self._kept = kept / self._ctx.part.column_parts  # all parts of a row have its whole sketch
        return super()._correct(sketches, estimator, moves=moves)

    def _apply(self, square: Tensor, alpha: float | Tensor) -> None:
        ctx, threshold = self._ctx, self._ctx.group["clip_threshold"]
        square = square.clamp(min=0)
        size = pure.clipped_step_size(alpha, square, ctx.numel, threshold)
        self._whole = [square, size.float().square() * square, (square > threshold**2 * ctx.numel).float()]
