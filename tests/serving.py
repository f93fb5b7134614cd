"""Servers for tests: as a process, like a user's, and in the event loop of a test, with its engine within reach."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from unittest import mock

import httpx

from cpu_attention.kvstore import KVStore
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.opening import open_engine
from fastdecode.server.app import create_app
from fastdecode.server.connection import HTTPServer, bind
from fastdecode.server.life import Life
from fastdecode.server.options import ServerOptions
from fastdecode.server.service import Service

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}#{% endif %}"
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def with_chat_template(model: Path, directory: Path) -> Path:
    """A copy of a model whose tokenizer has a chat template."""
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return directory


class ServerProcess:
    """``fastdecode serve`` on a free port, and what it says on standard error."""

    def __init__(
        self, *arguments: object, launcher: Sequence[str] = (), port: int = 0, env: dict[str, str] | None = None
    ) -> None:
        command = [*launcher, sys.executable, "-m", "fastdecode", "serve", *map(str, arguments), "--port", str(port)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, text: str, timeout: float = 100) -> str:
        """The line with it."""
        deadline = time.monotonic() + timeout
        while True:
            line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            assert line is not None, f"ended without saying {text!r}:\n{self.said}"
            self.said += line
            if text in line:
                return line

    def ready(self) -> Self:
        self.url = self.wait_for("listening on").split("listening on ")[1].strip()
        return self

    def ended(self, timeout: float = 60) -> int:
        code = self.process.wait(timeout)
        self._reader.join(10)
        while (line := self._lines.get(timeout=10)) is not None:
            self.said += line
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10)
        assert self.process.stderr
        self.process.stderr.close()


class Live:
    """A server in this event loop."""

    def __init__(self, service: Service, stores: list[KVStore], http: HTTPServer, port: int) -> None:
        """stores: of R-workers, which are threads here."""
        self.service, self.stores, self.http, self.port = service, stores, http, port
        self.url = f"http://127.0.0.1:{port}"

    async def connect(self, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=limit)

    async def post(self, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(self.url + path, json=body)

    async def idle(self, timeout: float = 20) -> None:
        """Nothing runs, nothing waits, and no KV is held but what is kept for others, by the scheduler's account and
        the R-workers'."""
        deadline = time.monotonic() + timeout
        while not self._is_idle() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.service._engine._scheduler.check_integrity()
        assert self.service.num_running == 0 and self.service.num_waiting == 0 and self.service._num_inside == 0
        assert self._is_kept()
        assert not self.service._live and not self.service._engine._requests.sequences

    def _is_idle(self) -> bool:
        return self._is_kept() and not self.service._num_inside and not self.service._engine.has_work

    def _is_kept(self) -> bool:
        """By R-workers, in whatever order they came up."""
        kept = [self.service._engine._scheduler.kept(worker) for worker in range(len(self.stores))]
        return sorted(map(sorted, kept)) == sorted(sorted(store.seq_ids) for store in self.stores)


@asynccontextmanager
async def live_server(model: Path, engine: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Live]:
    config = EngineConfig.from_options({"model": model, "num_r_workers": 2, **(engine or {})})
    stores: list[KVStore] = []
    init = KVStore.__init__

    def noted(self: KVStore, *args: Any) -> None:
        init(self, *args)
        stores.append(self)

    with mock.patch.object(KVStore, "__init__", noted):
        opened = await asyncio.to_thread(open_engine, config)
    assert len(stores) == config.num_r_workers
    made = ServerOptions(served_model_name=("demo",), **options)
    life = Life(str(model), made.served_model_name)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    http = HTTPServer(create_app(life, made), made)
    serving = asyncio.create_task(http.serve([listener]))
    try:
        service = Service(opened, max_queue=made.max_queue)
        service.start()
        life.begin(service)
        while not http.started:
            await asyncio.sleep(0.01)
        yield Live(service, stores, http, port)
        await service.drain(10)
    finally:
        http.should_exit = True
        await serving
        opened.close()
