"""The scheduler's promises, on any workload: pure, so it takes milliseconds."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduler_world import OTHER, World, a_sequence, create_scheduler, pass_step, siblings

from fastdecode.errors import RequestError
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.scheduling.kv_credits import KV_POLICIES
from fastdecode.scheduling.load_control import START_POLICIES
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.predictor import Learned, MaxTokens, NoisyOracle, Oracle
from fastdecode.scheduling.prefixes import SHARING
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.waiting import ORDERS, WaitingQueue

sizes = st.tuples(
    st.integers(1, 40),
    st.integers(0, 12),
    st.one_of(st.none(), st.integers(1, 12)),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([1, 1, 1, 2, 4]),
    st.sampled_from([None, None, "a"]),
    st.sampled_from([(), (5,) * 18, (6,) * 33]),
)
PREDICTORS = {
    "max": MaxTokens,
    "oracle": Oracle,
    "noisy": lambda: NoisyOracle(0.5),
    "learned": lambda: Learned(least=2),
}
TIMES: dict[str, PerfModel | None] = {  # of blocks, where the device, the R-workers, or neither is the better place
    "unknown": None,
    "device": PerfModel((1, 8), (1.0, 2.0), 1.0, 1, r_fixed_seconds=5.0, device_kv_token_seconds=0.001),
    "R-workers": PerfModel((1, 8), (1.0, 1.1), 0.001, 1, device_kv_token_seconds=0.1),
    "both": PerfModel((1, 4, 8), (1.0, 2.0, 3.0), 0.05, 1, 0.1, 3.0, 0.01, 0.02, 0.1),
}


@settings(max_examples=400)
@given(
    sizes=st.lists(sizes, min_size=1, max_size=25),
    arrivals=st.lists(st.integers(0, 4), min_size=25, max_size=25),
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 24), max_size=5),
    max_num_seqs=st.integers(1, 9),
    budget=st.integers(1, 60),
    lanes=st.integers(1, 4),
    capacity=st.lists(st.integers(4, 40), min_size=1, max_size=3).map(tuple).filter(lambda blocks: sum(blocks) >= 13),
    device=st.tuples(st.sampled_from([0, 0, 5, 13, 40]), st.booleans()),
    min_part=st.sampled_from([None, 1, 7, 20]),
    predictor=st.sampled_from(sorted(PREDICTORS)),
    kv_policy=st.sampled_from(KV_POLICIES),
    start_policy=st.sampled_from(START_POLICIES),
    interval=st.integers(1, 5),
    max_kv_load=st.one_of(st.none(), st.integers(1, 200)),
    quantile=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    order=st.sampled_from(ORDERS),
    window=st.integers(1, 6),
    split_fuse=st.booleans(),
    restart=st.one_of(st.none(), st.integers(1, 50)),
    scored_rows=st.integers(1, 50),
    prompt_room=st.integers(0, 12),
    sharing=st.sampled_from(SHARING),
    times=st.sampled_from(["unknown", *TIMES]),
)
def test_whatever_comes(
    sizes: list[tuple[int, int, int | None, int, bool, int, str | None, tuple[int, ...]]],
    arrivals: list[int],
    aborts: dict[int, int],
    max_num_seqs: int,
    budget: int,
    lanes: int,
    capacity: tuple[int, ...],
    device: tuple[int, bool],
    min_part: int | None,
    predictor: str,
    kv_policy: str,
    start_policy: str,
    interval: int,
    max_kv_load: int | None,
    quantile: float,
    order: str,
    window: int,
    split_fuse: bool,
    restart: int | None,
    scored_rows: int,
    prompt_room: int,
    sharing: str,
    times: str,
) -> None:
    """Budgets are kept in every step (see World), nobody running is skipped, no credit leaks, everything ends.

    What is to be scored is scored once, in its order, whoever is thrown out meanwhile.
    """
    scheduler = create_scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        num_lanes=lanes,
        capacity_blocks=capacity,
        device_blocks=device[0],
        prompts_attend_there=device[1],
        predictor=PREDICTORS[predictor](),
        kv_policy=kv_policy,
        start_policy=start_policy,
        start_interval=interval,
        max_kv_load=max_kv_load,
        length_quantile=quantile,
        order=order,
        order_window=window,
        min_part_tokens=min_part,
        split_fuse=split_fuse,
        restart_tokens=restart,
        max_scored_rows=scored_rows,
        prompt_kv_blocks=prompt_room,
        prompt_kv_block_tokens=3,
        sharing=sharing,
        times=TIMES[times],
    )
    world = World(scheduler, budget, capacity, split_fuse, scored_rows, device[0])
    coming: list[tuple[int, Sequence]] = []
    for when, (prompt, out, true, rank, scores, copies, salt, first) in zip(arrivals, sizes, strict=False):
        coming += [
            (when, one)
            for one in siblings(len(coming), prompt, out, true and min(true, out), rank, scores, copies, salt, first)
        ]
    aborted = set()
    for number in range(20_000):
        while coming and (coming[0][0] <= number or not scheduler.has_work):
            world.add(coming.pop(0)[1])
        if (victim := world.sequences.get(aborts.get(number, -1))) is not None:
            world.remove([victim])
            aborted.add(victim.seq_id)
        assert len(world.running) <= max_num_seqs
        if world.step() is None and not coming:
            break
    assert not scheduler.has_work and not world.running
    scheduler.forget_prefixes()
    world.add(a_sequence(len(coming) + len(world.sequences), prompt=1, output=1))
    world.run()
    assert all(s.num_free_blocks >= s.num_blocks - 1 for s in world.stores.values()), "a block has leaked"
    for sequence in world.sequences.values():
        if sequence.seq_id not in aborted:
            expected = sequence.request.true_output_tokens or sequence.request.max_new_tokens
            assert len(sequence.output_token_ids) == expected and sequence.finish_reason
            assert world.scored[sequence.seq_id] == list(range(sequence.num_to_score))
    if (
        restart is None
        and kv_policy != "greedy"
        and predictor == "max"
        and times == "unknown"  # nothing moves
        and (sharing == "nothing" or kv_policy == "reserve-static")
        and len({rank for _, _, _, rank, *_ in sizes}) == 1
    ):
        assert world.num_preempted == 0, "what is reserved to the end is never thrown out"


def test_a_sequence_that_outgrows_the_original_length_is_computed_anew() -> None:
    """Once, from its first token, all of them as given; whoever begins beyond that length never is."""
    scheduler = create_scheduler(restart_tokens=8)
    world = World(scheduler, 64, (50, 50))
    for sequence in (a_sequence(0, prompt=5, output=9), a_sequence(1, prompt=8, output=3)):
        world.add(sequence)
    world.run()
    chunks = [s for step in world.steps for s in step.segments if s.is_prompt]
    assert [(s.seq_id, s.start, s.num_tokens, s.given_tokens) for s in chunks] == [
        (0, 0, 5, 5),
        (1, 0, 8, 8),
        (0, 0, 8, 8),
    ]
    assert world.num_preempted == 1


@pytest.mark.parametrize("start_policy", START_POLICIES)
def test_who_outranks_others_goes_first(start_policy: str) -> None:
    """All seats, all KV and a long prompt are in its way; its first token comes as if it were alone."""
    scheduler = create_scheduler(
        max_num_seqs=3, max_num_batched_tokens=8, capacity_blocks=(30,), start_policy=start_policy, kv_policy="greedy"
    )
    world = World(scheduler, 8, (30,))
    for i in range(6):
        world.add(a_sequence(i, prompt=30, output=60, rank=1))
    for _ in range(9):
        world.step()
    world.add(a_sequence(10, prompt=12, output=20, rank=0))
    first_steps = [world.step(), world.step()]
    own = [s for step in first_steps if step for s in step.segments if s.seq_id == 10]
    assert next(s.num_tokens for s in own) >= 5 and world.sequences[10].output_token_ids
    world.run()
    ends = [len(sequence.output_token_ids) for sequence in world.sequences.values()]
    assert ends == [60] * 6 + [20]


def test_sequences_join_and_leave_between_steps() -> None:
    world = World(create_scheduler(max_num_seqs=2), 64, (50, 50))
    for i in range(3):
        world.add(a_sequence(i, output=2 + i))
    world.run()
    steps = [step.seq_ids for step in world.steps]
    assert steps == [{0, 1}, {0, 1}, {1, 2}, {2}, {2}, {2}]


def test_every_step_is_full_while_prompts_wait() -> None:
    """SplitFuse: decodes first, then prompts cut so that the step has exactly its budget of tokens."""
    scheduler = create_scheduler(max_num_seqs=60, max_num_batched_tokens=64, capacity_blocks=(4000,))
    world = World(scheduler, 64, (4000,))
    for i in range(60):
        world.add(a_sequence(i, prompt=3 + 37 * i % 150, output=40))
    world.run()
    tokens = [step.num_tokens for step in world.steps]
    last_prompt = max(i for i, step in enumerate(world.steps) if step.admissions)
    assert set(tokens[:last_prompt]) == {64}


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_memory_for_so_many_sequences_runs_so_many(policy: str) -> None:
    """Each holds 5 + 4 - 1 = 8 tokens at its end, two blocks to the last place."""
    scheduler = create_scheduler(kv_policy=policy, capacity_blocks=(16,), start_policy="at-once")
    world = World(scheduler, 64, (16,))
    for i in range(9):
        world.add(a_sequence(i))
    world.step()
    assert scheduler.num_running == 8
    world.run()
    assert world.num_preempted == 0


def test_decodes_cannot_starve_prompts() -> None:
    """An eighth of the budget is for prompts, however many sequences may run."""
    scheduler = create_scheduler(max_num_seqs=1000, max_num_batched_tokens=64, capacity_blocks=(4000,))
    world = World(scheduler, 64, (4000,))
    for i in range(200):
        world.add(a_sequence(i, prompt=1, output=50))
    world.run()
    decodes = [len(step.decodes) for step in world.steps]
    assert max(decodes) == 56


def test_a_prompt_that_finds_no_room_attends_on_its_r_worker() -> None:
    """All of its chunks; who comes after the end of another finds its room, and one that comes whole needs none."""
    scheduler = create_scheduler(max_num_batched_tokens=32, prompt_kv_blocks=5, prompt_kv_block_tokens=8, num_lanes=2)
    world = World(scheduler, 32, (50, 50))
    for i in range(2):
        world.add(a_sequence(i, prompt=40, output=2))
    for _ in range(8):
        world.step()
    for i, prompt in ((2, 16), (3, 33)):
        world.add(a_sequence(i, prompt=prompt, output=2))
    world.run()
    where = {i: {s.is_remote for step in world.steps for s in step.prompts if s.seq_id == i} for i in range(4)}
    assert where == {0: {False}, 1: {True}, 2: {False}, 3: {False}}


@pytest.mark.parametrize("num_lanes", [2, 3])
def test_lanes_share_the_work(num_lanes: int) -> None:
    """As many decodes and as much KV, on every R-worker, however they began."""
    scheduler = create_scheduler(
        max_num_seqs=100, max_num_batched_tokens=2000, capacity_blocks=(900, 900), num_lanes=num_lanes
    )
    world = World(scheduler, 2000, (900, 900))
    for i in range(60):
        world.add(a_sequence(i, prompt=1 + i * 37 % 50, output=15))
    for _ in range(5 * num_lanes):
        world.step()
    steps = world.steps[-num_lanes:]
    assert {step.lane for step in steps} == set(range(num_lanes))
    for worker in (0, 1):
        parts = [[s for s in step.segments if s.r_worker == worker] for step in steps]
        counts, kv = [len(part) for part in parts], [sum(s.end for s in part) for part in parts]
        assert max(counts) - min(counts) <= 2 and max(kv) - min(kv) <= 70, (counts, kv)
    world.run()


def test_a_lane_alone_gives_the_other_half_of_what_it_has() -> None:
    """All of one R-worker's sequences end in one lane."""
    scheduler = create_scheduler(max_num_seqs=100, max_num_batched_tokens=2000, capacity_blocks=(900,), num_lanes=2)
    world = World(scheduler, 2000, (900,))
    for i in range(20):
        world.add(a_sequence(i, prompt=5, output=40))
    world.step()
    first = next(step for step in world.steps if step.lane == 0)
    world.step()
    world.remove([world.sequences[i] for i in first.seq_ids])
    for _ in range(4):
        world.step()
    assert [len(step.decodes) for step in world.steps[-2:]] == [5, 5]


