"""The task ``lm``: a causal language model on text."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import Corpus, prepare_corpus
from floragrad.cli.train.sources import read_documents
from floragrad.cli.train.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


class LanguageModeling(Task):
    """A Llama by size, or a model of Hugging Face, on blocks of tokens."""

    data = Corpus
    auto_class = "AutoModelForCausalLM"
    blocks, everything = "held-out blocks", "all held-out documents"

    def prepare(self, config: RunConfig, folder: Path) -> Corpus:
        """Read, tokenize and pack the text of a run into a new folder."""
        documents = read_documents(config)
        folder.mkdir()
        if config.model in PRESETS:
            return prepare_corpus(config, documents, folder)
        from floragrad.cli.train.models import embedding_rows

        return prepare_corpus(config, documents, folder, embedding_rows(config))

    def build(self, config: RunConfig, data: Corpus) -> Any:
        """Return the model to train."""
        from floragrad.cli.train.models import build_model

        return build_model(self.auto_class, config, data.facts.vocab_size)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> "Tensor":
        """Return the model's own loss. All blocks are as long, so it is the mean over blocks too."""
        loss: Tensor = model(**batch).loss
        return loss

    def examine(self, model: Any, batch: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return the mean cross-entropy, in nats and float32, of each block's tokens but the first."""
        from torch.nn.functional import cross_entropy

        tokens = batch["input_ids"]
        logits = model(input_ids=tokens).logits[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return {"loss": losses.view(len(tokens), -1).mean(1)}
