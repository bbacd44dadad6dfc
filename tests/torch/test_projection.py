"""Projections: what holds exactly is asserted exactly, what holds in the mean at a bound that is derived.

Statistical bounds. Every seed is fixed, so a test passes or fails for ever; the bounds say how likely a
correct implementation would have been to fail at a seed chosen blindly: at most ``FALSE_ALARM`` a test, by

* Hoeffding (and Azuma, for martingale differences), for means of T numbers in [-1, 1]:
  P(|mean| >= x) <= 2 exp(-T x² / 2);
* Laurent and Massart, "Adaptive estimation of a quadratic functional", 2000, lemma 1, for χ² of D degrees:
  P(|χ²/D - 1| >= 2 sqrt(y/D) + 2 y/D) <= 2 exp(-y);
* the central limit theorem where a variance is known, at six standard errors: 2e-9.

Rounding bounds. A float32 result of s roundings differs from the exact one by at most about s·2⁻²⁴ of the
same sum taken over absolute values (Higham, "Accuracy and stability of numerical algorithms", section 3.1),
so every comparison with the dense float64 algebra is made element by element against that sum.
"""

from itertools import product
from math import ceil, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floragrad import Flora, reference
from floragrad._streams import Stream
from floragrad.torch.adaptive import noise_from
from floragrad.torch.projection import (
    BucketProjection,
    GaussianProjection,
    Projection,
    bucket_sizes,
    normalise_buckets,
    power_iteration,
)
from floragrad.torch.projection import random_signs as signs_of
from floragrad.torch.random import Philox
from tests.marks import slow

GOLDEN_ZERO = "+--++-++++-++---+++--+------+----++--+--+-+++-+-"
GOLDEN_LARGE = "-++-+--+---+-+++-+----+-++--++-++-+--+--++-++-+-"
GOLDEN_SUM = 38

FALSE_ALARM = 1e-9
SIGMAS = 6.0
UNIT = 2.0**-24
CPU = torch.device("cpu")


def random_signs(n: int, seed: int, index: int, resample_index: int, stream: Stream) -> torch.Tensor:
    return signs_of(Philox(seed, index, resample_index, stream), n, CPU)


def hoeffding(draws: int, comparisons: int) -> float:
    """What no mean of ``draws`` numbers in [-1, 1] exceeds, in any of so many comparisons."""
    return sqrt(2 * log(2 * comparisons / FALSE_ALARM) / draws)


def laurent_massart(degrees: int, comparisons: int) -> float:
    """How far no χ²/D departs from 1, in any of so many comparisons."""
    y = log(2 * comparisons / FALSE_ALARM)
    return 2 * sqrt(y / degrees) + 2 * y / degrees


def double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def rows_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_signs(n: int, k: int, draws: int, index: int = 0) -> list[BucketProjection]:
    """One projection per resample index, as the optimizer draws them."""
    return [
        BucketProjection.signs(n, k, random_signs(n, 0, index, resample_index, Stream.MOMENTUM))
        for resample_index in range(draws)
    ]


def drawn_gaussian(n: int, k: int, draws: int, piece: int) -> list[GaussianProjection]:
    return [GaussianProjection(n, k, seed, CPU, piece) for seed in range(draws)]


def all_signs(n: int, k: int) -> BucketProjection:
    """Every one of the 2ⁿ sign projections at once, as a batch: means over it are expectations."""
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=n))).unsqueeze(1)
    return BucketProjection.signs(n, k, patterns)


# --- The mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(12, 4), (10, 4), (9, 1), (8, 8)])
def test_signs_are_unbiased_over_all_patterns(n: int, k: int) -> None:
    """E[PᵀP] = I, with no tolerance: the mean over all patterns of sums of small integers is exact."""
    matrices = all_signs(n, k).matrix()
    assert torch.equal((matrices.mT @ matrices).mean(0), torch.eye(n))


