"""Attention work cut into equal shares, by KV tokens: pure arithmetic.

    rows      |──── 0 ────|─ 1 ─|──────────── 2 ────────────|3|
    shares    |─────── a ───────|────── b ──────|───── c ─────|      three pieces of a row where a cut falls inside

One sequence of 100,000 tokens keeps all cores busy, and so do 10,000 short ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpu_attention.job import address
from cpu_attention.sharing import Run
from cpu_attention.state import Pieces

# Rows whose arithmetic over a block takes about as long as reading it: a token of a run of r rows costs as much as
# max(1, r / this) tokens of one row.  Measured: 8 (float16), 4 (int8) with one query head per KV head, fewer with four.
ROWS_PER_READ = 4
_SNAP = 16  # a cut moves to the end of a row that is nearer than this part of a share


@dataclass(frozen=True)
class Work:
    """Pieces, and the shares they fall into: first those that are done for several rows, then each row's own, by rows.

    A row's last tokens are in its last piece, which is its own.

    The first piece of row r writes slot r; further ones write the slots from num_rows on, and are merged into it.
    """

    num_rows: int
    pieces: Pieces
    shares: tuple[slice, ...]  # of pieces
    split_rows: np.ndarray  # [num_slots - num_rows] int64: the row whose part each further slot holds
    # How many pieces from each one on read the same blocks, each for another row, and are done jointly: 1 where it is
    # one row's alone, or the last of several.  # [num_pieces] int64
    jointly: np.ndarray

    @cached_property
    def rows_of_nothing(self) -> np.ndarray:
        """That see no key at all.  # [n] int64"""
        return np.flatnonzero(self.part_counts == 0)

    @property
    def num_slots(self) -> int:
        return self.num_rows + len(self.split_rows)

    @cached_property
    def is_joint(self) -> bool:
        """Whether any piece is done for several rows."""
        return bool((self.jointly > 1).any())

    @cached_property
    def bounds(self) -> np.ndarray:
        """# [num_shares + 1] int64: where the shares begin, and the last one ends."""
        return np.array([*(share.start for share in self.shares), len(self.pieces)], np.int64)

    @cached_property
    def part_counts(self) -> np.ndarray:
        """Pieces of each row.  # [num_rows] int64"""
        return np.bincount(self.pieces.rows, minlength=self.num_rows)

    @cached_property
    def part_firsts(self) -> np.ndarray:
        """Where the parts of each row begin among those of all rows that were cut.  # [num_rows] int64"""
        counts = np.where(self.part_counts > 1, self.part_counts, 0)
        return np.cumsum(counts) - counts

    @cached_property
    def places(self) -> np.ndarray:
        """Which of all parts each piece is; of no meaning for whole rows.  # [num_pieces] int64"""
        rows, counts = self.pieces.rows, self.part_counts
        places = np.empty(len(rows), np.int64)
        places[np.argsort(rows, kind="stable")] = np.arange(len(rows)) + np.repeat(
            self.part_firsts - np.cumsum(counts) + counts, counts
        )
        return places

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """What compiled code goes by, each contiguous int64, by its name in `job.Job`: for all layers made once."""
        pieces = self.pieces
        columns = {
            "rows": pieces.rows, "begins": pieces.begins, "ends": pieces.ends, "places": self.places,
            "jointly": self.jointly, "part_firsts": self.part_firsts, "part_counts": self.part_counts,
            "bounds": self.bounds,
        }  # fmt: skip
        return {name: np.ascontiguousarray(column, np.int64) for name, column in columns.items()}

    @cached_property
    def addresses(self) -> dict[str, int]:
        """Where the columns lie, as long as this does."""
        return {name: address(column) for name, column in self.columns.items()}

    @cached_property
    def num_parts(self) -> int:
        """Pieces of rows that were cut."""
        return len(self.split_rows) + len(np.unique(self.split_rows))


class NewTokens(NamedTuple):
    """K and V to store before any row attends, and where."""

    k: np.ndarray  # [num_tokens, num_kv_heads, head_dim] of any float dtype
    v: np.ndarray  # like k
    blocks: np.ndarray  # [num_tokens] int32
    offsets: np.ndarray  # [num_tokens] int32, places in the blocks
    # By `cut_tokens`.  None: token r is the newest of row r and in no other row's sequence, so that it need be stored
    # only before that row attends.
    shares: Sequence[slice] | None = None


class _Spans(NamedTuple):
    """What is to be cut: a row's own tokens, or a run's."""

    begins: np.ndarray  # [n] int64, tokens
    ends: np.ndarray  # like begins
    costs: np.ndarray  # [n] float64, of a token; 1 is that of a token of one row
    firsts: np.ndarray  # [n] int64: a span is of rows members[first : first + count]
    counts: np.ndarray  # like firsts
    members: np.ndarray  # int64


