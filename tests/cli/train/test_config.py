import json
from dataclasses import replace

import pytest

from floragrad.cli.errors import UserError
from floragrad.cli.methods import EMBEDDING_LR, METHODS
from floragrad.cli.presets import FINE_TUNING_LEARNING_RATE, PRESETS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.defaults import rank_of


def test_defaults_are_the_presets() -> None:
    for name, preset in PRESETS.items():
        config = RunConfig.resolve(model=name)
        assert (config.steps, config.batch_size, config.sequence_length, config.vocab_size) == (
            preset.steps,
            preset.batch_size,
            preset.sequence_length,
            preset.vocab_size,
        )
        assert config.rank == rank_of(preset.hidden_size) == preset.hidden_size // 4


@pytest.mark.parametrize("optimizer", METHODS)
def test_each_method_has_its_own_learning_rate(optimizer: str) -> None:
    config = RunConfig.resolve(optimizer=optimizer)
    assert (config.lr, config.embedding_lr) == (METHODS[optimizer].lr, pytest.approx(EMBEDDING_LR))
    tuned = RunConfig.resolve(optimizer=optimizer, model="somebody/model")
    assert tuned.lr == pytest.approx(FINE_TUNING_LEARNING_RATE * METHODS[optimizer].lr / METHODS["adamw"].lr)


def test_a_shared_vocabulary_has_floras_learning_rate_beside_every_method() -> None:
    for optimizer in METHODS:
        assert RunConfig.resolve(optimizer=optimizer, vocabulary="shared", lr=7e-4).embedding_lr == EMBEDDING_LR
    assert RunConfig.resolve(vocabulary="shared", embedding_lr=3e-3).embedding_lr == 3e-3


def test_the_embedding_follows_a_given_learning_rate() -> None:
    default = RunConfig.resolve()
    config = RunConfig.resolve(lr=3 * default.lr)
    assert config.embedding_lr == pytest.approx(3 * default.embedding_lr)
    assert RunConfig.resolve(lr=1e-3, embedding_lr=7e-3).embedding_lr == 7e-3


def test_a_model_with_weights_is_tuned_gently() -> None:
    config = RunConfig.resolve(model="somebody/model")
    assert config.lr == config.embedding_lr == FINE_TUNING_LEARNING_RATE
    assert config.vocab_size is None


def test_floras_options_are_floras_only() -> None:
    config = RunConfig.resolve(optimizer="adamw")
    assert (config.rank, config.kappa, config.projection, config.state_dtype) == (None,) * 4
    assert RunConfig.resolve(projection="adaptive").kappa == 100
    assert RunConfig.resolve().kappa == 1000


