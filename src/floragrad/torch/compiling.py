"""Functions under ``torch.compile``, each compiled for all that it may depend on, and launched for little."""

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor

from floragrad.torch.tensor_step import TensorStep

BACKEND: Final = "inductor"
"""Of ``torch.compile``."""


def maybe_compiled(function: Callable[..., Any], at: TensorStep, *also: Hashable) -> Callable[..., Any]:
    """The function, under ``torch.compile`` where the group asks for it and the tensor is worth a graph's launch."""
    return _guarded(function, at.view, at.device, *also) if at.is_compiled else function


@cache
def _guarded(function: Callable[..., Any], *_specialised: Hashable) -> Callable[..., Any]:
    return torch.compile(_copy(function), backend=BACKEND, fullgraph=True, dynamic=False)


@cache
def graph_of(function: Callable[..., None], *_specialised: Hashable) -> "Graph":
    """The function's graph for what it is specialised to."""
    return Graph(function)


def leaves(values: tuple[Any, ...]) -> list[Any]:
    """What is in a tuple of values and tuples, in order."""
    found = []
    for each in values:
        if isinstance(each, tuple):
            found += leaves(each)
        else:
            found.append(each)
    return found


class Graph:
    """A function of tensors in tuples, which it writes to, as one graph that is launched without dynamo.

    Dynamo runs once, to compile. Each time after, it would look whether the graph is of such arguments, and find the
    tensors in them, which takes longer than the launch itself. So a graph belongs to everything that it may depend on
    (dtypes, devices, strides; on a CPU, the number of threads), and is given the tensors as dynamo found them.

    Args:
        function: It returns nothing; every tensor that it is given is another one.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._compiled = torch.compile(_copy(function), backend=self._compile, fullgraph=True, dynamic=False)
        self._given: list[int] = []
        self._order: list[int] = []
        self._launch: Callable[..., Any] | None = None

    def __call__(self, tensors: Sequence[Any], *args: Any) -> None:
        """Run it.

        Args:
            tensors: All that are in ``args``, in an order that stays the same; laid out like those before them.
            args: The function's.
        """
        if self._launch is not None:
            self._launch(*[tensors[position] for position in self._order])
            return
        self._given = [id(each) for each in tensors]
        self._compiled(*args)

    def _compile(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        """Dynamo's backend: the real one's code, and where in the arguments its inputs are."""
        from torch._dynamo import lookup_backend

        launch = lookup_backend(BACKEND)(graph, examples)

        def first(*inputs: Tensor) -> Any:
            self._order = [self._given.index(id(each)) for each in inputs]
            self._launch = launch
            return launch(*inputs)

        return first


def _copy(function: Callable[..., Any]) -> FunctionType:
    """The function with code of its own.

    Dynamo compiles one code object at most 8 times, and this many tensors' shapes, ratios and decays would be more:
    each combination gets a code object of its own. A new step or learning rate compiles nothing.
    """
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
