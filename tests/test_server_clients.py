"""Clients that go away, stall, send too much or too slowly: real HTTP, with the engine within reach."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Live, live_server

PROMPT = "def f(x):"
LONG = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "temperature": 1.0, "seed": 1}


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


async def until(condition: Any, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_frees_its_kv(is_streamed: bool, how: str, demo_model: Path) -> None:
    """Within a step or so, while another's answer goes on untouched."""

    async def run() -> None:
        async with live_server(demo_model) as live:
            other = asyncio.create_task(live.post({"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True}))
            reader, writer = await live.connect()
            writer.write(request_bytes({**LONG, "stream": is_streamed, "n": 4}))
            await until(lambda: live.service.num_running == 5)
            if is_streamed:
                await reader.readuntil(b"data: ")
            if how == "reset":
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                writer.transport.abort()
            else:
                writer.close()
            steps = live.service._engine._scheduler._num_steps
            await until(lambda: live.service.num_running == 1)
            assert (
                live.service._engine._scheduler._num_steps - steps <= 10
            )  # the step at hand, and what the network takes
            assert not other.done()
            answer = (await other).json()
            assert answer["usage"]["completion_tokens"] == 300
            await live.idle()

    asyncio.run(run())


def test_a_tenth_of_the_clients_goes(demo_model: Path) -> None:
    """At any moment of their requests; the others get what they get alone, and nothing is left behind."""

    async def run() -> None:
        async with live_server(demo_model, {"max_num_seqs": 24}) as live:
            bodies = [
                {"prompt": "x" * i, "max_tokens": 20 + i % 30, "temperature": 0.8, "seed": i, "n": 1 + i % 2}
                for i in range(1, 81)
            ]
            generator = random.Random(5)
            leaves = {i: generator.uniform(0, 1.0) for i in generator.sample(range(80), 8)}

            async def ask(client: httpx.AsyncClient, i: int) -> Any:
                if i in leaves:
                    try:
                        body = {**bodies[i], "stream": bool(i % 2), "max_tokens": 800, "ignore_eos": True}
                        await asyncio.wait_for(client.post("/v1/completions", json=body), leaves[i])
                    except TimeoutError:
                        return None
                    raise AssertionError("it should have been too long for this")
                return [
                    choice["text"]
                    for choice in (await client.post("/v1/completions", json=bodies[i])).json()["choices"]
                ]

            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=live.url, timeout=100, limits=limits) as client:
                got = await asyncio.gather(*(ask(client, i) for i in range(80)))
                await live.idle()
                for i in range(0, 80, 9):
                    if i not in leaves:
                        assert got[i] == await ask(client, i)
            assert [text is None for text in got] == [i in leaves for i in range(80)]
            await live.idle()

    asyncio.run(run())


def test_a_client_that_stops_reading_is_left(demo_model: Path) -> None:
    """What waits for it in this process stays small, and its KV is freed; one that reads slowly is served."""

    async def run() -> None:
        async with live_server(demo_model, client_timeout_s=1.5) as live:
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(raw, ("127.0.0.1", live.port))
            # Some 50 KB for every token, so that the kernel's buffers are full soon.
            await loop.sock_sendall(raw, request_bytes({**LONG, "stream": True, "logprobs": 1000}))
            await until(lambda: live.service.num_running == 1)
            began = time.monotonic()
            (connection,) = live.http.server_state.connections
            largest = 0
            while live.service.num_running:
                largest = max(largest, connection.transport.get_write_buffer_size())
                assert time.monotonic() - began < 30
                await asyncio.sleep(0.01)
            await live.idle()
            assert largest < 1 << 20
            assert live.service._engine._scheduler._num_steps < 850  # it was not served to its end
            await until(lambda: not live.http.server_state.connections)
            raw.close()

            slow, writer = await live.connect(limit=4096)
            writer.write(request_bytes({**LONG, "max_tokens": 90, "stream": True, "logprobs": 1000}))
            size, begun, last = 0, time.monotonic(), b""
            while part := await slow.read(1 << 15):
                size, last = size + len(part), (last + part)[-40:]
                if last.endswith(b"0\r\n\r\n"):
                    break
                await asyncio.sleep(0.02)
            assert b"[DONE]" in last and size > 1 << 20 and time.monotonic() - begun > 1.5
            writer.close()

    asyncio.run(run())


async def answer_to(live: Live, *parts: bytes, timeout: float = 15) -> tuple[int, dict[str, Any]]:
    reader, writer = await live.connect()
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.01)
    raw = await asyncio.wait_for(reader.read(), timeout)
    writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_limits(demo_model: Path) -> None:
    async def run() -> None:
        async with live_server(demo_model, max_body_bytes=10_000, client_timeout_s=1.0) as live:
            head = (
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            )
            large = {"prompt": "x" * 20_000}

            async def post(body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
                async with httpx.AsyncClient(timeout=20) as client:
                    headers = {"content-type": "application/json", **headers}
                    answer = await client.post(live.url + "/v1/completions", content=body, headers=headers)
                    return answer.status_code, answer.json()["error"]

            status, error = await post(json.dumps(large).encode())
            assert (status, error["code"]) == (413, "body_too_large") and "10000 bytes" in error["message"]
            # Without a length, in chunks
            chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
            status, body = await answer_to(
                live, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 4, b"0\r\n\r\n"
            )
            assert (status, body["error"]["code"]) == (413, "body_too_large")
            # A body, a head, a connection that stop in the middle
            status, body = await answer_to(live, head + b"Content-Length: 100\r\n\r\n{")
            assert (status, body["error"]["code"]) == (408, "body_too_slow")
            for begun in (b"", b"POST /v1/comp"):
                reader, writer = await live.connect()
                writer.write(begun)
                started = time.monotonic()
                assert await asyncio.wait_for(reader.read(), 10) == b"" and time.monotonic() - started > 0.5
                writer.close()
            # Headers: at once, and one that never ends
            status, error = await post(b"{}", huge="y" * 40_000)
            assert (status, error["code"]) == (431, "headers_too_large")
            status, body = await answer_to(live, head + (b"X-A: " + b"y" * 4000 + b"\r\n") * 12)
            assert status == 400 and "32768 bytes" in body["error"]["message"]
            status, body = await answer_to(live, b"no HTTP at all\r\n\r\n")
            assert status == 400 and body["error"]["code"] == "invalid_request"
            # A page in a browser can send this without asking
            status, error = await post(b'{"prompt": "x"}', **{"content-type": "text/plain"})
            assert (status, error["code"]) == (415, "unsupported_media_type")
            status, error = await post(b"\x1f\x8b", **{"content-encoding": "gzip"})
            assert (status, error["code"]) == (415, "unsupported_media_type") and "Content-Encoding" in error["message"]
            status, error = await post(b'\xef\xbb\xbf{"prompt": 5}', **{"content-encoding": "identity"})
            assert (status, error["param"]) == (400, "prompt")  # a byte order mark is no part of it
            assert (await post(b"[" * 9000))[1]["message"] == "body is nested too deeply"
            assert live.service._num_inside == 0

    asyncio.run(run())


def test_keys(demo_model: Path) -> None:
    """Every route wants one but /health and /ping, known routes and unknown ones alike."""
    keys = ("sesame", "ключ")

    async def run() -> None:
        async with live_server(demo_model, api_keys=keys) as live, httpx.AsyncClient(base_url=live.url) as client:
            paths = [
                "/v1/models",
                "/v1/completions",
                "/tokenize",
                "/version",
                "/openapi.json",
                "/metrics",
                "/nowhere",
                "//health",
            ]
            for wrong in (
                b"",
                b"Bearer",
                b"Bearer sesam",
                b"Bearer sesame2",
                b"Basic sesame",
                b"sesame",
                b"Bearer \xff\xfe",
            ):
                for path in paths:
                    answer = await client.get(path, headers={b"authorization": wrong} if wrong else None)
                    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            assert [(await client.get(path)).status_code for path in ("/health", "/ping")] == [200, 200]
            for key in keys:
                right = {b"authorization": b"Bearer " + key.encode()}
                assert (await client.get("/v1/models", headers=right)).status_code == 200
                assert (await client.get("/nowhere", headers=right)).status_code == 404
                answer = await client.post("/v1/completions", headers=right, json={"prompt": "x", "max_tokens": 2})
                assert answer.status_code == 200
            # No other site's page may read an answer.
            answer = await client.options(
                "/v1/models", headers={"Origin": "http://evil", **{"Access-Control-Request-Method": "GET"}}
            )
            assert "access-control-allow-origin" not in answer.headers

    asyncio.run(run())


def test_more_than_the_queue_holds(demo_model: Path) -> None:
    """Whoever finds it full hears so at once, and when to come again; the others are served."""

    async def run() -> None:
        async with live_server(demo_model, {"max_num_seqs": 2}, max_queue=4) as live:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=live.url, timeout=60, limits=limits) as client:

                async def ask(i: int) -> tuple[httpx.Response, float]:
                    began = time.monotonic()
                    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": bool(i % 2)}
                    return await client.post("/v1/completions", json=body), time.monotonic() - began

                asked = await asyncio.gather(*(ask(i) for i in range(60)))
                served = [seconds for answer, seconds in asked if answer.status_code == 200]
                refused = [(answer, seconds) for answer, seconds in asked if answer.status_code != 200]
                assert 6 <= len(served) <= 8 and len(refused) == 60 - len(served)
                for answer, seconds in refused:
                    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
                    assert answer.json()["error"]["code"] == "queue_full" and seconds < max(served)
                # A list that the queue never holds whole is the request's fault; one that it holds is served.
                answer = await client.post("/v1/completions", json={"prompt": ["x"] * 3, "n": 2, "temperature": 1})
                assert answer.status_code == 400 and "3 prompts x n = 2 are 6 sequences" in answer.text
                answer = await client.post("/v1/completions", json={"prompt": ["x"] * 4, "max_tokens": 2})
                assert answer.status_code == 200 and len(answer.json()["choices"]) == 4
            await live.idle()

    asyncio.run(run())


def test_timeouts(demo_model: Path) -> None:
    """408 before the first token; in the middle of a stream, an event."""

    async def run() -> None:
        async with live_server(demo_model, timeout_s=0.6) as live:
            whole = await live.post(LONG)
            assert whole.status_code == 408 and whole.json()["error"]["code"] == "timeout"
            assert whole.json()["error"]["message"] == "not finished within 0.6 s"
            streamed = await live.post({**LONG, "stream": True})
            assert streamed.status_code == 200
            *_, last = [line for line in streamed.text.splitlines() if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
            await live.idle()

    asyncio.run(run())
