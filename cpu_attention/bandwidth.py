"""How fast this machine reads memory: the roof under which decode attention lives."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from cpu_attention.machine import available_memory_bytes

_BYTES_PER_THREAD = 256 << 20  # beyond any last-level cache
_SHARE_OF_MEMORY = 8  # at most an eighth of what is free


def measure_read_bandwidth(num_threads: int, repeats: int = 5) -> float:
    """Bytes per second that `num_threads` threads read together, the median of `repeats` passes."""
    part_bytes = min(_BYTES_PER_THREAD, available_memory_bytes() // _SHARE_OF_MEMORY // num_threads)
    parts = [np.ones(part_bytes // 8, np.uint64) for _ in range(num_threads)]
    _sum(parts[0][:8])
    seconds = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            totals = list(pool.map(_sum, parts))
            seconds.append(time.perf_counter() - started)
            assert all(total == len(parts[0]) for total in totals)
    return sum(part.nbytes for part in parts) / statistics.median(seconds)


@numba.njit(nogil=True, cache=True)
def _sum(values):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(values.size):  # integers may be reassociated, so this becomes wide loads
        total += values[i]
    return total
