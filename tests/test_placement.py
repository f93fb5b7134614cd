"""Where KV is kept and over how many lanes steps go, by a model of both sides: never slower than either alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Case, quiet
from scheduler_world import World, a_sequence, create_scheduler
from test_recovery import assert_at_rest, gone, make_faulty, r_workers

from bench.near_ties import assert_same_tokens
from bench.placement import Cell, brute_force, run
from cpu_attention import RWorker
from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError
from fastdecode.modelling.calibration import Calibration, write_calibration
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.observe.step_log import read_step_log
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.placement import Placement, Room, Share, best_plan, step_seconds, tokens_per_s
from fastdecode.scheduling.times import LaneWork

__all__ = ["r_workers"]  # a fixture

SMALL: dict[str, Any] = {"max_num_seqs": 128, "max_num_batched_tokens": 1024}
DEVICE_BEST = PerfModel((1, 64), (1.0, 2.0), 1.0, 1, r_fixed_seconds=5.0, device_kv_token_seconds=0.001)
R_WORKERS_BEST = PerfModel((1, 64), (1.0, 1.1), 1e-4, 1, device_kv_token_seconds=0.1)
EVEN = PerfModel((1, 4, 64), (1.0, 1.5, 4.0), 0.01, 1, 0.2, 3.3, 0.005, 0.004, 0.05)


@pytest.mark.parametrize("times", [DEVICE_BEST, R_WORKERS_BEST, EVEN], ids=["device", "R-workers", "even"])
@pytest.mark.parametrize("room", [Room(2000, 8000, 2, 64, 640), Room(400, 400, 1, 64, 64), Room(9000, 0, 0, 64, 64)])
@pytest.mark.parametrize("kv_tokens", [3.0, 50.0, 700.0])
def test_the_plan_is_as_good_as_all_pairs(times: PerfModel, room: Room, kv_tokens: float) -> None:
    """But for what it is worth to need no R-workers, or no limit."""
    share = Share(kv_tokens, 1.2)
    most_device = min(room.num_sequences, room.device / kv_tokens)
    most_r = min(room.num_sequences, room.r_workers / kv_tokens)
    best = max(
        tokens_per_s(times, room.num_r_workers, 2, device, min(r, room.num_sequences - device), share)
        for device in np.linspace(0, most_device, 65).tolist()
        for r in np.linspace(0, most_r, 65).tolist()
    )
    assert best <= room.margin * 1.03 * best_plan(times, 2, room, share).tokens_per_s


def test_plans_at_the_ends() -> None:
    share, room = Share(100.0, 1.1), Room(2000, 100_000, 4, 64, 6400)
    assert best_plan(DEVICE_BEST, 2, room, share)[:2] == (math.inf, 0.0)
    assert best_plan(R_WORKERS_BEST, 2, room, share)[:2] == (0.0, math.inf)
    even = replace(EVEN, device_kv_token_seconds=0.0005)
    device, r_workers, _ = best_plan(even, 2, room, share)
    assert device == math.inf and 0 < r_workers < room.r_workers  # W_lim
    hidden = r_workers / share.kv_tokens
    s_seconds = even.s_seconds((20 + hidden) * share.num_tokens) + even.device_seconds(2000)
    assert even.r_seconds(r_workers, 4, hidden) <= 1.3 * s_seconds  # it hides under the device's work


def test_one_lane_where_nothing_is_hidden() -> None:
    """Two cost the weights twice; from where R-work is long they pay, and not a little earlier and later in turns."""
    placement = Placement(EVEN, 2)
    for seq_id in range(64):
        placement.start(seq_id, False, Share(10.0, 1.0))
    chosen = []
    for load in [*range(0, 4000, 10), *range(4000, 0, -10)]:
        chosen.append(placement.num_lanes(0, load, 1))
    assert chosen[0] == 1 == chosen[-1] and max(chosen) == 2
    assert int(np.count_nonzero(np.diff(chosen))) == 2
    share = Share(1.0, 1.0)
    assert step_seconds(EVEN, 1, 2, 0, 64, Share(50.0, 1.0)) < step_seconds(EVEN, 1, 1, 0, 64, Share(50.0, 1.0))
    assert step_seconds(EVEN, 1, 2, 64, 0, share) > step_seconds(EVEN, 1, 1, 64, 0, share)


@pytest.mark.parametrize(("output_tokens", "sockets"), [(64, 1), (64, 10), (256, 4)])
@pytest.mark.parametrize("model", ["7B MHA", "8B GQA"])
@pytest.mark.parametrize("device", ["a10", "h100"])
def test_never_slower_than_either_alone(device: str, model: str, output_tokens: int, sockets: int) -> None:
    cell = Cell(device, model, output_tokens, sockets)
    both = run(cell, 400, **SMALL)
    alone = run(replace(cell, sockets=0), 400, num_lanes=1, times=None, **SMALL)
    offload = run(cell, 400, device_blocks=0, **SMALL)
    assert both.tokens_per_s >= 0.98 * alone.tokens_per_s
    assert both.tokens_per_s >= 0.98 * offload.tokens_per_s
    assert both.lane_changes <= 6


def test_machinery_that_is_idle_costs_nothing() -> None:
    """All fits on the device, and R-workers are there: the same steps as without them."""
    cell = Cell("h100", "8B GQA", 256, 4)
    both = run(cell, 300, **SMALL)
    alone = run(replace(cell, sockets=0), 300, num_lanes=1, times=None, **SMALL)
    assert both.mean_load == 0 and both.lane_changes == 0
    assert both.seconds == pytest.approx(alone.seconds, rel=0.01)


def test_near_the_best_of_fixed_choices() -> None:
    cell = Cell("a10", "7B MHA", 64, 2)
    small = SMALL | {"max_num_seqs": 64}
    best, choice = brute_force(cell, 160, **small)
    assert run(cell, 160, **small).tokens_per_s >= 0.9 * best, choice


def test_all_on_the_cpus() -> None:
    """A device that holds less than any sequence keeps nobody from R-workers, whatever the plan is."""
    for times in (DEVICE_BEST, R_WORKERS_BEST, EVEN):
        scheduler = create_scheduler(capacity_blocks=(20, 20), device_blocks=2, num_lanes=2, times=times)
        world = World(scheduler, 64, (20, 20), device_blocks=2)
        for seq_id in range(12):
            world.add(a_sequence(seq_id, prompt=12, output=8))
        world.run()
        assert all(DEVICE not in step.r_workers for step in world.steps)


def test_no_flipping() -> None:
    """In a steady stream of requests, at a load where both sides are about as good: the plan settles."""
    scheduler = create_scheduler(
        max_num_seqs=64,
        capacity_blocks=(200, 200),
        device_blocks=60,
        num_lanes=2,
        times=EVEN,
        max_num_batched_tokens=200,
    )
    world, lanes, plans = World(scheduler, 200, (200, 200), device_blocks=60), [], []
    generator = np.random.default_rng(0)
    for number in range(600):
        if number % 2 == 0:
            length = int(generator.integers(20, 60))
            world.add(a_sequence(len(world.sequences), prompt=20, output=length))
        world.step()
        lanes.append(scheduler.num_lanes_in_use)
        plans.append(scheduler.num_plans)
    world.run()
    assert np.count_nonzero(np.diff(lanes[100:])) <= 4
    assert plans[-1] - plans[100] <= 12


def test_what_is_long_moves_to_the_device_when_that_is_free() -> None:
    """Once, all of it, with nobody waiting; and the steps that are saved pay for it."""
    times = PerfModel((1, 256), (1.0, 1.2), 1e-4, 1, 1.0, device_kv_token_seconds=1e-5)
    seconds = {}
    for moves in (True, False):
        scheduler = create_scheduler(
            max_num_seqs=128, max_num_batched_tokens=256, capacity_blocks=(1600,), device_blocks=330, num_lanes=2,
            times=times,
        )  # fmt: skip
        if not moves:
            scheduler._to_move = list  # type: ignore[method-assign, assignment]
        world = World(scheduler, 256, (1600,), device_blocks=330)
        for seq_id in range(300):
            world.add(a_sequence(seq_id, prompt=20, output=300 if seq_id in (150, 151, 152) else 30))
        seconds[moves] = 0.0
        while step := world.step():
            lanes, load = scheduler.num_lanes_in_use, sum(scheduler.kv_tokens)
            own = len(step.decodes) - step.num_device_decodes
            work = LaneWork(step.num_tokens, load / lanes, scheduler.device_kv_tokens / lanes, own)
            seconds[moves] += times.step_seconds([work] * lanes, 1) / lanes
        assert (scheduler.num_moves > 0) == moves
        assert max(sequence.num_preemptions for sequence in world.sequences.values()) <= 1
    assert seconds[True] < 0.8 * seconds[False]


def test_who_has_no_other_place_is_not_held_back() -> None:
    """Requests without max_tokens may come to more than the device holds; R-workers take as many as they can."""
    scheduler = create_scheduler(
        max_num_seqs=16, capacity_blocks=(400,), device_blocks=20, num_lanes=2, times=DEVICE_BEST
    )
    world = World(scheduler, 64, (400,), device_blocks=20)
    for seq_id in range(12):
        world.add(a_sequence(seq_id, prompt=8, output=100, true=20))
    most = 0
    while world.step():
        most = max(most, len(world.running))
    assert most >= 10


def test_a_limit_of_the_load_is_part_of_the_plan() -> None:
    """What R-workers may not read does not count as room there: the device is used."""
    scheduler = create_scheduler(
        max_num_seqs=32, capacity_blocks=(400, 400), device_blocks=60, num_lanes=2, times=EVEN, max_kv_load=20
    )
    world = World(scheduler, 64, (400, 400), device_blocks=60)
    for seq_id in range(24):
        world.add(a_sequence(seq_id, prompt=8, output=12))
    world.run()
    assert sum(step.num_device_decodes for step in world.steps) > sum(len(s.decodes) for s in world.steps) / 2


def test_one_refusal_hides_no_side() -> None:
    """Nor does an R-worker that was lost and has come back."""
    scheduler = create_scheduler(
        max_num_seqs=64, max_num_batched_tokens=256, capacity_blocks=(40, 40), device_blocks=60, num_lanes=2,
        times=R_WORKERS_BEST,
    )  # fmt: skip
    world = World(scheduler, 256, (40, 40), device_blocks=60)
    world.add(a_sequence(0, prompt=4, output=40))
    world.step()
    world.add(a_sequence(1, prompt=180, output=20))  # fits the device, and no single R-worker
    for _ in range(3):
        world.step()
    for seq_id in range(2, 80):
        world.add(a_sequence(seq_id, prompt=4, output=12))
    world.run()
    of_r_workers = [len(step.decodes) - step.num_device_decodes for step in world.steps]
    assert sum(of_r_workers) > sum(step.num_device_decodes for step in world.steps)


@pytest.mark.parametrize("seed", range(6))
def test_lanes_that_open_and_close_at_any_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts on their way, requests that generate nothing, and those that end in a lane that closes."""
    generator = np.random.default_rng(seed)
    monkeypatch.setattr(Placement, "num_lanes", lambda self, *_: int(generator.choice([1, 3])))
    scheduler = create_scheduler(
        max_num_seqs=24, max_num_batched_tokens=90, capacity_blocks=(60, 60), device_blocks=40, num_lanes=3, times=EVEN
    )
    world = World(scheduler, 90, (60, 60), device_blocks=40)
    for _ in range(300):
        if generator.random() < 0.4:
            prompt, output = int(generator.integers(1, 60)), int(generator.integers(0, 20))
            world.add(a_sequence(len(world.sequences), prompt=prompt, output=output))
        world.step()
    world.run()


