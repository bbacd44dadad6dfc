"""Few-bit storage: its rounding uses 16 random bits, so the mean over all 65,536 of them is the mean itself.

Nothing below is sampled but the random bits themselves, whose bounds are Hoeffding's: of T fair coins the
mean of ±1 exceeds x with probability at most 2 exp(-T x² / 2); ``FALSE_ALARM`` over all comparisons of a test.
"""

import re
from functools import cache, partial
from math import ceil, log, prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from floragrad.jax import quantize as module
from floragrad.jax.quantize import LARGEST, Stored, round_to_bfloat16, specs
from floragrad.jax.state_checks import describe
from floragrad.policy import StateDtype, storage
from tests.marks import paired, slow

# Compiled once for each shape; operation by operation, every one of them would be.
store = jax.jit(module.save_with_bits, static_argnames=("state_dtype", "axis"))
save = jax.jit(module.save, static_argnames=("state_dtype", "axis"))
load = jax.jit(module.load, static_argnames=("width", "state_dtype", "axis"))


@partial(jax.jit, static_argnums=(1, 2))
def random_bits(key: Array, shape: tuple[int, ...], axis: int) -> Array:
    (words,) = module.random_words(key, shape, axis, 1)
    return module.random_bits(*words)


LOW_BIT: list[StateDtype] = ["int8", "int4"]
EVERY: list[StateDtype] = [*LOW_BIT, "bfloat16", "float32"]
PATTERNS = 2**16
ALL_BITS = np.arange(PATTERNS, dtype=np.uint32)
FALSE_ALARM = 1e-9
UNIT = 2.0**-24

low_bit = pytest.mark.parametrize("state_dtype", LOW_BIT)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def bits_for(values: np.ndarray) -> np.ndarray:
    """NumPy's: JAX would compile a loop for every shape."""
    return np.random.default_rng(1).integers(PATTERNS, size=values.shape, dtype=np.uint32)


def round_trip(values: np.ndarray, state_dtype: StateDtype, bits: Any = None) -> np.ndarray:
    kept = store(jnp.asarray(values), state_dtype, bits_for(values) if bits is None else bits)
    return np.asarray(load(kept, values.shape[-1], state_dtype))


def column_scale(scale: Array | None, width: int) -> np.ndarray:
    return np.repeat(np.asarray(scale), 64, axis=-1)[..., :width]


def whole(values: np.ndarray, bits: int) -> Array:
    return jnp.full(values.shape, bits, jnp.uint32)


# --- Low-bit storage ---------------------------------------------------------------------------------------


@low_bit
@pytest.mark.parametrize("width", [slow(1), 7, slow(64), 130])
def test_mean_and_variance_over_all_random_bits(state_dtype: StateDtype, width: int) -> None:
    """E[stored] = x, Var[stored] = p(1 - p) scale² <= scale²/4, with p the part of x/scale above its floor.

    Of the 65,536 values of u, a number p in (0, 1) rounds up within half a one of 65536 p of them: 2⁻¹⁷ in
    the mean. x/scale and its sum with u are rounded in float32, below 128: 2⁻¹⁸ each; q·scale is rounded
    once, 2⁻²⁴ of at most 127 scale: 2⁻¹⁷. In all less than 2⁻¹⁵ of the scale. Only neighbours occur
    (asserted), so with the found frequency f the variance is f(1 - f) scale², and |f(1 - f) - p(1 - p)| is at
    most |f - p|: the same tolerance.
    """
    row = drawn(width, seed=3) * np.logspace(-2, 2, width, dtype=np.float32)
    values = np.broadcast_to(row, (PATTERNS, width))
    kept = store(jnp.asarray(values), state_dtype, jnp.broadcast_to(ALL_BITS[:, None], values.shape))
    scale = np.asarray(kept.scale)
    assert (scale == scale[0]).all()
    step = column_scale(scale[0], width).astype(np.float64)
    grid = row.astype(np.float64) / step
    stored = np.asarray(load(kept, width, state_dtype)).astype(np.float64) / step
    tolerance = 2.0**-15
    assert np.abs(stored.mean(0) - grid).max() <= tolerance
    assert (stored >= np.floor(grid) - tolerance).all()
    assert (stored <= np.ceil(grid) + tolerance).all()
    p = grid - np.floor(grid)
    assert np.abs(stored.var(0) - p * (1 - p)).max() <= tolerance
    assert stored.var(0).max() <= 0.25 + tolerance


