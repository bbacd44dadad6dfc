"""Counter-based random numbers: any stream of a tensor at any step, on any device, without earlier draws.

Philox4x64-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in NumPy's order of
words. On the CPU NumPy draws them; elsewhere PyTorch's operations do, for many streams at once, so that only
the keys of the streams are copied from the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from threading import Lock
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from floragrad._streams import Stream

_GENERATOR = np.random.Philox(key=0)
_GENERATING = Lock()

_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Philox:
    """Stream of a tensor's random words.

    The words depend on the four fields alone: not on the device, the order of calls, or how many devices share the
    tensor.

    Attributes:
        seed: The optimizer's seed, 0 to 2**63 - 1.
        tensor_id: Key of the tensor's random streams.
        counter: The resample index for projections, the step for rounding.
        stream: Purpose of the stream.
    """

    seed: int
    tensor_id: int
    counter: int
    stream: Stream

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return the first ``count`` words, drawn by NumPy."""
        key = np.array([self.seed, self.tensor_id], dtype=np.uint64)
        counter = np.array([0, self.counter, int(self.stream), 0], dtype=np.uint64)
        # The construction of a generator would take four times as long.
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

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Return the first ``count`` words as int64 on a device."""
        return draw_words([Request(self, count)], device)[0]


class Request(NamedTuple):
    """Request for the first words of a stream.

    Attributes:
        source: The stream.
        words: Number of words.
    """

    source: Philox
    words: int


def draw_words(requests: Sequence[Request], device: torch.device) -> list[Tensor]:
    """Return 64-bit words as int64 tensors of (count,), drawn together on accelerators."""
    if device.type == "cpu":
        return [torch.from_numpy(each.source.words(each.words).view(np.int64)) for each in requests]
    return philox_words(requests, device) if requests else []


def philox_words(requests: Sequence[Request], device: torch.device) -> list[Tensor]:
    """Return the words as :func:`draw_words`, by PyTorch's operations on a device."""
    blocks = [ceil(each.words / 4) for each in requests]
    firsts = list(accumulate(blocks, initial=0))[:-1]
    table = [
        [source.seed, source.tensor_id, source.counter, int(source.stream), first, count]
        for (source, _), first, count in zip(requests, firsts, blocks, strict=True)
    ]
    total = sum(blocks)
    given = on_device(torch.tensor(table, dtype=torch.int64, device="cpu"), device)
    seed, tensor_id, counter, stream, first = given[:, :5].repeat_interleave(given[:, 5], dim=0, output_size=total).T
    number = torch.arange(1, total + 1, dtype=torch.int64, device=device) - first  # NumPy counts up before each block
    words = _philox(torch.stack([seed, tensor_id]), torch.stack([number, stream]), torch.stack([counter, 0 * counter]))
    return [
        words[first : first + count].flatten()[: each.words]
        for each, first, count in zip(requests, firsts, blocks, strict=True)
    ]


def _philox(key: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Run ten rounds on words 0 and 2, and 1 and 3, of each block, both (2, blocks); return (blocks, 4)."""
    device = key.device
    multiplier, step = (_constants(each, device) for each in (_MULTIPLIERS, _KEY_STEPS))
    for _ in range(_ROUNDS):
        high, low = _multiplied(multiplier, even)
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = key + step
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=1)


def _constants(values: tuple[int, int], device: torch.device) -> Tensor:
    """Return two unsigned words as int64 of (2, 1), filled on the device."""
    signed = [value - (value >> 63 << 64) for value in values]
    return torch.stack([torch.full((1,), value, dtype=torch.int64, device=device) for value in signed])


def _multiplied(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low 64 bits of unsigned products; int64 wraps, and holds the same bits."""
    a_low, a_high, b_low, b_high = a & _LOW, (a >> 32) & _LOW, b & _LOW, (b >> 32) & _LOW
    first, second, low = a_low * b_high, a_high * b_low, a_low * b_low
    carry = ((low >> 32) & _LOW) + (first & _LOW) + (second & _LOW)
    high = a_high * b_high + ((first >> 32) & _LOW) + ((second >> 32) & _LOW) + (carry >> 32)
    return high, a * b


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to a device without synchronization."""
    if device.type == "cuda" and torch.cuda.is_available():
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def halves(words: Tensor, count: int) -> Tensor:
    """Return ``count`` words of 32 bits, int32: of each word the low half first."""
    return words.view(torch.int32)[:count]


def half_count(count: int) -> int:
    """Return how many words :func:`halves` takes."""
    return ceil(count / 2)


def signs(words: Tensor, count: int) -> Tensor:
    """Return ``count`` independent signs, +1 and -1 with probability one half, float32.

    Of each byte the highest bit comes first.
    """
    shifts = torch.arange(8, dtype=torch.int8, device=words.device)
    unset = (words.view(torch.int8).unsqueeze(-1) << shifts).flatten()[:count] >= 0
    return torch.rsub(unset.float(), 1, alpha=2)


def sign_count(count: int) -> int:
    """Return how many words :func:`signs` takes."""
    return ceil(count / 64)
