"""Flora in ms-swift: importing this module registers ``--optimizer flora``.

``--external_plugins`` takes a file; one with the line ``import floragrad.swift`` is enough. Give Flora's options as
``--optim_args rank=64,embedding_lr=1e-3``; ``--learning_rate`` and ``--weight_decay`` apply.
"""

from ast import literal_eval
from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from floragrad.torch import Flora
from floragrad.transformers import FloraFactory

__all__ = ["FloraOptimizerCallback"]


class FloraOptimizerCallback(OptimizerCallback):  # type: ignore[misc]
    """Callback of ``--optimizer flora``."""

    def create_optimizer(self, model: Any = None) -> Flora:
        """Return the optimizer of the trainer's model, or of the model that is given."""
        args = self.args
        rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        return FloraFactory()(self.trainer.model if model is None else model, **{**rates, **parsed(args.optim_args)})


def parsed(options: str | None) -> dict[str, Any]:
    """Parse ``name=value,...``; a value that is no literal of Python is a string.

    Example:
        >>> parsed("rank=64, state_dtype=int4")
        {'rank': 64, 'state_dtype': 'int4'}
    """
    found: dict[str, Any] = {}
    for each in filter(None, (options or "").replace(" ", "").split(",")):
        name, _, value = each.partition("=")
        try:
            found[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


optimizers_map["flora"] = FloraOptimizerCallback