@low_bit
def test_scale_is_the_largest_value_of_a_block_over_the_largest_integer(state_dtype: StateDtype) -> None:
    """So the noise is no larger than it must be. A quotient, or a product with a rounded reciprocal."""
    values = drawn(3, 130)
    kept = store(jnp.asarray(values), state_dtype, bits_for(values))
    expected = np.stack([np.abs(part).max(-1) for part in np.split(values, (64, 128), axis=-1)], axis=-1)
    scale = np.asarray(kept.scale, np.float64)
    assert scale.shape == (3, 3)
    assert np.abs(scale * LARGEST[state_dtype] / expected - 1).max() <= 2.01 * UNIT


@low_bit
@pytest.mark.parametrize("bits", [0, PATTERNS - 1])
def test_extremes_zeros_and_grid_points_are_exact(state_dtype: StateDtype, bits: int) -> None:
    """Every integer of the grid is stored as itself whatever the random bits, the extremes included."""
    largest = LARGEST[state_dtype]
    grid = np.arange(-largest, largest + 1, dtype=np.float32)
    blocks = np.zeros((ceil(len(grid) / 62), 64), np.float32)
    blocks[:, :2] = largest, -largest  # the scale of every block is 1
    for block, start in zip(blocks, range(0, len(grid), 62), strict=True):
        part = grid[start : start + 62]
        block[2 : 2 + len(part)] = part
    for unit in (1.0, 2.0**-20, 2.0**30):
        values = (blocks * unit).astype(np.float32)
        np.testing.assert_array_equal(round_trip(values, state_dtype, whole(values, bits)), values)


