"""Sorting a model's parameters: hidden matrices, vocabulary-like tensors, vectors."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from floragrad.policy import VOCABULARY_ASPECT, Kind, matrix_view

_MATRIX_MODULES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)


def param_groups(
    model: nn.Module,
    lr: float | Tensor,
    embedding_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`floragrad.Flora`, or any other optimizer of torch's kind.

    Sorts by the type of the module that owns a parameter first, by shape second:

    * ``"vocabulary"``: embeddings, the model's output head (tied to an embedding, of the shape of a tall one,
      or what ``get_output_embeddings()`` returns), and, outside the layers that torch knows as matrices, what
      has an aspect ratio above 4. They want a learning rate of their own.
    * ``"matrix"``: everything else with a matrix view.
    * ``"vector"``: biases, norms, scalars: no weight decay.

    Frozen parameters are left out. Tied parameters stand once, under their first name, as vocabulary if any
    of their owners says so. Empty groups are left out.

    Args:
        model: Any module.
        lr: Learning rate of matrices and vectors.
        embedding_lr: Learning rate of vocabulary-like tensors; None: ``lr``.
        weight_decay: Of matrices and vocabulary-like tensors.
        **options: Any further options for every group, such as ``rank``.

    Returns:
        Groups with ``params`` as (name, tensor) pairs, ``kind``, ``lr``, ``weight_decay`` and the options.

    Example:
        >>> model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64))
        >>> [(g["kind"], g["lr"], len(g["params"])) for g in param_groups(model, lr=1e-3, embedding_lr=1e-2)]
        [('matrix', 0.001, 1), ('vocabulary', 0.01, 1), ('vector', 0.001, 1)]
    """
    kinds = _kinds(model)
    rates: dict[Kind, float | Tensor] = {"matrix": lr, "vocabulary": lr, "vector": lr}
    if embedding_lr is not None:
        rates["vocabulary"] = embedding_lr
    groups = []
    for kind, rate in rates.items():
        named = [(name, param) for name, param in model.named_parameters() if kinds.get(param) == kind]
        if named:
            decay = 0.0 if kind == "vector" else weight_decay
            groups.append({"params": named, "kind": kind, "lr": rate, "weight_decay": decay, **options})
    return groups


def widest_matrix(model: nn.Module) -> int:
    """The largest smaller side of a model's hidden matrices, which bounds every rank; 0 where it has none.

    Example:
        >>> widest_matrix(nn.Sequential(nn.Embedding(1000, 512), nn.Linear(64, 48), nn.Linear(16, 16)))
        48
    """
    matrices = [param for param, kind in _kinds(model).items() if kind == "matrix"]
    views = [view for view in (matrix_view(param.shape) for param in matrices) if view is not None]
    return max((min(view.rows, view.columns) for view in views), default=0)


def _kinds(model: nn.Module) -> dict[Tensor, Kind]:
    """What every trainable parameter is; vocabulary wins where owners disagree."""
    heads, vocabularies = _declared_embeddings(model), _vocabulary_shapes(model)
    kinds: dict[Tensor, Kind] = {}
    for module, param in _owned(model):
        kind = _kind(module, param, heads, vocabularies)
        if kind == "vocabulary" or param not in kinds:
            kinds[param] = kind
    return kinds


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param.requires_grad:
                yield module, param


def _kind(module: nn.Module, param: Tensor, heads: list[nn.Module], vocabularies: set[tuple[int, ...]]) -> Kind:
    view = matrix_view(param.shape)
    if view is None:
        return "vector"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or any(module is head for head in heads):
        return "vocabulary"
    if isinstance(module, nn.Linear):
        return "vocabulary" if tuple(param.shape) in vocabularies else "matrix"
    if isinstance(module, _MATRIX_MODULES):
        return "matrix"
    return "vocabulary" if view.aspect > VOCABULARY_ASPECT else "matrix"


def _vocabulary_shapes(model: nn.Module) -> set[tuple[int, ...]]:
    """Shapes of the tall embeddings: a linear layer of the same shape is an output head."""
    return {
        (module.num_embeddings, module.embedding_dim)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.num_embeddings > VOCABULARY_ASPECT * module.embedding_dim
    }


def _declared_embeddings(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings that Hugging Face models declare."""
    declared = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter = getattr(model, name, None)
        module = getter() if callable(getter) else None
        if isinstance(module, nn.Module):
            declared.append(module)
    return declared
