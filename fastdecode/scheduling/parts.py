"""Where a sequence lies: on one R-worker, or in parts where one cannot hold it or would have too much to read.  Pure.

    tokens       0 ........ 31,999 │ 32,000 ............ 64,000, …
    parts        (R-worker 1, 0)   │ (R-worker 0, 32000)            the last one has no end: it gets what comes

A part is a range of tokens that begins with a block.  K and V of a token go to the part it is in; its query goes to all
parts up to that one, and their partial states are merged on the S-worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

DEVICE = -1  # in place of an R-worker: the S-worker's own device


class Part(NamedTuple):
    r_worker: int  # or `DEVICE`
    first_token: int  # its last one is that before the next part's first


@cache
def whole_on(r_worker: int) -> tuple[Part, ...]:
    """One and the same for all sequences that lie there whole: of nearly all, and thousands may run."""
    return (Part(r_worker, 0),)


def part_of(parts: tuple[Part, ...], position: int) -> Part:
    """That has the token there."""
    if len(parts) == 1:
        return parts[0]
    return reached(parts, position + 1)[-1]


def reached(parts: tuple[Part, ...], num_tokens: int) -> tuple[Part, ...]:
    """Those that have some of the first so many tokens."""
    return tuple(part for part in parts if part.first_token < num_tokens)


def next_bound(parts: tuple[Part, ...], position: int) -> int | None:
    """Where the part after that of the token there begins; None: there is no other."""
    return next((part.first_token for part in parts if part.first_token > position), None)


def lengths(parts: tuple[Part, ...], num_tokens: int) -> list[tuple[int, int]]:
    """R-worker, and how many of a sequence's so many tokens lie there; of each part."""
    if len(parts) == 1:
        return [(parts[0].r_worker, num_tokens)]
    ends = [*(part.first_token for part in parts[1:]), num_tokens]
    return [
        (part.r_worker, max(0, min(end, num_tokens) - part.first_token)) for part, end in zip(parts, ends, strict=True)
    ]


def divide(num_blocks: int, loads: Mapping[int, int], room: Mapping[int, int], least: int) -> dict[int, int] | None:
    """So many blocks over R-workers, so that the fullest is as light as it can be; None: there is no room.

    loads: R-worker -> what it has to read already, in blocks; room: what it can take; least: blocks of a part.
    # R-worker -> blocks, of those that get some; the one with the most room left is the last
    """
    workers = {worker for worker in loads if room[worker] >= least}
    while sum(room[worker] for worker in workers) >= num_blocks > 0:
        sizes = _filled(num_blocks, loads, room, workers)
        lightest = min(sizes, key=lambda worker: sizes[worker])
        if sizes[lightest] >= min(least, num_blocks):
            return dict(sorted(sizes.items(), key=lambda item: room[item[0]] - item[1]))
        workers.remove(lightest)
    return None


def _filled(
    num_blocks: int, loads: Mapping[int, int], room: Mapping[int, int], workers: Iterable[int]
) -> dict[int, int]:
    """As water would lie: up to one level, as far as there is room.  There is enough of it."""
    workers = sorted(workers)

    def sizes(level: int) -> dict[int, int]:
        return {worker: min(max(level - loads[worker], 0), room[worker]) for worker in workers}

    below, level = 0, max(loads[worker] + room[worker] for worker in workers)
    while below < level:
        middle = (below + level) // 2
        if sum(sizes(middle).values()) >= num_blocks:
            level = middle
        else:
            below = middle + 1
    filled = sizes(level)
    excess = sum(filled.values()) - num_blocks  # less than there are R-workers: one level lower is too low
    for worker in workers:
        if excess and filled[worker]:
            filled[worker] -= 1
            excess -= 1
    return filled
