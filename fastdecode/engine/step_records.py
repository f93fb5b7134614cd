"""When each step began and ended, and what it did, for whoever wants to be told."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastdecode.holders.rpool import RPool
from fastdecode.observe.step_log import StepRecord, make_record
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.scheduler import Scheduler


class StepRecords:
    """Times are seconds of the monotonic clock."""

    def __init__(self, scheduler: Scheduler, rpool: RPool, on_step: Callable[[StepRecord], None] | None) -> None:
        """on_step: told of every step that was run."""
        self._scheduler, self._rpool, self.on_step = scheduler, rpool, on_step
        self.began: dict[int, float] = {}  # lane -> when its step under way did
        self._first_step: float | None = None  # when it began
        self._last_end = 0.0  # when a step was over last

    def tell(self, step: Step) -> None:
        """Of a step that was run and not committed."""
        if self.on_step is None:
            return
        began, now = self.began[step.lane], time.monotonic()
        self._first_step = began if self._first_step is None else self._first_step
        elapsed_s, self._last_end = now - max(began, self._last_end), now
        self.on_step(
            make_record(
                step,
                begin_s=began - self._first_step,
                seconds=now - began,
                elapsed_s=elapsed_s,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                kv_tokens=self._scheduler.kv_tokens,
                device_kv_tokens=self._scheduler.device_kv_tokens,
                lap=self._rpool.totals.lap(self._rpool.alive),
            )
        )
