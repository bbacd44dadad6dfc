"""The presets are the models that they are called after."""

import pytest
import torch

from floragrad.cli.plan.models import find_model
from floragrad.cli.plan.presets import MODELS

CHECKPOINTS = {
    # Parameters of the published checkpoints, tied ones once.
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "vit-b-16": 86_567_656,
    "vit-l-16": 304_326_632,
}
MILLIONS = {
    # As the GaLore paper's own training script prints them.
    "llama-60m": 58.07,
    "llama-130m": 134.11,
    "llama-350m": 367.97,
    "llama-1b": 1339.08,
}


def parameters(name: str) -> int:
    model = find_model(name)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model.build(torch.bfloat16).parameters())


def test_every_preset_is_checked() -> None:
    assert CHECKPOINTS.keys() | MILLIONS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_those_of_the_checkpoint(name: str) -> None:
    assert parameters(name) == CHECKPOINTS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_those_of_the_paper(name: str) -> None:
    assert round(parameters(name) / 1e6, 2) == MILLIONS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_names_its_source(name: str) -> None:
    assert "arXiv" in MODELS[name].source or "https://" in MODELS[name].source
