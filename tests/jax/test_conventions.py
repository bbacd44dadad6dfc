"""What optax asks of an optimizer, over the case table: compiled once, dtypes kept, and it finds minima."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from floragrad.jax import MatrixAxes, flora, scale_by_flora
from tests.jax.cases import as_kernel, build, kernel_axes, options, tensors
from tests.marks import slow
from tests.torch.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("unoptimized")

BY_NAME = {case.name: case for case in CASES}
VARIANTS = ["vector", "paper-estimator", "adaptive-experts", "gaussian", "vocabulary-compressed"]
"""One of everything that has code of its own, for tests that are not about numbers."""


def variants(names: list[str] = VARIANTS) -> Any:
    """Rows of the table; those that are easier than another one run with ``make test-slow`` only."""
    easier = ["paper-estimator", "gaussian", "vocabulary-compressed", "adaptive"]
    rows = [(slow if name in easier else pytest.param)(BY_NAME[name]) for name in names]
    return pytest.mark.parametrize("case", rows, ids=str)


def kernel(case: Case, **changes: Any) -> tuple[optax.GradientTransformation, jax.Array]:
    return build(case, matrix_axes=kernel_axes(case.shape), **changes), jnp.asarray(as_kernel(tensors(case, 1)[0]))


def types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


# --- Minima -----------------------------------------------------------------------------------------------


def minimise(loss: Callable[[Any], jax.Array], start: Any, steps: int, rate: float, **given: Any) -> Any:
    """Where ``steps`` steps arrive, at a rate that falls to nothing."""
    optimizer = flora(optax.cosine_decay_schedule(rate, steps), **given)

    def step(carried: Any, _: Any) -> Any:
        params, state = carried
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=steps))(start)
    return params


SKETCHES: list[dict[str, Any]] = [
    {"ratio": 2},
    {"ratio": 4, "projection": "adaptive", "kappa": 50},
    {"ratio": 1, "mu_dtype": "int4"},
]
MORE_SKETCHES: list[dict[str, Any]] = [
    {"ratio": 2, "residual": False},
    {"ratio": 2, "projection": "gaussian"},
    {"b1": None},
]


@pytest.mark.parametrize(
    "given",
    [*SKETCHES, *(slow(each) for each in MORE_SKETCHES)],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_finds_the_minimum_of_a_parabola(given: dict[str, Any]) -> None:
    """A matrix, a stack, a vector and a scalar, each with its own curvatures."""
    generator = np.random.default_rng(0)
    shapes = {"matrix": (12, 8), "stack": (2, 8, 6), "vector": (5,), "scalar": ()}
    goal = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    curvature = {name: jnp.asarray(generator.uniform(0.3, 3, shape), jnp.float32) for name, shape in shapes.items()}

    def loss(params: Any) -> jax.Array:
        return sum(
            jnp.sum(c * (p - g) ** 2) for p, g, c in zip(*map(jax.tree.leaves, (params, goal, curvature)), strict=True)
        )

    start = jax.tree.map(jnp.zeros_like, goal)
    found = minimise(loss, start, 600, 0.3, **given)
    assert loss(found) < 1e-4 * loss(start)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"ratio": 2}, id="sketch"),
        slow({"ratio": 1}, id="whole"),
        slow({"b1": None}, id="none"),
    ],
)
def test_finds_the_minimum_of_rosenbrock_valleys(given: dict[str, Any]) -> None:
    """Sixteen valleys side by side, x in one row of inputs and y in the next; every minimum is at (1, 1)."""

    def loss(params: jax.Array) -> jax.Array:
        x, y = params[0::2], params[1::2]
        return jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)

    start = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (8, 4)), jnp.float32)
    found = minimise(loss, start, 20_000, 0.03, **given)
    np.testing.assert_allclose(found, 1.0, atol=1e-2)


def test_a_wrong_sign_finds_no_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the tests above are to find: what is decoded points the wrong way."""
    from floragrad.jax.projection import BucketProjection

    decode = BucketProjection.decode
    monkeypatch.setattr(BucketProjection, "decode", lambda self, z, *, axis=-2: -decode(self, z, axis=axis))
    goal = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)), jnp.float32)
    loss = lambda params: jnp.sum((params - goal) ** 2)  # noqa: E731
    assert loss(minimise(loss, jnp.zeros_like(goal), 600, 0.3, ratio=2, residual=False)) > 1e-2 * loss(
        jnp.zeros_like(goal)
    )


# --- Compiled once ----------------------------------------------------------------------------------------


