"""Rows that see the same blocks: which are found, and how their work is cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing_trees import TREES, Tree

from cpu_attention import sharing
from cpu_attention.multicore import Attention
from cpu_attention.sharing import MOST_ROWS, Run, Tables, find_runs
from cpu_attention.work import Work, cut_work


@pytest.fixture(autouse=True, scope="module")
def _short_runs() -> Iterator[None]:
    """Runs of one block, which do not pay, so that small cases have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST_SPARED", 1)
        yield


def spans_of(tree: Tree, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    ends = tree.positions + 1
    return np.zeros_like(ends) if window is None else np.maximum(ends - window, 0), ends


def check(work: Work, tree: Tree, begins: np.ndarray, ends: np.ndarray, block: int) -> None:
    """Every token of every row once; what is done jointly is whole blocks that all have, and no row's last one."""
    pieces, seen = work.pieces, [np.zeros(end, np.int64) for end in ends.tolist()]
    columns = (pieces.rows, pieces.begins, pieces.ends)
    for row, begin, end in zip(*(column.tolist() for column in columns), strict=True):
        assert begin < end
        seen[row][begin:end] += 1
    for begin, counts in zip(begins.tolist(), seen, strict=True):
        assert not counts[:begin].any() and (counts[begin:] == 1).all()
    edges = {share.start for share in work.shares} | {len(pieces)}
    assert [i for share in work.shares for i in range(share.start, share.stop)] == list(range(len(pieces)))
    first, blocks = 0, tree.tables.tables[tree.tables.sequences]
    while first < len(pieces):
        count = int(work.jointly[first])
        assert work.jointly[first : first + count].tolist() == list(range(count, 0, -1)) and count <= MOST_ROWS
        if count > 1:
            rows, begin, end = pieces.rows[first : first + count], int(pieces.begins[first]), int(pieces.ends[first])
            assert len(set(rows.tolist())) == count and begin % block == end % block == 0
            assert (pieces.begins[first : first + count] == begin).all()
            assert (pieces.ends[first : first + count] == end).all()
            shared = blocks[rows, begin // block : end // block]
            assert (shared == shared[0]).all() and (ends[rows] > end).all()
            assert edges.isdisjoint(range(first + 1, first + count)), "a share ends inside"
        first += count
    # Slots and places: a row's parts lie behind one another in the order of its pieces, its last tokens
    # last.
    assert sorted(pieces.slots.tolist()) == list(range(work.num_slots))
    is_part = work.part_counts[pieces.rows] > 1
    assert sorted(work.places[is_part].tolist()) == list(range(work.num_parts))
    for row in np.flatnonzero(work.part_counts > 1).tolist():
        of_row = np.flatnonzero(pieces.rows == row)
        expected = work.part_firsts[row] + np.arange(work.part_counts[row])
        assert work.places[of_row].tolist() == expected.tolist() and pieces.ends[of_row[-1]] == ends[row]


@settings(max_examples=150)
@given(TREES, st.none() | st.integers(1, 200), st.integers(1, 7))
def test_every_token_of_every_row_once(tree: Tree, window: int | None, num_shares: int) -> None:
    begins, ends = spans_of(tree, window)
    runs = find_runs(tree.tables, begins, ends, 16)
    check(cut_work(begins, ends, num_shares, 16, runs), tree, begins, ends, 16)


def described(runs: list[Run]) -> list[tuple[list[int], int, int]]:
    return sorted((sorted(run.rows.tolist()), run.begin, run.end) for run in runs)


def test_runs_of_a_tree() -> None:
    """All share 64 blocks, halves 16 more; a quarter's rows are of one sequence and part at their ends."""
    tables = np.arange(8 * 100, dtype=np.int32).reshape(8, 100)
    tables[:, :64] = tables[0, :64]
    tables[:4, 64:80], tables[4:, 64:80] = tables[0, 64:80], tables[4, 64:80]
    sequences = np.array([7, 1, 2, 3, 4, 5, 6, 0, 0])
    ends = np.array([99 * 16] * 7 + [90 * 16 + 3, 90 * 16 + 5])
    runs = find_runs(Tables(tables, sequences), np.zeros(9, np.int64), ends, 16)
    assert described(runs) == [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], 0, 64 * 16),
        ([0, 4, 5, 6], 64 * 16, 80 * 16),
        ([1, 2, 3, 7, 8], 64 * 16, 80 * 16),
        ([7, 8], 80 * 16, 90 * 16),
    ]
    begins = np.array([0] * 5 + [70 * 16 + 1] + [0] * 3)  # a window that one of them has left
    runs = find_runs(Tables(tables, sequences), begins, ends, 16)
    assert ([0, 1, 2, 3, 4, 6, 7, 8], 0, 64 * 16) in described(runs)


def test_nothing_is_shared() -> None:
    tables = Tables(np.arange(60, dtype=np.int32).reshape(3, 20), np.arange(3))
    assert find_runs(tables, np.zeros(3, np.int64), np.full(3, 320), 16) == []
    one = Tables(tables.tables, np.zeros(3, np.int64))  # their last block is their own
    assert find_runs(one, np.zeros(3, np.int64), np.array([16, 16, 15]), 16) == []
    nothing = Tables(np.zeros((2, 0), np.int32), np.arange(2))
    assert find_runs(nothing, np.zeros(2, np.int64), np.zeros(2, np.int64), 16) == []


@pytest.mark.parametrize("window, factor", [(None, 20), (512, 8)])
def test_queries_of_one_prompt(window: int | None, factor: int) -> None:
    """A chunk of a prompt: as many rows as a run takes, and a few runs for each."""
    positions = np.arange(1000, 3048)
    tables = Tables(np.arange(200, dtype=np.int32)[None], np.zeros(len(positions), np.int64))
    tree = Tree(tables, positions)
    begins, ends = spans_of(tree, window)
    runs = find_runs(tables, begins, ends, 16)
    work = cut_work(begins, ends, 4, 16, runs)
    check(work, tree, begins, ends, 16)
    read = sum(run.end - run.begin for run in runs) + (work.pieces.ends - work.pieces.begins)[work.jointly == 1].sum()
    assert (ends - begins).sum() > factor * read
    assert work.part_counts.max() <= 7


def test_one_prefix_keeps_all_threads_busy() -> None:
    tables = np.zeros((64, 1001), np.int32)
    tables[:, :1000], tables[:, 1000] = np.arange(1000), 1000 + np.arange(64)
    positions = np.full(64, 16_001)
    for rows in (2, 64):
        work = Attention(4).cut(positions[:rows], None, 16, shared=Tables(tables[:rows], np.arange(rows)))
        sizes = [int((work.pieces.ends - work.pieces.begins)[share].sum()) for share in work.shares]
        assert len(sizes) == 8 and max(sizes) <= 1.2 * min(sizes) + 64 * 16


def test_least_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it spares each row must be worth the partial state it leaves behind."""
    monkeypatch.setattr(sharing, "LEAST_SPARED", 128)
    for rows, blocks, is_run in ((2, 15, False), (2, 16, True), (8, 9, False), (8, 10, True)):
        tables = np.zeros((rows, blocks + 1), np.int32)
        tables[:, :blocks], tables[:, blocks] = np.arange(blocks), 1000 + np.arange(rows)
        tables_of = Tables(tables, np.arange(rows))
        runs = find_runs(tables_of, np.zeros(rows, np.int64), np.full(rows, blocks * 16 + 1), 16)
        assert bool(runs) == is_run
