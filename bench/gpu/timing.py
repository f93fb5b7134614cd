"""Seconds of calls on a device, and the rates they are compared with, measured in the same run.

On a GPU events on the current stream time calls that follow one another, so what lies between two kernels counts and
the launch of the first one does not; nothing waits in between.  On a processor a clock does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

REPEATS = 5  # of which the median is taken
_WARM_UP = 3
_LEAST_SECONDS = 0.03  # of calls that are timed together
_MOST_CALLS = 200
_COPIED_BYTES = 1 << 30
_TINY_BYTES = 8 << 20


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Of one call among many behind one another, median of `repeats`."""
    for _ in range(_WARM_UP):
        call()
    synchronise(device)
    count = max(1, min(_MOST_CALLS, round(_LEAST_SECONDS / max(_series_seconds(call, 1, device), 1e-7))))
    return statistics.median(_series_seconds(call, count, device) / count for _ in range(repeats))


def _series_seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Captured:
    """A call as one CUDA graph: `replay` does on the current stream what the call did, in the same memory."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Whatever the call compiles or sets up lazily is there after the first ones, beside the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._call, self._graph = call, torch.cuda.CUDAGraph()  # the call holds what the graph reads
        with torch.cuda.graph(self._graph):
            self.result = call()

    def replay(self) -> None:
        self._graph.replay()


def without_gaps(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work as a graph, where the device has them: what it takes when no launch is waited for."""
    return Captured(call).replay if device.type == "cuda" else call


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy within the device's memory, those read and those written."""
    num_bytes = _TINY_BYTES if device.type == "cpu" else min(_COPIED_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    return 2 * num_bytes / call_seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square product of random numbers."""
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / call_seconds(lambda: F.linear(a, b), device)
