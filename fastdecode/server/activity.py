"""A line in the log now and then, while there is work: what runs, what waits, how fast, how full."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from fastdecode.observe.step_log import StepRecord
from fastdecode.server.service import Service

logger = logging.getLogger(__name__)

_EVERY_S = 10.0


class _Sum(NamedTuple):
    """Of all steps, up to a last one."""

    prompt_tokens: int
    new_tokens: int
    last: StepRecord | None


class Activity:
    """Told of steps in the engine's thread, read in the event loop: each sum is made anew, and what was told of it is
    kept apart, so neither undoes what the other does."""

    def __init__(self) -> None:
        self._sum = self._told = _Sum(0, 0, None)
        self._capacity_tokens = 1

    def begin(self, service: Service) -> None:
        standing = service.standing
        self._capacity_tokens = sum(standing.kv_capacity_tokens) + standing.device_kv_capacity_tokens

    def on_step(self, record: StepRecord) -> None:
        before = self._sum
        self._sum = _Sum(
            before.prompt_tokens + record.num_prompt_tokens, before.new_tokens + record.num_sampled, record
        )

    def line(self, seconds: float) -> str | None:
        """Of the last `seconds`; None if nothing happened.  Prompts that are computed again count again."""
        told, now = self._told, self._sum
        record = now.last
        if record is None or now is told:
            return None
        self._told = now
        held = record.load + record.device_kv_tokens
        prompt_tokens, new_tokens = now.prompt_tokens - told.prompt_tokens, now.new_tokens - told.new_tokens
        return (
            f"{record.num_running} running, {record.num_waiting} waiting, {prompt_tokens / seconds:.1f} prompt "
            f"tokens/s, {new_tokens / seconds:.1f} generation tokens/s, KV "
            f"{100 * held / self._capacity_tokens:.1f} % of {self._capacity_tokens} tokens"
        )

    async def tell(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if line := self.line(_EVERY_S):
                logger.info("%s", line)
