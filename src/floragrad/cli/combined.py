"""One optimizer made of several, each with parameters of its own."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

Groups: TypeAlias = Sequence[dict[str, Any]]
Make: TypeAlias = Callable[[Groups], Optimizer]


class CombinedOptimizer(Optimizer):
    """Step several optimizers as one. Its groups are the parts' own, so that schedulers act on them.

    Args:
        params: The groups of each part, with their ``kind``.
        makes: The constructor of each part.
    """

    def __init__(self, params: Sequence[Groups], makes: Sequence[Make]) -> None:
        self.parts: list[Optimizer] = []
        super().__init__([{**group} for groups in params for group in groups], {})  # it changes the groups
        kinds = {param: group["kind"] for group in self.param_groups for param in group["params"]}
        self.parts = [make(groups) for make, groups in zip(makes, params, strict=True)]
        self._join()
        for group in self.param_groups:
            group.setdefault("kind", kinds[group["params"][0]])  # Gefen makes groups of its own

    def _join(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The state of every parameter, as its part keeps it."""
        return {param: state for part in self.parts for param, state in part.state.items()}

    @state.setter
    def state(self, _value: Any) -> None:
        """Ignore the empty state that the base class sets: the parts have theirs."""

    def step(self, closure: Any = None) -> Any:
        """Make a step of every part."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of every part."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()
