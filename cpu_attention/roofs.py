"""What this machine can do at most, measured: the two roofs under which decode attention lives.

It reads every K and V once, so the streaming read bandwidth bounds it; with G query heads per KV head it does 2·G
FLOP per number, so at large G the rate of fused multiply-adds may bound it first.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from cpu_attention import emit
from cpu_attention.compiling import compiled
from cpu_attention.emit import I8, I64
from cpu_attention.layout import LANES
from cpu_attention.machine import available_memory_bytes, pin_next

_BYTES_PER_THREAD = 256 << 20  # beyond any last-level cache
_SHARE_OF_MEMORY = 8  # at most an eighth of what is free
_ACCUMULATORS = 16  # enough to hide an FMA's latency, few enough to stay in registers
_TURNS = 1 << 18  # of the FMA loop: some milliseconds


class Roofs:
    """Streaming read and FMA rate of several threads at once; measured as often as asked."""

    def __init__(self, num_threads: int, cores: Sequence[int] = ()) -> None:
        """cores: a thread is pinned to each."""
        part_bytes = min(_BYTES_PER_THREAD, available_memory_bytes() // _SHARE_OF_MEMORY // num_threads)
        self._parts = [np.ones(part_bytes // 8, np.uint64) for _ in range(num_threads)]
        self._numbers = [np.ones(_ACCUMULATORS * LANES, np.float32) for _ in range(num_threads)]
        places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in cores[:num_threads]:
            places.put(core)
        self._pool = ThreadPoolExecutor(num_threads, "roof", pin_next, (places,))
        _sum(self._parts[0][:8])  # compiles
        _multiply_add(1, self._numbers[0])

    def read_bandwidth(self) -> float:
        """Bytes per second of one pass, each thread over memory of its own."""
        totals, seconds = self._timed(_sum, self._parts)
        assert all(total == len(part) for total, part in zip(totals, self._parts, strict=True))
        return sum(part.nbytes for part in self._parts) / seconds

    def fma_rate(self) -> float:
        """fp32 FLOP per second of fused multiply-adds in registers; each counts as two."""
        _, seconds = self._timed(lambda numbers: _multiply_add(_TURNS, numbers), self._numbers)
        return len(self._numbers) * _TURNS * _ACCUMULATORS * LANES * 2 / seconds

    def close(self) -> None:
        self._pool.shutdown()

    def _timed(self, do: Callable[[np.ndarray], Any], parts: list[np.ndarray]) -> tuple[list[Any], float]:
        started = time.perf_counter()
        results = list(self._pool.map(do, parts))
        return results, time.perf_counter() - started


class ThreadRoofs:
    """The same of the calling thread alone, by its own processor time: others on the machine disturb it less."""

    def __init__(self) -> None:
        part_bytes = min(_BYTES_PER_THREAD, available_memory_bytes() // _SHARE_OF_MEMORY)
        self._part, self._numbers = np.ones(part_bytes // 8, np.uint64), np.ones(_ACCUMULATORS * LANES, np.float32)
        _sum(self._part[:8])  # compiles
        _multiply_add(1, self._numbers)

    def read_bandwidth(self) -> float:
        """Bytes per second."""
        started = time.thread_time()
        assert _sum(self._part) == len(self._part)
        return self._part.nbytes / (time.thread_time() - started)

    def fma_rate(self) -> float:
        """fp32 FLOP per second."""
        started = time.thread_time()
        _multiply_add(_TURNS, self._numbers)
        return _TURNS * _ACCUMULATORS * LANES * 2 / (time.thread_time() - started)


def measure_read_bandwidth(num_threads: int, repeats: int = 5) -> float:
    """Bytes per second that `num_threads` threads read together, the median of `repeats` passes."""
    roofs = Roofs(num_threads)
    try:
        return statistics.median(roofs.read_bandwidth() for _ in range(repeats))
    finally:
        roofs.close()


@compiled
def _sum(values):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(values.size):  # integers may be reassociated, so this becomes wide loads
        total += values[i]
    return total


@compiled
def _multiply_add(turns, numbers):  # type: ignore[no-untyped-def]
    _fma_loop(np.int64(turns), numbers)


@intrinsic
def _fma_loop(typing_context, turns, numbers):  # type: ignore[no-untyped-def]
    """x = x · 0.5 + 0.5, `turns` times, for _ACCUMULATORS vectors."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        data = b.bitcast(context.make_array(signature.args[1])(context, b, arguments[1]).data, I8.as_pointer())
        places = [index * LANES * 4 for index in range(_ACCUMULATORS)]
        half = emit.constant(0.5)

        def body(turn: Any, sums: emit.Sums) -> emit.Sums:
            return [[emit.fma(b, value, half, half) for value in sums[0]]]

        start = [[emit.load(b, data, place) for place in places]]
        for value, place in zip(emit.loop(b, I64(0), arguments[0], 1, start, body)[0], places, strict=True):
            emit.store(b, value, data, place)
        return context.get_dummy_value()

    return types.void(turns, numbers), generate