@variants()
def test_injected_hyperparameters_change_nothing_and_compile_once(case: Case) -> None:
    """Twelve steps are those of the plain optimizer; no step, resampling or new learning rate is traced anew."""
    make = optax.inject_hyperparams(flora, static_args=("rank", "ratio", "min_dim_size_to_factor", "matrix_axes"))
    given = options(case) | {"learning_rate": 1e-2, "matrix_axes": kernel_axes(case.shape)}
    param = jnp.asarray(as_kernel(tensors(case, 1)[0]))
    plain, injected = flora(**given), make(**given)
    state, wrapped = plain.init(param), injected.init(param)
    traces = []

    @jax.jit
    def other(grad: jax.Array, state: Any, param: jax.Array) -> Any:
        traces.append(1)
        return injected.update(grad, state, param)

    one, together = jax.jit(plain.update), 12
    for t in range(25):
        rate = 1e-2 if t < together else 1e-2 / t
        wrapped.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        same, wrapped = other(param, wrapped, param)
        if t < together:
            updates, state = one(param, state, param)
            np.testing.assert_allclose(updates, same, rtol=1e-5, atol=1e-7)
    assert float(wrapped.hyperparams["kappa"]) == 10
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["rank", "min_dim_size_to_factor"])
def test_what_shapes_the_state_is_refused_as_a_hyperparameter(name: str) -> None:
    static = {"rank", "min_dim_size_to_factor"} - {name}
    optimizer = optax.inject_hyperparams(flora, static_args=tuple(static))(learning_rate=1e-3)
    with pytest.raises(ValueError, match=rf"{name} shapes the state.*static_args=\('{name}'"):
        optimizer.init(jnp.zeros((8, 8)))


# --- Dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "mu_dtype"),
    [(jnp.float16, "float32"), (jnp.bfloat16, "bfloat16"), (jnp.float32, "int8"), (jnp.bfloat16, "int4")],
    ids=["float16", "bfloat16", "float32", "bfloat16-int4"],
)
@variants()
def test_shapes_and_dtypes_of_state_and_updates_are_kept(case: Case, dtype: Any, mu_dtype: str) -> None:
    """From init to update, abstractly and under ``lax.cond``, whose branches must be of one type."""
    optimizer, param = kernel(case, state_dtype=mu_dtype)
    param = param.astype(dtype)
    state = jax.eval_shape(optimizer.init, param)
    assert types(state) == types(jax.eval_shape(lambda: optimizer.init(param)))

    def step(flag: Any, param: Any, state: Any) -> Any:
        return jax.lax.cond(flag, lambda: optimizer.update(param, state, param), lambda: (param, state))

    updates, after = jax.eval_shape(step, True, param, state)
    assert types(after) == types(state)
    assert updates.dtype == dtype
    assert updates.shape == param.shape


@variants(["wide", "adaptive", "vector"])
def test_float64_parameters_keep_their_precision(case: Case) -> None:
    with jax.enable_x64(True):
        optimizer, param = kernel(case)
        param = param.astype(jnp.float64)
        state = optimizer.init(param)
        updates, after = jax.jit(optimizer.update)(param, state, param)
        assert types(after) == types(state)
        assert updates.dtype == jnp.float64


@variants(["wide", "vector", "adaptive"])
def test_bfloat16_parameters_move_as_float32_ones(case: Case) -> None:
    """Second moments and momentum in float32: an update differs by the rounding of what it is returned in alone.

    Parameters and gradients are numbers of bfloat16 in both runs. The factor (1 + 2⁻⁸) is bfloat16's rounding of an
    update; the optimizer in between computes the same float32 numbers.
    """
    optimizer, param = kernel(case, state_dtype="float32", weight_decay=0.1, scale_parameter=True)
    narrow = param.astype(jnp.bfloat16)
    wide, states = narrow.astype(jnp.float32), [optimizer.init(narrow), optimizer.init(narrow.astype(jnp.float32))]
    update = jax.jit(optimizer.update)
    for step in range(15):
        grad = (narrow * (1 + step % 3)).astype(jnp.bfloat16)
        ours, states[0] = update(grad, states[0], narrow)
        exact, states[1] = update(grad.astype(jnp.float32), states[1], wide)
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2.0**-8)


# --- The same numbers -------------------------------------------------------------------------------------


