"""Sequences that lie in parts on several R-workers: how they are divided, and what R-workers are told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdecode.holders.split_rows import places_among, rows_of, split_rows
from fastdecode.scheduling.parts import Part, divide, lengths, next_bound, part_of, reached
from fastdecode.scheduling.plan import Segment, Step
from gpu_sworker.partial_state import PartialState, merge, merge_rows
from gpu_sworker.staging import HostStaging

PARTS = (Part(2, 0), Part(0, 32), Part(1, 48))


def test_where_tokens_lie() -> None:
    assert [part_of(PARTS, position) for position in (0, 31, 32, 47, 48, 500)] == [
        *(PARTS[0],) * 2, *(PARTS[1],) * 2, *(PARTS[2],) * 2
    ]  # fmt: skip
    assert [len(reached(PARTS, num_tokens)) for num_tokens in (1, 32, 33, 48, 49)] == [1, 1, 2, 2, 3]
    assert [next_bound(PARTS, position) for position in (0, 31, 32, 48)] == [32, 32, 48, None]
    assert lengths(PARTS, 100) == [(2, 32), (0, 16), (1, 52)]
    assert lengths(PARTS, 40) == [(2, 32), (0, 8), (1, 0)]
    assert lengths(PARTS[:1], 40) == [(2, 40)]


blocks = st.integers(0, 12)


@given(num_blocks=st.integers(1, 30), workers=st.lists(st.tuples(blocks, blocks), min_size=1, max_size=4), least=blocks)
def test_the_fullest_is_as_light_as_it_can_be(num_blocks: int, workers: list[tuple[int, int]], least: int) -> None:
    loads, room = (dict(enumerate(column)) for column in zip(*workers, strict=True))
    sizes = divide(num_blocks, loads, room, max(1, least))
    if sizes is None:
        able = [blocks for blocks in room.values() if blocks >= max(1, least)]
        assert sum(able) < num_blocks or least > 1
        return
    assert sum(sizes.values()) == num_blocks
    assert all(min(max(1, least), num_blocks) <= size <= room[worker] for worker, size in sizes.items())
    left = [room[worker] - size for worker, size in sizes.items()]
    assert left[-1] == max(left), "it may grow there"
    if least <= 1 and num_blocks <= 12 and len(workers) <= 3:
        highest = max(loads[worker] + size for worker, size in sizes.items())
        ways = itertools.product(*(range(min(room[w], num_blocks) + 1) for w in loads))
        best = min(max(loads[w] + size for w, size in enumerate(way) if size) for way in ways if sum(way) == num_blocks)
        assert highest == best


def test_no_part_is_smaller_than_it_may_be() -> None:
    assert divide(10, {0: 0, 1: 0, 2: 0}, {0: 99, 1: 99, 2: 99}, 4) in ({0: 5, 1: 5}, {1: 5, 2: 5}, {0: 5, 2: 5})
    assert divide(10, {0: 0, 1: 50}, {0: 99, 1: 99}, 4) == {0: 10}
    assert divide(10, {0: 0, 1: 0}, {0: 3, 1: 3}, 1) is None
    assert divide(10, {0: 0, 1: 0}, {0: 3, 1: 9}, 4) is None


def test_what_each_part_is_told() -> None:
    step = Step.of(
        [
            Segment(5, 1, 60, (9,), 0, part_start=48),  # decodes
            Segment(6, 0, 7, (9,), 0),
            Segment(7, 0, 40, (1, 2, 3), 90, is_remote=True, part_start=32),  # a chunk of a prompt
            Segment(8, 0, 0, (4, 5), 2),
        ],
        parts={5: PARTS, 7: PARTS[:2]},
    )
    assert [s.seq_id for s in step.segments] == [6, 5, 7, 8] and step.segments[1].part_start == 48
    assert step.r_workers == {0, 1, 2} and step.queries == slice(0, 5)
    told = split_rows(step)
    assert [(t.seq_id, [*t.rows], t.r_worker, t.num_stored, t.num_new, t.query_start) for t in told] == [
        (5, [1], 2, 32, 0, 60),
        (5, [1], 0, 16, 0, 28),
        (5, [1], 1, 12, 1, 12),
        (7, [2, 3, 4], 2, 32, 0, 40),
        (7, [2, 3, 4], 0, 8, 3, 8),
    ]
    assert rows_of(told) == slice(1, 5)
    assert rows_of([t for t in told if t.num_new and t.seq_id == 7]) == slice(2, 5)
    rows = rows_of([told[0], told[0].__class__(9, range(4, 5), 0, 0, 0, is_last=False)])
    assert isinstance(rows, np.ndarray) and rows.tolist() == [1, 4]
    assert places_among(rows, slice(1, 5)).tolist() == [0, 3]


def test_parts_of_some_rows_make_the_state_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        PartialState(torch.randn(4, 2, 8, generator=generator), torch.randn(4, 2, generator=generator))
        for _ in range(3)
    ]
    some = np.array([1, 3])
    merged = merge_rows([(np.arange(4), states[0]), (some, states[1][:2]), (np.arange(4), states[2])])
    whole = merge_rows([(np.arange(4), state) for state in states])
    torch.testing.assert_close(whole.o, merge(states).o)
    for row in range(4):
        parts = [state[row : row + 1] for state in (states[0], states[2])]
        if row in (1, 3):
            parts.append(states[1][row // 2 : row // 2 + 1])
        expected = merge(parts)
        torch.testing.assert_close(merged.o[row], expected.o[0])
        torch.testing.assert_close(merged.lse[row], expected.lse[0])


@pytest.mark.parametrize("last", [slice(4, 5), np.array([1, 4])])
def test_room_is_left_for_what_is_merged(last: slice | np.ndarray) -> None:
    gathering = HostStaging().gather((6, 1, 2), torch.float32)
    put = [slice(0, 1), slice(2, 4)] if isinstance(last, np.ndarray) else [slice(0, 2), slice(2, 4)]
    for rows in put:
        gathering.put(rows, np.full((rows.stop - rows.start, 1, 2), 1, np.float32))
    with pytest.raises(AssertionError, match="in order"):
        gathering.put(slice(0, 1), np.ones((1, 1, 2), np.float32))
    merged = torch.full((2 if isinstance(last, np.ndarray) else 1, 1, 2), 7.0)
    o = gathering.finish([(last, merged)])
    assert o[:, 0, 0].tolist() == ([1, 7, 1, 1, 7, 0] if isinstance(last, np.ndarray) else [1, 1, 1, 1, 7, 0])
