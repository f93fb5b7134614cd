"""Which R-worker a sequence lives on.  Pure."""

from __future__ import annotations

from collections.abc import Sequence


def least_reserved(reserved_blocks: Sequence[int], capacity_blocks: Sequence[int], needed_blocks: int) -> int | None:
    """The R-worker with the fewest reserved blocks among those with room for `needed_blocks`; None if there is none.

    reserved_blocks, capacity_blocks: [num_r_workers].  The slowest R-worker sets the pace of a step, and its time
    is the KV it reads, so an even spread of KV is the goal.
    """
    open_workers = [
        worker
        for worker, (reserved, capacity) in enumerate(zip(reserved_blocks, capacity_blocks, strict=True))
        if reserved + needed_blocks <= capacity
    ]
    return min(open_workers, key=lambda worker: reserved_blocks[worker], default=None)
