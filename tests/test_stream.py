"""What is there at a time goes out as one send, and is an event for each token all the same."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fastdecode import RequestOutput, SamplingParams
from fastdecode.api.outputs import Delta
from fastdecode.errors import RequestError
from fastdecode.openai_api import ReadRequest
from fastdecode.server.answers import StreamedAnswer
from fastdecode.server.stream import Stream, deltas_of


def a_stream() -> Stream:
    return Stream([5, 6], 1, lambda stream: None)


def a_delta(text: str, finish_reason: str | None = None) -> Delta:
    return Delta("0", 0, text, [7], None, finish_reason, None)


WHOLE = RequestOutput("0", None, [5, 6], [])


def test_all_that_is_there_comes_at_a_time() -> None:
    async def run() -> list[list[tuple[int, str]]]:
        streams = [a_stream(), a_stream()]
        streams[1].put(a_delta("a"))
        got = []
        async for deltas in deltas_of(streams):
            got.append([(place, delta.text) for place, delta in deltas])
            if len(got) == 1:
                for stream, event in ((1, a_delta("b")), (0, a_delta("c")), (1, a_delta("d")), (1, WHOLE)):
                    streams[stream].put(event)
            elif len(got) == 2:
                asyncio.get_running_loop().call_soon(streams[0].put, a_delta("e"))
                asyncio.get_running_loop().call_soon(streams[0].put, WHOLE)
        return got

    assert asyncio.run(run()) == [[(1, "a")], [(0, "c"), (1, "b"), (1, "d")], [(0, "e")]]


def test_an_error_comes_after_what_was_before_it() -> None:
    async def run() -> None:
        streams = [a_stream(), a_stream()]
        streams[0].put(a_delta("a"))
        streams[0].put(RequestError("timeout", "too late"))
        streams[1].put(a_delta("b"))
        got = []
        with pytest.raises(RequestError, match="too late"):
            async for deltas in deltas_of(streams):
                got += [delta.text for _, delta in deltas]
        assert got == ["a", "b"]
        with pytest.raises(RequestError, match="too late"):
            await streams[0].output()

    asyncio.run(run())


def test_one_send_and_an_event_for_each_token() -> None:
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        stream = a_stream()
        request = ReadRequest(None, ["x"], SamplingParams(), is_chat=True, is_streamed=True, with_usage=True)

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                for event in (a_delta("b"), a_delta("c"), a_delta("", "stop"), WHOLE):
                    stream.put(event)

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream.put(a_delta("a"))
        await StreamedAnswer(request, "demo", [stream], None)({}, receive, send)

    asyncio.run(run())
    bodies = [message["body"].decode() for message in sent[1:]]
    assert [message.get("more_body") for message in sent] == [None, True, True, True, False]
    events = [body.removesuffix("\n\n").split("\n\n") for body in bodies]
    assert [len(of_one) for of_one in events] == [2, 3, 1, 1] and events.pop() == ["data: [DONE]"]
    read = [json.loads(event.removeprefix("data: ")) for of_one in events for event in of_one]
    deltas = [event["choices"][0]["delta"] for event in read[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {"content": "c"}, {}]
    assert read[-1]["usage"]["completion_tokens"] == 4
