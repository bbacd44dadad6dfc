"""``floragrad train --backend jax`` next to the PyTorch backend."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, set_seed

from floragrad.cli.errors import DivergenceError
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import Corpus
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.jax import loop
from floragrad.cli.train.jax.checkpoint import load_llama
from floragrad.cli.train.jax.model import Llama, abstract_llama, next_token_loss
from floragrad.cli.train.jax.weights import from_transformers
from floragrad.cli.train.models import build_model
from floragrad.cli.train.run import begin, train
from tests.cli.train.support import (
    FAST,
    Meddler,
    assert_same_run,
    fast_config,
    interrupt,
    load_tokenizer,
    newest,
    quiet,
    read_json,
    run,
    timeless,
)
from tests.cli.train.test_interrupt import stopped_by_ctrl_c
from tests.marks import slow

SMALL = replace(PRESETS["tiny"], hidden_size=64, intermediate_size=96, heads=2, layers=1)
"""What ``tiny`` is here: XLA compiles each of a model's matrices, and three layers take three times as long as one."""


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory, unoptimized: None) -> Iterator[dict[str, str]]:
    """What is compiled once is compiled once: a run that goes on, or is made again, finds it. The environment of it.

    Without LLVM's optimizations, which take longer than the runs.
    """
    cache = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for names in (cache, before):
        for name, value in names.items():
            jax.config.update(name, value)
        reset_cache()
        if names is cache:
            environment = {name.upper(): str(value) for name, value in cache.items()}
            yield environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


REDRAWN = {"steps": 12, "eval_every": 5, "save_every": 5, "kappa": 3}


def as_options(given: Mapping[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def jax_config(texts: Path, **options: Any) -> RunConfig:
    return fast_config(texts, backend="jax", **options)


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory, compiled: dict[str, str]) -> RunFolder:
    """A run with Flora, made by the command itself in a process that cannot import torch."""
    out = tmp_path_factory.mktemp("runs") / "jax"
    arguments = ["train", "--backend", "jax", "--text", str(texts), "--out", str(out)]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from floragrad.cli import main\n"
        "from floragrad.cli.presets import PRESETS\n"
        f"PRESETS['tiny'] = type(PRESETS['tiny'])(**{vars(SMALL)!r})\n"
        f"sys.exit(main({[*arguments, *as_options({**FAST, **REDRAWN})]!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | compiled
    )
    assert (result.returncode, result.stderr) == (0, "")
    return RunFolder.open(out)


def test_the_folder_is_that_of_the_other_backend(finished: RunFolder, texts: Path, tmp_path: Path) -> None:
    other = run(fast_config(texts, **REDRAWN), tmp_path / "torch")
    assert {path.name for path in finished.path.iterdir()} == {path.name for path in other.path.iterdir()}
    for line, wanted in zip(finished.metrics(), other.metrics(), strict=True):
        assert line.keys() == wanted.keys()
        assert (line["step"], line["tokens"]) == (wanted["step"], wanted["tokens"])
    ours, theirs = (read_json(folder.path / "summary.json") for folder in (finished, other))
    # Hidden matrices are measured by themselves with PyTorch only.
    assert ours.keys() == theirs.keys() - {"hidden_parameters", "hidden_state_bytes"}
    for name in ("parameters", "tokens", "steps", "gradient_bytes", "accumulation_bytes"):
        assert ours[name] == theirs[name], name
    assert (ours["backend"], theirs["backend"]) == ("jax", "torch")
    architectures = [read_json(newest(folder) / "config.json") for folder in (finished, other)]
    for architecture in architectures:
        del architecture["use_cache"]  # off while the Trainer trains
    assert architectures[0] == architectures[1]
    assert Corpus.load(finished.corpus).facts == Corpus.load(other.corpus).facts


def test_the_model_learns(finished: RunFolder) -> None:
    losses = [line["validation_loss"] for line in finished.metrics() if "validation_loss" in line]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2)
    assert losses[-1] < 0.85 * losses[0]


