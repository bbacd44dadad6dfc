"""Optimizer: a chain of optax's transformations around the momentum."""

from typing import Any

import optax
from jax import Array
from jax.typing import DTypeLike

from floragrad._checks import DEFAULT_RANK, refuse_renamed
from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.precision import in_float32
from floragrad.jax.second_moment import scale_by_factored_rms_of_matrices
from floragrad.jax.transform import scale_by_flora
from floragrad.policy import EmbeddingMomentum, Projection, StateDtype


@refuse_renamed(
    tau="rank", b2="decay_rate, the exponent of the second moment's decay in both", factorized_second_moment="factored"
)
def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = DEFAULT_RANK,
    b1: float | Array | None = 0.9,
    decay_rate: float | Array = 0.8,
    kappa: int | Array = 1000,
    clipping_threshold: float | Array | None = 1.0,
    multiply_by_parameter_scale: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    eps: float | Array = 1e-30,
    factored: bool = True,
    min_dim_size_to_factor: int = 1,
    seed: int | Array = 0,
    *,
    ratio: int | None = None,
    projection: Projection = "sign",
    residual: bool | None = None,
    embedding_momentum: EmbeddingMomentum = "none",
    mu_dtype: StateDtype | DTypeLike = "int8",
    min_parameter_scale: float | Array = 1e-3,
    matrix_axes: MatrixAxesOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    """Build Adafactor with a momentum stored as a random projection that is resampled every ``kappa`` steps.

    For a kernel W with gradient G, both n x m (in, out)::

        v_row, v_col ← averages of G² + eps, decayed by 1 − t^(−decay_rate)
        U = G · rsqrt(v_row / mean(v_row)) · rsqrt(v_col)
        M ← b1·transfer(M) + (1 − b1) P U           D = U + Pᵀ (P Pᵀ)⁻¹ (M − P U)
        W ← W − learning_rate · (D / max(1, rms(D) / clipping_threshold) + weight_decay · W)

    The second line is :func:`optax.scale_by_factored_rms`, the third :func:`floragrad.jax.scale_by_flora`, and
    the last ``clip_by_block_rms``, ``add_decayed_weights``, ``scale_by_param_block_rms`` and
    ``scale_by_learning_rate``, all in float32 for parameters of float32 or lower precision.

    Args:
        learning_rate: Learning rate or schedule, in AdamW's units (see ``multiply_by_parameter_scale``).
        rank: r of the paper; ρ = min(m, n) // r inputs share one element of the momentum; default 128.
        b1: Decay of the momentum; default 0.9; None or 0 for no momentum and no buffers.
        decay_rate: Exponent of the second moment's decay; default 0.8.
        kappa: Steps between two projections; default 1000; 100 suits ``"adaptive"``.
        clipping_threshold: Largest root mean square of an update; default 1; None for no clipping.
        multiply_by_parameter_scale: Multiply the step by max(min_parameter_scale, rms(W)), as Adafactor does; default
            False.
        weight_decay: Decoupled weight decay, a number or a schedule, multiplied by the step size; default None.
        weight_decay_mask: Parameters with weight decay: a tree of booleans, or a function from the parameters to one;
            default None, all.
        eps: Added to squared gradients; default 1e-30.
        factored: False for a second moment that is not factored; the momentum stays compressed; default True.
        min_dim_size_to_factor: Shortest side of matrices whose second moment is factored; default 1.
        seed: Seed of projections and rounding, 0 to 2**32 - 1; default 0.
        ratio: ρ, the same for all arrays, instead of ``rank``; default None.
        projection: ``"sign"`` (default), ``"adaptive"`` (adapted weights, n float32 elements more), ``"gaussian"`` (the
            paper's).
        residual: True for momentum inside the sketched subspace and the fresh gradient outside it, as above; False for
            the paper's unbiased estimator; default None, True but for ``"gaussian"``, which has no residual.
        embedding_momentum: Momentum of embedding-like arrays: ``"none"`` (default), ``"full"``, ``"compressed"``.
        mu_dtype: Storage format of the momentum: ``"float32"``, ``"bfloat16"``, ``"int8"`` (default) or ``"int4"``, the
            last three with stochastic rounding, so that the average stays unbiased.
        min_parameter_scale: Smallest parameter scale with ``multiply_by_parameter_scale``; default 1e-3.
        matrix_axes: Axes of inputs and outputs: a :class:`~floragrad.jax.MatrixAxes`, a tree of them or a function from
            the parameters to one; default None, the last two axes of each array, in this order.

    Raises:
        ValueError: An option has a wrong value, or options contradict each other; or, at an update, a state that does
            not fit the updates' shapes and the options, or that was cast.
        TypeError: An option has the name that it has in flora-opt.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((32, 16))}
        >>> optimizer = flora(learning_rate=1e-2, rank=4)
        >>> state = optimizer.init(params)
        >>> grads = jax.grad(lambda params: jnp.sum(params["kernel"] ** 2))(params)
        >>> updates, state = optimizer.update(grads, state, params)
        >>> bool(jnp.all(optax.apply_updates(params, updates)["kernel"] < 1))
        True

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024,
    algorithm 2; Shazeer, Stern, "Adafactor", ICML 2018, algorithm 4. Deviations: ``docs/method.md``.
    """
    transformations = [
        scale_by_factored_rms_of_matrices(factored, decay_rate, min_dim_size_to_factor, eps, matrix_axes=matrix_axes),
        scale_by_flora(
            rank,
            b1,
            kappa,
            projection,
            residual,
            seed,
            embedding_momentum,
            mu_dtype,
            ratio=ratio,
            matrix_axes=matrix_axes,
        ),
    ]
    if clipping_threshold is not None:
        transformations.append(optax.clip_by_block_rms(clipping_threshold))
    if weight_decay is not None:
        transformations.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
    if multiply_by_parameter_scale:
        transformations.append(optax.scale_by_param_block_rms(min_parameter_scale))
    return in_float32(optax.chain(*transformations, optax.scale_by_learning_rate(learning_rate)))