@low_bit
def test_largest_value_survives_to_three_roundings(state_dtype: StateDtype) -> None:
    """A block's largest value is the largest integer times the scale: a reciprocal and two products away."""
    values = drawn(500, 64)
    at = np.abs(values).argmax(-1)[:, None]
    # A quotient just above -largest may rightly round up, at the one random number in 65,536 nearest to 1.
    for bits in (0, PATTERNS // 2):
        found = round_trip(values, state_dtype, whole(values, bits))
        ratio = np.take_along_axis(found, at, -1).astype(np.float64) / np.take_along_axis(values, at, -1)
        assert np.abs(ratio - 1).max() <= 3.01 * UNIT


@low_bit
def test_zeros_stay_zeros(state_dtype: StateDtype) -> None:
    kept = save(jnp.zeros((3, 70)), state_dtype, jax.random.key(0))
    assert not np.asarray(kept.payload).any()
    assert not np.asarray(kept.scale).any()
    values = drawn(200, 70)
    values[:, ::3] = 0
    found = round_trip(values, state_dtype)
    assert not found[:, ::3].any()
    assert found[:, 1::3].any(), "not only zeros are stored"


LAYOUTS = [((3,), 1), ((5,), 65), ((2, 3), 128), ((1, 4), 127)]
"""Leading dimensions, and the length of a row."""


@pytest.mark.parametrize(("state_dtype", "axis", "layout"), paired(EVERY, (-1, -2), LAYOUTS))
def test_storage_is_packed_and_as_planned(
    state_dtype: StateDtype, axis: int, layout: tuple[tuple[int, ...], int]
) -> None:
    """The shapes, dtypes and bytes of the policy and of ``specs``; every number is within one step of its own."""
    leading, width = layout
    values = np.moveaxis(drawn(*leading, width), -1, axis)
    assert np.broadcast_shapes(*module.word_shapes(values.shape, axis)) == values.shape
    kept = store(jnp.asarray(values), state_dtype, bits_for(values), axis=axis)
    expected = specs(values.shape, state_dtype, axis=axis)
    assert jax.tree.map(describe, kept) == jax.tree.map(describe, expected)
    planned = storage(leading, width, state_dtype)
    found = dict(zip(("data", "scale"), jax.tree.leaves(kept), strict=False))
    assert found.keys() == planned.keys()
    for name, buffer in planned.items():
        assert np.moveaxis(found[name], axis, -1).shape == buffer.shape
        assert (str(found[name].dtype), found[name].nbytes) == (buffer.dtype, buffer.nbytes)
    stored = load(kept, width, state_dtype, axis=axis)
    assert stored.dtype == jnp.float32
    error = np.abs(np.moveaxis(np.asarray(stored), axis, -1) - np.moveaxis(values, axis, -1))
    if state_dtype == "float32":
        assert not error.any()
    elif state_dtype == "bfloat16":
        assert (np.moveaxis(error, -1, axis) <= 2.0**-7 * np.abs(values)).all()
    else:
        assert (error <= column_scale(np.moveaxis(kept.scale, axis, -1), width) * (1 + 2.0**-15)).all()


@low_bit
@pytest.mark.parametrize("width", [130, 7])
def test_rows_along_another_axis_are_stored_as_their_transposes(state_dtype: StateDtype, width: int) -> None:
    values, bits = drawn(5, width), bits_for(drawn(5, width))
    along = store(jnp.asarray(values), state_dtype, bits)
    across = store(jnp.asarray(values.T), state_dtype, bits.T, axis=-2)
    for one, other in zip(along, across, strict=True):
        np.testing.assert_array_equal(one, np.asarray(other).T)


def test_int4_holds_every_pair_in_one_byte() -> None:
    """All 225 pairs of two integers of -7 ... 7, exact, each pair in a byte of its own."""
    grid = np.arange(-7.0, 8.0, dtype=np.float32)
    pairs = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    # A second pair of extremes sets the scale to 1.
    values = np.concatenate([pairs, np.full((225, 2), 7.0, np.float32)], axis=1)
    kept = store(jnp.asarray(values), "int4", bits_for(values))
    payload = np.asarray(kept.payload)
    assert payload.shape == (225, 2)
    np.testing.assert_array_equal(load(kept, 4, "int4"), values)
    assert len({tuple(row) for row in payload.tolist()}) == 225
    halves = np.stack([payload & 15, payload >> 4], axis=-1).reshape(225, 4).astype(np.float32)
    np.testing.assert_array_equal(np.where(halves > 7, halves - 16, halves), values)


@low_bit
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_block(state_dtype: StateDtype, axis: int, bad: float) -> None:
    """In the first, a middle and the short last block of a row, and of shapes for which XLA has fast kernels.

    An infinity makes all of its block not finite. A NaN does where maxima propagate it, which is not everywhere.
    """
    for row, column in ((2, 0), (40, 70), (63, 129)):
        values = drawn(64, 130)
        spoilt = values.copy()
        spoilt[row, column] = bad
        bits = np.moveaxis(bits_for(values), -1, axis)

        def stored(given: np.ndarray, bits: np.ndarray = bits) -> np.ndarray:
            matrix = jnp.asarray(np.moveaxis(given, -1, axis))
            kept = store(matrix, state_dtype, bits, axis=axis)
            return np.moveaxis(np.asarray(load(kept, 130, state_dtype, axis=axis)), axis, -1)

        block = np.zeros((64, 130), bool)
        block[row, column // 64 * 64 : column // 64 * 64 + 64] = True
        assert not np.isfinite(stored(spoilt)[block] if np.isinf(bad) else stored(spoilt)[row, column]).any()
        np.testing.assert_array_equal(stored(spoilt)[~block], stored(values)[~block])


@low_bit
def test_denormal_and_huge_blocks(state_dtype: StateDtype) -> None:
    """Numbers near the largest float stay finite; those too small for a scale become zeros, never NaN."""
    huge = np.full((1, 64), 3e38, np.float32)
    assert np.abs(round_trip(huge, state_dtype).astype(np.float64) / huge - 1).max() <= 3.01 * UNIT
    assert not round_trip(np.full((1, 64), 1e-45, np.float32), state_dtype).any()


# --- Random bits -------------------------------------------------------------------------------------------


def test_random_bits_are_those_of_their_key() -> None:
    first, second = (np.asarray(random_bits(jax.random.key(seed), (7, 33), -1)) for seed in (1, 2))
    np.testing.assert_array_equal(first, random_bits(jax.random.key(1), (7, 33), -1))
    assert (first != second).mean() > 0.9
    assert first.max() < PATTERNS


@pytest.mark.parametrize("axis", [-1, -2])
def test_random_bits_are_fair_and_pairwise_independent(axis: int) -> None:
    """All 16 bits of six numbers of a matrix are fair, and no two of these 96 agree too often, over 2¹⁵ keys.

    So are the exclusive or of the four corners of a rectangle, the only numbers of which one word follows from
    the other three: their 16 bits, and 16 more under a shift, as sums of words would show in carries.
    """
    keys = jax.random.split(jax.random.key(0), 2**15)
    bits = np.asarray(jax.jit(jax.vmap(lambda key: random_bits(key, (2, 3), axis)))(keys)).astype(np.int64)

    def coins(words: np.ndarray) -> np.ndarray:
        return (((words[..., None] >> np.arange(16)) & 1) * 2.0 - 1).reshape(len(keys), -1)

    every = coins(bits)
    corners = coins(bits[:, 0, 0] ^ bits[:, 0, 1] ^ bits[:, 1, 0] ^ bits[:, 1, 1])
    assert every.shape == (len(keys), 96)
    bound = sqrt(2 * log(2 * (96 + 96 * 95 / 2 + 16) / FALSE_ALARM) / len(keys))
    assert np.abs(every.mean(0)).max() <= bound
    agreement = every.T @ every / len(keys)
    assert np.abs(agreement - np.eye(96)).max() <= bound
    assert np.abs(corners.mean(0)).max() <= bound


@pytest.mark.parametrize("axis", [-1, -2])
def test_words_drawn_together_are_of_each_array(axis: int) -> None:
    """Words of 32 bits: two agree with probability 2⁻³²."""
    first, second = module.random_words(jax.random.key(0), (40, 60), axis, 2)
    for one, other in zip(first, second, strict=True):
        assert (one != other).all()
    rows, columns = ((40, 1), (1, 60)) if axis == -1 else ((1, 60), (40, 1))
    assert [each.shape for each in first] == [rows, columns]


def test_random_bits_of_one_key_are_uniform() -> None:
    """4-bit counts over a matrix of one key: pairwise independent, so Chebyshev with 9 standard deviations.

    A count over N numbers with p = 1/16 has variance N p(1 - p); 16 counts fail with probability 16/81 at
    most by Chebyshev, and a far smaller one if more than pairs are independent; the key is fixed.
    """
    numbers = np.asarray(random_bits(jax.random.key(5), (300, 500), -1)).reshape(-1) >> 12
    counts = np.bincount(numbers, minlength=16)
    assert np.abs(counts - len(numbers) / 16).max() <= 9 * sqrt(len(numbers) * 15 / 256)


# --- bfloat16 ----------------------------------------------------------------------------------------------


def as_float(pattern: int) -> float:
    return float(np.array(pattern & 0xFFFFFFFF, np.uint32).view(np.float32))


@pytest.mark.parametrize(
    "value", [1.0 + 2.0**-9, 3.14159274, -3.14159274, 1e-3, -7.77e20, 2.0 - 2.0**-20, 1e-40, -1e-40]
)
def test_bfloat16_mean_over_all_random_bits_is_exact(value: float) -> None:
    """x lies low/65536 of the way to the neighbour farther from zero, low its last 16 bits as an integer.

    Over all random bits exactly ``low`` of them round away from zero: so E = x without any tolerance, and the
    variance is p(1 - p) of the gap squared, p = low/65536. Only the two neighbours occur.
    """
    x = np.full(PATTERNS, value, np.float32)
    pattern = int(x.view(np.uint32)[0])
    low = pattern & 0xFFFF
    found = round_to_bfloat16(jnp.asarray(x), jnp.asarray(ALL_BITS))
    assert found.dtype == jnp.bfloat16
    stored = np.asarray(found).astype(np.float64)
    near, far = as_float(pattern & ~0xFFFF), as_float((pattern & ~0xFFFF) + 0x10000)
    assert abs(near) <= abs(value) < abs(far)
    assert (stored == far).sum() == low
    assert (stored == near).sum() == PATTERNS - low
    assert stored.mean() == float(x[0])


def test_bfloat16_values_stay_what_they_are() -> None:
    """Every one of the 65,536 bfloat16 values, NaN and infinities too, under the smallest and largest bits."""
    every = ALL_BITS.astype(np.uint16).view(jnp.bfloat16)

    def is_nan(values: np.ndarray) -> np.ndarray:
        return values.view(np.uint16) & 0x7FFF > 0x7F80

    for bits in (0, 1, PATTERNS // 2, PATTERNS - 1):
        found = np.asarray(round_to_bfloat16(jnp.asarray(every.astype(np.float32)), whole(every, bits)))
        both_nan = is_nan(found) & is_nan(every)
        same = (found.view(np.uint16) == every.view(np.uint16)) | both_nan
        assert same.all()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7F80FFFF])
def test_bfloat16_nan_of_any_payload_stays_nan(pattern: int) -> None:
    """0x7FFFFFFF plus a carry would be minus zero, and 0x7F800001 cut would be infinity."""
    x = np.full(4096, pattern, np.uint32).view(np.float32)
    assert np.isnan(x).all()
    assert np.isnan(np.asarray(round_to_bfloat16(jnp.asarray(x), bits_for(x)))).all()


# --- In a program ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [slow("int8"), "int4", "bfloat16", "float32"])
def test_scan_and_vmap_keep_what_is_stored_as_it_is(state_dtype: StateDtype) -> None:
    """A sum over steps by scan, for each replica by vmap: types do not change, and the sum is unbiased.

    Σ of T addends a is T·a in the mean; each of T roundings of at most T·max|a|, with errors below the step,
    independent over replicas: Hoeffding on the mean of R replicas' errors, each within ±T steps.
    """
    steps, replicas, width = 4, 512, 70
    addend = jnp.asarray(drawn(2, width))

    def one(key: Array) -> Array:
        start = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs((2, width), state_dtype))

        def body(kept: Stored, key: Array) -> tuple[Stored, None]:
            return save(load(kept, width, state_dtype) + addend, state_dtype, key), None

        kept, _ = jax.lax.scan(body, start, jax.random.split(key, steps))
        return load(kept, width, state_dtype)

    sums = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), replicas))
    error = np.asarray(sums).mean(0, dtype=np.float64) - steps * np.asarray(addend, np.float64)
    share = {"int8": 1 / 127, "int4": 1 / 7, "bfloat16": 2.0**-7, "float32": 4 * UNIT}[state_dtype]
    # A stored sum may exceed the largest true one by the errors so far.
    step = share * steps * np.abs(addend).max() * (1 + share) ** steps
    assert np.abs(error).max() <= step * steps * sqrt(2 * log(2 * error.size / FALSE_ALARM) / replicas)