@pytest.mark.parametrize("times", [DEVICE_BEST, R_WORKERS_BEST, EVEN], ids=["device", "R-workers", "even"])
def test_nobody_starves(times: PerfModel) -> None:
    """One that only an R-worker can hold, among an endless stream of those that the device serves better."""
    scheduler = create_scheduler(max_num_seqs=8, capacity_blocks=(60,), device_blocks=24, num_lanes=2, times=times)
    world = World(scheduler, 64, (60,), device_blocks=24)
    giant = a_sequence(0, prompt=120, output=40)
    world.add(a_sequence(1, prompt=8, output=8))
    world.step()
    world.add(giant)
    for number in range(400):
        if number % 3 == 0:
            world.add(a_sequence(len(world.sequences), prompt=8, output=8))
        world.step()
        if giant.finish_reason:
            break
    assert giant.finish_reason and number < 300
    world.run()


@pytest.mark.parametrize("times", [DEVICE_BEST, R_WORKERS_BEST, EVEN], ids=["device", "R-workers", "even"])
@pytest.mark.parametrize("transport", ["inproc", "shm"])
def test_wherever_they_are_kept_tokens_are_the_same(
    transport: str, times: PerfModel, case: Callable[[str], Case], tmp_path: Path
) -> None:
    """And over however many lanes a step goes."""
    llama = case("llama")
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        num_layers = len(llm.facts.layers)
    path, log = tmp_path / "c.json", tmp_path / "steps.jsonl"
    of_this_model = replace(times, num_layers=num_layers)
    write_calibration(Calibration("llama", "a CPU", "float32", "float32", "here", 2, 1, "-", of_this_model), path)
    with LLM(
        llama.directory, calibration=path, device_kv_memory=768 * 480, num_r_workers=2, block_tokens=16,
        kv_cache_memory=768 * 960, micro_batches=2, transport=transport, skip_tokenizer_init=True, step_log=log,
    ) as llm:  # fmt: skip
        for _ in range(2):
            outputs = quiet(llm, llama.prompts, SamplingParams(temperature=0, max_tokens=32))
            assert [output.outputs[0].token_ids for output in outputs] == llama.reference
        assert llm._engine._scheduler.num_plans
        llm._engine._scheduler.check_integrity()
    steps = list(read_step_log(log))
    of_device, of_r_workers = max(step.device_kv_tokens for step in steps), max(step.load for step in steps)
    if times is DEVICE_BEST:
        assert of_device and not of_r_workers
    else:
        assert of_r_workers and (of_device if times is EVEN else of_device < of_r_workers)


