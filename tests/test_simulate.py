"""The simulator drives the engine's scheduler; what that promises is shown here, in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load_algorithms import all_that_fits, published, run
from test_load import mixed_jobs

from bench.paper_figures import FIGURES, load_stabilising, splitfuse
from fastdecode.cli import main
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.modelling.simulation.cost import SplitCost, WholeCost, flat_cost
from fastdecode.modelling.simulation.latency import keeps_rate, summary
from fastdecode.modelling.simulation.simulator import Served, Simulation, simulate
from fastdecode.modelling.simulation.workload import Arrivals, Job, make_jobs
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.predictor import Learned, MaxTokens, NoisyOracle, Oracle, Predictor
from fastdecode.scheduling.scheduler import Scheduler

FLAT = flat_cost(0.01, 1e-9)


def simulate_offline(jobs: list[Job], predictor: Predictor, num_r_workers: int, **options: object) -> Simulation:
    settings: dict[str, object] = dict(
        max_num_seqs=4096, max_num_batched_tokens=1 << 20, num_lanes=1, block_tokens=16,
        capacity_blocks=(1 << 20,) * num_r_workers,
    )  # fmt: skip
    scheduler = Scheduler(SchedulerConfig(**settings | options), predictor)  # type: ignore[arg-type]
    simulation = simulate(scheduler, jobs, Arrivals((0.0,) * len(jobs)), FLAT, num_r_workers)
    assert not scheduler.has_work and all(len(one.tokens) == one.job.output_tokens for one in simulation.served)
    return simulation


@pytest.mark.parametrize("batch, length, interval", [(256, 256, 16), (128, 384, 3), (60, 96, 8)])
def test_uniform_lengths_have_half_the_peak(batch: int, length: int, interval: int) -> None:
    """B(S + F)/2 within 2 %, and as many sequences live as all at once have at twice that load."""
    limit, jobs = batch * (length + interval) // 2, [Job(1, length, length)] * (4 * batch)
    steady = simulate_offline(jobs, Oracle(), 2, max_kv_load=limit, start_interval=interval)
    at_once = simulate_offline(jobs[:batch], Oracle(), 2, start_policy="at-once")
    loads = [record.load for record in steady.steps]
    assert 0.98 * limit <= max(loads) <= limit
    assert max(record.load for record in at_once.steps) == batch * length
    settled = steady.steps[2 * length : 3 * length]
    assert np.mean([record.num_running for record in settled]) >= 0.97 * batch


@pytest.mark.parametrize("lengths, gain", [("256", 0.65), ("normal:256:0.1:1000", 0.92), ("128,256,512", 0.9),
                                           ("uniform:1:512", 1.02), ("lognormal:200:0.7:1000", 1.02)])  # fmt: skip
def test_the_default_is_never_slower_than_starting_what_fits(lengths: str, gain: float) -> None:
    """In the same memory, in steps; far quicker where lengths are alike."""
    jobs = make_jobs(1000, "16", lengths, None, np.random.default_rng(0))
    steady, eager = (
        len(simulate_offline(jobs, Oracle(), 1, capacity_blocks=(1024,), start_policy=policy).steps)
        for policy in ("steady", "eager")
    )
    assert steady <= gain * eager


@pytest.mark.parametrize("seed", range(4))
def test_mixed_lengths(seed: int) -> None:
    """W_lim holds in every step; as quick as brute force, far quicker than the published algorithm."""
    jobs, limit = mixed_jobs(seed, 1000), 40_000
    simulation = simulate_offline(
        [Job(job.prompt + 1, job.steps, job.steps) for job in jobs], Oracle(), 2, max_kv_load=limit
    )
    assert max(record.load for record in simulation.steps) <= limit
    assert len(simulation.steps) <= 1.05 * len(run(jobs, all_that_fits(limit))[0])
    assert len(simulation.steps) <= 0.6 * len(run(jobs, published(limit, 1024))[0])


def test_at_the_published_accuracy() -> None:
    """74.9 %: hardly a step over the limit, 95 % of the oracle's throughput, no evictions where greedy has many."""
    capacity, workers = 32768, 4
    limit = int(0.9 * workers * capacity)
    jobs = make_jobs(2000, "lognormal:100:1.0:1024", "lognormal:220:0.9:2048", 2048, np.random.default_rng(0))
    memory: dict[str, object] = dict(capacity_blocks=(capacity // 16,) * workers, max_num_batched_tokens=4096)
    speeds = []
    for predictor in (Oracle(), NoisyOracle()):
        result: dict[str, Any] = summary(
            simulate_offline(jobs, predictor, workers, max_kv_load=limit, length_quantile=0.55, **memory), limit
        )
        speeds.append(result["output_tokens_per_s"])
        assert result["preemptions"] == 0 and result["steps_over_limit"] <= 0.01 * result["steps"]
    greedy = summary(simulate_offline(jobs, MaxTokens(), workers, kv_policy="greedy", start_policy="eager", **memory))
    assert speeds[1] >= 0.95 * speeds[0]
    assert greedy["preemptions"] > 100  # type: ignore[operator]


@pytest.mark.parametrize("predictor, most", [(Oracle, 1.05), (NoisyOracle, 1.05), (Learned, 1.08)])
def test_r_workers_are_balanced(predictor: type, most: float) -> None:
    """8 of them, 512 sequences of heavy-tailed lengths at a time: the largest load over the mean, average of steps."""
    jobs = make_jobs(1500, "lognormal:200:1.2:2048", "lognormal:150:0.9:1024", 1024, np.random.default_rng(0))
    steps = simulate_offline(jobs, predictor(), 8, max_num_seqs=512, max_num_batched_tokens=4096).steps
    full = np.array([record.kv_tokens for record in steps if record.num_running > 450], float)
    assert len(full) > 200 and (full.max(1) / full.mean(1)).mean() <= most


def test_equal_lengths_do_not_swing() -> None:
    """Where each worker's load now is all that counts, the largest comes to three times the mean."""
    jobs = [Job(1, 256, 256)] * 1500
    steps = simulate_offline(jobs, Oracle(), 8, max_kv_load=512 * (256 + 16) // 2, start_interval=16).steps
    settled = np.array([record.kv_tokens for record in steps[300:600]], float)
    assert (settled.max(1) / settled.mean(1)).max() < 1.05


def test_load_stabilising_as_published() -> None:
    """Figure 12 by the model of an A10 and eight Epycs, within 7 %; `bench/paper_figures.py` has the others."""
    figure = FIGURES[2]
    simulated, _ = load_stabilising(figure, fillings=1.6)
    for name in ("start", "peak", "mean", "steady"):
        assert simulated[name] == pytest.approx(getattr(figure, name), rel=0.07), name
    assert 0.66 <= simulated["steady_to_peak"] <= 0.76 and simulated["load_ratio"] == pytest.approx(17 / 32, rel=0.01)


def test_splitfuse_as_published() -> None:
    """Effective throughput at 4 tokens/s, and the 95th percentile between tokens, against whole prompts first."""
    figures = splitfuse((4, 6, 8, 14, 16))
    first, fused = figures["prefill-first"], figures["splitfuse"]
    assert fused["effective_throughput"]["4"] >= 1.4 * first["effective_throughput"]["4"]  # type: ignore[index]
    assert first["gap_ms"]["p95"] >= 2.5 * fused["gap_ms"]["p95"]  # type: ignore[index]
    assert fused["gap_ms"]["p50"] == pytest.approx(first["gap_ms"]["p50"], rel=0.1)  # type: ignore[index]


def test_kv_on_the_device() -> None:
    """It is read by the device, at its rate and beside no wire; R-workers read what does not fit there."""
    jobs = [Job(1, 100, 100)] * 8
    model = PerfModel((1, 8), (0.01, 0.01), 1e-4, 1, r_fixed_seconds=0.02, device_kv_token_seconds=1e-5)
    cost = SplitCost(model)
    seconds = {}
    for device, r_workers in ((0, 1), (4, 1), (8, 1), (8, 0)):
        config = SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=64, num_lanes=1, block_tokens=100,
            capacity_blocks=(8,) * r_workers, device_blocks=device, start_policy="eager",
        )  # fmt: skip
        simulation = simulate(Scheduler(config, Oracle()), jobs, Arrivals((0.0,) * 8), cost, r_workers)
        assert max(record.device_kv_tokens for record in simulation.steps) == 100 * device
        assert max(record.load for record in simulation.steps) == 100 * (8 - device)
        seconds[device, r_workers] = simulation.seconds
    # 100 steps of 8 sequences that read 1 to 100 tokens: 40,400 tokens in all, less where the prompt's step reads none.
    assert seconds[8, 0] == pytest.approx(100 * 0.01 + 40_400 * 1e-5, rel=0.01)
    assert seconds[0, 1] == pytest.approx(100 * 0.03 + 40_400 * 1e-4, rel=0.01)
    assert seconds[4, 1] == pytest.approx(100 * 0.03 + 20_200 * 1e-4, rel=0.01)  # the device reads meanwhile


def test_order() -> None:
    """Shortest jobs first wait less on average, longest more; nobody is passed by more than the window."""
    jobs = make_jobs(400, "lognormal:300:1.0:4000", "8", None, np.random.default_rng(0))
    waits, most_passed = {}, 0
    for order in ("fcfs", "sjf", "ljf"):
        served = simulate_offline(
            jobs, Oracle(), 1, order=order, order_window=16, max_num_batched_tokens=512, start_policy="eager"
        ).served
        waits[order] = np.mean([one.started for one in served])  # type: ignore[arg-type]
        ranks = np.argsort(np.argsort([one.started for one in served], kind="stable"))  # type: ignore[arg-type]
        most_passed = max(most_passed, int(np.abs(ranks - np.arange(400)).max()))
    assert waits["sjf"] < waits["fcfs"] < waits["ljf"] and most_passed < 16 + 16


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_queue_as_in_the_books(load: float) -> None:
    """Prompts alone, one at a time, Poisson arrivals: M/D/1, mean time to first token D + R D²/(2(1 - R D))."""
    duration = 0.1
    cost = WholeCost((duration * 1e3, 0, 0), (1, 0, 0), (1, 0, 0))
    generator, count, rate = np.random.default_rng(1), 10_000, load / duration
    jobs = [Job(64, 1, 1)] * count
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=1,
            max_num_batched_tokens=64,
            num_lanes=1,
            block_tokens=16,
            capacity_blocks=(100,),
            split_fuse=False,
        )
    )
    times = tuple(np.cumsum(generator.exponential(1 / rate, count)).tolist())
    result = summary(simulate(scheduler, jobs, Arrivals(times), cost, 1))
    expected = duration + rate * duration**2 / (2 * (1 - load))
    assert result["ttft_s"]["mean"] == pytest.approx(expected, rel=0.06)  # type: ignore[index]


