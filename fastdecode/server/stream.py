"""What a request has brought so far, from the service to whoever answers it.  In the event loop alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from fastdecode.errors import FastDecodeError, RequestError
from fastdecode.outputs import Delta, RequestOutput

Event = Delta | RequestOutput | FastDecodeError


class Stream:
    """A request on its way.  Iterate over it for deltas, or await `output`; leave it by `abort`."""

    def __init__(self, prompt_token_ids: list[int], num_samples: int, drop: Callable[[Stream], None]) -> None:
        """drop: what tells the engine's thread that nobody wants it any more."""
        self.prompt_token_ids, self.num_samples = prompt_token_ids, num_samples
        self.request_id = ""  # of the engine, once it has it
        self._drop = drop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._is_over = False

    def put(self, event: Event) -> None:
        """Of the engine; deltas first, then one that is none."""
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Raises RequestError (timeout, worker_lost, cancelled, ...), RWorkerError (the engine is dead)."""
        while not self._is_over:
            event = await self._next()
            if isinstance(event, Delta):
                yield event

    async def output(self) -> RequestOutput:
        """The whole of it.  Raises like iterating."""
        while True:
            event = await self._next()
            if isinstance(event, RequestOutput):
                return event

    def abort(self) -> None:
        """Nobody wants it any more: its KV is free after the step at hand.  Can be called at any time, and twice."""
        if not self._is_over:
            self._is_over = True
            self._drop(self)

    async def _next(self) -> Delta | RequestOutput:
        event = await self._events.get()
        if isinstance(event, FastDecodeError):
            self._is_over = True
            raise event
        if isinstance(event, RequestOutput):
            self._is_over = True
            if event.error:
                raise RequestError(event.error.code, event.error.message)
        return event
