"""FloraTrainerMixin in front of TRL's trainers: their losses, norms and parameters where nothing is rounded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer

from floragrad.transformers import FloraFactory, FloraTrainerMixin
from tests.integrations.test_transformers import EXACT, OPTIONS, RATES, llama, logged
from tests.torch.accumulation_cases import flat


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(61))]
    model = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def numbers(first: int, count: int) -> str:
    return " ".join(str(each % 61) for each in range(first, first + count))


def texts() -> list[dict[str, str]]:
    return [{"text": numbers(first, 4 + first)} for first in range(8)]


def preferences() -> list[dict[str, str]]:
    return [
        {"prompt": numbers(first, 3), "chosen": " " + numbers(first + 3, 4), "rejected": " " + numbers(2 * first, 3)}
        for first in range(8)
    ]


def prompts() -> list[dict[str, str]]:
    return [{"prompt": numbers(first, 3)} for first in range(8)]


def ones(completions: list[str], **_: Any) -> list[float]:
    """Reward of GRPO."""
    return [float(text.count("1")) for text in completions]


@dataclass(frozen=True)
class Case:
    """One trainer.

    Attributes:
        name: The test's id.
        trainer: The name of TRL's trainer, and the first part of its configuration's.
        data: Its examples.
        options: Of the trainer, made anew for each.
        configuration: Of its configuration.
    """

    name: str
    trainer: str
    data: Callable[[], list[dict[str, str]]]
    options: Callable[[], dict[str, Any]] = dict
    configuration: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("sft", "SFT", texts),
    Case("sft-lora", "SFT", texts, lambda: {"peft_config": LoraConfig(r=8, target_modules="all-linear")}),
    Case("dpo", "DPO", preferences, lambda: {"ref_model": llama()}),
    Case(
        "grpo",
        "GRPO",
        prompts,
        lambda: {"reward_funcs": ones},
        {"num_generations": 2, "max_completion_length": 6, "steps_per_generation": 2},
    ),
]


def made(case: Case, folder: Path, compress: bool) -> Trainer:
    configuration = getattr(trl, f"{case.trainer}Config")(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **case.configuration,
    )
    theirs = getattr(trl, f"{case.trainer}Trainer")
    options: dict[str, Any] = {
        "args": configuration,
        "train_dataset": Dataset.from_list(case.data()),
        "processing_class": tokenizer(),
        **case.options(),
    }
    factory = (FloraFactory, {**RATES, **OPTIONS})
    if compress:
        ours = type("Ours", (FloraTrainerMixin, theirs), {})
        return ours(llama(), **options, optimizer_cls_and_kwargs=factory, accumulation=EXACT)
    trainer = theirs(llama(), **options)
    trainer.optimizer_cls_and_kwargs = factory  # DPOTrainer and GRPOTrainer have no such argument
    return trainer


def trained(case: Case, folder: Path, compress: bool) -> Trainer:
    trainer = made(case, folder, compress)  # sets the seed of GRPO's completions
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_trls_trainer(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")  # or TRL reports its use
    ours, theirs = (trained(case, tmp_path, compress) for compress in (True, False))
    assert ours.state.global_step == theirs.state.global_step == 2
    for key in ("loss", "grad_norm"):
        assert torch.allclose(logged(ours, key), logged(theirs, key), rtol=1e-5, atol=1e-6), key
    assert (flat(ours.model) - flat(theirs.model)).abs().max() <= 1e-6 * flat(theirs.model).abs().max()
    assert (logged(theirs, "grad_norm") > 1e-3).all()
    # Of what is trained alone, folded and freed as it appears.
    assert ours.accumulator.releases
    names = {name for name, param in ours.model.named_parameters() if param.requires_grad}
    assert {row.name for row in ours.optimizer.optimizer.report().rows} == names
    assert len(ours.accumulator.report().rows) == len(names)
