"""How much of q, k, v to the host and of o to the device lies beside S-blocks of another lane.

    without    two lanes in turns, each attention answered by a tensor that is on the device already
    with       the same, each call's q, k, v staged to the host and waited for, o put from host memory
    alone      those transfers by themselves, nothing beside them

Hidden is what of `alone` does not come back as time: 1 - (with - without) / alone.  All through the S-worker's own
staging (gpu_sworker/staging.py); R-workers take no time here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np
import torch

from bench.gpu import stack
from bench.gpu.report import Report, arguments
from bench.gpu.timing import REPEATS, call_seconds, synchronise
from gpu_sworker import AttentionCall, SWorker, as_array

_BATCHES, _TINY_BATCHES = (512, 256, 1024, 64), (8, 2)  # of each lane; the goal's first
_NUM_LANES = 2
_PINNED_BYTES, _TINY_BYTES = 256 << 20, 1 << 20
_POINT_SECONDS = 2.0


def main(args: argparse.Namespace) -> None:
    with Report("copies", args) as report:
        to_host, to_device = _link_rates(report)
        report.add(to_host_gb_per_s=to_host / 1e9, to_device_gb_per_s=to_device / 1e9)
        for name in stack.NAMES:
            with report.surviving(name):
                sworker = stack.load(name, args.work, args.dry)
                for batch in _TINY_BATCHES if report.is_dry else _BATCHES:
                    what = f"{name}, {batch} tokens a lane"
                    if report.has_time(what, 0 if report.is_dry else _POINT_SECONDS):
                        with report.surviving(what), sworker.inference():
                            _measure(report, sworker, name, batch, to_host, to_device)


def _measure(report: Report, sworker: SWorker, name: str, batch: int, to_host: float, to_device: float) -> None:
    lanes = _Lanes(sworker, batch)
    ways: tuple[Callable[[], None], ...] = lanes.step_without, lanes.step_with, lanes.transfers_alone
    without, beside, alone = _medians(ways, sworker.device)
    hidden = 1 - (beside - without) / alone
    link = lanes.bytes_to_host / to_host + lanes.bytes_to_device / to_device
    report.add(
        model=name, tokens_of_a_lane=batch, without_ms=1e3 * without, with_ms=1e3 * beside, alone_ms=1e3 * alone,
        link_ms=1e3 * link, hidden=hidden,
    )  # fmt: skip
    if batch in (_BATCHES[0], _TINY_BATCHES[0]):
        report.hold(
            f"{name}: transfers hidden, two lanes of {batch}", hidden, "share", roof=1.0, at_least=0.9,
            note=f"{1e3 * alone:.2f} ms alone, step {1e3 * without:.2f} ms without and {1e3 * beside:.2f} ms with them",
        )  # fmt: skip


class _Lanes:
    """Steps of two lanes through all layers, in turns."""

    def __init__(self, sworker: SWorker, batch: int) -> None:
        self._sworker, self._rows = sworker, slice(0, batch)
        self._tokens, self._o = stack.decode_batch(batch), stack.made_up_o(sworker, batch)
        self._host_o: np.ndarray = as_array(self._o.cpu())  # as an R-worker's, in memory that is not pinned
        spec, layers = sworker.facts.layers[0], len(sworker.facts.layers)
        numbers = _NUM_LANES * layers * batch * spec.head_dim
        self.bytes_to_host = numbers * (spec.num_q_heads + 2 * spec.num_kv_heads) * sworker.dtype.itemsize
        self.bytes_to_device = numbers * spec.num_q_heads * sworker.dtype.itemsize

    def step_without(self) -> None:
        forwards = [self._sworker.forward(self._tokens) for _ in range(_NUM_LANES)]
        for forward in forwards:
            next(forward)
        for _ in self._sworker.facts.layers:
            for forward in forwards:
                _go_on(forward, self._o)

    def step_with(self) -> None:
        forwards = [self._sworker.forward(self._tokens) for _ in range(_NUM_LANES)]
        calls, transfers = [], []
        for forward in forwards:
            calls.append(next(forward))
            transfers.append(self._sworker.stage(calls[-1], self._rows, self._rows))
        for _ in self._sworker.facts.layers:
            for lane, forward in enumerate(forwards):
                transfers[lane].wait()
                call = _go_on(forward, self._put(calls[lane]))
                if call is not None:
                    calls[lane], transfers[lane] = call, self._sworker.stage(call, self._rows, self._rows)

    def transfers_alone(self) -> None:
        forward = self._sworker.forward(self._tokens)
        call = next(forward)
        synchronise(self._sworker.device)
        for _ in range(_NUM_LANES * len(self._sworker.facts.layers)):
            self._sworker.stage(call, self._rows, self._rows).wait()
            self._put(call)
            synchronise(self._sworker.device)
        forward.close()

    def _put(self, call: AttentionCall) -> torch.Tensor:
        gathering = self._sworker.gather(call)
        gathering.put(self._rows, self._host_o)
        return gathering.finish([])


def _go_on(forward: Generator[AttentionCall, torch.Tensor, torch.Tensor], o: torch.Tensor) -> AttentionCall | None:
    """None: it is through."""
    try:
        return forward.send(o)
    except StopIteration:
        return None


def _medians(ways: tuple[Callable[[], None], ...], device: torch.device) -> list[float]:
    """Seconds of each by the clock, in turns, until the device is done; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    for round_ in range(2 * REPEATS + 1):
        for way, column in zip(ways, seconds, strict=True):
            synchronise(device)
            began = time.perf_counter()
            way()
            synchronise(device)
            if round_:
                column.append(time.perf_counter() - began)
    return [statistics.median(column) for column in seconds]


def _link_rates(report: Report) -> tuple[float, float]:
    """Bytes per second between pinned memory and the device, each way alone."""
    num_bytes = _TINY_BYTES if report.is_dry else _PINNED_BYTES
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=not report.is_dry)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=report.device)
    to_host = call_seconds(lambda: host.copy_(there, non_blocking=True), report.device)
    to_device = call_seconds(lambda: there.copy_(host, non_blocking=True), report.device)
    return num_bytes / to_host, num_bytes / to_device


if __name__ == "__main__":
    main(arguments(__doc__))