@pytest.mark.parametrize("caching", [False, True])
def test_moved_in_the_middle_tokens_are_the_same(caching: bool, case: Callable[[str], Case], tmp_path: Path) -> None:
    llama, path = case("llama"), tmp_path / "c.json"
    prompts = [[5 + i % 50, 7, 9 + i % 3] * 5 for i in range(150)]
    params = [
        SamplingParams(temperature=0, max_tokens=120 if i in (70, 71, 72) else 16, ignore_eos=True) for i in range(150)
    ]
    with LLM(llama.directory, skip_tokenizer_init=True, max_num_seqs=128) as llm:
        expected = quiet(llm, prompts, params)
        num_layers = len(llm.facts.layers)
    times = PerfModel((1, 256), (1.0, 1.2), 1e-4, num_layers, 1.0, device_kv_token_seconds=1e-5)
    write_calibration(Calibration("llama", "a CPU", "float32", "float32", "here", 1, 1, "-", times), path)
    with LLM(
        llama.directory, calibration=path, device_kv_memory=768 * 960, block_tokens=16, max_num_seqs=128,
        max_num_batched_tokens=512, micro_batches=2, skip_tokenizer_init=True, enable_prefix_caching=caching,
    ) as llm:  # fmt: skip
        outputs = quiet(llm, prompts, params)
        assert 0 < llm._engine._scheduler.num_moves <= 6
    assert_same_tokens(llama.directory, prompts, params, outputs, expected)


