"""How fast this machine reads memory: the roof under which decode attention lives."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

_BYTES_PER_THREAD = 256 << 20  # well beyond any last-level cache


def measure_read_bandwidth(num_threads: int, repeats: int = 5) -> float:
    """Bytes per second that `num_threads` threads read together, the median of `repeats` passes."""
    parts = [np.ones(_BYTES_PER_THREAD // 8, np.uint64) for _ in range(num_threads)]
    _sum(parts[0][:8])
    seconds = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            totals = list(pool.map(_sum, parts))
            seconds.append(time.perf_counter() - started)
            assert all(total == len(parts[0]) for total in totals)
    return num_threads * _BYTES_PER_THREAD / statistics.median(seconds)


@numba.njit(nogil=True, cache=True)
def _sum(values):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(values.size):  # integers may be reassociated, so this becomes wide loads
        total += values[i]
    return total
