"""Rows of a step whose sequences lie in parts on several R-workers: what of them each is told.

    queries    of all these rows, to every part up to the one that gets the new tokens
    K and V    to that one

Positions on an R-worker are counted from the first token that lies there, so a query's may be behind all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdecode.scheduling.parts import Part, lengths
from fastdecode.scheduling.plan import Step

Rows = slice | np.ndarray  # of what R-workers see of q, k, v, o; [n] int64, rising


@dataclass(frozen=True)
class SplitRows:
    """Consecutive rows of one sequence, and one of its parts."""

    seq_id: int
    rows: range  # of those that R-workers see of the step
    r_worker: int
    num_stored: int  # tokens that are there before the step
    query_start: int  # the first row's position, counted from the part's first token
    is_last: bool  # their K and V go there

    @property
    def num_new(self) -> int:
        return len(self.rows) if self.is_last else 0


def split_rows(step: Step) -> list[SplitRows]:
    """Of all sequences in parts, in the order of the rows."""
    found, decodes = [], step.decodes
    first = step.stored.start
    for row in range(decodes.num_whole, len(decodes)):
        seq_id, own = int(decodes.seq_ids[row]), range(row - first, row - first + 1)
        found += _split(seq_id, own, int(decodes.positions[row]), step.parts[seq_id])
    row = len(decodes) - first
    for segment in step.remote_prompts:
        rows = range(row, row + segment.num_tokens)
        if segment.is_in_parts:
            found += _split(segment.seq_id, rows, segment.start, step.parts[segment.seq_id])
        row = rows.stop
    return found


def rows_of(parts: list[SplitRows]) -> Rows:
    """All of them together; a slice where they lie so."""
    rows = np.array(sorted({row for part in parts for row in part.rows}), np.int64)
    if not len(rows):
        return slice(0, 0)
    is_slice = rows[-1] - rows[0] == len(rows) - 1
    return slice(int(rows[0]), int(rows[-1]) + 1) if is_slice else rows


def places_among(rows: Rows, all_rows: Rows) -> np.ndarray:
    """Where the rows are among all of them, which they are part of.  # [len(rows)] int64"""
    return np.searchsorted(_numbers(all_rows), _numbers(rows))


def _numbers(rows: Rows) -> np.ndarray:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def _split(seq_id: int, rows: range, start: int, parts: tuple[Part, ...]) -> list[SplitRows]:
    return [
        SplitRows(seq_id, rows, part.r_worker, num_stored, start - part.first_token, is_last=part is parts[-1])
        for part, (_, num_stored) in zip(parts, lengths(parts, start), strict=True)
    ]
