"""The server's door without an engine behind it: browsers of other sites, prefixes of proxies, keys, addresses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from fastdecode.errors import ConfigError
from fastdecode.server.app import create_app
from fastdecode.server.connection import HTTPServer, LoopErrors, bind
from fastdecode.server.life import Life
from fastdecode.server.options import ServerOptions

ORIGIN = "https://a.example"
KEY = {"Authorization": "Bearer sesame"}


def with_client(act: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], **options: Any) -> None:
    made = ServerOptions(served_model_name=("m",), **options)
    transport = httpx.ASGITransport(create_app(Life("m", made.served_model_name), made))

    async def run() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await act(client)

    asyncio.run(run())


def preflight(method: str = "POST", origin: str = ORIGIN, **more: str) -> dict[str, str]:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,content-type"}
    return {"Origin": origin, **asked, **more}


def test_a_preflight_is_answered_before_the_key_is_asked_for() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.options("/v1/chat/completions", headers=preflight())
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        near = await client.options(
            "/v1/models", headers=preflight("GET", **{"Access-Control-Request-Private-Network": "true"})
        )
        assert near.status_code == 200
        for headers in (preflight(origin="https://b.example"), preflight("DELETE")):
            assert (await client.options("/v1/models", headers=headers)).status_code == 400
        refused = await client.get("/v1/models", headers={"Origin": ORIGIN})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN, (
            "pages can read why"
        )
        told = await client.post("/v1/completions", headers={"Origin": ORIGIN, **KEY}, json={"prompt": "x"})
        assert told.status_code == 503 and "Retry-After" in told.headers["access-control-expose-headers"]
        other = await client.get("/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers

    with_client(act, cors_origins=(ORIGIN, "http://localhost:3000"), api_keys=("sesame",))


def test_any_origin_or_none() -> None:
    async def any_origin(client: httpx.AsyncClient) -> None:
        assert (await client.options("/v1/models", headers=preflight("GET"))).status_code == 200
        answer = await client.get("/version", headers={"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == "*"

    async def none(client: httpx.AsyncClient) -> None:
        assert (await client.options("/v1/models", headers=preflight("GET"))).status_code == 405
        assert "access-control-allow-origin" not in (await client.get("/version", headers={"Origin": ORIGIN})).headers

    with_client(any_origin, cors_origins=("*",))
    with_client(none)


@pytest.mark.parametrize("prefix", ["", "/llm", "/a/b"])
def test_requests_come_with_the_proxys_prefix_or_without(prefix: str) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        for before in {"", prefix}:
            assert (await client.get(f"{before}/version", headers=KEY)).status_code == 200
            assert (await client.get(f"{before}/version")).status_code == 401
            assert (await client.get(f"{before}/health")).json()["error"]["code"] == "loading", "asks for no key"
            answer = await client.post(f"{before}/v1/completions", headers=KEY, json={"prompt": "x"})
            assert answer.json()["error"]["code"] == "loading"
            document = (await client.get(f"{before}/openapi.json", headers=KEY)).json()
            assert document.get("servers", []) == ([{"url": prefix}] if prefix else [])
            assert "/v1/completions" in document["paths"]
        for wrong in ("/llm2/health", "/b/health", "//health", f"{prefix}{prefix}/health" if prefix else "/x/health"):
            assert (await client.get(wrong)).status_code == 401, "a path that is not open"

    with_client(act, root_path=prefix, api_keys=("sesame",))


def test_a_key_comes_in_either_header() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        for headers in ({"X-Api-Key": "sesame"}, {"x-api-key": "second", "Authorization": "Bearer wrong"}, KEY):
            assert (await client.get("/version", headers=headers)).status_code == 200
        wrongs: list[dict[str, str]] = [
            {"X-Api-Key": ""}, {"X-Api-Key": "wrong"}, {"X-Api-Key": "Bearer sesame"}, {"Authorization": "sesame"}, {}
        ]  # fmt: skip
        for wrong in wrongs:
            refused = await client.get("/version", headers=wrong)
            assert refused.status_code == 401 and "X-Api-Key" in refused.json()["error"]["message"]

    with_client(act, api_keys=("sesame", "second"))


@pytest.mark.parametrize("host", ["::", "[::]", ""])
def test_all_addresses_are_of_both_families(host: str) -> None:
    with bind(host, 0) as listener:
        port = listener.getsockname()[1]
        for address in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
            with socket.create_connection((address, port), timeout=10):
                pass


def test_one_address_is_one() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.family == socket.AF_INET
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind("x" * 70 + ".invalid", 0)


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a.example,https://b.example", "", "**"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="is no origin"):
        ServerOptions(served_model_name=("m",), cors_origins=(origin,))


def test_connections_wait_while_file_descriptors_are_used_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One try at a time, with a pause after it, and one line in the log; then they are served."""
    tries = 0

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            nonlocal tries
            tries += 1
            if tries <= 5:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.05)
    made = ServerOptions(served_model_name=("m",))
    http = HTTPServer(create_app(Life("m", made.served_model_name), made), made)

    async def run() -> None:
        with bind("127.0.0.1", 0) as bound:
            listener = Exhausted(fileno=bound.detach())
        listener.setblocking(False)
        serving = asyncio.create_task(http.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            answers = await asyncio.gather(*(client.get("/health") for _ in range(8)))
        assert {answer.status_code for answer in answers} == {503}  # no model is loaded
        http.should_exit = True
        await serving

    asyncio.run(run())
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["new connections wait"]
    assert 6 <= tries < 30


def test_other_errors_of_the_loop_are_told(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    LoopErrors()(loop, {"message": "Task exception was never retrieved", "exception": OSError(errno.EMFILE, "files")})
    LoopErrors()(loop, {"message": "socket.accept() went wrong", "exception": OSError(errno.EBADF, "bad")})
    loop.close()
    assert len(caplog.records) == 2
