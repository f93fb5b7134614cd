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


class ReadBandwidth:
    """A streaming read by several threads at once, each over memory of its own; measured as often as asked."""

    def __init__(self, num_threads: int) -> None:
        part_bytes = min(_BYTES_PER_THREAD, available_memory_bytes() // _SHARE_OF_MEMORY // num_threads)
        self._parts = [np.ones(part_bytes // 8, np.uint64) for _ in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads)
        _sum(self._parts[0][:8])  # compiles

    def measure(self) -> float:
        """Bytes per second of one pass."""
        started = time.perf_counter()
        totals = list(self._pool.map(_sum, self._parts))
        seconds = time.perf_counter() - started
        assert all(total == len(part) for total, part in zip(totals, self._parts, strict=True))
        return sum(part.nbytes for part in self._parts) / seconds


def measure_read_bandwidth(num_threads: int, repeats: int = 5) -> float:
    """Bytes per second that `num_threads` threads read together, the median of `repeats` passes."""
    bandwidth = ReadBandwidth(num_threads)
    return statistics.median(bandwidth.measure() for _ in range(repeats))


@numba.njit(nogil=True, cache=True)
def _sum(values):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(values.size):  # integers may be reassociated, so this becomes wide loads
        total += values[i]
    return total
