"""Metrics of sharded parameters are those of whole tensors, on every rank."""

import pytest

from floragrad import Flora
from tests.distributed import cases
from tests.distributed.cases import SHAPES, Tensors, options_of, run_steps
from tests.distributed.conftest import Worlds


def measured(_: int, sharding: str) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of shards, and of whole tensors."""
    columns = [1 if len(shape) == 2 else None for shape in SHAPES.values()]
    shardings = {"rows": cases.fsdp, "columns": cases.tensor_parallel(*columns)}
    found = []
    for params in (shardings[sharding](Tensors(SHAPES)), list(Tensors(SHAPES).parameters())):
        optimizer = Flora(params, **options_of(kappa=2, ratio=4))
        optimizer.collect_stats()
        run_steps(params, optimizer, range(3))
        found.append(optimizer.stats())
    return found[0], found[1]


@pytest.mark.parametrize("sharding", ["rows", "columns"])
def test_shards_have_the_metrics_of_the_whole(worlds: Worlds, sharding: str) -> None:
    for sharded, whole in worlds(2).run(measured, sharding):
        assert sharded == pytest.approx(whole, rel=1e-4)
        assert "sketch_energy" in whole