def test_transformers_reads_the_checkpoint(finished: RunFolder) -> None:
    blocks = Corpus.load(finished.corpus).validation_blocks(finished.config)
    rows = np.stack([blocks[position]["input_ids"] for position in range(len(blocks))])
    tokens = torch.tensor(rows)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(newest(finished))(input_ids=tokens, labels=tokens).loss.item()
    ours = next_token_loss(load_llama(newest(finished)), jnp.asarray(rows)).item()
    validated = read_json(finished.path / "summary.json")["validation_loss"]
    assert theirs == pytest.approx(validated, rel=1e-5)
    evaluated = finished.metrics()[-1]["block_losses"]
    assert mean(evaluated) == pytest.approx(validated, abs=1e-6)
    assert len(set(evaluated)) == len(blocks) == 4
    assert ours == pytest.approx(validated, rel=1e-6)
    assert len(load_tokenizer(newest(finished))) == 300


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "linear"},
        {
            **{"optimizer": "adafactor", "accumulate": 3, "batch_size": 1, "max_grad_norm": 0.1},
            **{"schedule": "constant", "gradient_checkpointing": True},
        },
    ],
    ids=lambda options: options["optimizer"],
)
def test_from_the_same_weights_both_backends_make_the_same_run(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any]
) -> None:
    """Same batches, losses, norms and learning rates, step by step; 1e-4 is what test_run allows two float32 runs."""

    def drawn(model_config: Any, dtype: Any, _rngs: nnx.Rngs) -> Llama:
        set_seed(config.seed)
        model = build_model("AutoModelForCausalLM", config, 300)
        weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
        graph, shapes = abstract_llama(model_config, dtype)
        return nnx.merge(graph, from_transformers(weights, shapes))

    config = jax_config(texts, **options)
    monkeypatch.setattr(loop, "Llama", drawn)
    ours = timeless(run(config, tmp_path / "jax"))
    theirs = timeless(run(fast_config(texts, **options), tmp_path / "torch"))
    for line, wanted in zip(ours, theirs, strict=True):
        if "block_losses" in wanted:
            blocks = wanted.pop("block_losses")
            assert line.pop("block_losses") == pytest.approx(blocks, rel=1e-4)
            # s/√n moves by no more than the losses that it is made of.
            error = wanted.pop("standard_error")
            assert line.pop("standard_error") == pytest.approx(error, abs=1e-4 * max(blocks))
        assert line == pytest.approx(wanted, rel=1e-4)


CASES = {
    "flora sketched": {
        **{"dtype": "bfloat16", "projection": "adaptive", "kappa": 3, "state_dtype": "int4"},
        **{"accumulate": 2, "batch_size": 1, "accumulator_ratio": 2},
    },
    "adamw exact": {
        **{"optimizer": "adamw", "accumulate": 2, "batch_size": 1},
        **{"schedule": "linear", "gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize(
    "options",
    [slow(CASES["adamw exact"], id="adamw exact"), pytest.param(CASES["flora sketched"], id="flora sketched")],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """And no step compiles anything again."""
    traced = []
    original = loop.next_token_losses
    monkeypatch.setattr(loop, "next_token_losses", lambda *given: traced.append(1) or original(*given))
    config = jax_config(texts, **{"steps": 6, "eval_every": 3, **options})
    assert_same_run(interrupt(config, tmp_path / "stopped", 4), run(config, tmp_path / "whole"))
    assert len(traced) == 3 * 2, "once for the step, once for the validation, whenever a run begins or goes on"


def test_a_crash_loses_only_what_came_after_the_checkpoint(texts: Path, tmp_path: Path, finished: RunFolder) -> None:
    folder = begin(jax_config(texts, **REDRAWN), tmp_path / "crashed")
    with pytest.raises(ZeroDivisionError):
        train(folder, Meddler(8, ZeroDivisionError()))
    assert [step for step, _ in folder.checkpoints()] == [5]
    train(folder, quiet())
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on(texts: Path, tmp_path: Path) -> None:
    stopped_by_ctrl_c(tmp_path / "run", "--backend", "jax", "--optimizer", "adamw", "--text", texts)


def test_a_run_that_diverges_stops_and_says_where(texts: Path, tmp_path: Path) -> None:
    each_step = {"eval_every": 1, "save_every": 1}
    options = {"optimizer": "adamw", "lr": 1e30, "max_grad_norm": 0.0, "warmup_steps": 1, **each_step}
    folder = begin(jax_config(texts, **options), tmp_path / "run")
    with pytest.raises(DivergenceError, match=r"at step \d+: give a lower --lr") as caught:
        train(folder, quiet())
    last = folder.metrics()[-1]
    assert (last["step"], last.get("loss")) == (caught.value.step, None)
    assert folder.checkpoints()[-1][0] < caught.value.step
    assert all(np.isfinite(weight).all() for weight in load_file(newest(folder) / "model.safetensors").values())


def test_state_bytes_are_those_of_the_saved_state(finished: RunFolder) -> None:
    """Orbax's own record of what it wrote, next to the summary."""
    with ocp.StandardCheckpointer() as checkpointer:
        record = checkpointer.metadata((newest(finished) / "optimizer").resolve()).item_metadata.tree
    saved = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(record))
    assert read_json(finished.path / "summary.json")["optimizer_state_bytes"] == saved


def test_it_needs_no_torch(finished: RunFolder) -> None:
    assert finished.summary() is not None
