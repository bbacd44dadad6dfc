"""The page on replicas of shards, from made-up measurements."""

from typing import Any

import pytest

from benchmarks.replicas import EXCHANGED, METHODS, MICRO_BATCHES, REPLICAS, SHARDS, Cluster, cells, simulated

COUNT = 1000
CROSSED = {"HSDP, between replicas once": 4.0, f"{EXCHANGED}float32": 4.5, f"{EXCHANGED}int8": 1.5}
"""Bytes of an element that cross between replicas, where it is not half a byte."""


def found() -> dict[str, Any]:
    part = 2 * (REPLICAS - 1) / REPLICAS * COUNT / SHARDS
    base = next(iter(METHODS))
    run = {}
    for name in METHODS:
        sent = 100 + (0 if name == base else CROSSED.get(name, 0.5)) * part
        run[name] = {"sent": [1e9, sent, sent], "left": 560, "loss": 3}  # the first window is not counted
    return {"parameters": COUNT, "runs": [run]}


def test_what_crosses_is_the_difference_to_replicas_that_exchange_nothing() -> None:
    rows, bytes_of = cells(found())
    assert rows[0] == ("within a replica alone", "100 B", "0 B", "560 B (0.56)", "3.0000")
    assert [row[2] for row in rows if row[0] == f"{EXCHANGED}int4"] == ["250 B"]
    assert rows[-1][1:3] == ("350 B", ""), "it sends less within a replica"
    assert bytes_of == {"gradients": 4.0, "sketches, float32": 4.5, "sketches, int8": 1.5, "sketches, int4": 0.5}


def test_a_step_is_its_compute_and_its_messages() -> None:
    cluster = Cluster(parameters=8e9, replicas=2, devices=8, compute=10.0, micro_batches=4)
    assert cluster.seconds(0.0, 0, 1) == 40
    assert cluster.seconds(4.0, 1, 100) == pytest.approx(40 + 2.56)
    assert cluster.seconds(4.0, 4, 100) == pytest.approx(40 + 4 * 2.56)
    lines = simulated(cluster, {"gradients": 4.0, "sketches, int4": 0.5})
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| gradients, every micro-batch | 4.000 |")
    assert "| 42.6 s (1.06) |" in lines[3]
    assert "| 40.3 s (1.01) |" in lines[4]
    assert Cluster().micro_batches == MICRO_BATCHES
