"""What the R-workers did since the pool was made, and how long the S-worker waited for them: plain sums, for metrics.

The engine's thread alone reads and writes them; other threads get a `Standing`, which nobody changes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace


@dataclass
class WorkerTotals:
    """Of one R-worker; it goes on counting when the worker was lost and comes back."""

    attention_ns: int = 0  # as it timed itself
    bytes_sent: int = 0  # of q, k and v to it
    bytes_received: int = 0  # of o from it


@dataclass(frozen=True)
class Lap:
    """Of one step, seconds."""

    wait_s: float  # the S-worker's thread had nothing to do but wait for answers
    attention_s: tuple[float | None, ...]  # [num_r_workers]; None: it does not serve


@dataclass
class PoolTotals:
    workers: dict[int, WorkerTotals] = field(default_factory=dict)
    wait_ns: int = 0
    num_lost: int = 0  # R-workers that were given up
    num_recoveries: int = 0  # times that the others came to rest after it and went on
    num_joined: int = 0  # R-workers that came back, or new
    _told: dict[int, int] = field(default_factory=dict)  # attention_ns by worker, at the last lap
    _told_wait_ns: int = 0

    def copy(self) -> PoolTotals:
        return replace(self, workers={worker: replace(totals) for worker, totals in self.workers.items()})

    def begin_anew(self) -> None:
        """What was done before requests came, to measure, is none of theirs."""
        self.workers = {worker: WorkerTotals() for worker in self.workers}
        self.wait_ns, self._told, self._told_wait_ns = 0, {}, 0

    def lap(self, serving: Collection[int]) -> Lap:
        """Since the last one."""
        attention = [
            (totals.attention_ns - self._told.get(worker, 0)) / 1e9 if worker in serving else None
            for worker, totals in sorted(self.workers.items())
        ]
        wait_ns = self.wait_ns - self._told_wait_ns
        self._told = {worker: totals.attention_ns for worker, totals in self.workers.items()}
        self._told_wait_ns = self.wait_ns
        return Lap(wait_ns / 1e9, tuple(attention))


@dataclass(frozen=True)
class Standing:
    """How an engine stood when it last told: when a step began, and when it had ended."""

    num_running: int  # sequences with KV on an R-worker
    num_waiting: int  # sequences in the queue
    kv_capacity_tokens: tuple[int, ...]  # [num_r_workers]; 0 of those that did not serve
    device_kv_capacity_tokens: int  # on the S-worker's device
    kv_load_limit: int  # W_lim
    totals: PoolTotals  # a copy
    num_prefix_queried: int = 0  # prompt tokens of all sequences that have started
    num_prefix_found: int = 0  # of them those that did not go through the model