def test_who_is_in_a_step_under_way_is_freed_after_it() -> None:
    scheduler = create_scheduler(num_lanes=2)
    sequences = [a_sequence(i) for i in range(2)]
    scheduler.add(*sequences)
    steps = [scheduler.schedule(0), scheduler.schedule(1)]
    assert all(steps) and scheduler.remove(sequences[:1]) == {} and scheduler.num_running == 2
    for step in steps:
        assert step and scheduler.commit(step, np.full(1, OTHER)) == []
    assert scheduler.remove([]) == {0: [0]} and scheduler.num_running == 1
    scheduler.check_integrity()


def test_a_loss_breaks_off_the_lanes_that_had_rows_there() -> None:
    scheduler = create_scheduler(num_lanes=2, capacity_blocks=(50, 50), max_num_batched_tokens=20)
    sequences = [a_sequence(i, prompt=9 if i == 3 else 4, output=9) for i in range(4)]
    scheduler.add(*sequences[:2])
    for _ in range(2):
        for lane in range(2):
            step = scheduler.schedule(lane)
            assert step
            scheduler.commit(step, np.full(len(step.sampled), OTHER))
    steps = [scheduler.schedule(lane) for lane in range(2)]
    assert [step and step.r_workers for step in steps] == [{0}, {1}]
    loss = scheduler.lose(0)
    assert loss.broken == {0} and loss.released == {0: [0]} and loss.kept == {}
    assert sequences[0].r_worker is None and scheduler.under_way == [1]
    assert steps[1] and scheduler.commit(steps[1], np.full(1, OTHER)) == []
    assert len(sequences[1].output_token_ids) == 3
    scheduler.check_integrity()


