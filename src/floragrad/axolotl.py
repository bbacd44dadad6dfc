"""Flora in axolotl: a plugin, ``plugins: [floragrad.axolotl.FloraPlugin]``."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from floragrad.torch import Flora
from floragrad.torch.integrations.transformers import FloraFactory, extend_trainer

__all__ = ["FloraArgs", "FloraPlugin"]


class FloraArgs(BaseModel):
    """Keys that the plugin adds to axolotl's configuration.

    Attributes:
        flora: Options of :class:`floragrad.Flora`, such as ``{rank: 64}``.
        flora_accumulation: Options of the windows, as of :class:`floragrad.GradientAccumulator`.
    """

    flora: dict[str, Any] | None = None
    flora_accumulation: dict[str, Any] | None = None


class _Factory(FloraFactory):
    """Factory that axolotl gives its training arguments as well."""

    def __call__(self, model: nn.Module, _args: Any = None, **options: Any) -> Flora:  # type: ignore[override]
        return super().__call__(model, **options)


class FloraPlugin(BasePlugin):  # type: ignore[misc]
    """Train with Flora; ``gradient_accumulation_steps`` micro-batches are kept as sketches.

    ``learning_rate``, ``embedding_lr`` and ``weight_decay`` of axolotl's configuration apply; ``optimizer`` does not.
    Every trainer of axolotl is extended, whichever it chose for ``rl``.
    """

    def get_input_args(self) -> str:
        """Return the class of the configuration's further keys."""
        return f"{__name__}.{FloraArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer Flora's factory, and sketches if it accumulates."""
        args = trainer.args
        rates = {
            "lr": args.learning_rate,
            "embedding_lr": getattr(args, "embedding_lr", None),
            "weight_decay": args.weight_decay,
        }
        trainer.optimizer_cls_and_kwargs = (_Factory, {**rates, **(cfg.flora or {})})
        if args.gradient_accumulation_steps > 1:
            extend_trainer(trainer, cfg.flora_accumulation)