def cut_work(
    begins: np.ndarray, ends: np.ndarray, num_shares: int, block_tokens: int, runs: Sequence[Run] = ()
) -> Work:
    """Row r attends to tokens begins[r] to ends[r], which may be none; # [num_rows] int64 each.

    What several rows have in common (`sharing.find_runs`) is done for all of them at once, and before the rest.

    Cuts inside a row or run fall between blocks, so shares are equal up to a block, or up to a sixteenth where that
    spares a cut.
    """
    spans = _spans(begins, ends, runs)
    lengths = spans.ends - spans.begins
    span_ends, cost_ends = np.cumsum(lengths), np.cumsum(lengths * spans.costs)
    total = int(span_ends[-1]) if len(lengths) else 0
    size = float(cost_ends[-1]) / num_shares if total else 0.0
    cuts = [_cut(spans, span_ends, cost_ends, size, i, block_tokens) for i in range(1, num_shares) if total]
    edges = np.unique(np.concatenate([[0], span_ends, cuts]).astype(np.int64))
    of = np.searchsorted(span_ends, edges[:-1], side="right")
    first_tokens = (spans.begins - (span_ends - lengths))[of]  # token = edge + this, within the span
    bounds = np.searchsorted(edges[:-1], [0, *cuts, total])
    piece_begins, piece_ends = edges[:-1] + first_tokens, edges[1:] + first_tokens
    counts, firsts = spans.counts[of], spans.firsts[of]
    if runs:  # a piece for each row
        piece_begins, piece_ends = np.repeat(piece_begins, counts), np.repeat(piece_ends, counts)
        counted = np.cumsum(counts)
        bounds = np.append(0, counted)[bounds]
        left = np.repeat(counted, counts) - np.arange(counted[-1])
        rows, jointly = spans.members[np.repeat(firsts + counts, counts) - left], left
        is_first = np.zeros(len(rows), np.bool_)
        is_first[np.unique(rows, return_index=True)[1]] = True
    else:
        rows, jointly = spans.members[firsts], counts
        is_first = np.diff(rows, prepend=-1) > 0
    slots = np.where(is_first, rows, len(begins) + np.cumsum(~is_first) - 1)
    shares = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds) if a < b)
    return Work(len(begins), Pieces(rows, piece_begins, piece_ends, slots), shares, rows[~is_first], jointly)


def _spans(begins: np.ndarray, ends: np.ndarray, runs: Sequence[Run]) -> _Spans:
    """Runs first, then what is left to rows, in their order."""
    rows, counts, costs = np.arange(len(begins)), np.zeros(0, np.int64), np.zeros(0)
    if runs:
        counts = np.array([len(run.rows) for run in runs])
        costs = np.maximum(1.0, counts / ROWS_PER_READ)
        run_begins, run_ends = np.array([run.begin for run in runs]), np.array([run.end for run in runs])
        # Of each row the gaps between its runs, and what is behind them.
        members = np.concatenate([run.rows for run in runs])
        all_rows = np.append(members, rows)
        gap_ends = np.append(np.repeat(run_begins, counts), ends)
        order = np.lexsort((gap_ends, all_rows))
        after = np.append(np.repeat(run_ends, counts), ends)[order]
        rows, gap_ends = all_rows[order], gap_ends[order]
        gap_begins = np.where(np.diff(rows, prepend=-1) > 0, begins[rows], np.append(0, after[:-1]))
        begins, ends = gap_begins, gap_ends
    own = np.flatnonzero(ends > begins)
    rows, begins, ends, ones = rows[own], begins[own], ends[own], np.ones(len(own), np.int64)
    firsts = np.arange(len(rows)) + int(counts.sum())
    if not runs:
        return _Spans(begins, ends, ones.astype(np.float64), firsts, ones, rows)
    return _Spans(
        np.append(run_begins, begins), np.append(run_ends, ends), np.append(costs, ones),
        np.append(np.cumsum(counts) - counts, firsts), np.append(counts, ones), np.append(members, rows),
    )  # fmt: skip


def _cut(
    spans: _Spans, span_ends: np.ndarray, cost_ends: np.ndarray, size: float, index: int, block_tokens: int
) -> int:
    """Where the index-th share ends, in tokens of all spans behind one another."""
    goal = size * index
    at = min(int(np.searchsorted(cost_ends, goal)), len(cost_ends) - 1)
    begin, cost, span_end, cost_end = int(spans.begins[at]), float(spans.costs[at]), int(span_ends[at]), cost_ends[at]
    span_begin = span_end - (int(spans.ends[at]) - begin)
    cost_begin = cost_end - (span_end - span_begin) * cost
    inside = span_begin + round((begin + (goal - cost_begin) / cost) / block_tokens) * block_tokens - begin
    is_near_begin = goal - cost_begin < cost_end - goal
    nearest, away = (span_begin, goal - cost_begin) if is_near_begin else (span_end, cost_end - goal)
    return nearest if abs(away) <= size / _SNAP or not span_begin < inside < span_end else inside


def cut_tokens(blocks: np.ndarray, num_shares: int) -> list[slice]:
    """Tokens to append in about equal shares, cut only where the block changes: a block has one writer."""
    changes = np.flatnonzero(np.diff(blocks)) + 1
    goals = len(blocks) * np.arange(1, num_shares) // num_shares
    where = np.searchsorted(changes, goals)
    cuts = np.append(changes, len(blocks))[where]
    bounds = [0, *cuts.tolist(), len(blocks)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]
