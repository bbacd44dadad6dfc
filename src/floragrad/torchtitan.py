"""Flora in torchtitan: an ``OptimizersContainer`` for the configuration of a run."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer

from floragrad.torch import Flora, param_groups

__all__ = ["FloraOptimizersContainer"]


class FloraOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """One :class:`floragrad.Flora` for each model part, its parameters grouped by :func:`floragrad.param_groups`.

    The parts are sharded already. Checkpoints are torchtitan's, keyed by parameter names; its loop sums micro-batches
    in ``.grad``.

    Args:
        config: Learning rates, weight decay and Flora's options; ``param_groups`` of the base class stay empty.
        model_parts: Of the pipeline; without one, the model.

    Raises:
        ValueError: ``config.param_groups`` is set.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """Configuration, in place of ``default_adamw(...)``.

        Attributes:
            lr: Learning rate.
            embedding_lr: Of embeddings and output heads; None: ``lr``.
            weight_decay: Of everything but vectors.
            options: Of :class:`floragrad.Flora`.
        """

        lr: float
        embedding_lr: float | None = None
        weight_decay: float = 0.0
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups:
            raise ValueError(
                "param_groups of FloraOptimizersContainer: floragrad.param_groups() makes them; leave it out"
            )
        self.model_parts = model_parts
        self.optimizers = [
            Flora(_named_groups(part, config), **config.options) for part in model_parts if list(part.parameters())
        ]
        self._post_init([param for each in self.optimizers for group in each.param_groups for param in group["params"]])


def _named_groups(part: nn.Module, config: FloraOptimizersContainer.Config) -> list[dict[str, Any]]:
    """Return the groups of a model part, with the names that torchtitan's checkpoints have."""
    groups = param_groups(part, config.lr, config.embedding_lr, config.weight_decay)
    return [{**group, "params": [(canonical_fqn(name), param) for name, param in group["params"]]} for group in groups]
