"""Live bytes, seen by a dispatch mode: every storage that an operation makes, until it is freed.

The mode works on real and on fake tensors alike, so that predictions and measurements are counted by
one rule. It does not see memory that a kernel takes and frees inside itself, nor an allocator's rounding.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from floragrad.cli.plan.result import CATEGORIES

_POSITIONS = {category: position for position, category in enumerate(CATEGORIES)}


@dataclass
class _Held:
    """A live storage: its bytes, their category, and the parameter whose values or gradient it holds."""

    storage: "weakref.ref[torch.UntypedStorage]"
    size: int
    category: int
    name: str


@dataclass(frozen=True)
class Moment:
    """A stretch of a step, and the most that lived in it.

    Attributes:
        name: Of the stretch.
        peak: Live bytes of each category when they were most together.
        highest: The most bytes of each category by itself.
    """

    name: str
    peak: tuple[int, ...]
    highest: tuple[int, ...]

    def plus(self, **nbytes: int) -> "Moment":
        """Return the moment with more bytes of some categories, alive from its beginning to its end."""
        added = _vector(nbytes)
        return replace(self, peak=_sum(self.peak, added), highest=_sum(self.highest, added))


def moment_of(name: str, **nbytes: int) -> Moment:
    """Return a moment at which these bytes of some categories live."""
    return Moment(name, _vector(nbytes), _vector(nbytes))


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages made inside the context, by category and by moment of the step.

    New tensors count in the category of :meth:`phase`, at first ``"temporaries"``, until :meth:`hold` says which
    it is. Storages that were there before count from when they are held.

    Attributes:
        peak: The most bytes that lived at once.

    Example:
        >>> with MemoryTracker() as memory:
        ...     ones = torch.ones(1000, dtype=torch.float32, device="cpu")
        ...     del ones
        >>> memory.live, memory.peak
        (0, 4000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._by = [0] * len(CATEGORIES)
        self._known: dict[int, _Held] = {}
        self._category = _POSITIONS["temporaries"]
        self._follows = False
        self._word = self._name = ""
        self._moments: list[Moment] = []
        self._begin()

    @property
    def live(self) -> int:
        """Bytes that live now."""
        return sum(self._by)

    def bytes_of(self, category: str) -> int:
        """Bytes of a category that live now."""
        return self._by[_POSITIONS[category]]

    def cut(self) -> tuple[Moment, ...]:
        """Return the moments since the last cut, in order; neighbours of one name are one."""
        self._finish()
        moments, self._moments = self._moments, []
        self._begin()
        return merged(moments)

    def enter(self, name: str) -> None:
        """Begin a moment."""
        self._finish()
        self._name = name
        self._begin()

    def phase(self, word: str, category: str, *, follow: bool = False) -> None:
        """Begin a moment, and count new tensors in a category.

        Args:
            word: The moment's name.
            category: One of :data:`floragrad.cli.plan.result.CATEGORIES`.
            follow: Whether the moment becomes ``"<word> of <name>"`` with every operation on a storage that is held
                under a name.
        """
        self._word, self._category, self._follows = word, _POSITIONS[category], follow
        self.enter(word)

    @contextmanager
    def during(self, word: str, category: str, *, follow: bool = False) -> Iterator[None]:
        """Begin a :meth:`phase` that ends with the context."""
        before = self._word, self._category, self._follows, self._name
        self.phase(word, category, follow=follow)
        try:
            yield
        finally:
            self._word, self._category, self._follows, name = before
            self.enter(name)

    def hold(self, tensor: Tensor, category: str, name: str = "") -> None:
        """Count a tensor's storages as a category from the next moment or tensor on.

        Args:
            tensor: Any tensor; subclasses that wrap others count as the wrapped ones.
            category: One of :data:`floragrad.cli.plan.result.CATEGORIES`.
            name: Of the parameter that they belong to.
        """
        position = _POSITIONS[category]
        for storage in _storages(tensor):
            self._count(storage)
            held = self._known[id(storage)]
            self._by[held.category] -= held.size
            self._by[position] += held.size
            held.category, held.name = position, name or held.name

    def _touch(self, *tensors: Any) -> None:
        """Move on to the moment of the named storage that is worked on, where the phase follows names."""
        if not self._follows:
            return
        for each in tensors:
            held = self._known.get(id(each.untyped_storage())) if isinstance(each, Tensor) else None
            if held is not None and held.name:
                name = f"{self._word} of {held.name}"
                if name != self._name:
                    self.enter(name)
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked of fake tensors more often than all else
            return args[0].fake_device
        # What a wrapper does inside is seen when it has unwrapped itself.
        if any(hasattr(each, "__tensor_flatten__") for each in types):
            return NotImplemented
        self._touch(*args)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:
            # What torch.tensor made is new, though this is how it enters.
            args = ()
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._notice(tensor, args, kwargs)
        return result

    def _notice(self, tensor: Tensor, args: Any, kwargs: Any) -> None:
        """Count the tensors that an operation made, unless it returned its arguments."""
        for storage in _storages(tensor):
            if not self._is_known(storage):
                given = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
                if all(each.untyped_storage() is not storage for each in given):
                    self._count(storage)

    def _is_known(self, storage: torch.UntypedStorage) -> bool:
        held = self._known.get(id(storage))
        return held is not None and held.storage() is storage

    def _count(self, storage: torch.UntypedStorage) -> None:
        if self._is_known(storage):
            return
        key = id(storage)

        def freed(_: Any) -> None:
            gone = self._known.pop(key)
            self._by[gone.category] -= gone.size

        held = _Held(weakref.ref(storage, freed), storage.nbytes(), self._category, "")
        self._known[key] = held
        self._by[held.category] += held.size
        self._observe()

    def _begin(self) -> None:
        """Open the stretch of the current moment."""
        self._total, self._peak, self._highest = -1, [0], list(self._by)
        self._observe()

    def _finish(self) -> None:
        """Keep the stretch that is open."""
        self._moments.append(Moment(self._name, tuple(self._peak), tuple(self._highest)))

    def _observe(self) -> None:
        """Take note of live bytes, and of the most of each category by itself."""
        self._highest = [max(pair) for pair in zip(self._highest, self._by, strict=True)]
        total = sum(self._by)
        if total > self._total:
            self._total, self._peak = total, list(self._by)
            self.peak = max(self.peak, total)


def merged(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Return the moments with neighbours of one name as one."""
    found: list[Moment] = []
    for moment in moments:
        if found and found[-1].name == moment.name:
            before = found.pop()
            highest = tuple(map(max, before.highest, moment.highest))
            moment = Moment(moment.name, max(before.peak, moment.peak, key=sum), highest)
        found.append(moment)
    return tuple(found)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor, or of the tensors that it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def _vector(nbytes: dict[str, int]) -> tuple[int, ...]:
    assert nbytes.keys() <= set(CATEGORIES)
    return tuple(nbytes.get(category, 0) for category in CATEGORIES)


def _sum(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
