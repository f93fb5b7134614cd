"""A server of the demonstration's model in a process of its own, for benchmarks that ask it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "scripts" / "demo_model"


class Server:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def own(self) -> psutil.Process:
        """The process that serves: under mpirun a child."""
        found = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return next(p for p in found if p.cmdline()[1:4] == ["-m", "fastdecode", "serve"])

    def rss_mib(self) -> float:
        return self.own().memory_info().rss / 2**20

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = httpx.get(self.url + "/metrics", timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def held(self) -> float:
        return self.metric("fastdecode:kv_load_tokens") + self.metric("vllm:num_requests_running")


@contextmanager
def serving(*flags: str, launcher: tuple[str, ...] = ()) -> Iterator[Server]:
    command = [*launcher, sys.executable, "-m", "fastdecode", "serve", str(MODEL), "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        line = next(line for line in process.stderr if "listening on " in line)
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield Server(process, line.split("listening on ")[1].strip())
        Server(process, "").own().send_signal(signal.SIGTERM)
        process.wait(60)
        drain.wait(10)
    finally:
        process.kill()
        process.wait()
