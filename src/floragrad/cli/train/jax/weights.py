"""A Llama's weights under transformers' names and in transformers' layout."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

Params = dict[str, Any]
"""The weights as nested dictionaries of arrays: ``nnx.to_pure_dict`` of the model's state."""


def parameter_names(params: Params) -> Params:
    """Return Transformers' name of every weight, in a tree of the same structure.

    Example:
        >>> parameter_names({"layers": {0: {"mlp": {"up_proj": {"kernel": 0}}}}})
        {'layers': {0: {'mlp': {'up_proj': {'kernel': 'model.layers.0.mlp.up_proj.weight'}}}}}
    """
    names: Params = jax.tree_util.tree_map_with_path(lambda path, _: _name(path), params)
    return names


def to_transformers(params: Params) -> dict[str, NDArray[Any]]:
    """Return the weights as ``LlamaForCausalLM`` names and stores them: matrices are (outputs, inputs) there."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # safetensors writes a buffer as it lies in memory, so that a transposed view would be saved untransposed.
    return {_name(path): np.ascontiguousarray(_turned(path, np.asarray(leaf))) for path, leaf in leaves}


def from_transformers(weights: Mapping[str, NDArray[Any]], like: Params) -> Params:
    """Return the weights of :func:`to_transformers` as a tree of the structure of ``like``, exactly."""
    params: Params = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.numpy.asarray(_turned(path, weights[_name(path)])), like
    )
    return params


def _name(path: tuple[Any, ...]) -> str:
    *modules, _ = (str(key.key) for key in path)
    prefix = "" if modules[0] == "lm_head" else "model."
    return f"{prefix}{'.'.join(modules)}.weight"


def _turned(path: tuple[Any, ...], weight: NDArray[Any]) -> NDArray[Any]:
    """Kernels change between (inputs, outputs) and (outputs, inputs); all else stays."""
    return weight.T if path[-1].key == "kernel" else weight
