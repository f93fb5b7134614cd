"""A server's process from its first answer to its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import ROOT, ServerProcess, free_port

from fastdecode.engine.opening import OpenEngine
from fastdecode.observe.step_log import StepRecord
from fastdecode.server.activity import Activity
from fastdecode.server.run import _load

LONG = {"prompt": "def f(x):", "max_tokens": 700, "ignore_eos": True, "temperature": 1.0, "seed": 4}


class Asking(threading.Thread):
    """A streamed request on its way."""

    def __init__(self, server: ServerProcess, **more: Any) -> None:
        super().__init__(daemon=True)
        self._url, self._body = server.url + "/v1/completions", {**LONG, **more, "stream": True}
        self.events: list[Any] = []
        self.has_begun, self.is_cut_off = threading.Event(), False
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=100) as answer:
                for line in filter(None, answer.iter_lines()):
                    self.events.append(line.removeprefix("data: "))
                    self.has_begun.set()
        except httpx.RemoteProtocolError:
            self.is_cut_off = True

    def begun(self) -> Asking:
        assert self.has_begun.wait(60)
        return self

    def text(self) -> str:
        self.join(100)
        assert self.events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in self.events)


def test_from_loading_to_drained(demo_model: Path) -> None:
    """503 while it loads; after SIGTERM what runs ends, what comes is refused, and the exit code is 0."""
    port = free_port()
    with ServerProcess(demo_model, port=port) as server:
        server.wait_for("loading ")
        url = f"http://127.0.0.1:{port}"
        health = httpx.get(url + "/health")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert health.json()["error"]["message"] == "Loading model" and health.headers["retry-after"]
        for answer in (httpx.get(url + "/v1/models"), httpx.post(url + "/v1/completions", json=LONG)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert httpx.get(url + "/version").status_code == 200
        assert server.ready().url == url
        assert httpx.get(url + "/health").json()["status"] == "ok"
        alone = Asking(server).text()

        running = Asking(server).begun()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM")
        health = httpx.get(url + "/health")
        assert health.status_code == 503 and health.json()["status"] == "draining"
        refused = httpx.post(url + "/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert running.text() == alone
        assert server.ended() == 0 and "Traceback" not in server.said
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")


def test_what_takes_too_long_to_drain(demo_model: Path) -> None:
    """It is told, and the exit code is still 0: the end was asked for."""
    with ServerProcess(demo_model, "--shutdown-timeout", 0.3) as server:
        running = Asking(server.ready(), n=30).begun()
        server.process.send_signal(signal.SIGINT)
        assert server.ended(20) == 0
        running.join(20)
        assert json.loads(running.events[-1])["error"]["code"] == "cancelled"


def test_a_second_signal(demo_model: Path) -> None:
    with ServerProcess(demo_model, "--transport", "shm") as server:
        running = Asking(server.ready(), n=30).begun()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM")
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(10) == 143
        running.join(10)
        assert running.is_cut_off and "[DONE]" not in running.events
        (r_worker,) = r_workers(server)
        wait_until_gone(r_worker)


def r_workers(server: ServerProcess) -> list[int]:
    return [int(process) for process in re.findall(r"R-worker \d+ .* process (\d+):", server.said)]


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline, f"process {process} is still there"
        time.sleep(0.05)


def test_the_engine_dies(demo_model: Path) -> None:
    """One R-worker lost costs nothing; none comes back: whoever waits is told, and the exit code is 1."""
    with ServerProcess(demo_model, "--transport", "shm", "--num-r-workers", 2) as server:
        alone = Asking(server.ready()).text()
        first, _ = r_workers(server)
        running = Asking(server).begun()
        os.kill(first, signal.SIGKILL)
        assert running.text() == alone

    with ServerProcess(demo_model, "--transport", "shm", "--worker-timeout", 3) as server:
        running = Asking(server.ready(), n=8).begun()
        began = time.monotonic()
        while server.process.poll() is None and time.monotonic() - began < 30:
            for child in psutil.Process(server.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            time.sleep(0.02)
        assert server.ended(1) == 1 and time.monotonic() - began < 20
        running.join(20)
        assert json.loads(running.events[-1])["error"]["code"] == "engine_dead"
        assert "error: R-worker 0" in server.said


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nowhere"], "error: nowhere is no directory"),
        (["MODEL", "--max-body", "3 potatoes"], "error: max_body: '3 potatoes' is no amount"),
        (["MODEL", "--max-queue", "0"], "error: max_queue must be from 1 to"),
        (["MODEL", "--api-key", ""], "error: api_key: an empty one would let everybody in"),
        (["MODEL", "--host", "no.such.host.invalid"], "error: cannot listen on no.such.host.invalid"),
        (["MODEL", "--kv-cache-memory", "1KiB"], "raise kv_cache_memory"),
        (["MODEL", "--cors-origins", "https://a.example/"], "error: cors_origins: 'https://a.example/' is no origin"),
        (["MODEL", "--root-path", "llm"], "error: root_path begins with a slash"),
    ],
)
def test_what_cannot_start_says_so(arguments: list[str], text: str, demo_model: Path) -> None:
    with ServerProcess(*[demo_model if argument == "MODEL" else argument for argument in arguments]) as server:
        assert server.ended() == 2
        assert text in server.said and "Traceback" not in server.said


def test_a_port_that_is_taken(demo_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServerProcess(demo_model, port=port) as server:
            assert server.ended() == 2 and f"error: cannot listen on 127.0.0.1:{port}" in server.said


def test_the_key_from_the_environment_and_a_signal_while_loading(demo_model: Path) -> None:
    with ServerProcess(demo_model, env={"FASTDECODE__API_KEY": "sesame"}) as server:
        url = server.wait_for("loading ").split("; ")[1].split()[0]
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(10) == 0


def test_flags_from_a_file(demo_model: Path, tmp_path: Path) -> None:
    """The model, too; the command line (here the port) goes first."""
    (tmp_path / "serve.yaml").write_text(
        f"model: {demo_model}\nport: 1\napi-key: [sesame, open]\nserved-model-name: [demo]\nmax-body: 1KiB\n"
    )
    with ServerProcess("--config", tmp_path / "serve.yaml") as server:
        server.ready()
        for key, status in (("sesame", 200), ("open", 200), ("x", 401)):
            asked = {"Authorization": f"Bearer {key}"}
            assert httpx.get(server.url + "/v1/models", headers=asked).status_code == status
        large = {"prompt": "x" * 2000}
        asked = {"Authorization": "Bearer open"}
        assert httpx.post(server.url + "/v1/completions", json=large, headers=asked).status_code == 413


def test_without_the_extra(demo_model: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        f"from fastdecode.cli import main\nsys.exit(main(['serve', {str(demo_model)!r}]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 2 and "pip install 'fastdecode[server]'" in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize("error", [ValueError("no"), StopIteration("no more"), SystemExit(3)], ids=repr)
def test_loading_that_fails_in_any_way_is_told(error: BaseException) -> None:
    def load() -> OpenEngine:
        raise error

    async def run() -> None:
        await asyncio.wait_for(_load(load, asyncio.Event()), 60)

    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error), match="no|3"):
        asyncio.run(run())


def test_the_line_of_activity() -> None:
    """First tokens count, too, which their prompts' steps bring."""
    activity = Activity()
    assert activity.line(10) is None
    for number in range(2):
        record = StepRecord(
            number=number, begin_s=0, seconds=1, num_decodes=30, num_prompt_tokens=100, num_running=31,
            num_waiting=4, num_preempted=0, kv_tokens=(100, 150), num_sampled=31 - number,
        )  # fmt: skip
        activity.on_step(record)
    activity._capacity_tokens = 1000
    assert activity.line(10) == (
        "31 running, 4 waiting, 20.0 prompt tokens/s, 6.1 generation tokens/s, KV 25.0 % of 1000 tokens"
    )
    assert activity.line(10) is None


def test_mpirun(mpirun: list[str], demo_model: Path) -> None:
    """Rank 0 serves, the others are its R-workers; a signal to rank 0 ends the job in order."""
    arguments = [demo_model, "--transport", "mpi", "--kv-cache-memory", "64MiB", "--shutdown-timeout", "120"]
    with ServerProcess(*arguments, launcher=[*mpirun, "-n", "3"]) as server:
        server.ready()
        answer = httpx.post(server.url + "/v1/completions", json={**LONG, "max_tokens": 20}, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 20
        assert server.said.count(" of float32 KV") == 2
        running = Asking(server).begun()
        rank_0 = next(
            int(line.split()[3]) for line in server.said.splitlines() if line.split()[:2] == ["0", "S-worker"]
        )
        os.kill(rank_0, signal.SIGTERM)
        running.text()
        assert server.ended(60) == 0, server.said
