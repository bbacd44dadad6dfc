"""Reference implementation of the method in float64 NumPy: the oracle of all fast paths.

Follows Flora (Hao, Cao, Mou, ICML 2024, algorithms 1 and 2) on the base of Adafactor (Shazeer, Stern, ICML
2018, algorithm 4), with the deviations that ``docs/method.md`` lists. Projections are passed as dense k x n
matrices, so that any framework can use the same ones. Tensors are in their matrix view, (batch, m, n), or
of any shape without a view.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

Array = Any  # float64 arrays: NumPy types the result of most operators as Any


@dataclass(frozen=True)
class Options:
    """Hyperparameters, named as in :class:`floragrad.Flora`."""

    lr: float | None = 1e-3
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = 0.9
    weight_decay: float = 0.0
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False
    factored: bool = True
    residual: bool = True
    maximize: bool = False


@dataclass
class State:
    """State between steps; 0.0 stands for zeros of any shape."""

    step: int = 0
    momentum: Any = 0.0
    row: Any = 0.0
    col: Any = 0.0
    variance: Any = 0.0


def bucket_projection(weights: Array, k: int) -> Array:
    """Return P with P[j mod k, j] = weights[j]: random signs, or the weights of ``"adaptive"``."""
    n = len(weights)
    projection = np.zeros((k, n))
    projection[np.arange(n) % k, np.arange(n)] = weights
    return projection


def adaptive_weights(matrix: Array, start: Array, k: int) -> Array:
    """Run two power iterations in each bucket: w ← Vᵀ(V w) / ‖Vᵀ(V w)‖, V the bucket's columns of ``matrix``."""
    weights = np.array(start)
    for bucket in range(k):
        block, w = matrix[:, bucket::k], weights[bucket::k]
        for _ in range(2):
            product = block.T @ (block @ w)
            norm = np.sqrt(np.sum(product**2))
            w = product / norm if norm > 0 else w
        weights[bucket::k] = w
    return weights


def transpose(matrix: Array) -> Array:
    """Swap the last two dimensions."""
    return np.swapaxes(matrix, -1, -2)


def orthogonal_decode(sketch: Array, projection: Array) -> Array:
    """Return Z (P Pᵀ)⁻¹ P: after encoding, the orthogonal projection onto the rows of P."""
    gram = projection @ transpose(projection)
    return sketch @ np.linalg.inv(gram) @ projection


def second_moment(grad: Array, state: State, options: Options) -> Array:
    """Return U, the gradient (negated by ``maximize``) over the root of Adafactor's second moment; update ``state``."""
    grad = -grad if options.maximize else grad
    beta2 = 1 - state.step**options.decay_rate
    squares = grad**2 + options.eps[0]
    if not options.factored:
        state.variance = beta2 * state.variance + (1 - beta2) * squares
        return grad / np.sqrt(state.variance)
    state.row = beta2 * state.row + (1 - beta2) * squares.mean(axis=-1, keepdims=True)
    state.col = beta2 * state.col + (1 - beta2) * squares.mean(axis=-2, keepdims=True)
    return grad / np.sqrt(state.row / state.row.mean(axis=-2, keepdims=True)) / np.sqrt(state.col)


def direction(update: Array, state: State, options: Options, now: Array | None, before: Array | None) -> Array:
    """Return D; update the momentum in ``state``. ``now`` and ``before`` are P, None at ρ = 1."""
    beta1 = options.beta1
    if not beta1:
        return update
    if now is None or before is None:
        state.momentum = beta1 * state.momentum + (1 - beta1) * update
        return state.momentum
    if state.step == 1:
        state.momentum = np.zeros((*update.shape[:-1], now.shape[-2]))
    sketch = update @ transpose(now)
    old = state.momentum
    if options.residual:
        transferred = old if now is before else orthogonal_decode(old, before) @ transpose(now)
        state.momentum = beta1 * transferred + (1 - beta1) * sketch
        return update + orthogonal_decode(state.momentum - sketch, now)
    transferred = old if now is before else (old @ before) @ transpose(now)
    state.momentum = beta1 * transferred + (1 - beta1) * sketch
    return (1 - beta1) * update + beta1 * (old @ before)


def blend(update: Array, state: State, options: Options, before: Array) -> Array:
    """Return the matrix of the adaptive weights: β₁ times the old momentum, decoded, plus (1 − β₁) U."""
    beta1 = options.beta1 or 0.0
    old = orthogonal_decode(state.momentum, before) if state.step > 1 else 0.0
    return beta1 * old + (1 - beta1) * update


def step_size(param: Array, state: State, options: Options) -> float:
    """Return α: the learning rate, relative to the step and to the parameter's scale with the options for it."""
    if options.relative_step:
        lr = min(1e-6 * state.step if options.warmup_init else 1e-2, state.step**-0.5)
    else:
        assert options.lr is not None
        lr = options.lr
    return float(lr * max(options.eps[1], rms(param)) if options.scale_parameter else lr)


def rms(values: Array) -> float:
    """Return the root mean square of all elements."""
    return float(np.sqrt(np.mean(values**2)))


def apply(param: Array, update: Array, state: State, options: Options) -> Array:
    """Return W after decoupled weight decay and a clipped step along D."""
    limit = options.clip_threshold
    clipped = update / max(1.0, rms(update) / limit) if limit < inf else update
    alpha = step_size(param, state, options)
    return param - alpha * options.weight_decay * param - alpha * clipped


def step(
    param: Array,
    grad: Array,
    state: State,
    options: Options,
    now: Array | None = None,
    before: Array | None = None,
) -> Array:
    """Step one tensor: return the new parameter; update ``state`` in place.

    Args:
        param: W, (batch, m, n), or any shape with ``options.factored`` False and no projection; float64.
        grad: G, in the shape of W.
        state: State of the tensor.
        options: The hyperparameters.
        now: P of this step, (k, n) or (batch, k, n); None at ρ = 1.
        before: P of the step before; the same object as ``now`` between resamples.
    """
    state.step += 1
    update = second_moment(grad, state, options)
    return apply(param, direction(update, state, options, now, before), state, options)
