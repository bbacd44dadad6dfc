"""A second moment of every element in 8 bits: its values on average, its bytes, its checkpoints, its conversion."""

from typing import Any

import pytest
import torch

from floragrad import Flora
from floragrad.torch.storage import LEVELS, dequantize_squares, quantize_squares_
from tests.torch.test_quantize import ALL_BITS, PATTERNS

LOW_BIT: dict[str, Any] = {"factorize_second_moment": False, "second_moment_dtype": "int8"}
SHAPES = {"matrix": (24, 130), "experts": (3, 24, 70), "convolution": (16, 8, 3, 3), "vector": (16,)}


def trained(steps: int = 7, dtype: torch.dtype = torch.float32, **options: Any) -> Flora:
    """An optimizer over one parameter of each shape, after some steps."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES.values()]
    optimizer = Flora(params, **{"lr": 1e-2, "ratio": 4, "kappa": 3, **LOW_BIT, **options})
    step(optimizer, range(steps))
    return optimizer


def step(optimizer: Flora, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def variance_of(optimizer: Flora, position: int = 0) -> torch.Tensor:
    """The second moment of one tensor by rows, in float64."""
    param = optimizer.param_groups[0]["params"][position]
    kept = [optimizer.state[param][key] for key in ("variance", "variance_scale") if key in optimizer.state[param]]
    rows = kept[0].flatten(1) if position == list(SHAPES).index("convolution") else kept[0]
    return (dequantize_squares(rows, kept[1]) if len(kept) == 2 else rows).double()


def test_the_mean_over_all_random_bits_is_the_element() -> None:
    """Between its levels, of which only the two neighbours occur.

    Of the 65,536 values of u, a chance p rounds up within half a one of 65536 p of them: 2⁻¹⁷ of the distance of the
    levels. p is a quotient of two differences of float32 numbers of at most the upper level, 2⁻²⁴ of which is rounded
    in each and in the level that is read: less than 2⁻²¹ of it in all.
    """
    row = 3 * torch.logspace(-9, 0, 130)
    kept = quantize_squares_(row.repeat(PATTERNS, 1), ALL_BITS.unsqueeze(1).expand(PATTERNS, 130))
    stored = dequantize_squares(*kept).double()
    largest = torch.stack([row[:64].max(), row[64:128].max(), row[128:].max()])
    assert torch.equal(kept[1], largest.expand(PATTERNS, 3))
    scale = largest.double().repeat_interleave(64)[:130]
    grid = torch.arange(LEVELS + 1, dtype=torch.float64).div(LEVELS).pow(4)
    above = torch.searchsorted(grid, row.double() / scale).clamp(1, LEVELS)
    low, high = grid[above - 1] * scale, grid[above] * scale
    tolerance = (high - low) * 2.0**-17 + high * 2.0**-21
    assert ((stored.mean(0) - row.double()).abs() <= tolerance).all()
    assert (stored >= low - high * 2.0**-21).all()
    assert (stored <= high * (1 + 2.0**-21)).all()


def test_no_stored_square_is_zero_but_of_a_block_of_zeros() -> None:
    values = torch.zeros(2, 70)
    values[0, :3] = torch.tensor([1e-30, 1e-3, 5.0])
    values[1, 65] = torch.nan
    stored = dequantize_squares(*quantize_squares_(values, torch.zeros(2, 70, dtype=torch.int32)))
    assert torch.equal(stored[0, 3:64], torch.full((61,), stored[0, 0]))
    assert stored[0, 0] == pytest.approx(5.0 * LEVELS**-4)
    assert stored[0, 2] == 5.0
    assert not stored[0, 64:].any()
    assert stored[1, 64:].isnan().all()
    assert not stored[1, :64].any()


def test_a_run_keeps_the_second_moment_on_average() -> None:
    """Within five standard errors of the exact one, at the end of 40 steps: bits of two elements are independent."""
    param = torch.nn.Parameter(torch.zeros(256, 128))
    optimizer = Flora([param], lr=1e-3, ratio=4, **LOW_BIT)
    generator, exact = torch.Generator().manual_seed(0), torch.zeros(256, 128, dtype=torch.float64)
    size = torch.logspace(-1, 1, 128)
    for number in range(1, 41):
        param.grad = (torch.rand(param.shape, generator=generator) + 0.5) * size
        optimizer.step()
        exact.lerp_(param.grad.double().square(), number**-0.8)
    relative = variance_of(optimizer) / exact
    assert abs(relative.mean() - 1) <= 5 * relative.std() / relative.numel() ** 0.5
    assert 0 < relative.std() < 0.2


def test_its_bytes_and_its_path_are_reported() -> None:
    optimizer = trained(steps=1, beta1=None)
    rows = dict(zip(SHAPES, optimizer.report().rows, strict=True))
    scales = {"matrix": 24 * 3, "experts": 3 * 24 * 2, "convolution": 16 * 2}
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        expected = 16 + (4 * numel if name == "vector" else numel + 4 * scales[name])
        state = optimizer.state[optimizer.param_groups[0]["params"][list(SHAPES).index(name)]]
        assert rows[name].state_bytes == expected == sum(tensor.nbytes for tensor in state.values())
    assert "second moment in int8" in rows["matrix"].path
    assert "second moment" not in rows["vector"].path


@pytest.mark.parametrize("options", [{}, {"ratio": 1, "projection": "sign"}, {"projection": "adaptive"}], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(options: dict[str, Any]) -> None:
    whole, half = trained(8, torch.bfloat16, **options), trained(4, torch.bfloat16, **options)
    other = trained(0, torch.bfloat16, **options)
    other.load_state_dict(half.state_dict())
    for to, source in zip(other.param_groups[0]["params"], half.param_groups[0]["params"], strict=True):
        to.data.copy_(source.data)
    step(other, range(4, 8))
    for param, wanted in zip(other.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        assert torch.equal(param, wanted)
        for key, value in whole.state[wanted].items():
            assert torch.equal(other.state[param][key], value), key


def test_a_state_of_a_version_without_the_option_has_float32() -> None:
    saved = trained(second_moment_dtype="float32").state_dict()
    for group in saved["param_groups"]:
        del group["second_moment_dtype"]
    other = trained(0, second_moment_dtype="float32")
    other.load_state_dict(saved)
    assert other.param_groups[0]["second_moment_dtype"] == "float32"
    with pytest.raises(
        ValueError, match=r"written with second_moment_dtype='float32', .* has second_moment_dtype='int8'"
    ):
        trained(0).load_state_dict(saved)
    trained(0).load_state_dict(trained(0).convert_state(saved))


@pytest.mark.parametrize("position", range(3))
def test_a_converted_state_has_the_nearest_levels(position: int) -> None:
    old, new = trained(second_moment_dtype="float32"), trained(0)
    new.load_state_dict(new.convert_state(old.state_dict()))
    before, after = variance_of(old, position), variance_of(new, position)
    assert not torch.equal(before, after)
    largest = torch.cat([part.amax(-1, keepdim=True).expand_as(part) for part in before.split(64, -1)], -1)
    levels, stored = (LEVELS * (each / largest) ** 0.25 for each in (before, after))
    assert (levels - stored).abs().max() < 1 + 1e-4, "one of the two levels around it"
    back = trained(0, second_moment_dtype="float32")
    back.load_state_dict(back.convert_state(new.state_dict()))
    assert torch.equal(variance_of(back, position), after)
    factored = trained(0, factorize_second_moment=True, second_moment_dtype="float32")
    factored.load_state_dict(factored.convert_state(new.state_dict()))
    row_var = factored.state[factored.param_groups[0]["params"][position]]["row_var"]
    torch.testing.assert_close(row_var.double(), after.mean(-1))
