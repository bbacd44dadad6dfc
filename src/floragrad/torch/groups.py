"""Parameter groups of a model: hidden matrices, vocabulary-like tensors, vectors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, get_args

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from floragrad.policy import Kind, matrix_view
from floragrad.torch.options import did_you_mean, option_names

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_MATRIX_MODULES = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_VECTOR_WORDS = frozenset({"bias", "biases", "scale", "pos", "position", "positional"})
_STATE_SPACE_NAMES = frozenset({"A_log", "D"})
_HIDDEN: Final[tuple[Kind, ...]] = ("matrix", "convolution")
_SORTED: Final = ("params", "kind", "lr", "weight_decay")
_TALL: Final = 4
"""A linear layer of the shape of an embedding of more than this many times as many rows as columns is its head."""


def param_groups(
    model: nn.Module,
    lr: float | Tensor,
    embedding_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    *,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return parameter groups for :class:`floragrad.Flora`, or any other ``torch.optim`` optimizer.

    Sorts by the module that owns a parameter, never by its aspect ratio:

    * ``"vocabulary"``: embeddings and the model's output head (tied to an embedding, of the shape of a tall one,
      or the result of ``get_output_embeddings()``). They want a learning rate of their own.
    * ``"vector"``: scalars, biases and norms of any shape, gains of weight normalization, class tokens and position
      tables outside ``nn.Embedding``, ``A_log`` and ``D`` of state-space layers, and parameters with a true
      ``_no_weight_decay``: no weight decay.
    * ``"convolution"``: kernels whose last dimension, 32 or more, would look like a stack of matrices.
    * ``"matrix"``: everything else: linear layers, other convolutions, experts, routers, adapters.

    Frozen parameters are left out. Tied parameters stand once, under their first name, as vocabulary if any
    of their owners says so. Empty groups are left out.

    Args:
        model: Any module.
        lr: Learning rate of everything but vocabulary.
        embedding_lr: Learning rate of embeddings and output heads; None: ``lr``.
        weight_decay: Of everything but vectors.
        extra: Options of another optimizer for every group, such as ``{"betas": (0.9, 0.95)}``; not checked.
        **options: Options of :class:`floragrad.Flora` for every group, such as ``rank``.

    Returns:
        Groups with ``params`` as (name, tensor) pairs, ``kind``, ``lr``, ``weight_decay`` and the options.

    Raises:
        TypeError: An option is none of Flora's, or is set by the sorting.

    Example:
        >>> model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64))
        >>> [(g["kind"], g["lr"], len(g["params"])) for g in param_groups(model, lr=1e-3, embedding_lr=1e-2)]
        [('matrix', 0.001, 1), ('vocabulary', 0.01, 1), ('vector', 0.001, 1)]
    """
    _check_names(options, extra or {})
    kinds = _kinds(model)
    rates: dict[Kind, float | Tensor] = dict.fromkeys(get_args(Kind), lr)
    if embedding_lr is not None:
        rates["vocabulary"] = embedding_lr
    groups = []
    for kind, rate in rates.items():
        named = [(name, param) for name, param in model.named_parameters() if kinds.get(param) == kind]
        if named:
            decay = 0.0 if kind == "vector" else weight_decay
            groups.append(
                {"params": named, "kind": kind, "lr": rate, "weight_decay": decay, **options, **(extra or {})}
            )
    return groups


