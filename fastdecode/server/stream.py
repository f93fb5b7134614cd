"""What requests have brought so far, from the service to whoever answers them.  In the event loop alone.

put ─► deltas ─► take: all that came since the last time      news ─► wakes whoever waits, once for all of it
   └─► output, or an error: the end, and nothing after it
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from fastdecode.api.outputs import Delta, RequestOutput
from fastdecode.errors import FastDecodeError, RequestError

Event = Delta | RequestOutput | FastDecodeError


class Stream:
    """A request on its way.  `take` its deltas when there are `news`, or await `output`; leave it by `abort`."""

    def __init__(self, prompt_token_ids: list[int], num_samples: int, drop: Callable[[Stream], None]) -> None:
        """drop: what tells the engine's thread that nobody wants it any more."""
        self.prompt_token_ids, self.num_samples = prompt_token_ids, num_samples
        self.request_id = ""  # of the engine, once it has it
        self.news = asyncio.Event()  # its own, or that of several which are read together
        self._drop = drop
        self._deltas: list[Delta] = []  # that nobody has taken
        self._output: RequestOutput | None = None
        self._error: FastDecodeError | None = None
        self._is_left = False

    @property
    def is_over(self) -> bool:
        """All of it was taken, and it has ended well."""
        return self._output is not None and not self._deltas

    def put(self, event: Event) -> None:
        """Of the engine; deltas first, then one that is none."""
        if isinstance(event, Delta):
            self._deltas.append(event)
        elif isinstance(event, FastDecodeError):
            self._error = event
        elif event.error:
            self._error = RequestError(event.error.code, event.error.message)
        else:
            self._output = event
        self.news.set()

    def take(self) -> list[Delta]:
        """What has come since the last time, if anything."""
        taken, self._deltas = self._deltas, []
        return taken

    def check(self) -> None:
        """Raises what it ended with: RequestError (timeout, worker_lost, cancelled, ...), RWorkerError (the engine)."""
        if self._error:
            raise self._error

    async def output(self) -> RequestOutput:
        """The whole of it.  Raises like `check`."""
        while self._output is None:
            await self.news.wait()
            self.news.clear()
            self.check()
        return self._output

    def abort(self) -> None:
        """Nobody wants it any more: its KV is free after the step at hand.  Can be called at any time, and twice."""
        if not (self._is_left or self._output or self._error):
            self._is_left = True
            self._drop(self)


async def deltas_of(streams: Sequence[Stream]) -> AsyncIterator[list[tuple[int, Delta]]]:
    """(place of the stream, delta): all that is there at a time, at least one.

    Raises the first error of any, like `Stream.check`, after what had come before it.
    """
    news = asyncio.Event()
    news.set()  # of what has come already
    for stream in streams:
        stream.news = news
    while not all(stream.is_over for stream in streams):
        await news.wait()
        if taken := [(place, delta) for place, stream in enumerate(streams) for delta in stream.take()]:
            yield taken
            continue
        for stream in streams:
            stream.check()
        news.clear()
