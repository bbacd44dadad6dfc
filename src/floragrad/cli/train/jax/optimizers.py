"""The optimizers of ``--optimizer``, as optax has them, with a learning rate for each kind of parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from floragrad._report import Report
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.jax.weights import Params, parameter_names
from floragrad.jax import compressed_multi_steps, flora, flora_report
from floragrad.jax.precision import in_float32
from floragrad.policy import Kind

GRADIENT_NORM = "gradient_norm"
VOCABULARIES = ("embed_tokens", "lm_head")


def kinds(params: Params) -> Params:
    """Return the kind of every parameter, as ``floragrad.param_groups`` has it, in a tree of the same structure."""
    found: Params = jax.tree_util.tree_map_with_path(lambda path, leaf: _kind(path[0].key, leaf), params)
    return found


def learning_rates(config: RunConfig) -> dict[Kind, optax.Schedule]:
    """Each kind's learning rate over the steps: a linear warm-up, then ``--schedule``."""
    peaks: dict[Kind, float] = {"matrix": config.lr, "vocabulary": config.embedding_lr, "vector": config.lr}
    return {kind: _warmed_up(config, peak) for kind, peak in peaks.items()}


def _warmed_up(config: RunConfig, peak: float) -> optax.Schedule:
    left = config.steps - config.warmup_steps
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, left),
        "linear": optax.linear_schedule(peak, 0.0, left),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup_steps), decay], [config.warmup_steps])


def transformation(config: RunConfig) -> optax.GradientTransformation:
    """Everything between the gradient and the update, clipping by the global norm included.

    AdamW has torch's defaults. Adafactor has those of Hugging Face's, with momentum, every matrix factored, and
    learning rates on AdamW's scale.
    """
    rates = learning_rates(config)
    groups = {kind: _OPTIMIZERS[config.optimizer](config, kind, rate) for kind, rate in rates.items()}
    clipping = [in_float32(optax.clip_by_global_norm(config.max_grad_norm))] if config.max_grad_norm else []
    return optax.chain(optax.snapshot(GRADIENT_NORM, _norm), *clipping, optax.partition(groups, kinds))


def report(config: RunConfig, params: Params) -> Report:
    """Report Flora's state of every parameter, under transformers' names."""
    names, found, leaves = map(jax.tree.leaves, (parameter_names(params), kinds(params), params))
    parts: dict[Kind, dict[str, jax.Array]] = {"matrix": {}, "vocabulary": {}}
    for name, kind, leaf in zip(names, found, leaves, strict=True):
        parts["vocabulary" if kind == "vocabulary" else "matrix"][name] = leaf
    reports = [flora_report(part, **_compression(config, kind)) for kind, part in parts.items()]
    rows = {row.name: row for each in reports for row in each.rows}
    return Report(tuple(rows[name] for name in names))


def windowed(config: RunConfig, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wrap a transformation for steps of several micro-batches, whose gradients are gathered first."""
    if config.micro_batches == 1:
        return inner
    if config.accumulator == "exact":
        return optax.MultiSteps(inner, config.micro_batches).gradient_transformation()
    return compressed_multi_steps(
        inner,
        config.micro_batches,
        **config.keywords("accumulator"),
    )


def _kind(module: str, leaf: jax.Array) -> Kind:
    if leaf.ndim < 2:
        return "vector"
    return "vocabulary" if module in VOCABULARIES else "matrix"


def _decay(config: RunConfig, kind: Kind) -> float:
    return 0.0 if kind == "vector" else config.weight_decay


def _adamw(config: RunConfig, kind: Kind, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=_decay(config, kind))


def _adafactor(config: RunConfig, kind: Kind, rate: optax.Schedule) -> optax.GradientTransformation:
    # optax's own weight decay would not follow the learning rate.
    decay = _decay(config, kind)
    return in_float32(
        optax.chain(
            optax.adafactor(rate, min_dim_size_to_factor=1, multiply_by_parameter_scale=False, momentum=0.9),
            optax.add_decayed_weights(lambda count: -decay * rate(count)),
        )
    )


def _flora(config: RunConfig, kind: Kind, rate: optax.Schedule) -> optax.GradientTransformation:
    assert config.kappa is not None
    return flora(
        rate,
        kappa=config.kappa,
        weight_decay=_decay(config, kind),
        seed=config.seed,
        **_compression(config, kind),
    )


def _compression(config: RunConfig, kind: Kind) -> dict[str, Any]:
    """Return Flora's options for one kind of parameter; vocabulary-like ones keep no momentum, as in PyTorch."""
    return {
        "rank": config.rank,
        "b1": None if kind == "vocabulary" else 0.9,
        "projection": config.projection,
        "mu_dtype": config.state_dtype,
    }


_OPTIMIZERS = {"flora": _flora, "adamw": _adamw, "adafactor": _adafactor}


def _norm(gradients: optax.Updates) -> jax.Array:
    """Return the global norm, in float32 whatever the gradients are in."""
    norm: jax.Array = optax.tree.norm(optax.tree.cast(gradients, jnp.float32))
    return norm
