"""A regression whose mini-batches disagree: every second one pulls the other way.

The loss is ‖W - W*‖², its gradient W - W* plus a noise N, twice as large as the distance at the start, whose
sign alternates. Without momentum W follows the noise to and fro, a learning rate each time, and that is the
loss it ends with. Momentum in a sketched subspace cancels the noise there, so the loss ends lower, if what is
decoded has the right sign and stands in the right basis. What is carried into a wrong basis is a random
direction that lasts for ten steps, as long as kappa here, and the loss ends higher.

The bound of each row is the largest loss of the four storages, measured, and 5% above: everything is seeded,
so nothing but rounding can move it, and the three faults below move most rows by more. They are made here on
purpose, so that the test of the tests is a test.
"""

from collections.abc import Callable
from itertools import product
from math import sqrt
from typing import Any

import pytest
import torch

from floragrad import Flora
from floragrad.policy import StateDtype
from floragrad.torch.context import StepContext
from floragrad.torch.projection import BucketProjection, GaussianProjection
from tests.marks import paired, slow
from tests.torch.cases import CASES, Case

STEPS = 80
STORAGE: list[StateDtype] = ["float32", "bfloat16", "int8", "int4"]
GAUSSIAN = [("gaussian", "float32"), ("gaussian", "int4")]
"""Those that always run: a Gaussian projection is drawn anew in every step, which takes most of the time."""

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")


def learning_rate(case: Case) -> dict[str, Any]:
    """A constant one, large enough to arrive, where the step does not derive its own."""
    return {} if case.options.get("relative_step") else {"lr": 0.1}


def reach(options: dict[str, Any]) -> float:
    """How far away to start: ten steps of the last step size, so that each case has the same task."""
    if options["lr"] is not None:
        return float(10 * options["lr"])
    last = 1e-6 * STEPS if options.get("warmup_init") else 1e-2
    return 10 * min(last, 1 / sqrt(STEPS))


def loss(case: Case, state_dtype: StateDtype) -> float:
    """The mean squared distance over the last ten steps, between two resamplings, in units of that at the start."""
    options = case.all_options(**learning_rate(case), state_dtype=state_dtype)
    generator = torch.Generator().manual_seed(3)
    target, start, noise = (torch.randn(case.shape, generator=generator) for _ in range(3))
    distance = reach(options)
    param = torch.nn.Parameter(target + distance * start)
    optimizer = Flora([param], **options)
    last = []
    for step in range(STEPS):
        sign = -1 if step % 2 else 1
        param.grad = param.detach() - target - 2 * sign * distance * noise
        optimizer.step()
        if step >= STEPS - 10:
            last.append((param.detach() - target).square().mean().item())
    return sum(last) / len(last) / (distance * start).square().mean().item()


@pytest.mark.parametrize(
    ("case", "state_dtype"),
    [
        *paired([case for case in CASES if "gaussian" not in case.name], STORAGE),
        *(
            (pytest.param if (case.name, dtype) in GAUSSIAN else slow)(case, dtype)
            for case, dtype in product(CASES, STORAGE)
            if "gaussian" in case.name
        ),
    ],
    ids=str,
)
def test_reaches_its_loss(case: Case, state_dtype: StateDtype) -> None:
    assert loss(case, state_dtype) <= case.bound


# --- The faults that it is there to find ------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def flip_what_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    added, bucket, gaussian = (
        BucketProjection.add_decoded_,
        BucketProjection.decode,
        GaussianProjection.decode,
    )
    monkeypatch.setattr(BucketProjection, "add_decoded_", lambda self, rows, z: added(self, rows, -z))
    monkeypatch.setattr(BucketProjection, "decode", lambda self, z: -bucket(self, z))
    monkeypatch.setattr(GaussianProjection, "decode", lambda self, z: -gaussian(self, z))


def skip_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BucketProjection, "transfer", lambda self, z, previous, *, orthogonal: z)


def go_on_in_the_old_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = StepContext.projection

    def stale(self: StepContext, resample_index: int, *_: Any) -> Any:
        return drawn(self, resample_index if self.is_resample_step else max(0, resample_index - 1))

    monkeypatch.setattr(StepContext, "projection", stale)


FAULTS: list[tuple[Break, tuple[str, ...]]] = [
    (
        flip_what_is_decoded,
        ("wide", "ratio-2", "one-bucket", "paper-estimator", "gaussian", "adaptive", "convolution"),
    ),
    (skip_the_transfer, ("wide", "tall", "ratio-2", "stacked-experts", "convolution", "vocabulary-compressed")),
    (
        go_on_in_the_old_basis,
        ("wide", "tall", "ratio-2", "one-bucket", "stacked-experts", "convolution", "paper-estimator"),
    ),
]


@pytest.mark.parametrize(("break_it", "names"), FAULTS, ids=[each.__name__ for each, _ in FAULTS])
@pytest.mark.usefixtures("eager")
def test_a_fault_misses_the_loss(break_it: Break, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    missed = {case.name for case in CASES if case.name in names and loss(case, "float32") > case.bound}
    assert missed == set(names)
