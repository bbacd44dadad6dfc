"""Random numbers by counting: any of a tensor's streams, at any step, without what came before."""

from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt

from floragrad._streams import Stream

_GENERATOR = np.random.Philox(key=0)
_GENERATING = Lock()


@dataclass(frozen=True)
class Philox:
    """The counter-based numbers of one tensor's stream at one epoch or step.

    They depend on the four fields alone: not on the device, the order of calls, or how many devices share the tensor.

    Attributes:
        seed: The optimizer's seed, 0 to 2**63 - 1.
        index: The number that the tensor's random streams are drawn with.
        counter: The epoch for projections, the step for rounding.
        stream: Which of the tensor's streams.
    """

    seed: int
    index: int
    counter: int
    stream: Stream

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The first ``count`` of them."""
        key = np.array([self.seed, self.index], dtype=np.uint64)
        counter = np.array([0, self.counter, int(self.stream), 0], dtype=np.uint64)
        # A generator of its own would take four times as long to make.
        with _GENERATING:
            _GENERATOR.state = {
                "bit_generator": "Philox",
                "state": {"counter": counter, "key": key},
                "buffer": np.zeros(4, dtype=np.uint64),
                "buffer_pos": 4,
                "has_uint32": 0,
                "uinteger": 0,
            }
            return _GENERATOR.random_raw(count)
