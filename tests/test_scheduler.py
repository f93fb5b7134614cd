"""The scheduler's promises, on any workload: pure, so it takes milliseconds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode.errors import RequestError
from fastdecode.placement import least_reserved
from fastdecode.plan import Step
from fastdecode.request import Request, Sequence
from fastdecode.sampling_params import SamplingParams
from fastdecode.scheduler import Scheduler, SchedulerConfig

END = 1


def create_scheduler(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    num_micro_batches: int = 2,
    block_tokens: int = 4,
    capacity_blocks: tuple[int, ...] = (50, 50),
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs, max_num_batched_tokens, num_micro_batches, block_tokens, capacity_blocks)
    )


def a_sequence(seq_id: int, prompt: int = 5, output: int = 4, **changes: object) -> Sequence:
    request = Request(
        str(seq_id),
        tuple(range(10, 10 + prompt)),
        SamplingParams(max_tokens=output),
        output,
        frozenset(),
        frozenset({END}),
    )
    return Sequence(seq_id, request, 0, 0)


def run_step(scheduler: Scheduler, token: int = 7) -> tuple[Step | None, list[Sequence]]:
    step = scheduler.schedule()
    if step is None:
        return None, []
    tokens = {s.seq_id: token for m in step.micro_batches for s in m.segments}
    finished = scheduler.commit(step, tokens)
    scheduler.remove(finished)
    scheduler.check_integrity()
    return step, finished


@settings(max_examples=200)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=25),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 60),
    micro_batches=st.integers(1, 4),
    capacity=st.lists(st.integers(14, 40), min_size=1, max_size=4).map(tuple),
)
def test_every_sequence_gets_every_token(
    sizes: list[tuple[int, int]], max_num_seqs: int, budget: int, micro_batches: int, capacity: tuple[int, ...]
) -> None:
    """In order of arrival, once per step, its prompt first, its positions without a gap, on one R-worker."""
    scheduler = create_scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_tokens=4,
        num_micro_batches=micro_batches,
        capacity_blocks=capacity,
    )
    sequences = [a_sequence(i, *size) for i, size in enumerate(sizes)]
    for sequence in sequences:
        scheduler.add(sequence)
    seen: dict[int, list[int]] = {}
    places: dict[int, int] = {}
    admitted: list[int] = []
    for _ in range(1000):
        step, _ = run_step(scheduler)
        if step is None:
            break
        admitted += [a.seq_id for a in step.admissions]
        assert len(step.micro_batches) <= micro_batches
        segments = [s for m in step.micro_batches for s in m.segments]
        assert len({s.seq_id for s in segments}) == len(segments) <= max_num_seqs
        prompts = [s for s in segments if s.is_prompt]
        assert len(prompts) <= 1 or sum(s.num_tokens for s in prompts) <= budget
        for segment in segments:
            positions = seen.setdefault(segment.seq_id, [])
            assert segment.start == len(positions)
            positions += range(segment.start, segment.start + segment.num_tokens)
            assert places.setdefault(segment.seq_id, segment.r_worker) == segment.r_worker
    assert admitted == sorted(admitted) == list(range(len(sizes)))
    for sequence, (prompt, output) in zip(sequences, sizes, strict=True):
        assert sequence.output_token_ids == [7] * output and sequence.finish_reason == "length"
        assert len(seen[sequence.seq_id]) == prompt + output - 1 == sequence.max_kv_tokens
    assert not scheduler.has_work


def test_sequences_join_and_leave_between_steps() -> None:
    scheduler = create_scheduler(max_num_seqs=2)
    for i in range(3):
        scheduler.add(a_sequence(i, output=2 + i))
    steps = [
        {s.seq_id for m in step.micro_batches for s in m.segments}
        for step in iter(lambda: run_step(scheduler)[0], None)
    ]
    assert steps == [{0, 1}, {0, 1}, {1, 2}, {2}, {2}, {2}]


def test_micro_batches_share_the_work() -> None:
    scheduler = create_scheduler(max_num_seqs=100, max_num_batched_tokens=1000, capacity_blocks=(500, 500))
    for i in range(40):
        scheduler.add(a_sequence(i, prompt=1 + i % 7, output=5))
    first, _ = run_step(scheduler)
    second, _ = run_step(scheduler)
    assert first and second
    sizes = [m.num_tokens for m in first.micro_batches]
    assert max(sizes) - min(sizes) <= 7
    for worker in (0, 1):
        parts = [sum(s.r_worker == worker for s in m.segments) for m in second.micro_batches]
        assert max(parts) - min(parts) <= 1


def test_end_of_sequence_frees_at_once() -> None:
    scheduler = create_scheduler(capacity_blocks=(2,), block_tokens=4)
    scheduler.add(a_sequence(0, prompt=5, output=4))
    scheduler.add(a_sequence(1, prompt=5, output=4))
    run_step(scheduler)
    assert scheduler.num_waiting == 1  # no KV for both
    _, finished = run_step(scheduler, END)
    assert [s.finish_reason for s in finished] == ["stop"] and finished[0].stop_reason is None
    step, _ = run_step(scheduler)
    assert step and [a.seq_id for a in step.admissions] == [1]


def test_what_never_fits_is_refused_with_the_arithmetic() -> None:
    scheduler = create_scheduler(capacity_blocks=(3, 5), block_tokens=4)
    scheduler.add(a_sequence(0, prompt=16, output=5))  # 20 tokens of KV = 5 blocks
    with pytest.raises(RequestError, match="21 tokens of KV = 6 blocks of 4; the largest R-worker has 5") as info:
        scheduler.add(a_sequence(1, prompt=16, output=6))
    assert info.value.code == "kv_budget_exceeded"


def test_remove_waiting_and_running() -> None:
    scheduler = create_scheduler(max_num_seqs=1)
    sequences = [a_sequence(i) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_step(scheduler)
    assert scheduler.remove(sequences[:2]) == {0: [0]}  # only the running one holds KV
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)


@pytest.mark.parametrize(
    "reserved, capacity, needed, expected",
    [
        ([5, 3, 4], [9, 9, 9], 1, 1),
        ([5, 3, 4], [9, 4, 9], 2, 2),
        ([5, 3, 4], [9, 9, 9], 7, None),
        ([2, 2], [9, 9], 1, 0),
    ],
)
def test_placement(reserved: list[int], capacity: list[int], needed: int, expected: int | None) -> None:
    assert least_reserved(reserved, capacity, needed) == expected


def test_placement_balances() -> None:
    scheduler = create_scheduler(max_num_seqs=64, max_num_batched_tokens=10_000, capacity_blocks=(400,) * 4)
    for i in range(64):
        scheduler.add(a_sequence(i, prompt=1 + (i * 37) % 50, output=4))
    step, _ = run_step(scheduler)
    assert step
    loads = [sum(a.max_tokens for a in step.admissions if a.r_worker == w) for w in range(4)]
    assert max(loads) / (sum(loads) / 4) < 1.1