@cache
def stored_alone(state_dtype: StateDtype, axis: int) -> Stored:
    """What one device stores."""
    return save(drawn(512, 512), state_dtype, jax.random.key(1), axis=axis)


@pytest.mark.parametrize(
    ("types", "state_dtype", "axis", "sharded"),
    paired((AxisType.Auto, AxisType.Explicit), ("int8", "int4", "bfloat16"), (-1, -2), (-1, -2)),
)
def test_shards_are_stored_where_they_are(types: AxisType, state_dtype: StateDtype, axis: int, sharded: int) -> None:
    """Nothing is communicated, rows sharded or columns; buffers are sharded as the values; the numbers agree.

    A quotient rounded in another place may cross an integer: by one step, in fewer than one number of 2¹⁴
    (the quotient's rounding errors, below 2⁻¹⁷ together, beside a u that is uniform).
    """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(types,))
    spec = [None, None]
    spec[sharded] = "x"
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    program = jax.jit(partial(module.save, state_dtype=state_dtype, key=jax.random.key(1), axis=axis))
    with jax.set_mesh(mesh):
        values = jax.device_put(drawn(512, 512), sharding)
        compiled = program.lower(values).compile()
        kept = compiled(values)
    alone = stored_alone(state_dtype, axis)
    assert not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", compiled.as_text())
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(alone), strict=True):
        assert one.sharding.is_equivalent_to(sharding, 2)
        apart = np.asarray(one) != np.asarray(other)
        assert apart.mean() <= 2.0**-14
    stored, single = (np.asarray(load(each, 512, state_dtype, axis=axis)) for each in (jax.device_get(kept), alone))
    if state_dtype != "bfloat16":
        step = np.repeat(np.asarray(kept.scale), 64, axis=axis)
        assert (np.abs(stored - single) <= step * 1.001).all()
    assert prod(kept.payload.addressable_shards[0].data.shape) * 8 == kept.payload.size