def test_end_of_sequence_frees_at_once() -> None:
    world = World(create_scheduler(capacity_blocks=(2,), predictor=MaxTokens()), 64, (2,))
    world.add(a_sequence(0, prompt=5, output=4, true=2))
    world.add(a_sequence(1, prompt=5, output=4, true=2))
    world.step()
    assert world.scheduler.num_waiting == 1  # no KV for both
    world.step()
    assert world.sequences[0].finish_reason == "stop" and world.sequences[0].stop_reason is None
    step = world.step()
    assert step and [a.seq_id for a in step.admissions] == [1]


def test_what_never_fits_is_refused_with_the_arithmetic() -> None:
    scheduler = create_scheduler(capacity_blocks=(3, 5))
    scheduler.add(a_sequence(0, prompt=16, output=17))  # 32 tokens of KV = 8 blocks
    with pytest.raises(RequestError, match="33 tokens of KV = 9 blocks of 4; the R-workers have 8 in all") as info:
        scheduler.add(a_sequence(1, prompt=16, output=18))
    assert info.value.code == "kv_budget_exceeded"


def test_the_queue_is_bounded() -> None:
    scheduler = create_scheduler(max_num_waiting=2)
    scheduler.add(a_sequence(0))
    with pytest.raises(RequestError, match="1 sequences wait already, and 2 may") as info:
        scheduler.add(a_sequence(1), a_sequence(2))
    assert info.value.code == "queue_full" and scheduler.num_waiting == 1 and scheduler.has_room(1)
    scheduler.add(a_sequence(1))
    assert not scheduler.has_room(1)
    pass_step(scheduler)
    scheduler.add(a_sequence(2), a_sequence(3), a_sequence(4))  # an empty queue takes them all


