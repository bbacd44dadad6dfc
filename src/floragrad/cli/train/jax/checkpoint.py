"""Checkpoints of the JAX backend: weights as transformers reads them, and the optimizer's state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp  # type: ignore[import-untyped]
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from floragrad.cli.train.jax.model import DTYPES, Llama, abstract_llama
from floragrad.cli.train.jax.weights import Params, from_transformers, to_transformers
from floragrad.jax.upgrade import PROJECTION_ID, upgrade_state

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer"


def save(folder: Path, model_config: Any, params: Params, optimizer_state: Any) -> None:
    """Write a folder that ``LlamaForCausalLM.from_pretrained`` reads, with the optimizer's state for :func:`restore`.

    Args:
        folder: A folder that does not exist.
        model_config: The model's ``LlamaConfig``.
        params: The weights.
        optimizer_state: Any tree of arrays; orbax writes it.
    """
    folder.mkdir(parents=True)
    model_config.save_pretrained(folder)
    save_file(to_transformers(params), folder / WEIGHTS, metadata={"format": "pt"})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / OPTIMIZER, optimizer_state)


def restore(folder: Path, params: Params, init: Callable[[Params], Any], kappa: int | None) -> tuple[Params, Any]:
    """Read the weights and the optimizer's state of a checkpoint, bit for bit.

    Args:
        folder: Output of :func:`save`, of this version or one whose states had no ``projection_id``.
        params: The weights' tree, of arrays or their shapes.
        init: The optimizer's.
        kappa: Flora's interval between projections; None for other optimizers.
    """
    weights, path = from_transformers(load_file(folder / WEIGHTS), params), folder.resolve() / OPTIMIZER
    target = jax.eval_shape(init, params)
    with ocp.StandardCheckpointer() as checkpointer:
        if kappa is not None and _has_ids(target) and not _has_ids(checkpointer.metadata(path).item_metadata.tree):
            return weights, upgrade_state(checkpointer.restore(path), init(weights), kappa)
        return weights, checkpointer.restore(path, target)


def _has_ids(state: Any) -> bool:
    return any(PROJECTION_ID in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


def load_llama(folder: str | Path) -> Llama:
    """Return the trained model of a checkpoint's folder, or of any folder with such a Llama of transformers.

    Args:
        folder: With ``config.json`` and ``model.safetensors``.
    """
    config = LlamaConfig.from_pretrained(folder)
    # Where torch is installed, transformers reads its name of the dtype as torch's.
    graph, shapes = abstract_llama(config, DTYPES[str(config.dtype).removeprefix("torch.")])
    model: Llama = nnx.merge(graph, from_transformers(load_file(Path(folder) / WEIGHTS), shapes))
    return model