def test_drawn_signs_are_unbiased() -> None:
    """The diagonal of PᵀP is 1 in every draw; an entry off it is 0 or a fair sign, so Hoeffding applies."""
    n, k, draws = 22, 6, 4000
    mean = torch.stack([p.matrix().T @ p.matrix() for p in drawn_signs(n, k, draws)]).mean(0)
    assert torch.equal(mean.diagonal(), torch.ones(n))
    assert (mean - torch.eye(n)).abs().max() <= hoeffding(draws, n * (n - 1) // 2)


def test_gaussian_is_unbiased() -> None:
    """A diagonal entry of the mean of T matrices PᵀP is χ²/D with D = kT.

    One off it is a sum of products ab = ((a + b)² - (a - b)²) / 4, hence the half difference of two such
    means: inside the same bound when both of them are.
    """
    n, k, draws = 12, 5, 4000
    mean = torch.stack([p.matrix().T @ p.matrix() for p in drawn_gaussian(n, k, draws, piece=k)]).mean(0)
    assert (mean - torch.eye(n)).abs().max() <= laurent_massart(k * draws, n * n)


@pytest.mark.parametrize(("n", "k"), [(12, 4), (10, 4), (9, 1), (8, 8)])
def test_error_and_norm_of_signs_over_all_patterns(n: int, k: int) -> None:
    """E‖decode(encode(x)) - x‖² = Σ (b - 1) x², b the size of the column's bucket, and E‖encode(x)‖² = ‖x‖².

    Where k divides n, b = ρ and the error is (ρ - 1)‖x‖². Integers stay exact in float32: no tolerance.
    """
    x = torch.arange(1.0, n + 1) * torch.tensor([1.0, -1.0]).repeat(n)[:n]
    projection = all_signs(n, k)
    sketch = projection.encode(x.expand(2**n, 1, n))
    errors = (projection.decode(sketch) - x).square().sum((1, 2))
    sizes = bucket_sizes(n, k, CPU)[torch.arange(n) % k]
    expected = ((sizes - 1) * x.square()).sum()
    assert errors.double().mean() == expected
    if n % k == 0:
        assert expected == (n // k - 1) * x.square().sum()
    assert sketch.double().square().sum((1, 2)).mean() == x.square().sum()


def test_error_of_drawn_signs() -> None:
    """As above, for the signs that are drawn.

    For x = (1, …, 1) a bucket of size b with sum S of its signs has the error b S² - 2 S² + b, of mean
    b (b - 1) and variance (b - 2)² Var(S²) = (b - 2)² 2 b (b - 1); buckets and draws are independent.
    """
    n, k, draws = 24, 6, 4000
    x, b = torch.ones(1, n), 24 // 6
    errors = [(p.decode(p.encode(x)) - x).square().sum().item() for p in drawn_signs(n, k, draws)]
    standard_error = sqrt(k * (b - 2) ** 2 * 2 * b * (b - 1) / draws)
    assert abs(np.mean(errors) - (b - 1) * n) <= SIGMAS * standard_error


@pytest.mark.parametrize("piece", [slow(4), 3, slow(1)])  # 3: two pieces, the last smaller
def test_error_and_norm_of_gaussian(piece: int) -> None:
    """E‖decode(encode(x)) - x‖² = ((n + 1)/k) ‖x‖² and E‖encode(x)‖² = ‖x‖².

    Turn x to (1, 0, …, 0). With s = ‖P x‖² = χ²_k / k the error is A + B with A = (s - 1)² along x and
    B = (s / k) q across it, q = χ²_{n-1} independent of s. So the mean is 2/k + (n - 1)/k, and
    E[A²] = (12 k² + 48 k)/k⁴ (the fourth central moment of χ²_k), E[B²] = (1 + 2/k)((n - 1)² + 2(n - 1))/k²;
    sd(A + B) <= sd(A) + sd(B) <= sqrt(E[A²]) + sqrt(Var B). At six standard errors the bound is 8% of the
    error, where n/k instead of (n + 1)/k would be off by 11%. ‖encode(x)‖² summed is χ² of kT degrees.
    Rows drawn piece by piece are as independent as those drawn at once: repeated ones would add to the error.
    """
    n, k, draws = 8, 4, 10000
    x = torch.nn.functional.normalize(rows_of(1, n), dim=-1)
    errors, norms = [], []
    for projection in drawn_gaussian(n, k, draws, piece):
        sketch = projection.encode(x)
        errors.append((projection.decode(sketch) - x).square().sum().item())
        norms.append(sketch.square().sum().item())
    sd_along = sqrt(12 / k**2 + 48 / k**3)
    across = ((1 + 2 / k) * ((n - 1) ** 2 + 2 * (n - 1)) - (n - 1) ** 2) / k**2
    standard_error = (sd_along + sqrt(across)) / sqrt(draws)
    assert SIGMAS * standard_error < 0.9 / k
    assert abs(np.mean(errors) - (n + 1) / k) <= SIGMAS * standard_error
    assert abs(np.mean(norms) - 1) <= laurent_massart(k * draws, 1)


def test_norm_of_a_matrix_is_unbiased_under_drawn_signs() -> None:
    """‖encode(X)‖² - ‖X‖² is a sum over pairs i < j of a bucket of 2 s_i s_j ⟨x_i, x_j⟩, x_i the columns.

    The pairs' signs are uncorrelated, so its variance is Σ 4 ⟨x_i, x_j⟩², computed here from X itself.
    """
    n, k, draws = 22, 6, 4000
    x = rows_of(9, n)
    gram = double(x).T @ double(x)
    together = np.equal.outer(np.arange(n) % k, np.arange(n) % k)
    standard_error = sqrt(4 * (np.triu(gram, 1)[together] ** 2).sum() / draws)
    norms = [p.encode(x).square().sum().item() for p in drawn_signs(n, k, draws)]
    assert abs(np.mean(norms) - np.trace(gram)) <= SIGMAS * standard_error


# --- Signs ------------------------------------------------------------------------------------------------


def signs_text(*arguments: int) -> str:
    n, seed, index, resample_index, stream = arguments
    return "".join("+" if s > 0 else "-" for s in random_signs(n, seed, index, resample_index, Stream(stream)).tolist())


def test_signs_are_those_of_the_first_release() -> None:
    """A checkpoint holds no signs, only their seed: another generator would read it in a foreign basis."""
    assert signs_text(48, 0, 0, 0, Stream.MOMENTUM) == GOLDEN_ZERO
    assert signs_text(48, 2**63 - 1, 5, 7, Stream.ACCUMULATOR) == GOLDEN_LARGE
    # The longest of them runs over several words of the generator.
    assert random_signs(1000, 3, 2, 1, Stream.MOMENTUM).sum() == GOLDEN_SUM


def test_signs_do_not_depend_on_order_length_or_global_state() -> None:
    """The first n signs are the same in any order of calls, at any length, whatever torch's own generator."""
    wanted = [(index, resample_index) for index in range(3) for resample_index in range(3)]
    forth = [random_signs(100, 0, index, resample_index, Stream.MOMENTUM) for index, resample_index in wanted]
    state = torch.manual_seed(5).get_state()
    back = [random_signs(163, 0, index, resample_index, Stream.MOMENTUM) for index, resample_index in reversed(wanted)]
    assert torch.equal(torch.get_rng_state(), state), "drawing signs moved torch's generator"
    for one, other in zip(forth, reversed(back), strict=True):
        assert torch.equal(one, other[:100])


def test_signs_are_fair() -> None:
    """Every length draws +1 and -1 only; over 2¹⁷ of them the mean is inside Hoeffding's bound."""
    signs = random_signs(2**17, 0, 0, 0, Stream.MOMENTUM)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) <= hoeffding(len(signs), 1)


def test_signs_are_independent_across_tensors_epochs_streams_and_seeds() -> None:
    """Products of two independent fair signs are fair signs: Hoeffding for every pair of 240 streams."""
    n = 8192
    drawn = torch.stack(
        [
            random_signs(n, seed, index, resample_index, stream)
            for seed in (0, 1, 2**40, 2**63 - 1)
            for index in (0, 1, 2, 1000)
            for resample_index in (0, 1, 2)
            for stream in Stream
        ]
    )
    correlations = (drawn @ drawn.T / n).fill_diagonal_(0)
    streams = len(drawn)
    assert correlations.abs().max() <= hoeffding(n, streams * (streams - 1) // 2)


def test_signs_are_independent_along_the_row_and_over_epochs() -> None:
    """s_j s_{j+l} is a martingale difference in j, so Azuma's bound holds at every lag l.

    The same for one column over epochs, where the lag is the number of epochs between.
    """
    lags = range(1, 200)
    along = random_signs(2**15, 0, 0, 0, Stream.MOMENTUM)
    over = torch.stack([random_signs(1, 0, 0, resample_index, Stream.MOMENTUM)[0] for resample_index in range(4096)])
    for signs in (along, over):
        bound = hoeffding(len(signs) - lags[-1], 2 * len(lags))
        assert abs(signs.mean().item()) <= bound
        for lag in lags:
            assert abs((signs[lag:] * signs[:-lag]).mean().item()) <= bound, f"lag {lag}"


# --- The dense algebra ------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 7), st.integers(1, 50), st.integers(1, 30), st.integers(0, 2**31))


def weights_of(n: int, k: int, kind: str, seed: int) -> BucketProjection:
    """Signs; learnt weights; learnt weights of a batch of two matrices."""
    if kind == "signs":
        return BucketProjection.signs(n, k, random_signs(n, seed, 0, 0, Stream.MOMENTUM))
    raw = rows_of(n, seed=seed) if kind == "learnt" else rows_of(2, 1, n, seed=seed)
    return BucketProjection.normalised(normalise_buckets(raw, k, raw), k)


def assert_rounded(found: torch.Tensor, exact: np.ndarray, magnitude: np.ndarray, roundings: int) -> None:
    """``roundings`` of them, counted generously: three more for the operands' own products and sums."""
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    excess = np.abs(double(found) - exact) - 1.01 * (roundings + 3) * UNIT * magnitude
    assert excess.max() <= 0


def assert_equals_dense(p: Projection, rows: torch.Tensor, longest: int) -> None:
    """Encode and decode against X Pᵀ and Z P."""
    dense, x = double(p.matrix()), double(rows)
    sketch = p.encode(rows)
    assert_rounded(sketch, x @ dense.swapaxes(-1, -2), np.abs(x) @ np.abs(dense).swapaxes(-1, -2), longest)
    z = double(sketch)
    assert_rounded(p.decode(sketch), z @ dense, np.abs(z) @ np.abs(dense), longest)


@pytest.mark.parametrize("kind", ["signs", "learnt", "learnt-batch"])
@given(shape=shapes)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_bucket_algebra_equals_the_dense_matrix(kind: str, shape: tuple[int, int, int, int]) -> None:
    """Every operation, for k dividing n or not, one bucket, k = n, and weights of each matrix's own."""
    m, n, k, seed = shape
    k = min(k, n)
    rows = rows_of(2, m, n, seed=seed)
    new, old = weights_of(n, k, kind, seed), weights_of(n, k, kind, seed + 1)
    assert_equals_dense(new, rows, ceil(n / k))

    dense, before, x = double(new.matrix()), double(old.matrix()), double(rows)
    gram = np.diagonal(dense @ dense.swapaxes(-1, -2), axis1=-2, axis2=-1)[..., None, :]
    sketch = rows_of(2, m, k, seed=seed + 2)
    z = double(sketch)
    added = new.add_orthogonal_(rows.clone(), sketch)
    # The Gram diagonal itself is only known to (bucket size + 3) roundings where weights are learnt.
    assert_rounded(added, x + z / gram @ dense, np.abs(x) + np.abs(z) / gram @ np.abs(dense), ceil(n / k) + 6)

    gram = np.diagonal(before @ before.swapaxes(-1, -2), axis1=-2, axis2=-1)[..., None, :]
    for orthogonal, divisor in ((False, np.ones_like(gram)), (True, gram)):
        carried = new.transfer(sketch, old, orthogonal=orthogonal)
        across = np.abs(z) / divisor @ np.abs(before) @ np.abs(dense).swapaxes(-1, -2)
        exact = z / divisor @ before @ dense.swapaxes(-1, -2)
        assert_rounded(carried, exact, across, 2 * ceil(n / k) + 6)


@given(shape=shapes, piece=st.integers(1, 30))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_gaussian_algebra_equals_the_dense_matrix(shape: tuple[int, int, int, int], piece: int) -> None:
    """The same, however many rows of P exist at a time; P is the same at every use."""
    m, n, k, seed = shape
    k = min(k, n)
    new, old = (GaussianProjection(n, k, each, CPU, piece) for each in (seed, seed + 1))
    assert torch.equal(new.matrix(), new.matrix())
    assert_equals_dense(new, rows_of(2, m, n, seed=seed), n)
    sketch = rows_of(2, m, k, seed=seed)
    z, dense, before = double(sketch), double(new.matrix()), double(old.matrix())
    across = np.abs(z) @ np.abs(before) @ np.abs(dense).T
    assert_rounded(new.transfer(sketch, old, orthogonal=False), z @ before @ dense.T, across, n + k)


def test_gaussian_refuses_what_needs_orthogonal_rows() -> None:
    projection = GaussianProjection(8, 2, 0, CPU, piece=2)
    with pytest.raises(NotImplementedError, match="not orthogonal"):
        projection.add_orthogonal_(rows_of(3, 8), rows_of(3, 2))
    with pytest.raises(NotImplementedError, match="not orthogonal"):
        projection.transfer(rows_of(3, 2), projection, orthogonal=True)


@given(shape=shapes)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sign_rows_are_orthogonal_and_as_long_as_their_buckets(shape: tuple[int, int, int, int]) -> None:
    """PPᵀ is the diagonal of bucket sizes (ρI where k divides n), exactly: it counts ones."""
    _, n, k, seed = shape
    k = min(k, n)
    projection = weights_of(n, k, "signs", seed)
    matrix = projection.matrix()
    counted = np.bincount(np.arange(n) % k, minlength=k)
    assert torch.equal(matrix @ matrix.T, torch.diag(projection.gram))
    assert projection.gram.tolist() == counted.tolist()
    assert (matrix != 0).sum(0).tolist() == [1] * n, "a column stands in one bucket"
    if n % k == 0:
        assert torch.equal(matrix @ matrix.T, (n // k) * torch.eye(k))


@pytest.mark.parametrize("kind", ["signs", "learnt"])
@pytest.mark.parametrize(("n", "k"), [(48, 8), (37, 8), (9, 1), (12, 12)])
def test_residual_reading_is_an_orthogonal_projection(kind: str, n: int, k: int) -> None:
    """Q X = (X Pᵀ)(P Pᵀ)⁻¹ P: Q² = Q, Q = Qᵀ, rank k; after a transfer, the projection of what was read.

    Tolerances: an application is 2 ceil(n/k) + 6 roundings of numbers no larger than the bucket's sum of |x|,
    here bounded for all elements by the largest of them; two applications, twice that.
    """
    new, old = weights_of(n, k, kind, 0), weights_of(n, k, kind, 1)

    def project(rows: torch.Tensor, onto: BucketProjection) -> torch.Tensor:
        return onto.add_orthogonal_(torch.zeros_like(rows), onto.encode(rows))

    q = project(torch.eye(n), new)
    tolerance = 2 * (2 * ceil(n / k) + 6) * UNIT * ceil(n / k)
    assert (project(q, new) - q).abs().max() <= tolerance
    assert (q - q.T).abs().max() <= tolerance
    assert abs(q.trace().item() - k) <= n * tolerance
    sketch = rows_of(5, k)
    read_before = old.add_orthogonal_(torch.zeros(5, n), sketch)
    carried = new.transfer(sketch, old, orthogonal=True)
    read_after = new.add_orthogonal_(torch.zeros(5, n), carried)
    scale = read_before.abs().max().item()
    assert (read_after - project(read_before, new)).abs().max() <= tolerance * scale
    assert read_after.norm() <= read_before.norm() * (1 + tolerance)
    assert (new.transfer(sketch, new, orthogonal=True) - sketch).abs().max() <= tolerance * sketch.abs().max()


# --- The adaptive projection ------------------------------------------------------------------------------


@given(shape=shapes)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_adaptive_rows_are_orthonormal(shape: tuple[int, int, int, int]) -> None:
    """PPᵀ = I: zero off the diagonal exactly, one on it to the roundings of a norm (b + 3) and a division."""
    _, n, k, seed = shape
    k = min(k, n)
    matrix = double(weights_of(n, k, "learnt", seed).matrix())
    gram = matrix @ matrix.T
    assert np.count_nonzero(gram - np.diag(np.diag(gram))) == 0
    assert np.abs(np.diag(gram) - 1).max() <= 2 * (ceil(n / k) + 5) * UNIT


def test_a_bucket_of_zeros_keeps_its_old_weights() -> None:
    """What has no direction to learn falls back, so rows stay orthonormal; other buckets do not notice."""
    n, k = 11, 3
    old = normalise_buckets(rows_of(n), k, rows_of(n))
    grown = rows_of(n, seed=1)
    learnt = normalise_buckets(grown, k, old)
    grown[1::k] = 0
    found = normalise_buckets(grown, k, old)
    assert torch.equal(found[1::k], old[1::k])
    for bucket in (0, 2):
        assert torch.equal(found[bucket::k], learnt[bucket::k])


@given(shape=shapes, cut=st.integers(0, 7))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_power_iteration_of_blocks_sums_up(shape: tuple[int, int, int, int], cut: int) -> None:
    """Σ over row blocks of Vᵀ(V w) is that of the whole, and equals the dense product in every bucket.

    Roundings: b for V w, m for the sum over rows, and as many again for each of the two parts.
    """
    m, n, k, seed = shape
    k, cut = min(k, n), min(cut, m)
    rows = rows_of(m, n, seed=seed)
    projection = weights_of(n, k, "learnt", seed)
    whole = power_iteration(rows, projection)
    parts = power_iteration(rows[:cut], projection) + power_iteration(rows[cut:], projection)
    exact, magnitude = np.empty((1, n)), np.empty((1, n))
    x, w = double(rows), double(projection.weight)
    for bucket in range(k):
        block, own = x[:, bucket::k], w[bucket::k]
        exact[0, bucket::k] = block.T @ (block @ own)
        magnitude[0, bucket::k] = np.abs(block).T @ (np.abs(block) @ np.abs(own))
    for found in (whole, parts):
        assert_rounded(found, exact, magnitude, ceil(n / k) + m)


@given(shape=shapes)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_power_iteration_never_loses_energy(shape: tuple[int, int, int, int]) -> None:
    """‖V w‖² of the new w is at least that of the old, in every bucket.

    A = VᵀV, ‖w‖ = 1, a = wᵀA w, b = ‖A w‖², c = (A w)ᵀA(A w). Cauchy and Schwarz give a² <= b, and b² <= a c
    from b = (A^½ w)ᵀ(A^{3/2} w); so the energy c/b that A w captures is at least b/a >= a. From random signs
    on, the learnt projection therefore captures at least what the signs captured. Rounding: A w is off by
    (ceil(n/k) + m + 8) roundings of at most sqrt(ceil(n/k)) times the bucket's energy (the sum of absolute
    values in it), which moves the quotient by at most four times that.
    """
    m, n, k, seed = shape
    k = min(k, n)
    rows = rows_of(m, n, seed=seed)
    signs = random_signs(n, seed, 0, 0, Stream.MOMENTUM)
    start = BucketProjection.normalised(normalise_buckets(signs, k, signs), k)
    grown = power_iteration(rows, start)[0]
    learnt = BucketProjection.normalised(normalise_buckets(grown, k, start.weight), k)
    x = double(rows)
    before, after = (np.sum((x @ double(p.matrix()).T) ** 2, axis=0) for p in (start, learnt))
    energy = np.array([np.sum(x[:, bucket::k] ** 2) for bucket in range(k)])
    slack = 4 * (ceil(n / k) + m + 8) * UNIT * sqrt(ceil(n / k)) * energy
    assert (after >= before - slack).all()


@pytest.mark.parametrize(("ratio", "factor"), [(6, 2.0), (24, 6.0)])
def test_adaptive_captures_what_power_iteration_promises(ratio: int, factor: float) -> None:
    """Through the optimizer, on a matrix whose buckets are of rank one plus noise.

    With U's singular values s_i in a bucket's block V, and c_i the cosines of the start to its right singular
    vectors, the start after two iterations is Σ c_i s_i⁴ v_i up to its length, so the captured energy is
    Σ c_i² s_i¹⁰ / Σ c_i² s_i⁸. The tolerance is that of float32 along two iterations, 2 (ρ + m + 8)
    roundings, four times for the quotient and over the cosine of the start, at least 2⁻⁸ here (asserted).
    Random signs capture 1/ρ of the energy in the mean, exactly; here the learnt weights take ``factor`` times
    that, the range that the design names.
    """
    m, buckets = 40, 4
    n = ratio * buckets
    steady = torch.empty(m, n)
    for bucket in range(buckets):
        steady[:, bucket::buckets] = torch.outer(rows_of(m, seed=bucket), rows_of(ratio, seed=9 + bucket))
    param = torch.nn.Parameter(torch.zeros(m, n))
    optimizer = Flora([param], lr=1e-3, ratio=ratio, projection="adaptive", state_dtype="float32")
    start = double(optimizer.state[param]["projection_weight"])
    start = start + double(noise_from(Philox(0, 0, 0, Stream.ADAPTIVE_NOISE).draw(n, CPU), n, buckets))
    param.grad = steady + 0.3 * rows_of(m, n, seed=99)
    optimizer.step()
    update = reference.second_moment(double(param.grad), reference.State(step=1), reference.Options())
    weight = double(optimizer.state[param]["projection_weight"])

    captured = 0.0
    for bucket in range(buckets):
        block, learnt = update[:, bucket::buckets], weight[bucket::buckets]
        _, s, v = np.linalg.svd(block, full_matrices=False)
        c = v @ (start[bucket::buckets] / np.linalg.norm(start[bucket::buckets]))
        assert abs(c[0]) > 2**-8
        promised = np.sum(c**2 * s**10) / np.sum(c**2 * s**8)
        found = np.sum((block @ learnt) ** 2)
        tolerance = 4 * 2 * (ratio + m + 8) * UNIT / abs(c[0])
        assert abs(found / promised - 1) <= tolerance
        captured += found
    assert captured >= factor * np.sum(update**2) / ratio
