"""What the JAX backend saves: the weights as transformers reads them, and the optimizer's state beside them."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp  # type: ignore[import-untyped]
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from floragrad.train.jax.model import DTYPES, Llama, abstract_llama
from floragrad.train.jax.weights import Params, from_transformers, to_transformers

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


def restore(folder: Path, params: Params, optimizer_state: Any) -> tuple[Params, Any]:
    """The weights and the optimizer's state of a checkpoint, bit for bit.

    Args:
        folder: What :func:`save` wrote.
        params: The weights' tree, of arrays or their shapes.
        optimizer_state: The state's tree, of arrays or their shapes and dtypes.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder.resolve() / OPTIMIZER, optimizer_state)
    return from_transformers(load_file(folder / WEIGHTS), params), state


def load_llama(folder: str | Path) -> Llama:
    """The trained model of a checkpoint's folder, or of any folder with such a Llama of transformers.

    Args:
        folder: With ``config.json`` and ``model.safetensors``.
    """
    config = LlamaConfig.from_pretrained(folder)
    # Where torch is installed, transformers reads its name of the dtype as torch's.
    graph, shapes = abstract_llama(config, DTYPES[str(config.dtype).removeprefix("torch.")])
    model: Llama = nnx.merge(graph, from_transformers(load_file(Path(folder) / WEIGHTS), shapes))
    return model
