"""Few-bit storage: its rounding uses 16 random bits, so the mean over all 65,536 of them is the mean itself.

Nothing below is sampled but the random bits themselves, whose bounds are Hoeffding's: of T fair coins the
mean of ±1 exceeds x with probability at most 2 exp(-T x² / 2); ``FALSE_ALARM`` over all comparisons of a test.
"""

from math import ceil, log, prod, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floragrad._streams import Stream
from floragrad.policy import StateDtype, storage
from floragrad.torch.random import Philox, half_count, halves
from floragrad.torch.storage import (
    LARGEST,
    RoundingBits,
    dequantize,
    quantize,
    repacked_int4,
    round_to_bfloat16,
)

LOW_BIT: list[StateDtype] = ["int8", "int4"]
PATTERNS = 2**16
ALL_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
FALSE_ALARM = 1e-9
UNIT = 2.0**-24

low_bit = pytest.mark.parametrize("state_dtype", LOW_BIT)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_rounding_bits(source: Philox, leading: tuple[int, ...], columns: int) -> RoundingBits:
    words = halves(source.draw(half_count(prod(leading) + columns), torch.device("cpu")), prod(leading) + columns)
    return RoundingBits(words[: prod(leading)].view(leading), words[prod(leading) :])


def bits_for(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    source = Philox(seed, 0, 0, Stream.STATE_ROUNDING)
    bits = draw_rounding_bits(source, (*values.shape[:-1], 1), values.shape[-1])
    return bits.integers().view(values.shape)


def round_trip(values: torch.Tensor, state_dtype: StateDtype, bits: torch.Tensor | None = None) -> torch.Tensor:
    payload, scale = quantize(values, state_dtype, bits_for(values) if bits is None else bits)
    return dequantize(payload, scale, state_dtype, values.shape[-1])


def column_scale(scale: torch.Tensor, width: int) -> torch.Tensor:
    return scale.repeat_interleave(64, dim=-1)[..., :width]


@low_bit
@pytest.mark.parametrize("width", [1, 7, 64, 130])
def test_mean_and_variance_over_all_random_bits(state_dtype: StateDtype, width: int) -> None:
    """E[stored] = x, Var[stored] = p(1 - p) scale² <= scale²/4, with p the part of x/scale above its floor.

    Of the 65,536 values of u, a number p in (0, 1) rounds up within half a one of 65536 p of them: 2⁻¹⁷ in
    the mean. x/scale and its sum with the two terms of u are rounded in float32, below 128: 2⁻¹⁸ each; q·scale
    is rounded once, 2⁻²⁴ of at most 127 scale: 2⁻¹⁷. In all 7·2⁻¹⁸, less than 2⁻¹⁵ of the scale. Only neighbours occur
    (asserted), so with the found frequency f the variance is f(1 - f) scale², and |f(1 - f) - p(1 - p)| is at
    most |f - p|: the same tolerance.
    """
    row = drawn(width, seed=3) * torch.logspace(-2, 2, width)
    values = row.expand(PATTERNS, width)
    payload, scale = quantize(values, state_dtype, ALL_BITS.unsqueeze(1).expand(PATTERNS, width))
    assert (scale == scale[0]).all()
    step = column_scale(scale[0], width).double()
    grid = row.double() / step
    stored = dequantize(payload, scale, state_dtype, width).double() / step
    tolerance = 2.0**-15
    assert (stored.mean(0) - grid).abs().max() <= tolerance
    assert (stored >= grid.floor() - tolerance).all()
    assert (stored <= grid.ceil() + tolerance).all()
    p = grid - grid.floor()
    variance = stored.var(0, correction=0)
    assert (variance - p * (1 - p)).abs().max() <= tolerance
    assert variance.max() <= 0.25 + tolerance


@low_bit
def test_scale_is_the_largest_value_of_a_block_over_the_largest_integer(state_dtype: StateDtype) -> None:
    """So the noise is no larger than it must be; one division is rounded once."""
    values = drawn(3, 130)
    _, scale = quantize(values, state_dtype, bits_for(values))
    expected = torch.stack([part.abs().amax(-1) for part in torch.split(values, 64, dim=-1)], dim=-1)
    assert scale.shape == (3, 3)
    assert (scale * LARGEST[state_dtype] / expected - 1).abs().max() <= 2 * UNIT


@low_bit
@pytest.mark.parametrize("bits", [-(2**15), 2**15 - 1])
def test_extremes_zeros_and_grid_points_are_exact(state_dtype: StateDtype, bits: int) -> None:
    """Every integer of the grid is stored as itself whatever the random bits, the extremes included."""
    largest = LARGEST[state_dtype]
    grid = torch.arange(-largest, largest + 1, dtype=torch.float32)
    blocks = torch.zeros(ceil(len(grid) / 62), 64)
    blocks[:, :2] = torch.tensor([largest, -largest])  # the scale of every block is 1
    for block, part in zip(blocks, torch.split(grid, 62), strict=True):
        block[2 : 2 + len(part)] = part
    for unit in (1.0, 2.0**-20, 2.0**30):
        values = blocks * unit
        assert torch.equal(round_trip(values, state_dtype, torch.full_like(values, bits).short()), values)


@low_bit
def test_largest_value_survives_to_a_rounding(state_dtype: StateDtype) -> None:
    """A block's largest value is the largest integer times the scale: two roundings away from itself."""
    values = drawn(500, 64)
    at = values.abs().argmax(-1, keepdim=True)
    # A quotient just above -largest may rightly round up, at the one random number in 65,536 nearest to 1.
    for bits in (-(2**15), 0):
        found = round_trip(values, state_dtype, torch.full_like(values, bits).short())
        assert (found.gather(-1, at) / values.gather(-1, at) - 1).abs().max() <= 2.01 * UNIT


@low_bit
def test_zeros_stay_zeros(state_dtype: StateDtype) -> None:
    payload, scale = quantize(torch.zeros(3, 70), state_dtype, bits_for(torch.zeros(3, 70)))
    assert not payload.any()
    assert not scale.any()
    values = drawn(200, 70)
    values[:, ::3] = 0
    found = round_trip(values, state_dtype)
    assert not found[:, ::3].any()
    assert found[:, 1::3].any(), "not only zeros are stored"


@low_bit
@given(rows=st.integers(1, 4), width=st.integers(1, 200), batch=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_storage_is_packed_and_as_planned(
    state_dtype: StateDtype, rows: int, width: int, batch: int, seed: int
) -> None:
    """Payload and scales have the policy's shapes and dtypes; every number is within one step of its own."""
    values = drawn(batch, rows, width, seed=seed)
    payload, scale = quantize(values, state_dtype, bits_for(values, seed))
    planned = storage((batch, rows), width, state_dtype)
    for found, buffer in ((payload, planned["data"]), (scale, planned["scale"])):
        assert (tuple(found.shape), str(found.dtype)) == (buffer.shape, f"torch.{buffer.dtype}")
    numbers = ceil(width / 2) if state_dtype == "int4" else width
    assert payload.nbytes == batch * rows * numbers
    error = (dequantize(payload, scale, state_dtype, width) - values).abs()
    assert (error <= column_scale(scale, width) * (1 + 2.0**-15)).all()


def test_int4_holds_every_pair_in_one_byte() -> None:
    """All 225 pairs of two integers of -7 ... 7, exact, each pair in a byte of its own."""
    grid = torch.arange(-7.0, 8.0)
    pairs = torch.cartesian_prod(grid, grid)
    # Two columns are one byte: low half the first, high half the second. A third pair sets the scale to 1.
    values = torch.cat([torch.full((225, 1), 7.0), pairs, torch.full((225, 1), 7.0)], dim=1)
    payload, scale = quantize(values, "int4", bits_for(values))
    assert payload.shape == (225, 2)
    assert torch.equal(dequantize(payload, scale, "int4", 4), values)
    assert len({tuple(row) for row in payload.tolist()}) == 225
    low, high = payload & 15, payload >> 4
    halves = torch.stack([low, high], dim=-1).flatten(1).float()
    assert torch.equal(torch.where(halves > 7, halves - 16, halves), values)


@pytest.mark.parametrize("width", [1, 2, 5, 64, 65, 129])
def test_int4_of_version_0_1_is_packed_anew(width: int) -> None:
    """Byte j of it held columns j and ceil(k/2) + j."""
    values = drawn(2, 3, width)
    payload, _ = quantize(values, "int4", bits_for(values))
    integers = torch.stack([payload & 15, payload >> 4], dim=-1).flatten(-2)[..., :width]
    half = ceil(width / 2)
    second = torch.nn.functional.pad(integers[..., half:], (0, 2 * half - width))
    assert torch.equal(repacked_int4(integers[..., :half] | (second << 4), width), payload)


@low_bit
@pytest.mark.parametrize("width", [5, 64, 100, 129])
def test_a_row_alone_is_stored_as_among_others(state_dtype: StateDtype, width: int) -> None:
    """Blocks never cross rows: a shard of rows quantises by itself to the same bytes."""
    values = drawn(6, width) * torch.logspace(-6, 6, 6).unsqueeze(1)
    bits = bits_for(values)
    payload, scale = quantize(values, state_dtype, bits)
    for row in range(6):
        alone, own = quantize(values[row : row + 1], state_dtype, bits[row : row + 1])
        assert torch.equal(alone[0], payload[row])
        assert torch.equal(own[0], scale[row])


@low_bit
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 70, 129])
def test_what_is_not_finite_spoils_its_block_and_no_other(state_dtype: StateDtype, bad: float, column: int) -> None:
    values = drawn(4, 130)
    spoilt = values.clone()
    spoilt[2, column] = bad
    found, clean = round_trip(spoilt, state_dtype), round_trip(values, state_dtype)
    block = torch.zeros(4, 130, dtype=torch.bool)
    block[2, column // 64 * 64 : column // 64 * 64 + 64] = True
    assert not found[block].isfinite().any()
    assert torch.equal(found[~block], clean[~block])


@low_bit
def test_denormal_and_huge_blocks(state_dtype: StateDtype) -> None:
    """Numbers near the largest float stay finite; those too small for a scale become zeros, never NaN."""
    huge = torch.full((1, 64), 3e38)
    assert (round_trip(huge, state_dtype) / huge - 1).abs().max() <= 2.01 * UNIT
    assert not round_trip(torch.full((1, 64), 1e-45), state_dtype).any()


# --- Random bits ------------------------------------------------------------------------------------------


def test_random_bits_repeat_from_their_source() -> None:
    values = drawn(7, 33)
    assert torch.equal(bits_for(values, 1), bits_for(values, 1))
    assert (bits_for(values, 1) != bits_for(values, 2)).float().mean() > 0.9
    assert bits_for(drawn(0, 5)).shape == (0, 5)
    assert bits_for(values).abs().max() <= 2**15


@settings(max_examples=30, deadline=None, derandomize=True)
@given(top=st.integers(0, 10), height=st.integers(1, 10), left=st.integers(0, 30), width=st.integers(1, 30))
def test_a_part_has_the_random_bits_that_it_has_in_the_whole(top: int, height: int, left: int, width: int) -> None:
    """So it does not matter how a tensor is cut into blocks, or sharded."""
    whole = draw_rounding_bits(Philox(3, 1, 4, Stream.STATE_ROUNDING), (2, 20, 1), 60)
    rows, columns = slice(top, top + height), slice(left, left + width)
    part = RoundingBits(whole.rows[:, rows], whole.columns[columns])
    assert torch.equal(part.integers(), whole.integers()[:, rows, columns])
    assert torch.equal(whole.of((slice(1, 2), rows)).integers(), whole.integers()[1:, rows])


def test_random_bits_are_fair_and_pairwise_independent() -> None:
    """All 16 bits of six numbers of a matrix are fair, and no two of these 96 agree too often, over 2¹⁵ draws.

    So are the exclusive or, and the alternating sum, of the four corners of a rectangle: the only numbers of which
    one follows from the words of the other three. Without the bijection that sum is 0, and this test fails.
    """
    draws = 2**15
    words = torch.from_numpy(Philox(0, 0, 0, Stream.STATE_ROUNDING).words(draws * 5).astype("int64"))
    words = words.to(torch.int32).view(draws, 5)
    bits = (RoundingBits(words[:, :2, None], words[:, None, 2:]).integers() & 0xFFFF).long()
    assert bits.shape == (draws, 2, 3)

    def coins(numbers: torch.Tensor) -> torch.Tensor:
        return (((numbers.unsqueeze(-1) >> torch.arange(16)) & 1) * 2 - 1).double().reshape(draws, -1)

    every = coins(bits)
    corners = bits[:, 0, 0], bits[:, 0, 1], bits[:, 1, 1], bits[:, 1, 0]
    odd = coins(corners[0] ^ corners[1] ^ corners[2] ^ corners[3])
    turned = coins(corners[0] - corners[1] + corners[2] - corners[3])
    bound = sqrt(2 * log(2 * (96 + 96 * 95 / 2 + 32) / FALSE_ALARM) / draws)
    assert every.mean(0).abs().max() <= bound
    assert (every.T @ every / draws).fill_diagonal_(0).abs().max() <= bound
    assert odd.mean(0).abs().max() <= bound
    assert turned.mean(0).abs().max() <= bound


def test_rounding_errors_have_no_large_singular_value() -> None:
    """u - 1/2 of independent numbers, variance 1/12, has a norm of about (√m + √n) / √12 (Bai and Yin, 1988).

    Sums of a row's and a column's number, without the bijection, are 7.8 times above it.
    """
    numbers = bits_for(torch.empty(500, 700)).double() * 2.0**-16
    ratio = torch.linalg.matrix_norm(numbers, ord=2) / ((500**0.5 + 700**0.5) / 12**0.5)
    assert 0.9 < ratio < 1.1


# --- bfloat16 ---------------------------------------------------------------------------------------------


def as_float(pattern: int) -> float:
    return torch.tensor([pattern], dtype=torch.int64).to(torch.int32).view(torch.float32).item()


@pytest.mark.parametrize(
    "value", [1.0 + 2.0**-9, 3.14159274, -3.14159274, 1e-3, -7.77e20, 2.0 - 2.0**-20, 1e-40, -1e-40]
)
def test_bfloat16_mean_over_all_random_bits_is_exact(value: float) -> None:
    """x lies low/65536 of the way to the neighbour farther from zero, low its last 16 bits as an integer.

    Over all random bits exactly ``low`` of them round away from zero: so E = x without any tolerance, and the
    variance is p(1 - p) of the gap squared, p = low/65536. Only the two neighbours occur.
    """
    x = torch.full((PATTERNS,), value)
    pattern = int(x[0].view(torch.int32).item())
    low = pattern & 0xFFFF
    found = round_to_bfloat16(x, ALL_BITS)
    assert found.dtype == torch.bfloat16
    near, far = as_float(pattern & ~0xFFFF), as_float((pattern & ~0xFFFF) + 0x10000)
    assert abs(near) <= abs(value) < abs(far)
    assert (found.double() == far).sum() == low
    assert (found.double() == near).sum() == PATTERNS - low
    assert found.double().mean() == x[0].double()


def test_bfloat16_values_stay_what_they_are() -> None:
    """Every one of the 65,536 bfloat16 values, NaN and infinities too, under the smallest and largest bits."""
    every = ALL_BITS.view(torch.bfloat16)
    for bits in (-1, -(2**15), 0, 2**15 - 1):
        found = round_to_bfloat16(every.float(), torch.full((PATTERNS,), bits, dtype=torch.int16))
        same = (found.view(torch.int16) == every.view(torch.int16)) | (found.isnan() & every.isnan())
        assert same.all()


@pytest.mark.parametrize(
    "pattern", [0x7FFFFFFF, 0xFFFFFFFF - 2**32, 0x7F800001, 0xFF800001 - 2**32, 0x7FC00000, 0x7F80FFFF]
)
def test_bfloat16_nan_of_any_payload_stays_nan(pattern: int) -> None:
    """0x7FFFFFFF plus a carry would be minus zero, and 0x7F800001 cut would be infinity."""
    x = torch.full((4096,), pattern, dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    assert round_to_bfloat16(x, bits_for(x)).isnan().all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_bfloat16_infinities_stay(bad: float) -> None:
    x = torch.full((4096,), bad)
    assert (round_to_bfloat16(x, bits_for(x)) == bad).all()


def test_bfloat16_takes_tensors_of_any_layout() -> None:
    x, bits = drawn(6, 8), bits_for(drawn(6, 8))
    assert torch.equal(round_to_bfloat16(x.T, bits.T), round_to_bfloat16(x, bits).T)
    assert round_to_bfloat16(torch.tensor(1.5), torch.tensor(7, dtype=torch.int16)).item() == 1.5
