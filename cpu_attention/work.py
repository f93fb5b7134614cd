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
from cpu_attention.state import Pieces

_SNAP = 16  # a cut moves to the end of a row that is nearer than this part of a share


@dataclass(frozen=True)
class Work:
    """Pieces in the order of rows, and the shares they fall into.

    The first piece of row r writes slot r; further ones write the slots from num_rows on, and are merged into it.
    """

    num_rows: int
    pieces: Pieces
    shares: tuple[slice, ...]  # of pieces
    split_rows: np.ndarray  # [num_slots - num_rows] int64: the row whose part each further slot holds

    @cached_property
    def rows_of_nothing(self) -> np.ndarray:
        """That see no key at all.  # [n] int64"""
        has_keys = np.zeros(self.num_rows, np.bool_)
        has_keys[self.pieces.rows] = True
        return np.flatnonzero(~has_keys)

    @property
    def num_slots(self) -> int:
        return self.num_rows + len(self.split_rows)

    @cached_property
    def bounds(self) -> np.ndarray:
        """# [num_shares + 1] int64: where the shares begin, and the last one ends."""
        return np.array([*(share.start for share in self.shares), len(self.pieces)], np.int64)

    @cached_property
    def places(self) -> np.ndarray:
        """Which of all pieces of rows that were cut each is; of no meaning for whole rows.  # [num_pieces] int64"""
        rows = self.pieces.rows
        same = rows[1:] == rows[:-1]
        return np.cumsum(np.append(same, False) | np.append(False, same)) - 1

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """What compiled code goes by, each contiguous int64, by its name in `job.Job`: for all layers made once."""
        pieces = self.pieces
        columns = {
            "rows": pieces.rows, "begins": pieces.begins, "ends": pieces.ends, "places": self.places,
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


def cut_work(begins: np.ndarray, ends: np.ndarray, num_shares: int, block_tokens: int) -> Work:
    """Row r attends to tokens begins[r] to ends[r], which may be none; # [num_rows] int64 each.

    Cuts inside a row fall between blocks, so shares are equal up to a block, or up to a sixteenth where that
    spares a cut.
    """
    num_rows, lengths = len(begins), ends - begins
    row_ends = np.cumsum(lengths)
    total = int(row_ends[-1]) if num_rows else 0
    cuts = [_cut(begins, lengths, row_ends, total / num_shares, i, block_tokens) for i in range(1, num_shares) if total]
    edges = np.unique(np.concatenate([[0], row_ends, cuts]).astype(np.int64))
    rows = np.searchsorted(row_ends, edges[:-1], side="right")
    first_tokens = begins - (row_ends - lengths)  # token = edge + this, within the row
    is_first = np.diff(rows, prepend=-1) > 0
    slots = np.where(is_first, rows, num_rows + np.cumsum(~is_first) - 1)
    pieces = Pieces(rows, edges[:-1] + first_tokens[rows], edges[1:] + first_tokens[rows], slots)
    bounds = np.searchsorted(edges[:-1], [0, *cuts, total])
    shares = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds) if a < b)
    return Work(num_rows, pieces, shares, rows[~is_first])


def _cut(
    begins: np.ndarray, lengths: np.ndarray, row_ends: np.ndarray, size: float, index: int, block_tokens: int
) -> int:
    """Where the index-th share ends, in tokens of all rows behind one another."""
    goal = size * index
    row = int(np.searchsorted(row_ends, goal))
    begin, row_end = int(begins[row]), int(row_ends[row])
    row_begin = row_end - int(lengths[row])
    inside = row_begin + round((begin + goal - row_begin) / block_tokens) * block_tokens - begin
    nearest = row_begin if goal - row_begin < row_end - goal else row_end
    return nearest if abs(nearest - goal) <= size / _SNAP or not row_begin < inside < row_end else inside


def cut_tokens(blocks: np.ndarray, num_shares: int) -> list[slice]:
    """Tokens to append in about equal shares, cut only where the block changes: a block has one writer."""
    changes = np.flatnonzero(np.diff(blocks)) + 1
    goals = len(blocks) * np.arange(1, num_shares) // num_shares
    where = np.searchsorted(changes, goals)
    cuts = np.append(changes, len(blocks))[where]
    bounds = [0, *cuts.tolist(), len(blocks)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]
