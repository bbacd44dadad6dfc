"""FloraTrainer against transformers.Trainer: the same losses, norms and parameters where nothing is rounded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from floragrad import Flora, param_groups
from floragrad.transformers import FloraFactory, FloraTrainer, FloraTrainerMixin
from tests.marks import slow
from tests.torch.accumulation_cases import flat

EXACT = {"state_dtype": "float32"}
STEPS = 4
EXAMPLES = 20  # ten micro-batches of two: windows of 4, 4 and 2


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def examples() -> list[dict[str, torch.Tensor]]:
    """With as many labels to learn from as the example's number: micro-batches differ in tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(EXAMPLES):
        tokens = torch.randint(0, 64, (12,), generator=generator)
        labels = tokens.clone()
        labels[2 + number // 2 :] = -100
        made.append({"input_ids": tokens, "labels": labels})
    return made


RATES = {"lr": 1e-2, "embedding_lr": 3e-2, "weight_decay": 0.1}
OPTIONS = {"rank": 4, "state_dtype": "float32"}


def flora(model: torch.nn.Module) -> Flora:
    return Flora(param_groups(model, **RATES), **OPTIONS)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


class Means:
    """A Trainer subclass with a loss and a training step of its own, blind to the tokens of a window."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.loss_is_scaled_for_ga = False
        return super().training_step(*args, **kwargs)


class HalfPrecision:
    """fp16 with a scaler, which Accelerate turns on for GPUs alone, on the CPU; the second window overflows."""

    seen = 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.seen == STEPS + 2 else loss


class StopsInAWindow(TrainerCallback):
    """Ends every epoch two micro-batches into its second window."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.substeps = getattr(self, "substeps", 0) + 1
        control.should_epoch_stop = self.substeps % (STEPS + 1) == 0
        return control


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: The test's id.
        optimizer: Of the model; None leaves it to the Trainer.
        accumulation: Of FloraTrainer, besides float32.
        arguments: Of TrainingArguments.
        base: What a subclass adds.
        callback: Made for each run.
        tolerance: Relative.
    """

    name: str
    optimizer: Callable[..., torch.optim.Optimizer] | None = flora
    accumulation: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    base: type = object
    callback: type | None = None
    tolerance: float = 1e-6

    def __str__(self) -> str:
        return self.name


CHECKPOINTED = {"gradient_checkpointing": True}
REENTRANT = {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
CASES = [
    Case("flora"),
    Case("flora-not-clipped", arguments={"max_grad_norm": 0.0}),
    # Norms are of sketches here, of gradients there. Their last bit turns roundings of bf16 in later steps.
    Case("flora-bf16", arguments={"bf16": True}, tolerance=2e-4),
    # Scale and clipping are one factor here, two there. Their last bit turns roundings of fp16 in later steps.
    Case("flora-fp16", base=HalfPrecision, tolerance=2e-4),
    Case("flora-checkpointing", arguments=CHECKPOINTED),
    Case("flora-reentrant-checkpointing", arguments=REENTRANT),
    Case("flora-means", base=Means),
    Case("flora-stopped", callback=StopsInAWindow),
    Case("flora-materialised", accumulation={"release": False}),
    Case("adamw", adamw),
    Case("adamw-not-clipped", adamw, arguments={"max_grad_norm": 0.0}),
    Case("adamw-bf16", adamw, arguments={"bf16": True}),
    Case("adamw-fp16", adamw, base=HalfPrecision),
    Case("adamw-means", adamw, base=Means),
    Case("adamw-stopped", adamw, callback=StopsInAWindow),
    Case("sgd-of-the-trainer", None, arguments={"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}),
]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {
        "gradient_accumulation_steps": STEPS,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**given, **options})


def trainer(case: Case, folder: Path, compress: bool, **accumulation: Any) -> Trainer:
    model = llama()
    made = type(
        "Trainer" if not compress else "FloraTrainer",
        ((case.base,) if case.base is not object else ()) + ((FloraTrainer,) if compress else (Trainer,)),
        {},
    )
    options: dict[str, Any] = {"accumulation": {**EXACT, **case.accumulation, **accumulation}} if compress else {}
    if case.optimizer is not None:
        options["optimizers"] = (case.optimizer(model), None)
    callbacks = [case.callback()] if case.callback else None
    given = arguments(folder, **case.arguments)
    return made(model, given, train_dataset=examples(), callbacks=callbacks, **options)


def logged(run: Trainer, key: str) -> torch.Tensor:
    return torch.tensor([entry[key] for entry in run.state.log_history if key in entry])


# Each of them with Flora, where gradients are freed on the way; AdamW's rows are of the sketches alone.
REPEATED = ("adamw-not-clipped", "adamw-bf16", "adamw-fp16", "adamw-means", "flora-checkpointing")


@pytest.mark.parametrize("case", [(slow if case.name in REPEATED else pytest.param)(case) for case in CASES], ids=str)
def test_it_equals_the_trainer(case: Case, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    ours, theirs = (trainer(case, tmp_path, compress) for compress in (True, False))
    ours.train()
    theirs.train()
    assert ours.state.global_step == theirs.state.global_step >= 2
    assert len(logged(theirs, "grad_norm")) == theirs.state.global_step
    for key in ("loss", "grad_norm", "learning_rate"):
        found, expected = logged(ours, key), logged(theirs, key)
        scale = expected[expected.isfinite()].abs().max()
        assert torch.allclose(found / scale, expected / scale, rtol=0, atol=case.tolerance, equal_nan=True), key
    assert logged(theirs, "grad_norm").isfinite().all() != (case.base is HalfPrecision)
    moved = flat(theirs.model) - flat(llama())
    assert (flat(ours.model) - flat(theirs.model)).abs().max() <= case.tolerance * flat(theirs.model).abs().max()
    assert moved.abs().max() > 1e-3
    assert not [w for w in recwarn if "optimizer.step()" in str(w.message)]


@pytest.mark.parametrize("kind", [Trainer, FloraTrainer])
def test_the_factory_groups_the_parameters_and_resumes(kind: type[Trainer], tmp_path: Path) -> None:
    given = arguments(tmp_path, save_strategy="steps", save_steps=2, num_train_epochs=1)

    def run(resume: bool = False, **optimizer: Any) -> Trainer:
        made = kind(llama(), given, train_dataset=examples(), **optimizer)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return made

    factory: Any = {"optimizer_cls_and_kwargs": (FloraFactory, {**RATES, **OPTIONS})}
    whole = run(**factory)
    groups = whole.optimizer.optimizer.param_groups
    assert [(group["kind"], group["initial_lr"], group["weight_decay"]) for group in groups] == [
        ("matrix", 1e-2, 0.1),
        ("vocabulary", 3e-2, 0.1),
        ("vector", 1e-2, 0.0),
    ]
    assert torch.equal(flat(run(resume=True, **factory).model), flat(whole.model))
    model = llama()
    by_hand = kind(model, given, train_dataset=examples(), optimizers=(flora(model), None))
    by_hand.train()
    assert torch.equal(flat(model), flat(whole.model))


def test_gradients_are_compressed_and_the_model_is_given_back(tmp_path: Path) -> None:
    held, bits = [], []

    class Watch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held.append(sum(param.grad is not None for param in run.model.parameters()))
            rows = run.optimizer.window.report().rows
            bits.append({row.state_dtype for row in rows if len(row.shape) == 2})

        on_pre_optimizer_step = on_substep_end

    model = llama()
    run = FloraTrainer(
        model, arguments(tmp_path), train_dataset=examples(), optimizers=(flora(model), None), callbacks=[Watch()]
    )
    for _ in range(2):  # train() may be called again
        run.train()
        assert len(held) == EXAMPLES  # two epochs of ten micro-batches
        assert not any(held)
        assert bits == [{"int4"}] * EXAMPLES
        held.clear()
        bits.clear()
        batch = {key: value[None] for key, value in examples()[0].items()}
        model(**batch).loss.backward()
        assert all(param.grad is not None for param in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize("optimizer", [flora, adamw])
def test_resumed_bit_for_bit(optimizer: Any, tmp_path: Path) -> None:
    """Between two windows there is no gradient to save, but the number that rounding and signs go on from."""
    case = Case("resume", optimizer, {"state_dtype": "int4", "ratio": 2}, {"save_strategy": "steps", "save_steps": 2})
    whole = trainer(case, tmp_path, True)
    whole.train()
    resumed = trainer(case, tmp_path, True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert torch.equal(logged(resumed, "grad_norm"), logged(whole, "grad_norm"))
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["accumulation"]
    assert (saved["window"], saved["seen"]) == (4, 0)
    assert not any(sketch["folds"] for sketch in saved["sketches"].values())


@pytest.mark.parametrize("optimizer", [flora, adamw])
def test_resumed_from_inside_a_window_as_the_trainer_does(optimizer: Any, tmp_path: Path) -> None:
    """An epoch that was stopped there is resumed with the window's first micro-batch: its sketches are dropped."""
    case = Case("stopped", optimizer, arguments={"save_strategy": "epoch"}, callback=StopsInAWindow)
    results = []
    for compress in (True, False):
        folder = tmp_path / str(compress)
        trainer(case, folder, compress).train()
        if compress:
            saved = torch.load(folder / "checkpoint-1" / "optimizer.pt", weights_only=True)["accumulation"]
            assert saved["seen"] > 0
        resumed = trainer(Case("resumed", optimizer), folder, compress)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        results.append(flat(resumed.model))
    assert (results[0] - results[1]).abs().max() <= 1e-6 * results[1].abs().max()


def test_a_checkpoint_of_the_trainer_is_taken_up(tmp_path: Path) -> None:
    case = Case("exchange", arguments={"save_strategy": "steps", "save_steps": 3})
    theirs = trainer(case, tmp_path, False)
    theirs.train()
    ours = trainer(case, tmp_path, True)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (flat(ours.model) - flat(theirs.model)).abs().max() <= 1e-6 * flat(theirs.model).abs().max()


def test_a_failed_run_leaves_no_hooks(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    run = trainer(Case("fails", callback=Fails), tmp_path, True)
    with pytest.raises(ZeroDivisionError):
        run.train()
    next(iter(run.model.parameters())).sum().backward()


def test_one_step_is_the_trainer(tmp_path: Path) -> None:
    case = Case("one", arguments={"gradient_accumulation_steps": 1})
    ours, theirs = (trainer(case, tmp_path, compress) for compress in (True, False))
    ours.train()
    theirs.train()
    assert type(ours.optimizer) is type(theirs.optimizer)
    assert torch.equal(flat(ours.model), flat(theirs.model))


def test_refusals_name_the_way_out(tmp_path: Path) -> None:
    run = trainer(Case("ratio"), tmp_path, True, ratio=0)
    with pytest.raises(ValueError, match="ratio=0"):
        run.train()
    model = llama()
    part = Flora(model.model.layers[0].parameters(), lr=1e-2, rank=4)
    run = FloraTrainer(model, arguments(tmp_path), train_dataset=examples(), optimizers=(part, None))
    with pytest.raises(ValueError, match="freeze what is not trained"):
        run.train()

    factory = (FloraFactory, {"lr": 1e-2})
    with pytest.raises(RuntimeError, match="give one of them"):
        FloraTrainer(model, arguments(tmp_path), optimizers=(flora(model), None), optimizer_cls_and_kwargs=factory)

    class Own(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.__class__ = type("Special", (type(self.accelerator),), {})

    with pytest.raises(RuntimeError, match="makes a Special"):
        type("Both", (FloraTrainerMixin, Own), {})(llama(), arguments(tmp_path))
