"""The model that a plan is about, as the tracer asks for it."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Subject(Protocol):
    """A model that can be built with any number of its repeated blocks, on whatever device is the default one."""

    @property
    def name(self) -> str:
        """Name of the model in the plan."""
        ...

    @property
    def blocks(self) -> int:
        """Number of repeated blocks; of an encoder-decoder, in each of both halves.

        With n of N blocks :meth:`build` gives the same model, that many blocks shallower: memory is traced on a few
        blocks and is linear in their number.
        """
        ...

    def build(self, dtype: torch.dtype, blocks: int) -> nn.Module:
        """Return the model in training mode, its weights in ``dtype``, with ``blocks`` blocks; no key-value cache."""
        ...

    def inputs(self, batch: int, sequence: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward pass, labels among them, so that its output has a ``loss``.

        Images are in ``dtype``, the weights': not every model casts them.
        """
        ...