def test_closed_loop_keeps_its_clients_busy() -> None:
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=64, max_num_batched_tokens=512, num_lanes=1, block_tokens=16, capacity_blocks=(1000,)
        )
    )
    simulation = simulate(scheduler, [Job(10, 20, 20)] * 50, Arrivals(None, 7), FLAT, 1)
    assert len(simulation.served) == 50
    assert max(record.num_running + record.num_waiting for record in simulation.steps) == 7
    assert {record.num_running for record in simulation.steps[:-20]} == {7}


def test_refused_jobs_do_not_stop_a_client() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=512, num_lanes=1, block_tokens=16, capacity_blocks=(4,))
    )
    served = simulate(scheduler, [Job(10, 20, 20), Job(100, 20, 20)] * 5, Arrivals(None, 1), FLAT, 1).served
    assert [one.refused for one in served] == [None, "kv_budget_exceeded"] * 5


def test_service_level() -> None:
    """The first token in prompt / 512 s; then a moving average of the gaps."""
    in_time = Served(Job(512, 4, 4), arrived=10.0, tokens=[11.0, 11.2, 11.4, 11.6])
    assert keeps_rate(in_time, 4) and not keeps_rate(in_time, 6)
    assert not keeps_rate(Served(Job(512, 2, 2), arrived=9.9, tokens=[11.0, 11.1]), 4)
    assert not keeps_rate(Served(Job(512, 3, 3), arrived=10.0, tokens=[11.0, 11.1, 12.1]), 4)  # one long gap


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """600 requests in seconds: a table, JSON, a plot."""
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["simulate", "--requests", "600", "--output-tokens", "64,128", "--kv-tokens", "8192"]
    assert main([*arguments, "--start-policy", "steady", "at-once", "--json", str(out), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert "steady" in table and "peak load" in table and "itl p95, ms" in table
    content = json.loads(out.read_text())
    assert content["options"]["requests"] == 600
    for name in ("steady", "at-once"):
        figures, steps = content["runs"][name]["summary"], content["runs"][name]["steps"]
        assert figures["requests"] == 600 and len(steps) == figures["steps"]
        assert max(sum(step["kv_tokens"]) for step in steps) == figures["peak_load"]
    assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output-tokens", "some"], "lengths"),
        (["--prompt-tokens", "normal:5"], "lengths"),
        (["--arrivals", "poisson:-1"], "arrivals"),
        (["--requests", "0"], "--requests must be 1 or more"),
        (["--max-kv-load", "0"], "--max-kv-load must be 1 or more"),
        (["--kv-tokens", "10"], "--kv-tokens must be 16 or more"),
        (["--max-tokens", "-3"], "--max-tokens must be 1 or more"),
        (["--output-tokens", "normal:nan:1:200"], "lengths"),
        (["--arrivals", "poisson:1e-320"], "arrivals"),
        (["--kv-tokens", "16"], "no request fits"),
        (["--calibration", "nothing.json"], "no calibration"),
        (["--accuracy", "2"], "shares"),
        (["--r-workers", "0"], "give --device-kv-tokens"),
        (["--device-kv-tokens", "999", "--profile", "a100-opt-13b"], "does not tell how fast the device reads"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_measure_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    """One token each: there is no time between tokens, and JSON has no NaN."""
    assert main(["simulate", "--requests", "4", "--output-tokens", "1", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert content["runs"]["steady"]["summary"]["itl_s"]["mean"] is None


def test_the_scheduler_is_not_told_the_truth() -> None:
    """Outputs that their requests cut short are no more known than others, and learned as what they are."""
    jobs = make_jobs(2000, "10", "lognormal:50:1.0:400", 100, np.random.default_rng(0))
    assert not any(job.is_known for job in jobs)
    learned = Learned()
    simulate_offline(jobs, learned, 1, max_num_seqs=64)
    mean = learned.predict(10, 100, None).mean()
    assert mean == pytest.approx(np.mean([job.output_tokens for job in jobs]), rel=0.15)
    assert learned.predict(10, 1000, None).mean() > 2 * mean
