"""The performance model: the paper's own numbers, and what every such model must obey."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdecode.modelling.perf_model import PerfModel, sls_peak
from fastdecode.scheduling.times import LaneWork

# Of an A10 (T of one block at 512 tokens) and one socket (R), read off the paper's figures 13 and 15.
LLAMA_7B = PerfModel((512,), (2.97e-3,), 110e-9, 32)
LLAMA_13B = PerfModel((512,), (4.66e-3,), 139e-9, 40)

models = st.builds(
    lambda points, r, layers: PerfModel.measured(sorted(points), [points[b] for b in sorted(points)], r, layers),
    st.dictionaries(st.integers(1, 4096), st.floats(1e-5, 1e-1), min_size=1, max_size=8),
    st.floats(1e-9, 1e-6),
    st.integers(1, 100),
)


@pytest.mark.parametrize(
    "model, length, sockets", [(LLAMA_13B, 1024, 7.8), (LLAMA_7B, 1024, 9.7), (LLAMA_7B, 768, 7.3)]
)
def test_the_papers_sockets(model: PerfModel, length: int, sockets: float) -> None:
    """It used 8 for all three, and calls the second overloaded and the third more balanced."""
    assert model.r_workers(512, length) == pytest.approx(sockets, abs=0.05)


def test_balance() -> None:
    """With as many R-workers as the model asks for, S and R take equally long at the mean load."""
    num = LLAMA_7B.r_workers(512, 1024)
    assert LLAMA_7B.kv_token_seconds * 512 * 1024 / 2 / num == pytest.approx(LLAMA_7B.s_seconds(512))


def test_steps() -> None:
    model = PerfModel((1, 100), (1.0, 2.0), 0.01, 3)
    assert model.step_seconds([LaneWork(100, 400)], 2) == pytest.approx(3 * (2 + 2))  # one alone: S, then R
    assert model.step_seconds([LaneWork(100, 400)] * 2, 2) == pytest.approx(3 * 4)  # two: both always busy
    assert model.step_seconds([LaneWork(100, 400)] * 2, 1) == pytest.approx(3 * 8)  # R binds
    assert model.step_seconds([], 1) == 0
    assert model.largest_load(3 * 4, 2) == 800


def test_steps_with_kv_on_the_device() -> None:
    model = PerfModel(
        (1, 100), (1.0, 2.0), 0.01, 3, 0.25, r_row_seconds=0.01, device_kv_token_seconds=0.005, device_fixed_seconds=0.5
    )
    assert model.step_seconds([LaneWork(100, device_kv_tokens=100)], 0) == pytest.approx(3 * (2 + 1))
    assert model.step_seconds([LaneWork(100)], 2) == pytest.approx(3 * 2)  # nothing goes to R-workers, nobody waits
    mixed = LaneWork(100, load=400, device_kv_tokens=100, num_r_rows=75)
    assert model.step_seconds([mixed], 2) == pytest.approx(3 * (2 + 0.25 + 0.75 + 2))  # the device reads meanwhile
    assert model.step_seconds([mixed] * 2, 2) == pytest.approx(3 * 6)  # 2·(2 + 1) here, 2·3 there
    with pytest.raises(ValueError, match="below 0"):
        PerfModel((1,), (1.0,), 1.0, 1, r_row_seconds=-1.0)


def test_sls_peak() -> None:
    assert sls_peak(6, 6, 2) == 24 and sls_peak(1024, 1024, 64) / (1024 * 1024) == pytest.approx(0.531, abs=1e-3)


@given(models, st.integers(1, 8192), st.integers(1, 2000), st.floats(0.01, 1e4))
def test_what_holds_for_every_model(model: PerfModel, batch: int, length: int, latency_s: float) -> None:
    assert model.s_seconds(batch) <= model.s_seconds(batch + 1) * (1 + 1e-12)
    largest = model.largest_batch(length, latency_s)
    if largest:
        assert 2 * model.num_layers * length * model.s_seconds(largest) <= latency_s
    assert 2 * model.num_layers * length * model.s_seconds(largest + 1) > latency_s
    assert list(model.seconds) == sorted(model.seconds)
    for measured, seconds in zip(model.batches, model.seconds, strict=True):
        assert model.s_seconds(measured) == pytest.approx(seconds)
    assert model.saturating_batch() in model.batches


@pytest.mark.parametrize(
    "batches, seconds, r",
    [((), (), 1.0), ((1, 1), (1.0, 1.0), 1.0), ((0,), (1.0,), 1.0), ((1,), (0.0,), 1.0), ((1, 2), (2.0, 1.0), 1.0)],
)
def test_measurements_that_cannot_be(batches: tuple[int, ...], seconds: tuple[float, ...], r: float) -> None:
    with pytest.raises(ValueError):
        PerfModel(batches, seconds, r, 1)
