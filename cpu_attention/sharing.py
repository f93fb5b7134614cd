"""Which rows see the same blocks: pure arithmetic over block tables.

    tables    a b c d e f        runs    rows 0 1 2 3   blocks 0..1        four rows read `a b` once
              a b c d g h                rows 0 1       blocks 2..3
              a b i j k l                rows 2 3       blocks 2..4
              a b i j k m

Rows are sorted by their tables, so that those with a common beginning lie side by side; what neighbours have in common
then tells where the tree of runs branches (as in a suffix array).  A row's last block is its own: its newest token is
stored there, and the causal ends of several queries of a sequence lie there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_ROWS = 64  # in a run: more read a block again, after it has been used so often that this costs nothing
# Tokens that a run spares each of its rows on the average, at least: its partial states take as long as reading so many
# (float16 and int8, 1 and 4 query heads for each KV head; the gain is 0 to 12 % there, and grows with the run).
LEAST_SPARED = 128
_LEVELS = 4  # of runs over one another: each leaves a partial state behind for each of its rows


class Tables(NamedTuple):
    """Where the tokens of rows lie, of which some may be of one sequence."""

    tables: np.ndarray  # [num_sequences, max_blocks] int32
    sequences: np.ndarray  # [num_rows] int64: whose table is each row's


@dataclass(frozen=True)
class Run:
    """Whole blocks that several rows see, all of them."""

    rows: np.ndarray  # [n] int64
    begin: int  # tokens
    end: int


def find_runs(tables: Tables, begins: np.ndarray, ends: np.ndarray, block_tokens: int) -> list[Run]:
    """Row r sees tokens begins[r] to ends[r]; # [num_rows] int64 each.  Runs of a row do not overlap."""
    blocks, sequences = tables
    starts, limits = -(-begins // block_tokens), (ends - 1) // block_tokens  # whole blocks that may be shared
    rows = np.flatnonzero(limits > starts)
    # Most rows have a first block of their own, and need no sorting.
    _, which, counts = np.unique(blocks[sequences[rows], :1], return_inverse=True, return_counts=True)
    rows = rows[counts[which.reshape(len(rows))] > 1]
    if len(rows) < 2:
        return []
    least = LEAST_SPARED / block_tokens
    used, index = np.unique(sequences[rows], return_inverse=True)
    prefixes = np.ascontiguousarray(blocks[used, : int(limits[rows].max())])
    order = np.argsort(prefixes.view(f"S{prefixes.shape[1] * prefixes.itemsize}")[:, 0], kind="stable")
    differs = prefixes[order[1:]] != prefixes[order[:-1]]
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), prefixes.shape[1])
    rank = np.empty(len(used), np.int64)
    rank[order] = np.arange(len(used))
    rank = rank[index]
    sorting = np.lexsort((limits[rows], rank))
    rows, rank = rows[sorting], rank[sorting]
    shared = np.minimum(limits[rows[1:]], limits[rows[:-1]])
    is_other = rank[1:] > rank[:-1]
    shared[is_other] = np.minimum(shared, np.append(common, 0)[rank[:-1]])[is_other]
    return [
        Run(members, begin * block_tokens, end * block_tokens)
        for members, begin, end in _branches(rows, shared, starts, least)
    ]


def _branches(
    rows: np.ndarray, shared: np.ndarray, starts: np.ndarray, least: float
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Rows, first block and the block behind the last one of each run.

    rows: sorted; shared: [len(rows) - 1] blocks that a row has in common with the next one; least: blocks that a run
    spares each of its rows.
    """
    covered = starts.copy()  # by row: up to this block it needs no other run
    work = [(first, end, 0) for first, end in _split(shared, 0, len(rows), int(least))]
    while work:
        first, end, level = work.pop()
        if end - first > MOST_ROWS:
            work += [(a, b, level) for a, b in _chop(shared, first, end)]
            continue
        common = int(shared[first : end - 1].min())
        members = rows[first:end]
        members = members[covered[members] + least < common]
        count = len(members)
        if count > 1 and (common - (begin := int(covered[members].max()))) * (count - 1) >= least * count:
            yield members, begin, common
            covered[members] = common
            level += 1
        if level < _LEVELS:
            work += [(a, b, level) for a, b in _split(shared, first, end, common)]


def _split(shared: np.ndarray, first: int, end: int, common: int) -> list[tuple[int, int]]:
    """The stretches of at least two rows that have more in common than so many blocks."""
    edges = first + 1 + np.flatnonzero(shared[first : end - 1] <= common)
    bounds = np.concatenate([[first], edges, [end]])
    is_several = np.diff(bounds) > 1
    return list(zip(bounds[:-1][is_several].tolist(), bounds[1:][is_several].tolist(), strict=True))


def _chop(shared: np.ndarray, first: int, end: int) -> list[tuple[int, int]]:
    """Stretches of at most MOST_ROWS, parted where neighbours have little in common."""
    bounds = [first]
    while end - bounds[-1] > MOST_ROWS:
        latest = bounds[-1] + min(MOST_ROWS, -(-(end - bounds[-1]) // 2))
        earliest = latest - MOST_ROWS // 4
        links = shared[earliest - 1 : latest][::-1]  # the last of equal ones
        bounds.append(latest - int(links.argmin()))
    bounds.append(end)
    return [(a, b) for a, b in itertools.pairwise(bounds) if b - a > 1]
