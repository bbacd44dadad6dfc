"""The table of cases of the PyTorch half, as JAX sees it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from floragrad.jax import MatrixAxes, flora
from tests.torch.cases import Case

RENAMED = {
    "beta1": "b1",
    "factorize_second_moment": "factored",
    "scale_parameter": "multiply_by_parameter_scale",
    "state_dtype": "mu_dtype",
    "clip_threshold": "clipping_threshold",
    "lr": "learning_rate",
}


def options(case: Case, **changes: Any) -> dict[str, Any]:
    """The case's options by their names in JAX; the step derives the learning rate where there is none."""
    given = case.all_options(**changes)
    relative, warmup = given.pop("relative_step", False), given.pop("warmup_init", False)
    if relative:
        given["lr"] = lambda count: jnp.minimum(1e-6 * (count + 1) if warmup else 1e-2, (count + 1.0) ** -0.5)
    if "decay_rate" in given:
        given["decay_rate"] = -given["decay_rate"]
    if "eps" in given:
        given["eps"], given["min_parameter_scale"] = given["eps"]
    if given.get("clip_threshold") == float("inf"):
        given["clip_threshold"] = None
    return {RENAMED.get(name, name): value for name, value in given.items()}


def torch_axes(shape: tuple[int, ...]) -> MatrixAxes:
    """The axes of the policy's matrices in a tensor that is kept as PyTorch keeps it."""
    if len(shape) < 2:
        return MatrixAxes((), ())
    if len(shape) > 2 and shape[-1] < 32:
        return MatrixAxes(tuple(range(1, len(shape))), 0)
    return MatrixAxes(-1, -2)


def kernel_axes(shape: tuple[int, ...]) -> MatrixAxes:
    """The same in the tensor as :func:`as_kernel` turns it."""
    if len(shape) < 2:
        return MatrixAxes((), ())
    if len(shape) > 2 and shape[-1] < 32:
        return MatrixAxes(tuple(range(len(shape) - 1)), -1)
    return MatrixAxes(-2, -1)


def as_kernel(array: np.ndarray) -> np.ndarray:
    """A tensor of PyTorch's, (out, in), (..., out, in) or (out, in, *window), as a kernel of JAX's.

    (in, out), (..., in, out), and for a convolution (*window, in, out).
    """
    if array.ndim > 2 and array.shape[-1] < 32:
        return np.moveaxis(array, (0, 1), (-1, -2))
    return np.swapaxes(array, -1, -2) if array.ndim > 1 else array


def tensors(case: Case, count: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """The case's parameter and gradients, in PyTorch's layout."""
    grads = np.stack([grad.numpy() for grad in case.gradients(count)])
    return case.parameter().detach().numpy(), grads


def trajectory(optimizer: optax.GradientTransformation, param: Any, grads: Any) -> np.ndarray:
    """The parameter after every step, all steps in one compiled scan."""

    def step(carried: Any, grad: jax.Array) -> tuple[Any, jax.Array]:
        param, state = carried
        updates, state = optimizer.update(grad, state, param)
        param = optax.apply_updates(param, updates)
        return (param, state), param

    run = jax.jit(lambda param, grads: jax.lax.scan(step, (param, optimizer.init(param)), grads)[1])
    return np.asarray(run(jnp.asarray(param), jnp.asarray(grads)), np.float64)


def build(case: Case, **changes: Any) -> optax.GradientTransformation:
    return flora(**options(case, **changes))


def to_torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
