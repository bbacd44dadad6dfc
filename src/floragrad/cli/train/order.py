"""Order in which a run reads its examples, and the sample that it validates with."""

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
HELD_OUT: Final = 10
"""Every tenth example is held out."""


class Order:
    """Indices of examples: each once and in order, or shuffled anew for every pass.

    The order follows from ``seed`` and the position alone, so that a run may start anywhere in it, and runs with
    different optimizers read the same batches.

    Args:
        examples: How many there are.
        seed: Of the shuffling; None keeps the order.
        total: Examples to serve; more than there are begin a further pass. None serves each once.
    """

    def __init__(self, examples: int, seed: int | None = None, total: int | None = None) -> None:
        self._total = examples if total is None else total
        self._seed = seed
        self._pass = -1
        self._order: NDArray[np.int64] = np.arange(examples)

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, position: int) -> int:
        number, index = divmod(position, len(self._order))
        if self._seed is not None and number != self._pass:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, number]))
            self._order, self._pass = generator.permutation(len(self._order)), number
        return int(self._order[index])


def divide(examples: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the examples to train on, and those held out. It goes by position, never by chance.

    Example:
        >>> divide(range(12))
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [9])
    """
    train = [each for index, each in enumerate(examples) if index % HELD_OUT != HELD_OUT - 1]
    return train, list(examples[HELD_OUT - 1 :: HELD_OUT])


def sampled(examples: int, count: int) -> NDArray[np.int64]:
    """Draw ``count`` of ``examples`` indices without replacement and sort them; all where there are no more.

    The draw is fixed, so that all runs on the same data validate with the same examples, and a larger sample contains
    the smaller ones. It uses the generator's raw bits, which are the same in every version of NumPy.

    Example:
        >>> sampled(20, 4), sampled(20, 6)
        (array([ 0,  2, 11, 17]), array([ 0,  1,  2,  9, 11, 17]))
    """
    order = np.argsort(np.random.Philox(key=0).random_raw(examples), kind="stable")
    return np.sort(order[:count])
