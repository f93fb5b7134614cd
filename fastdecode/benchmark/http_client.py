"""Requests to an OpenAI-compatible server, at the times they are due, and when each of their tokens came.

A chunk counts as tokens if it brings text, or neither text nor an end: half a character, from servers that tell of it.
A server may put several tokens in a chunk, so how many there were is the server's word (`usage`), if it gives it.

aiohttp, because a client that shares the server's cores slows it: with httpx a server on two gave 75 requests/s where
vLLM's client, which is built on aiohttp, too, saw 80 to 108.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import msgspec

from fastdecode.benchmark.serving import Call, Outcome

_CONNECT_S = 30.0
_DATA = b"data:"
_MAX_EVENT_BYTES = 1 << 20
_NOT_AS_AGREED = (ValueError, LookupError, TypeError, AttributeError)  # what parsing an answer may raise


async def send_all(
    url: str,
    calls: Sequence[Call],
    due_s: Sequence[float],
    *,
    max_concurrency: int | None,
    timeout_s: float,
    headers: dict[str, str],
) -> list[Outcome]:
    """due_s: when each call is, since the beginning.  max_concurrency: at the same time; who comes then waits here.

    A call that fails is an outcome with an error.
    """
    gate = asyncio.Semaphore(max_concurrency or len(calls) or 1)
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)
    connector = aiohttp.TCPConnector(limit=0)
    began = time.perf_counter()
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=_MAX_EVENT_BYTES
    ) as session:

        async def one(call: Call, due: float) -> Outcome:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            async with gate:
                outcome = Outcome(call.prompt_tokens, time.perf_counter() - began)
                try:
                    await _send(session, url, call, outcome)
                except (aiohttp.ClientError, *_NOT_AS_AGREED, OSError) as error:  # TimeoutError is an OSError
                    outcome.error = f"{type(error).__name__}: {error}"
            return outcome

        return list(await asyncio.gather(*map(one, calls, due_s)))


async def _send(session: aiohttp.ClientSession, url: str, call: Call, outcome: Outcome) -> None:
    sent = last = time.perf_counter()
    num_chunks, usage = 0, dict[str, Any]()
    async with session.post(url, json=call.body) as response:
        if response.status != 200:
            text = await response.text(errors="replace")
            outcome.error = f"HTTP {response.status}: {text[:300]}"
            return
        async for event in _events(response):
            now = time.perf_counter()
            if "error" in event:
                outcome.error = f"in the stream: {msgspec.json.encode(event['error']).decode()[:300]}"
                return
            usage = event.get("usage") or usage
            if not event.get("choices"):
                continue
            outcome.whole_s = now - sent
            if not _brings_tokens(event["choices"][0]):
                continue
            num_chunks += 1
            if outcome.first_s is None:
                outcome.first_s = now - sent
            else:
                outcome.gaps_s.append(now - last)
            last = now
    outcome.output_tokens = int(usage.get("completion_tokens", num_chunks))
    outcome.prompt_tokens = int(usage.get("prompt_tokens", outcome.prompt_tokens))
    outcome.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    if outcome.first_s is None:
        outcome.error = "the answer had no token"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Up to the server's word that this is all.  Raises ValueError if it never says so."""
    async for line in response.content:
        if not line.startswith(_DATA):
            continue
        content = line.removeprefix(_DATA).strip()
        if content == b"[DONE]":
            return
        yield msgspec.json.decode(content)
    raise ValueError("the answer ended before its end")


def _brings_tokens(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    text = delta.get("content") or delta.get("reasoning_content")
    return bool(text) or (choice.get("finish_reason") is None and "role" not in delta)