@pytest.mark.parametrize("times", [R_WORKERS_BEST, EVEN], ids=["R-workers", "even"])
@pytest.mark.parametrize("calls", range(5, 180, 35))
def test_lost_r_workers(
    calls: int, times: PerfModel, case: Callable[[str], Case], tmp_path: Path, r_workers: list[RWorker]
) -> None:
    """Of three one, then another, at any moment, and the device beside them: the same tokens, and nobody is lost."""
    llama, path = case("llama"), tmp_path / "c.json"
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        of_this_model = replace(times, num_layers=len(llm.facts.layers))
    write_calibration(Calibration("llama", "a CPU", "float32", "float32", "here", 3, 1, "-", of_this_model), path)
    r_workers.clear()
    with LLM(
        llama.directory, num_r_workers=3, calibration=path, device_kv_memory=768 * 480, kv_cache_memory=768 * 960,
        block_tokens=16, micro_batches=2, worker_timeout_s=60, skip_tokenizer_init=True,
    ) as llm:  # fmt: skip
        make_faulty(llm, calls % 3, calls, gone)
        make_faulty(llm, (calls + 1) % 3, 2 * calls, gone)
        params = SamplingParams(temperature=0, max_tokens=32)
        for _ in range(2):
            outputs = quiet(llm, llama.prompts, params)
            assert [output.outputs[0].token_ids for output in outputs] == llama.reference
        assert_at_rest(llm, r_workers)


def test_measured_at_the_start(case: Callable[[str], Case]) -> None:
    llama = case("llama")
    options: dict[str, Any] = {"device_kv_memory": "8MiB", "kv_cache_memory": "8MiB", "block_tokens": 16}
    for _ in range(5):
        try:
            llm = LLM(llama.directory, placement="planned", skip_tokenizer_init=True, **options)
            break
        except ConfigError as error:
            assert "too busy to be measured" in str(error)
    with llm:
        times = llm._engine._scheduler._config.times
        assert isinstance(times, PerfModel) and times.num_layers == len(llm.facts.layers)
        assert times.device_kv_token_seconds and times.device_seconds(1000) > 0
        assert 1e-12 < times.kv_token_seconds < 1e-5 and times.batches[-1] == 4096
        outputs = quiet(llm, llama.prompts, SamplingParams(temperature=0, max_tokens=32))
        assert [output.outputs[0].token_ids for output in outputs] == llama.reference
