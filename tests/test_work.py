"""How attention work is cut: completely, in order, equally."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpu_attention import share_of_cores
from cpu_attention.machine import NumaNode
from cpu_attention.work import cut_tokens, cut_work

SPANS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 3000)), max_size=40)


@given(SPANS, st.integers(1, 9), st.sampled_from([16, 64]))
def test_work_is_complete_and_equal(spans: list[tuple[int, int]], num_shares: int, block: int) -> None:
    begins = np.array([begin for begin, _ in spans], np.int64)
    ends = begins + np.array([length for _, length in spans], np.int64)
    work = cut_work(begins, ends, num_shares, block)
    pieces = work.pieces
    covered: dict[int, list[tuple[int, int]]] = {}
    for row, begin, end in zip(pieces.rows.tolist(), pieces.begins.tolist(), pieces.ends.tolist(), strict=True):
        assert begin < end
        covered.setdefault(row, []).append((begin, end))
    for row, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        parts = covered.pop(row)
        assert parts[0][0] == begin and parts[-1][1] == end
        assert all(a[1] == b[0] and a[1] % block == 0 for a, b in itertools.pairwise(parts))
    assert not covered
    # Every slot once: a row's first piece in its own, further ones behind.
    assert sorted(pieces.slots.tolist()) == list(range(work.num_slots))
    for row, slot in zip(pieces.rows.tolist(), pieces.slots.tolist(), strict=True):
        assert slot == row if slot < len(spans) else work.split_rows[slot - len(spans)] == row
    # The pieces of cut rows, in order, have places of their own.
    is_cut = np.bincount(pieces.rows, minlength=len(spans))[pieces.rows] > 1
    assert work.places[is_cut].tolist() == list(range(work.num_parts))
    # Shares: all pieces in order, none over its part by more than a block and the sixteenth that a cut may move.
    assert [i for share in work.shares for i in range(share.start, share.stop)] == list(range(len(pieces)))
    assert work.bounds.tolist() == [*(share.start for share in work.shares), len(pieces)]
    total = int((ends - begins).sum())
    for share in work.shares:
        size = int((pieces.ends[share] - pieces.begins[share]).sum())
        assert size <= total / num_shares * (1 + 2 / 16) + 2 * block


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=30), st.integers(1, 9))
def test_a_block_has_one_writer(runs: list[tuple[int, int]], num_shares: int) -> None:
    blocks = np.array([block for block, count in runs for _ in range(count)], np.int32)
    shares = cut_tokens(blocks, num_shares)
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(len(blocks)))
    assert len(shares) <= num_shares
    for share in shares[1:]:
        assert blocks[share.start] != blocks[share.start - 1]


def test_one_long_sequence_keeps_all_threads_busy() -> None:
    work = cut_work(np.zeros(1, np.int64), np.full(1, 100_000), 4, 64)
    sizes = [int((work.pieces.ends[s] - work.pieces.begins[s]).sum()) for s in work.shares]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 128


def test_each_worker_has_cores_of_one_numa_node() -> None:
    def nodes(*cores: tuple[int, ...]) -> list[NumaNode]:
        return [NumaNode(index, own, 0, 0) for index, own in enumerate(cores)]

    two = nodes((0, 1, 2, 3), (4, 5, 6, 7))
    shares = [share_of_cores(i, 2, range(8), two) for i in range(2)]
    assert shares == [(0, 1, 2, 3), (4, 5, 6, 7)]
    shares = [share_of_cores(i, 3, range(8), two) for i in range(3)]
    assert shares == [(0, 1), (4, 5, 6, 7), (2, 3)]
    assert [share_of_cores(i, 1, range(8), two) for i in range(1)] == [tuple(range(8))]
    four = nodes((0, 4), (1, 5), (2, 6), (3, 7))  # numbered across the nodes
    assert [share_of_cores(i, 4, range(8), four) for i in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert share_of_cores(1, 2, range(8), four) == (1, 5, 3, 7)
    allowed = (1, 2, 5, 6)  # what a container may use
    assert [share_of_cores(i, 2, allowed, four) for i in range(2)] == [(1, 5), (2, 6)]
    assert share_of_cores(0, 2, (0, 1), []) == (0,)  # a machine that tells nothing
    assert share_of_cores(0, 3, (0, 1), nodes((0, 1))) == ()