def test_places() -> None:
    """Every seat, unless a step has shown that KV is what is short."""
    scheduler = create_scheduler(capacity_blocks=(4,), start_policy="eager")
    sequences = [a_sequence(i, prompt=5, output=4) for i in range(3)]  # 2 blocks each
    scheduler.add(*sequences)
    assert scheduler.num_places == 8
    pass_step(scheduler)
    assert (scheduler.num_running, scheduler.num_places) == (2, 2)
    scheduler.remove(sequences[2:])
    pass_step(scheduler)
    assert (scheduler.num_running, scheduler.num_places) == (2, 8)
    scheduler.add(a_sequence(3))
    pass_step(scheduler)
    assert scheduler.num_places == 2
    scheduler.remove(sequences[:2])
    assert (scheduler.num_running, scheduler.num_places) == (0, 8)


def test_a_spent_budget_tells_nothing_of_places() -> None:
    scheduler = create_scheduler(max_num_batched_tokens=12)
    scheduler.add(*(a_sequence(i) for i in range(5)))
    scheduler.schedule()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_places) == (3, 2, 8)


def test_remove_waiting_and_running() -> None:
    scheduler = create_scheduler(max_num_seqs=1)
    sequences = [a_sequence(i) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    pass_step(scheduler)
    assert scheduler.remove(sequences[:2]) == {0: [0]}  # only the running one holds KV
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)


