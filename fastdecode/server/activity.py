"""A line in the log now and then, while there is work: what runs, what waits, how fast, how full."""

from __future__ import annotations

import asyncio
import logging

from fastdecode.server.service import Service
from fastdecode.step_log import StepRecord

logger = logging.getLogger(__name__)

_EVERY_S = 10.0


class Activity:
    """Told of steps in the engine's thread, read in the event loop; whole numbers, so no lock."""

    def __init__(self) -> None:
        self._prompt_tokens = self._new_tokens = 0
        self._last: StepRecord | None = None
        self._capacity_tokens = 1

    def begin(self, service: Service) -> None:
        self._capacity_tokens = sum(service.opened.engine.kv_capacity_tokens)

    def on_step(self, record: StepRecord) -> None:
        self._prompt_tokens += record.num_prompt_tokens
        self._new_tokens += record.num_sampled
        self._last = record

    def line(self, seconds: float) -> str | None:
        """Of the last `seconds`; None if nothing happened.  Prompts that are computed again count again."""
        record, self._last = self._last, None
        if record is None:
            return None
        prompt_tokens, self._prompt_tokens = self._prompt_tokens, 0
        new_tokens, self._new_tokens = self._new_tokens, 0
        return (
            f"{record.num_running} running, {record.num_waiting} waiting, {prompt_tokens / seconds:.1f} prompt "
            f"tokens/s, {new_tokens / seconds:.1f} generation tokens/s, KV "
            f"{100 * record.load / self._capacity_tokens:.1f} % of {self._capacity_tokens} tokens"
        )

    async def tell(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if line := self.line(_EVERY_S):
                logger.info("%s", line)