def _check_names(options: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Refuse options that no optimizer would read, and those that sorting decides."""
    arguments = ("lr", "embedding_lr", "weight_decay", "extra")
    known = [name for name in option_names() if name not in _SORTED]
    for name in (*options, *extra):
        if name in _SORTED:
            raise TypeError(f"param_groups() sets {name!r} for each group by itself: leave it out")
    for name in options:
        if name not in known:
            raise TypeError(
                f"param_groups() got {name!r}, which is no option of Flora{did_you_mean(name, (*arguments, *known))}; "
                f"an option of another optimizer goes into extra={{{name!r}: ...}}"
            )


def widest_matrix(model: nn.Module) -> int:
    """Return the largest smaller side of a model's hidden matrices, which bounds every rank; 0 without any.

    Example:
        >>> widest_matrix(nn.Sequential(nn.Embedding(1000, 512), nn.Linear(64, 48), nn.Linear(16, 16)))
        48
    """
    hidden = [matrix_view(param.shape, kind) for param, kind in _kinds(model).items() if kind in _HIDDEN]
    return max((min(view.rows, view.columns) for view in hidden if view is not None), default=0)


class _Owned(NamedTuple):
    """Trainable parameter with its module, its name there, and whether it is a gain.

    Attributes:
        module: Its module; of a parametrized tensor, the module that has the parametrization.
        name: Its name there; of a parametrized tensor, the tensor's.
        param: The parameter.
        gain: True if it only scales a weight that is stored beside it, as weight normalization's magnitudes.
    """

    module: nn.Module
    name: str
    param: Tensor
    gain: bool


def _kinds(model: nn.Module) -> dict[Tensor, Kind]:
    """Return the kind of every trainable parameter; vocabulary wins where owners disagree."""
    declared = _declared(model)
    vocabularies = _vocabulary_shapes(model, declared)
    kinds: dict[Tensor, Kind] = {}
    for owned in _owned(model):
        kind = _kind(owned, declared, vocabularies)
        if kind == "vocabulary" or owned.param not in kinds:
            kinds[owned.param] = kind
    return kinds


def _owned(model: nn.Module) -> Iterator[_Owned]:
    parametrized: dict[nn.Module, tuple[nn.Module, str]] = {}
    for module in model.modules():
        if is_parametrized(module):
            for name, parts in module.parametrizations.items():  # type: ignore[union-attr, operator]
                parametrized[parts] = module, name
        largest = max((param.numel() for param in module.parameters(recurse=False)), default=0)
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            if module in parametrized:
                yield _Owned(*parametrized[module], param, gain=param.numel() < largest)
            else:
                yield _Owned(module, name, param, gain=name.endswith("_g") and param.numel() < largest)


def _kind(owned: _Owned, declared: "_Declared", vocabularies: set[tuple[int, ...]]) -> Kind:
    module, name, param, gain = owned
    if matrix_view(param.shape) is None or gain or isinstance(module, _NORMS):
        return "vector"
    if isinstance(module, _EMBEDDINGS) or declared.has(module, name):
        return "vocabulary"
    if isinstance(module, nn.Linear) and tuple(param.shape) in vocabularies:
        return "vocabulary"
    if _is_vector_by_name(name) or getattr(param, "_no_weight_decay", False):
        return "vector"
    if isinstance(module, _CONVOLUTIONS):
        return "matrix" if matrix_view(param.shape) == matrix_view(param.shape, "convolution") else "convolution"
    if isinstance(module, _MATRIX_MODULES):
        return "matrix"
    return "vector" if _is_vector_by_shape(param.shape) else "matrix"


def _is_vector_by_name(name: str) -> bool:
    """Return whether a name is that of a bias, scale, position table or state-space decay."""
    return name in _STATE_SPACE_NAMES or not _VECTOR_WORDS.isdisjoint(name.split("_"))


def _is_vector_by_shape(shape: Sequence[int]) -> bool:
    """Return whether a parameter of an unknown module is one row or column, or a table that is broadcast."""
    view = matrix_view(shape)
    return view is None or min(view.rows, view.columns) == 1 or (len(shape) > 2 and shape[0] == 1)


class _Declared(NamedTuple):
    """Embeddings that Hugging Face models declare.

    Attributes:
        inputs: The input embedding; for images and sounds it may be any module.
        outputs: The output heads, or wrappers around them.
    """

    inputs: nn.Module | None
    outputs: tuple[nn.Module, ...]

    def has(self, module: nn.Module, name: str) -> bool:
        """Return whether a tensor is the declared embedding's table or a declared head's weight."""
        if not name.startswith("weight"):
            return False
        is_table = module is self.inputs and not isinstance(module, _MATRIX_MODULES)
        return is_table or any(module is head or _is_copy(module, head) for head in self.outputs)


def _is_copy(module: nn.Module, head: nn.Module) -> bool:
    """Return whether a wrapper of a head, such as peft's for ``modules_to_save``, trains ``module`` in its place."""
    weight, own = getattr(head, "weight", None), getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(own, Tensor):
        return False
    return own.shape == weight.shape and any(module is each for each in head.modules())


def _declared(model: nn.Module) -> _Declared:
    head = _returned(model, "get_output_embeddings")
    heads = tuple(head) if isinstance(head, nn.ModuleList) else (head,) if head is not None else ()
    return _Declared(_returned(model, "get_input_embeddings"), heads)


def _returned(model: nn.Module, getter: str) -> nn.Module | None:
    """Return the result of a model's getter; None if it is missing or raises NotImplementedError."""
    get = getattr(model, getter, None)
    try:
        module = get() if callable(get) else None
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Module) else None


def _vocabulary_shapes(model: nn.Module, declared: _Declared) -> set[tuple[int, ...]]:
    """Return the shapes of tall embeddings, which undeclared heads share; of the declared one alone if there is one."""
    if declared.outputs:
        return set()
    modules = [declared.inputs] if isinstance(declared.inputs, _EMBEDDINGS) else model.modules()
    return {
        (module.num_embeddings, module.embedding_dim)
        for module in modules
        if isinstance(module, _EMBEDDINGS) and module.num_embeddings > _TALL * module.embedding_dim
    }
