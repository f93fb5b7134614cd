"""What goes back: an answer whole, or as server-sent events; and nothing, if nobody is there any more.

the client ──disconnects──► abort ─► its KV is free after the step at hand
deltas ─► chunks ─► data: {...}  …  data: [DONE]
             └─ an error in the middle ─► data: {"error": ...}, and the stream ends
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastdecode.openai_api import ChunkWriter, Echo, ReadRequest, completion_body
from fastdecode.server.errors import JSONBody, error_event
from fastdecode.server.stream import Stream, deltas_of

_DONE = b"data: [DONE]\n\n"
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # for a proxy that would wait for more
]


class Answer(Response):
    """To a request whose streams run already.  They are over, or aborted, when it has been sent or has failed."""

    def __init__(
        self, request: ReadRequest, model: str, streams: Sequence[Stream], echoes: Sequence[Echo] | None
    ) -> None:
        """streams: one per prompt; model: what the answer calls it; echoes: one per prompt, if they are shown."""
        super().__init__()
        self._request, self._streams, self._echoes = request, streams, echoes
        self._heading: dict[str, Any] = {
            "is_chat": request.is_chat,
            "body_id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "model": model,
            "created": int(time.time()),
            "num_logprobs": request.params.logprobs,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestError and RWorkerError before anything was sent, never after."""
        gone = asyncio.create_task(_until_gone(receive))
        answered = asyncio.create_task(self._answer(scope, receive, send))
        try:
            await asyncio.wait((gone, answered), return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                answered.result()
        finally:
            for stream in self._streams:
                stream.abort()
            gone.cancel()
            answered.cancel()

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class WholeAnswer(Answer):
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        outputs = [await stream.output() for stream in self._streams]
        body = completion_body(
            outputs,
            **self._heading,
            num_prompt_logprobs=self._request.num_prompt_logprobs,
            echoes=self._echoes,
        )
        await JSONBody(body)(scope, receive, send)


class StreamedAnswer(Answer):
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        bodies = self._bodies()
        body = await anext(bodies)  # before the status is told: what is refused at once is refused by it
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        try:
            while True:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = await anext(bodies)
        except StopAsyncIteration:
            body = _DONE
        except Exception as error:
            body = _event(error_event(error))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _bodies(self) -> AsyncIterator[bytes]:
        """Events; those that are there at a time go out as one, for a send costs more than all that makes an event."""
        num_samples = self._request.params.n
        writer = ChunkWriter(
            **self._heading,
            echoes=self._echoes and [echo for echo in self._echoes for _ in range(num_samples)],
            prompt_tokens=sum(len(stream.prompt_token_ids) for stream in self._streams),
            with_usage=self._request.with_usage,
            with_usage_so_far=self._request.with_usage_so_far,
        )
        async for deltas in deltas_of(self._streams):
            events = [
                _event(chunk)
                for place, delta in deltas
                for chunk in writer.chunks(place * num_samples + delta.index, delta)
            ]
            if events:
                yield b"".join(events)
        if self._request.with_usage:
            yield _event(writer.usage())


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
