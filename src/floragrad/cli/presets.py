"""The sizes that ``--model`` knows by name, and the defaults that go with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One size of a model, and the job that it is trained on by default.

    The sizes of Llama from 60m up are those of the GaLore paper (arXiv 2403.03507, appendix), and so are their steps.
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    vocab_size: int
    sequence_length: int
    batch_size: int
    steps: int


PRESETS = {
    "tiny": Preset(192, 512, 6, 3, 2048, 128, 8, 500),
    "small": Preset(384, 1024, 6, 6, 8192, 256, 16, 2000),
    "60m": Preset(512, 1376, 8, 8, 32000, 256, 32, 10_000),
    "130m": Preset(768, 2048, 12, 12, 32000, 256, 32, 20_000),
    "350m": Preset(1024, 2736, 16, 24, 32000, 256, 32, 60_000),
    "1b": Preset(2048, 5461, 32, 24, 32000, 256, 32, 100_000),
}


TASKS = {
    "lm": PRESETS,
    "seq2seq": {"tiny": Preset(192, 512, 6, 2, vocab_size=1024, sequence_length=24, batch_size=64, steps=500)},
    "summarization": {"tiny": Preset(192, 512, 6, 2, vocab_size=2048, sequence_length=96, batch_size=16, steps=500)},
    "vision": {"tiny": Preset(192, 384, 6, 4, vocab_size=0, sequence_length=16, batch_size=64, steps=400)},
}
"""Each task's models by name: Llamas for language modeling, T5s for pairs of texts, ViTs for images.

The sequence of a ViT is its patches, and it has no vocabulary.
"""

PAIR_TASKS = ("seq2seq", "summarization")
"""Tasks on pairs of a source and a target, both texts."""

FINE_TUNING_LEARNING_RATE = 5e-5
"""The default for a model given by name or folder, whose weights are trained already (transformers' own)."""


def job_name(task: str, model: str) -> str:
    """Return the name of the model, and of the task where it is no language model."""
    return model if task == "lm" else f"{task}-{model}"