def test_gradients_are_gathered_as_suits_the_optimizer() -> None:
    alone, flora, adamw = (
        RunConfig.resolve(**options) for options in ({}, {"accumulate": 4}, {"accumulate": 4, "optimizer": "adamw"})
    )
    assert [config.accumulator for config in (alone, flora, adamw)] == ["none", "flora", "exact"]
    sketch = (flora.accumulator_ratio, flora.accumulator_dtype, flora.accumulator_projection, flora.release)
    assert sketch == (1, "int4", "sign", True)
    assert (alone.accumulator_ratio, adamw.accumulator_dtype, adamw.release) == (None, None, None)
    assert RunConfig.resolve(accumulate=4, optimizer="adamw", accumulator="flora").release is False
    assert [config.tokens_per_step // alone.tokens_per_step for config in (alone, flora, adamw)] == [1, 4, 4]
    assert RunConfig.resolve(accumulate=4, accumulator="none").tokens_per_step == alone.tokens_per_step


def test_only_the_default_job_is_bounded() -> None:
    assert RunConfig.resolve().max_megabytes == 4
    assert RunConfig.resolve(text=("a.txt",)).max_megabytes is None
    assert RunConfig.resolve(model="small").max_megabytes is None
    assert RunConfig.resolve(dataset="somebody/text").max_megabytes == 200


def test_json_gives_the_same_configuration_back() -> None:
    config = replace(RunConfig.resolve(text=("a.txt", "b"), lr=3e-4, max_megabytes=0.1), prepared="../../corpus")
    assert RunConfig.from_json(config.to_json()) == config


def test_a_run_from_before_there_were_several_processes_is_read() -> None:
    config = RunConfig.resolve()
    older = {name: value for name, value in json.loads(config.to_json()).items() if name not in ("fsdp", "timeout")}
    assert RunConfig.from_json(json.dumps(older)) == config


def test_a_run_may_be_started_in_another_way() -> None:
    config = RunConfig.resolve(fsdp=True, timeout=60)
    assert config.launched(None, None) == config
    assert config.launched(False, 5) == replace(config, fsdp=False, timeout=5)


SHARDED = [
    ({"optimizer": "muon"}, "muon takes whole ones only: choose --optimizer flora or adamw"),
    ({"vocabulary": "shared"}, "--fsdp has one optimizer for all tensors: leave it out, or --vocabulary shared"),
    ({"optimizer": "adafactor"}, "Hugging Face's Adafactor takes whole ones only: choose --optimizer flora or adamw"),
    ({"backend": "jax"}, "--fsdp is PyTorch's: leave it out with --backend jax"),
]


@pytest.mark.parametrize(("options", "message"), SHARDED, ids=str)
def test_what_takes_no_parts_of_tensors_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig.resolve(fsdp=True, **options)
    with pytest.raises(UserError, match=message):
        RunConfig.resolve(**options).launched(True, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "tiny"}', '{"no": "field"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"config\.json is not a run's configuration"):
        RunConfig.from_json(text)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "8", r"config\.json is not a run's configuration \(steps is '8'\)"),
        ("steps", True, r"\(steps is True\)"),
        ("steps", 1.5, r"\(steps is 1.5\)"),
        ("steps", None, r"\(steps is None\)"),
        ("keep_checkpoint", "yes", r"\(keep_checkpoint is 'yes'\)"),
        ("text", 3, r"config\.json is not a run's configuration"),
        ("lr", [1], r"\(lr is \[1\]\)"),
        ("steps", -8, "--steps is -8: give a whole number of at least 1"),
        ("batch_size", 0, "--batch-size is 0: give a whole number of at least 1"),
        ("lr", float("nan"), "--lr is nan: give a number above 0"),
        ("optimizer", "sgd", "--optimizer 'sgd' is unknown"),
        ("threads", 10**9, "--threads is 1000000000: give a whole number of at least 1 and at most 4096"),
    ],
)
def test_values_of_a_file_are_checked_too(name: str, value: object, message: str) -> None:
    values = json.loads(RunConfig.resolve().to_json())
    with pytest.raises(UserError, match=message):
        RunConfig.from_json(json.dumps({**values, name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, f"--optimizer 'sgd' is unknown: choose one of {', '.join(METHODS)}"),
        ({"projection": "dct"}, "--projection 'dct' is unknown: choose one of sign, adaptive, gaussian"),
        ({"state_dtype": "int2"}, "--state-dtype 'int2' is unknown: choose one of float32, bfloat16, int8, int4"),
        ({"schedule": "step"}, "--schedule 'step' is unknown: choose one of cosine, linear, constant"),
        (
            {"report_to": ("wandb",), "backend": "jax"},
            "--report-to belongs to --backend torch, and this is jax: leave it out",
        ),
        (
            {"validation_text": ("a",), "task": "vision"},
            "--validation-text belongs to --task lm, and this is vision: leave it out",
        ),
        ({"dtype": "float16"}, "--dtype 'float16' is unknown: choose one of float32, bfloat16"),
        ({"steps": 0}, "--steps is 0: give a whole number of at least 1"),
        ({"sequence_length": 1}, "--sequence-length is 1: give a whole number of at least 2"),
        ({"vocab_size": 256}, "--vocab-size is 256: give a whole number of at least 257"),
        ({"rank": 0}, "--rank is 0: give a whole number of at least 1"),
        ({"seed": -1}, "--seed is -1: give a whole number of at least 0 and at most 4294967295"),
        ({"seed": 2**32}, "--seed is 4294967296: give a whole number of at least 0 and at most 4294967295"),
        ({"timeout": 10**12}, "--timeout is 1000000000000: give a whole number of at least 1 and at most 10000000"),
        ({"lr": 0.0}, "--lr is 0.0: give a number above 0"),
        ({"embedding_lr": float("nan")}, "--embedding-lr is nan: give a number above 0"),
        ({"max_megabytes": -1.0}, "--max-megabytes is -1.0: give a number above 0"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1: give a number of 0 or more"),
        ({"max_grad_norm": float("inf")}, "--max-grad-norm is inf: give a number of 0 or more"),
        (
            {"steps": 10, "warmup_steps": 10},
            "--warmup-steps 10 leaves none of the 10 steps for the full learning rate: give at most 9, or more --steps",
        ),
        (
            {"text": ("a",), "dataset": "b"},
            "--text and --dataset are both given, and a run reads one of them: leave one out",
        ),
        (
            {"text_column": "body"},
            "--text-column belongs to --dataset, which is not given: add it, or leave it out",
        ),
        (
            {"optimizer": "adamw", "rank": 4},
            "--rank belongs to --optimizer flora, and this is adamw: leave it out",
        ),
        (
            {"optimizer": "flora-full", "rank": 4},
            "--rank belongs to --optimizer flora, and this is flora-full: leave it out",
        ),
        (
            {"optimizer": "muon", "backend": "jax"},
            "--backend jax trains with flora, adamw, adafactor, and --optimizer muon is none of them: choose one, or "
            "leave --backend out",
        ),
        (
            {"vocabulary": "shared", "backend": "jax"},
            "--vocabulary shared is PyTorch's: leave it out with --backend jax",
        ),
        ({"accumulate": 0}, "--accumulate is 0: give a whole number of at least 1"),
        (
            {"accumulate": 2, "accumulator": "sum"},
            "--accumulator 'sum' is unknown: choose one of flora, exact, none",
        ),
        (
            {"accumulator": "exact"},
            "--accumulator exact gathers the gradients of several micro-batches, and --accumulate is 1: give "
            "--accumulate 2 or more, or leave it out",
        ),
        (
            {"accumulate": 2, "accumulator": "exact", "accumulator_ratio": 2},
            "--accumulator-ratio belongs to --accumulator flora, and this is exact: leave it out, or give "
            "--accumulator flora and --accumulate 2 or more",
        ),
        (
            {"release": True},
            "--release belongs to --accumulator flora, and this is none: leave it out, or give --accumulator flora "
            "and --accumulate 2 or more",
        ),
        (
            {"optimizer": "adamw", "accumulate": 2, "accumulator": "flora", "release": True},
            "--release belongs to --optimizer flora, and this is adamw: leave it out",
        ),
        (
            {"model": "somebody/model", "vocab_size": 1000},
            "--vocab-size does not apply to --model somebody/model, which has a tokenizer of its own: leave it out",
        ),
    ],
)
def test_wrong_values_are_refused_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.resolve(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["steps", "seed", "warmup_steps"])
def test_the_smallest_values_are_allowed(name: str) -> None:
    smallest = {"steps": 1, "seed": 0, "warmup_steps": 0}[name]
    assert getattr(RunConfig.resolve(**{name: smallest}), name) == smallest
