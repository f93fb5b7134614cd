"""Hundreds of requests that begin alike, through the scheduler and through the engine: the books agree all along."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.end_to_end import make_model
from bench.prefix_requests import SHAPE, run_engine, run_scheduler


@pytest.mark.parametrize("num_workers, num_lanes", [(1, 1), (3, 2), (2, 3)])
def test_steps(num_workers: int, num_lanes: int) -> None:
    told = run_scheduler(400, num_workers=num_workers, num_lanes=num_lanes, seed=num_lanes)
    assert told["checks"] == 20 and told["share_found"] > 0.1
    assert told["preempted"] > 10 and told["aborted"] > 3 and bool(told["lost_workers"]) == (num_workers > 1)


def test_engine(tmp_path: Path) -> None:
    make_model(SHAPE, str(tmp_path))
    told = run_engine(300, tmp_path)
    assert told["checks"] == 20 and told["share_found"] > 0.1 and told["compared"] >= 2