@pytest.mark.parametrize(
    "order, expected", [("fcfs", [0, 1, 2, 3, 4]), ("sjf", [1, 2, 0, 4, 3]), ("ljf", [0, 2, 1, 3, 4])]
)
def test_order(order: str, expected: list[int]) -> None:
    """Sorted within a window of three; nobody is passed by more than the window."""
    world = World(create_scheduler(max_num_seqs=1, order=order, order_window=3), 64, (50, 50))
    for i, output in enumerate([9, 2, 5, 7, 3]):
        world.add(a_sequence(i, output=output))
    world.run()
    assert [a.seq_id for step in world.steps for a in step.admissions] == expected


def test_preemption_keeps_the_first_and_the_order() -> None:
    """Greedy: three sequences outgrow an R-worker of six blocks; whoever came last goes, and comes back in order."""
    world = World(create_scheduler(capacity_blocks=(6,), kv_policy="greedy", start_policy="eager"), 64, (6,))
    for i in range(3):
        world.add(a_sequence(i, prompt=5, output=12))
    world.run()
    assert world.num_preempted > 0 and world.sequences[0].num_preemptions == 0
    ends = [max(n for n, s in enumerate(world.steps) if i in s.seq_ids)
            for i in range(3)]  # fmt: skip
    assert ends == sorted(ends)


def test_a_preempted_sequence_goes_where_there_is_room() -> None:
    """The second R-worker is free by the time the first one is too small for two."""
    world = World(create_scheduler(capacity_blocks=(4, 4), kv_policy="greedy", start_policy="eager"), 64, (4, 4))
    for i, (prompt, output) in enumerate([(4, 9), (8, 2), (4, 9)]):
        world.add(a_sequence(i, prompt=prompt, output=output))
    world.run()
    places = defaultdict(list)
    for step in world.steps:
        for admission in step.admissions:
            places[admission.seq_id].append(admission.r_worker)
    assert set(places[2]) == {0, 1} and [len(places[i]) for i in (0, 1)] == [1, 1]


def batches(world: World) -> list[list[int]]:
    return [[a.seq_id for a in step.admissions] for step in world.steps if step.admissions]