@variants()
def test_jit_scan_and_donation_change_nothing(case: Case) -> None:
    """Compiled steps, a compiled loop of them, and donated buffers arrive at the same numbers."""
    optimizer, start = kernel(case)

    def step(param: Any, state: Any) -> Any:
        updates, state = optimizer.update(param, state, param)
        return optax.apply_updates(param, updates), state

    plain, donating = jax.jit(step), jax.jit(step, donate_argnums=(0, 1))
    run = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=12)[0])
    looped = run((start, optimizer.init(start)))
    one, other = (start, optimizer.init(start)), (jnp.copy(start), optimizer.init(start))
    for _ in range(12):
        given = (other[0], other[1][1].mu)
        one, other = plain(*one), donating(*other)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    for ours, theirs in ((one, other), (one, looped)):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@variants()
def test_replicas_under_vmap_equal_each_by_itself(case: Case) -> None:
    optimizer, param = kernel(case, state_dtype="float32")
    replicas = jnp.stack([param, 2 * param, -param])
    together = jax.vmap(optimizer.init)(replicas)
    apart = [optimizer.init(each) for each in replicas]
    update, updates_of = jax.jit(optimizer.update), jax.jit(jax.vmap(optimizer.update))
    for _ in range(11):
        updates, together = updates_of(replicas, together, replicas)
        for at, each in enumerate(replicas):
            ours, apart[at] = update(each, apart[at], each)
            np.testing.assert_allclose(updates[at], ours, rtol=1e-5, atol=1e-7)


def test_seeds_differ_and_repeat() -> None:
    param = jnp.asarray(np.random.default_rng(0).normal(size=(16, 48)), jnp.float32)

    @jax.jit
    def last(seed: int) -> jax.Array:
        optimizer = scale_by_flora(ratio=4, seed=seed)
        step = lambda state, scale: optimizer.update(scale * param, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(param), jnp.array([1.0, -2.0, 3.0]))[1][-1]

    assert np.array_equal(last(0), last(0))
    assert not np.allclose(last(0), last(1))


def test_default_axes_are_pytorchs() -> None:
    """Kernels sketch their inputs, embeddings and output heads their features; stacks one matrix at a time."""
    shapes = {"kernel": (24, 40), "embedding": (200, 40), "head": (40, 200), "experts": (3, 16, 40)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    mu = scale_by_flora(ratio=4, embedding_momentum="compressed", mu_dtype="float32").init(params).mu
    found = {name: kept.shape for name, kept in mu.items()}
    assert found == {"kernel": (6, 40), "embedding": (200, 10), "head": (10, 200), "experts": (3, 4, 40)}


@pytest.mark.parametrize(
    ("axes", "message"), [(MatrixAxes(0, 5), "give axes from -2 to 1"), (MatrixAxes(0, -2), "names an axis twice")]
)
def test_wrong_axes_are_refused(axes: MatrixAxes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_by_flora(matrix_axes=axes).init(jnp.zeros((4, 8)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank=0: must be an integer >= 1"),
        ({"rank": 8, "ratio": 2}, "give one of them"),
        ({"b1": 1.0}, r"b1=1.0: must be a number in \[0, 1\)"),
        ({"kappa": 0}, "kappa=0: must be an integer >= 1"),
        ({"kappa": 2**31}, "kappa=2147483648: must be an integer >= 1, and below 2"),
        ({"seed": -1}, r"seed=-1: must be an integer from 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed=4294967296: must be"),
        ({"projection": "svd"}, "projection='svd': must be one of 'sign', 'adaptive', 'gaussian'"),
        ({"projection": "gaussian", "residual": True}, "not orthogonal"),
        ({"projection": "adaptive", "residual": False}, "not unbiased"),
        ({"embedding_momentum": True}, "embedding_momentum=True: must be one of"),
        ({"mu_dtype": jnp.float16}, "mu_dtype='float16': must be one of 'float32', 'bfloat16', 'int8', 'int4'"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flora(1e-3, **given)


@pytest.mark.parametrize(
    ("function", "keyword", "ours"),
    [
        (flora, "tau", "rank"),
        (flora, "b2", "decay_rate"),
        (flora, "factorized_second_moment", "factored"),
        (scale_by_flora, "tau", "rank"),
        (scale_by_flora, "beta", "b1"),
    ],
)
def test_a_keyword_of_flora_opt_is_named_with_ours(function: Any, keyword: str, ours: str) -> None:
    with pytest.raises(TypeError, match=rf"^{keyword}= is flora-opt's keyword, .*: write {ours}"):
        function(**{keyword: 4})
    parameters = inspect.signature(function).parameters
    assert ours in parameters
    assert keyword not in parameters
