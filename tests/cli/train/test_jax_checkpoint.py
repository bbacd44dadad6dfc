"""Checkpoints of the JAX backend, of this version and of the one whose states had no projection_id."""

from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import LlamaConfig

from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.jax.checkpoint import restore, save
from floragrad.cli.train.jax.model import DTYPES, abstract_llama
from floragrad.cli.train.jax.optimizers import transformation
from tests.jax.test_identity import as_earlier

LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, dtype="float32"
)


@pytest.mark.parametrize("earlier", [False, True], ids=["this version", "before projection_id"])
def test_a_checkpoint_is_restored_bit_for_bit(earlier: bool, tmp_path: Path) -> None:
    """One of before is in the projection of its step: count // kappa."""
    config = RunConfig.resolve(steps=10, warmup_steps=0, kappa=3, rank=4)
    _, shapes = abstract_llama(LLAMA, DTYPES["float32"])
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    optimizer = transformation(config)
    state = jax.tree.map(lambda leaf: leaf + 7 if leaf.dtype == np.int32 else leaf, optimizer.init(params))
    expected = jax.tree.map(lambda leaf: leaf.at[2].set(7 // 3) if leaf.dtype == np.uint32 else leaf, state)
    save(tmp_path / "checkpoint", LLAMA, params, as_earlier(state) if earlier else expected)
    weights, found = restore(tmp_path / "checkpoint", shapes, optimizer.init, config.kappa)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, (weights, found), (params, expected))
