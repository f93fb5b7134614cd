"""The last minutes of a server, second by second: what the page at ``/dashboard`` draws.

Steps of one second become one entry; a second without steps has none, and is told as idle.  The ring holds `KEPT_S` of
them, whatever happens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastdecode.api.outputs import RequestOutput
from fastdecode.observe.step_log import StepRecord
from fastdecode.server.service import Service

KEPT_S, LEAST_S = 900, 10


@dataclass
class _Second:
    """Of one second of the monotonic clock; sums but for those that say otherwise."""

    number: int
    num_steps: int = 0
    num_ended: int = 0  # requests
    step_s: float = 0.0
    longest_step_s: float = 0.0
    new_tokens: int = 0
    prompt_tokens: int = 0
    wait_s: float = 0.0
    attention_s: dict[int, float] = field(default_factory=dict)  # by R-worker
    num_running: int = 0  # this and the next three: of its last step
    num_waiting: int = 0
    kv_tokens: tuple[int, ...] = ()
    device_kv_tokens: int = 0

    def add(self, record: StepRecord) -> None:
        self.num_steps += 1
        self.step_s += record.busy_s
        self.longest_step_s = max(self.longest_step_s, record.seconds)
        self.new_tokens += record.num_sampled
        self.prompt_tokens += record.num_prompt_tokens
        self.wait_s += record.wait_s
        self.num_running, self.num_waiting = record.num_running, record.num_waiting
        self.kv_tokens, self.device_kv_tokens = record.kv_tokens, record.device_kv_tokens
        for worker, attention_s in enumerate(record.attention_s):
            if attention_s is not None:
                self.attention_s[worker] = self.attention_s.get(worker, 0.0) + attention_s

    def row(self, num_workers: int) -> dict[str, Any]:
        """For JSON; None where there is nothing to tell."""
        busy = max(self.step_s, 1e-9)
        return {
            "load": sum(self.kv_tokens),
            "step_ms": 1e3 * self.step_s / self.num_steps if self.num_steps else None,
            "longest_step_ms": 1e3 * self.longest_step_s if self.num_steps else None,
            "running": self.num_running,
            "waiting": self.num_waiting,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "ended": self.num_ended,
            "device_kv": self.device_kv_tokens,
            "kv": [*self.kv_tokens, *([0] * num_workers)][:num_workers],
            "s_idle": min(1.0, self.wait_s / busy) if self.num_steps else None,
            "r_idle": [
                max(0.0, 1 - self.attention_s[worker] / busy) if worker in self.attention_s else None
                for worker in range(num_workers)
            ],
        }


class History:
    """Pass `on_step` to `open_engine` and `on_finished` to `Service`, then `begin`; asked before, it is loading."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.model_name = model_name
        self._clock, self._since = clock, int(clock())
        self._lock = threading.Lock()
        self._seconds: deque[_Second] = deque(maxlen=KEPT_S)
        self._service: Service | None = None

    def begin(self, service: Service) -> None:
        self._service = service

    def on_step(self, record: StepRecord) -> None:
        """In the engine's thread, when the step has ended."""
        with self._lock:
            self._this_second().add(record)

    def on_finished(self, output: RequestOutput) -> None:
        """In the engine's thread."""
        with self._lock:
            self._this_second().num_ended += 1

    def _this_second(self) -> _Second:
        number = int(self._clock())
        if not self._seconds or self._seconds[-1].number != number:
            self._seconds.append(_Second(number))
        return self._seconds[-1]

    def told(self, num_seconds: int) -> dict[str, Any]:
        """For JSON: the last whole seconds, oldest first, and how things stand.

        They begin where this does, but a few of them are there always.
        """
        service, now = self._service, int(self._clock())
        health = service.health() if service else None
        standing = service.standing if service else None
        capacity = standing.kv_capacity_tokens if standing else ()
        with self._lock:
            known = {second.number: second for second in self._seconds}
            numbers = range(max(now - min(num_seconds, KEPT_S), min(self._since, now - LEAST_S)), now)
            rows = [known.get(number, _Second(number)).row(len(capacity)) for number in numbers]
        return {
            "model": self.model_name,
            "state": health.state if health else "loading",
            "reason": health.reason if health else None,
            "lost": health.lost if health else [],
            "running": standing.num_running if standing else 0,
            "waiting": standing.num_waiting if standing else 0,
            "load_limit": standing.kv_load_limit if standing else 0,
            "capacity": list(capacity),
            "device_capacity": standing.device_kv_capacity_tokens if standing else 0,
            "seconds": rows,
        }