def test_a_batch_that_starts_at_once() -> None:
    """All that fit, over as many steps as their prompts take, whoever has ended by then; the next when all have."""
    world = World(
        create_scheduler(max_num_batched_tokens=16, capacity_blocks=(200,), start_policy="at-once"), 16, (200,)
    )
    for i in range(8):
        world.add(a_sequence(i, prompt=12, output=1 if i == 0 else 30))
    world.run()
    joined = [step.number for step in world.steps if step.admissions]
    assert [i for batch in batches(world) for i in batch] == list(range(8)) and joined[-1] < 12


def test_nobody_joins_a_batch_that_started_at_once() -> None:
    world = World(create_scheduler(start_policy="at-once"), 64, (50, 50))
    world.add(a_sequence(0, output=20))
    for _ in range(10):
        world.step()
    world.add(a_sequence(1))
    world.run()
    assert [step.number for step in world.steps if step.admissions] == [1, 21]


@pytest.mark.parametrize("output", [99, 150, 190, 199, 200, 250])
def test_one_that_is_larger_than_the_limit_costs_the_others_little(output: int) -> None:
    """It runs because nothing else does; what it costs beyond the limit is not owed by those after it."""
    scheduler = create_scheduler(max_num_seqs=50, capacity_blocks=(400,), max_kv_load=100)
    world = World(scheduler, 64, (400,))
    world.add(a_sequence(0, prompt=1, output=output))
    for i in range(1, 200):
        world.add(a_sequence(i, prompt=1, output=10))
    world.run()
    assert len(world.steps) < output + 250


class CountedId(int):
    """A seq_id that knows how often ids are compared."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        CountedId.comparisons += 1
        return int(self) < int(other)


def test_those_that_begin_alike_meet() -> None:
    """Behind the first of them, those that are alike for longer nearer to each other; nobody is passed by more than a
    window, and those that begin like nobody start as they came.
    """
    a, b, c = ((token,) * 40 for token in (5, 6, 7))
    beginnings = [a, b, a + b, c, a, b, a + b, (8,) * 90, b, c]
    queue = WaitingQueue("prefix", 8, lambda sequence: 0.0)
    for index, first in enumerate(beginnings):
        queue.add(a_sequence(index, prompt=90, first=first))
    queue.add(a_sequence(10, prompt=90, first=a, salt="another"))
    started = []
    while sequence := queue.first():
        started.append(sequence.seq_id)
        assert queue.remove(sequence)
    assert started == [0, 4, 2, 6, 1, 5, 3, 7, 8, 9, 10]


def test_thousands_put_back_are_sorted_once() -> None:
    """A lost R-worker's sequences wait again before all others, as they came, whatever order they are put back in."""
    queue, num = WaitingQueue("fcfs", 1, lambda sequence: 0.0), 3000
    sequences = [a_sequence(CountedId(index)) for index in range(num)]
    late = a_sequence(CountedId(num))
    queue.add(late)
    CountedId.comparisons = 0
    for index in range(num):
        queue.put_back(sequences[index * 7 % num if num % 7 else index])
    started = []
    while first := queue.first():
        started.append(first)
        assert queue.remove(first)
    assert started == [*sequences, late] and CountedId.comparisons < num * 40


def test_one_put_back_goes_before_those_that_came_later() -> None:
    queue = WaitingQueue("fcfs", 1, lambda sequence: 0.0)
    first, second, third, fourth = (a_sequence(index) for index in range(4))
    queue.add(fourth)
    for sequence in (third, first):
        queue.put_back(sequence)
    assert queue.first() is first and queue.remove(first)
    queue.put_back(second)
    queue.put_back(first)
    assert queue.first() is first and queue.remove(first)
    assert queue.first() is second and queue.remove(third) and queue.remove(second) and queue.first() is fourth


