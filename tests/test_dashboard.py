"""The page draws what the last seconds brought, holds no data itself, and lets nothing in from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import Case
from fastapi import FastAPI
from test_metrics import step

from fastdecode import SamplingParams
from fastdecode.api.outputs import RequestOutput
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.opening import open_engine
from fastdecode.observe.totals import PoolTotals, Standing
from fastdecode.server import dashboard
from fastdecode.server.dashboard import dashboard_router
from fastdecode.server.history import KEPT_S, History
from fastdecode.server.service import Health, Service

PAGE = Path(dashboard.__file__).with_name("dashboard.html").read_text()


class Clock:
    now = 1000.25

    def __call__(self) -> float:
        return self.now


def served(capacity: list[int], health: Health) -> Any:
    standing = Standing(3, 1, tuple(capacity), 0, sum(capacity), PoolTotals())
    return SimpleNamespace(standing=standing, health=lambda: health)


def get(history: History, path: str) -> httpx.Response:
    async def run() -> httpx.Response:
        app = FastAPI()
        app.include_router(dashboard_router(history))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get(path)

    return asyncio.run(run())


def test_seconds() -> None:
    clock = Clock()
    history = History("tiny", clock)
    assert history.told(60)["state"] == "loading" and len(history.told(60)["seconds"]) == 10
    history.begin(served([64, 0], Health("degraded", ["R-worker 1"])))
    history.on_step(step(0, seconds=0.2, num_decodes=0, num_prompt_tokens=7, num_sampled=2, attention_s=(0.1, None)))
    history.on_step(
        step(1, seconds=0.4, num_waiting=5, device_kv_tokens=3, num_sampled=3, wait_s=0.15, attention_s=(0.2, None))
    )
    history.on_finished(RequestOutput("0", None, [1], []))
    clock.now += 2
    history.on_step(step(2, seconds=0.1, num_sampled=1, kv_tokens=(9,), attention_s=(0.3,)))  # of a broken one, too
    assert [row["new_tokens"] for row in history.told(60)["seconds"]] == [*[0] * 8, 5, 0]  # the last one is not over
    clock.now += 1
    told = history.told(60)
    assert (told["state"], told["lost"], told["capacity"], told["running"]) == ("degraded", ["R-worker 1"], [64, 0], 3)
    first, idle, last = told["seconds"][-3:]
    assert first == {
        "load": 8, "step_ms": pytest.approx(300), "longest_step_ms": 400, "running": 1, "waiting": 5, "new_tokens": 5,
        "prompt_tokens": 7, "ended": 1, "device_kv": 3, "kv": [8, 0], "s_idle": pytest.approx(0.25),
        "r_idle": [pytest.approx(0.5), None],
    }  # fmt: skip
    assert idle["step_ms"] is None and idle["load"] == idle["running"] == 0 and idle["r_idle"] == [None, None]
    assert last["kv"] == [9, 0] and last["r_idle"] == [0, None] and last["s_idle"] == 0


def test_the_ring_is_bounded() -> None:
    clock = Clock()
    history = History("tiny", clock)
    for number in range(2 * KEPT_S):
        history.on_step(step(number))
        clock.now += 1
    assert len(history._seconds) == KEPT_S == len(history.told(10**6)["seconds"])
    assert len(history.told(60)["seconds"]) == 60 and all(row["step_ms"] for row in history.told(60)["seconds"])


def test_page_and_policy() -> None:
    history = History("secret-name")
    page = get(history, "/dashboard")
    assert page.text == PAGE and "secret-name" not in page.text and page.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", PAGE, re.DOTALL)
        assert policy[f"{kind}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    # Nothing from elsewhere, nothing that the policy would refuse, no markup made of data.
    assert not re.findall(
        r"""(?:src|href|action)=|https?://(?!www\.w3\.org/2000/svg)|\bon\w+="|\bstyle="|innerHTML""", PAGE
    )


def test_data(llama: Case) -> None:
    history = History("tiny")
    assert get(history, "/dashboard/data").json()["state"] == "loading"
    assert get(history, "/dashboard/data?seconds=5").status_code == 422
    options = {"num_r_workers": 2, "device_kv_memory": 768 * 256, "skip_tokenizer_init": True}
    opened = open_engine(EngineConfig.from_options({"model": llama.directory, **options}), on_step=history.on_step)

    async def run() -> int:
        service = Service(opened, max_queue=100, on_finished=history.on_finished)
        service.start()
        history.begin(service)
        params = SamplingParams(temperature=0, max_tokens=32)
        streams = [await service.submit(prompt, params) for prompt in llama.prompts]
        outputs = [await stream.output() for stream in streams]
        await asyncio.sleep(1.05)  # a second is told when it is over
        told = history.told(60)
        assert told["state"] == "ready" and told["capacity"] == opened.engine.kv_capacity_tokens
        assert told["device_capacity"] == 256
        await service.drain(10)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    try:
        num_new = asyncio.run(run())
        answer = get(history, "/dashboard/data?seconds=900")
        assert answer.headers["cache-control"] == "no-store"
        rows = answer.json()["seconds"]
        assert sum(row["new_tokens"] for row in rows) == num_new
        assert sum(row["prompt_tokens"] for row in rows) == sum(map(len, llama.prompts))
        assert sum(row["ended"] for row in rows) == len(llama.prompts)
        assert max(row["load"] for row in rows) > 0 and max(row["device_kv"] for row in rows) > 0
        assert all(len(row["kv"]) == 2 for row in rows)
        assert answer.json()["state"] == "draining"
    finally:
        opened.close()
