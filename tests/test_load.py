"""When sequences start: the projection is exact, the limit holds, the stream is steady."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_algorithms import Job, at_once, published, run, steady

from fastdecode.scheduling.load import Demand, Projection
from fastdecode.scheduling.predictor import Prediction
from fastdecode.scheduling.recent_starts import RECENT, RecentStarts, are_alike

demands = st.builds(
    lambda start, steps, first: Demand(start, start + steps - 1, first),
    st.integers(0, 20),
    st.integers(1, 30),
    st.integers(1, 50),
)


@given(st.lists(demands, max_size=40), demands.map(lambda d: Demand(20, d.end + 20 - d.start, d.first)))
def test_projection_is_exact(live: list[Demand], new: Demand) -> None:
    """Against walking every step; then with half of them removed again."""
    projection = Projection()
    live = [demand for demand in live if demand.end >= 20]
    for demand in live:
        projection.add(demand)
        projection.peak(new), projection.mean(35, 50)  # nothing of this is told later
    for _ in range(2):
        walked = [sum(d.at(step) for d in live) + new.at(step) for step in range(20, new.end + 1)]
        assert projection.peak(new) == max(walked)
        loads = [sum(demand.at(step) for demand in live) for step in range(20, 70)]
        assert [projection.at(step) for step in range(20, 70)] == loads
        for begin, end in ((35, 50), (20, 20), (20, 69), (35, 50)):
            assert projection.mean(begin, end) == pytest.approx(np.mean(loads[begin - 20 : end - 19]))
        for demand in live[::2]:
            projection.remove(demand)
        live = live[1::2]
        assert len(projection) == len(live)


def test_the_papers_example() -> None:
    """Figure 7: B = 6, S = 6, F = 2, so M = 2; the peak is 24 where all at once makes 36."""
    jobs = [Job(0, 6)] * 60
    loads, starts = run(jobs, steady(24, interval=2))
    assert starts == [step for step in range(0, 60, 2) for _ in range(2)]
    assert max(loads) == 24 and set(loads[5:59:2]) == {24}
    assert max(run(jobs, at_once(36))[0]) == 36


@pytest.mark.parametrize("batch, length, interval", [(1024, 1024, 64), (64, 768, 48), (128, 256, 1), (96, 96, 8)])
def test_uniform_lengths(batch: int, length: int, interval: int) -> None:
    """M = B·F/S starts every F steps; the peak is B(S + F)/2, about half of what all at once makes."""
    limit = batch * (length + interval) // 2
    jobs = [Job(0, length)] * (4 * batch)
    loads, starts = run(jobs, steady(limit, interval))
    per_interval = np.bincount(np.array(starts) // interval)
    assert set(per_interval[per_interval > 0].tolist()) <= {batch * interval // length, -(-batch * interval // length)}
    assert 0.98 * limit <= max(loads) <= limit
    assert max(run(jobs[:batch], at_once(batch * length))[0]) == batch * length


def bursts(starts: list[int], length: int) -> float:
    """The most sequences that start in one sixteenth of a length, relative to an even spread.  After the ramp."""
    counts = np.bincount(np.array(starts) * 16 // length)[16:48]
    return float(counts.max() / counts.mean())


def test_a_constant_limit_alone_makes_bursts() -> None:
    """Algorithm 1 with W_lim = W'max from the start: many start at once and then none for a length, for ever."""
    batch, length, interval = 256, 256, 16
    limit = batch * (length + interval) // 2
    jobs = [Job(0, length)] * (6 * batch)
    as_published, ours = run(jobs, published(limit, length))[1], run(jobs, steady(limit, interval))[1]
    assert bursts(as_published, length) > 4 and bursts(ours, length) <= 1.01


def mixed_jobs(seed: int, count: int) -> list[Job]:
    generator = np.random.default_rng(seed)
    return [
        Job(int(prompt), int(steps))
        for prompt, steps in zip(
            generator.integers(1, 1024, count), generator.choice([128, 256, 512, 1024], count), strict=True
        )
    ]


def a_prediction(*lengths: int) -> Prediction:
    return Prediction(tuple(sorted(set(lengths))), tuple(lengths.count(n) / len(lengths) for n in sorted(set(lengths))))


@pytest.mark.parametrize(
    "lengths, alike",
    [
        ([256] * 5 + [9, 90, 900], True),
        (np.random.default_rng(0).normal(256, 0.1 * 256, 128).astype(int).tolist(), True),
        (np.random.default_rng(0).normal(256, 0.3 * 256, 128).astype(int).tolist(), False),
        (np.random.default_rng(0).choice([128, 256, 512], 128).tolist(), True),
        (np.random.default_rng(0).integers(1, 512, 128).tolist(), False),
        ([5, 50, 500], True),  # too few to tell
    ],
)
def test_whether_lengths_are_alike(lengths: list[int], alike: bool) -> None:
    """Known one by one, or as a distribution that all of them share."""
    lengths = [max(1, length) for length in lengths]
    assert are_alike([a_prediction(length) for length in lengths]) == alike
    if len(lengths) >= 8:
        assert are_alike([a_prediction(*lengths)] * 20) == alike


shapes = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 50)), min_size=1, max_size=12, unique_by=lambda of: of[0]
)


@given(st.lists(shapes, max_size=40), st.integers(0, 3), st.randoms())
def test_recent_starts(shapes: list[list[tuple[int, int]]], more: int, random: Random) -> None:
    """After each of them, shared or not, what `are_alike` says of the last ones, however many have been forgotten."""
    recent, predictions, num_added = RecentStarts(), list[Prediction](), 0
    for shape in shapes + [[(100, 1)]] * (more * RECENT):
        lengths, counts = zip(*sorted(shape), strict=True)
        predictions.append(Prediction(lengths, tuple(count / sum(counts) for count in counts)))
        predictions += [random.choice(predictions)] * random.randint(0, 2)
        for prediction in predictions[num_added:]:
            recent.add(prediction)
        num_added = len(predictions)
        if random.random() < 0.3:
            continue  # nobody asks
        assert recent.are_alike == are_alike(predictions[-RECENT:])