@settings(max_examples=12)
@given(
    outputs=st.lists(st.integers(20, 40), min_size=60, max_size=90),
    start_policy=st.sampled_from(START_POLICIES),
    order=st.sampled_from(ORDERS),
)
@example(outputs=[30] * 90, start_policy="steady", order="fcfs")
@example(outputs=[20, 40] * 45, start_policy="steady", order="sjf")
def test_sequences_held_back_start_when_they_would_have(outputs: list[int], start_policy: str, order: str) -> None:
    """Added as more are wanted, they make the very steps that they make when all wait from the beginning; and far from
    all of them wait before the first."""

    def steps(is_held_back: bool) -> tuple[list[Any], int]:
        options: dict[str, Any] = {"start_policy": start_policy, "order": order, "order_window": 4}
        scheduler = create_scheduler(max_num_seqs=10, predictor=Oracle(), **options)
        coming = [a_sequence(index, prompt=20, output=output) for index, output in enumerate(outputs)][::-1]
        made, num_first = list[Any](), 0
        while coming or scheduler.has_work:
            while coming and (not is_held_back or scheduler.wants_more):
                scheduler.add(coming.pop())
            num_first = num_first or scheduler.num_waiting
            step = scheduler.schedule()
            assert step
            made.append((step.number, step.segments, step.admissions, step.preempted))
            scheduler.remove(scheduler.commit(step, np.full(len(step.sampled), OTHER)))
            scheduler.check_integrity()
        return made, num_first

    (at_once, _), (held_back, num_first) = steps(False), steps(True)
    assert held_back == at_once and num_first <= 40


def test_one_that_wants_more_takes_all_that_fits() -> None:
    scheduler = create_scheduler(max_num_seqs=3)
    for index in range(100):
        if not scheduler.wants_more:
            break
        scheduler.add(a_sequence(index))
    assert scheduler.num_waiting == 12  # memory for more than that, and seats for three


def ran_on(world: World) -> Counter[int]:
    """How many sequences began their prompt where."""
    return Counter(s.r_worker for step in world.steps for s in step.prompts if s.start == 0)


def test_a_device_keeps_nobody_from_r_workers() -> None:
    """They may outlive what is predicted beyond any R-worker, and start there all the same, as without a device."""
    steps = {}
    for device in (0, 70):
        scheduler = create_scheduler(
            capacity_blocks=(40, 40, 40),
            device_blocks=device,
            predictor=Oracle(),
            max_num_seqs=60,
            start_policy="eager",
        )
        world = World(scheduler, 64, (40, 40, 40), device_blocks=device)
        for i in range(60):
            world.add(a_sequence(i, prompt=12, output=228, true=20))
        world.run()
        steps[device] = len(world.steps)
        assert set(ran_on(world)) == ({0, 1, 2} | ({DEVICE} if device else set()))
    assert steps[70] <= steps[0]


def test_one_for_several_r_workers_does_not_wait_for_the_device() -> None:
    scheduler = create_scheduler(capacity_blocks=(20, 20), device_blocks=30, start_policy="eager")
    world = World(scheduler, 64, (20, 20), device_blocks=30)
    world.add(a_sequence(0, prompt=60, output=50))
    world.step()
    world.add(a_sequence(1, prompt=90, output=10))
    world.add(a_sequence(2, prompt=5, output=4))
    for _ in range(4):
        world.step()
    assert world.sequences[0].r_worker == DEVICE
    assert world.sequences[1].is_in_parts and (world.sequences[2].is_known or world.sequences[2].finish_reason)
    world.run()


def test_the_device_comes_before_parts() -> None:
    scheduler = create_scheduler(capacity_blocks=(40, 40), device_blocks=100, min_part_tokens=8)
    world = World(scheduler, 64, (40, 40), device_blocks=100)
    world.add(a_sequence(0, prompt=60, output=5))
    world.run()
    assert set(ran_on(world)) == {DEVICE}


def test_what_the_device_reads_is_no_load_of_r_workers() -> None:
    """One above the limit starts where R-workers read nothing, whatever the device does."""
    scheduler = create_scheduler(capacity_blocks=(50,), device_blocks=10, max_kv_load=30, start_policy="eager")
    world = World(scheduler, 64, (50,), device_blocks=10)
    world.add(a_sequence(0, prompt=5, output=30))
    world.step()
    world.add(a_sequence(1, prompt=45, output=5))
    world.step()
    assert world.sequences[1].r_worker == 0
    world.run()
