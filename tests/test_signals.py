"""Each command ends in order by the signals that end programs: what it began has ended, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fastdecode.signals import StoppedBySignal, handled, run_program, taken_over, unhandled

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "scripts" / "demo_model"
SMALL = ["--kv-cache-memory", "32MiB", "--linear-kernel", "plain", "--transport", "shm", "--r-worker-threads", "1"]
LONG = ["--input-len", "8", "--output-len", "900"]
ENDS_S = 100.0


GENERATE = ["generate", "MODEL", "--prompts-file", "PROMPTS", "--max-tokens", "900", "--ignore-eos", *SMALL]
# Each with the signal that is tried always, if one is; the others are among the slow ones.
COMMANDS = [
    (GENERATE, signal.SIGTERM),
    (["run-batch", "-i", "BATCH", "-o", "OUT", "--model", "MODEL", *SMALL], signal.SIGHUP),
    (["serve", "MODEL", "--port", "0", *SMALL], signal.SIGHUP),
    (["calibrate", "MODEL", "-o", "OUT", "--kv-cache-memory", "32MiB", "--transport", "shm"], None),
    (["simulate", "--requests", "20000"], signal.SIGTERM),
    (["bench", "throughput", "MODEL", "--backend", "fastdecode", "hf", *LONG, *SMALL], signal.SIGTERM),
    (["bench", "latency", "MODEL", *LONG, *SMALL], None),
    (["bench", "serve", "--base-url", "SERVER", "--model", "MODEL", "--num-warmups", "0", *LONG], signal.SIGTERM),
    (["bench", "transport", "--scheme", "shm", "--tokens", *["64"] * 99], signal.SIGHUP),
    (["bench", "sweep", "SWEEP", "-o", "OUT"], None),
]
BOTH = (signal.SIGTERM, signal.SIGHUP)
CASES = [
    pytest.param(
        command, ending, marks=[] if ending == always else [pytest.mark.slow],
        id="-".join([*(word for word in command[:2] if word.islower()), ending.name]),
    )
    for command, always in COMMANDS for ending in BOTH
]  # fmt: skip


@pytest.fixture
def files() -> Iterator[dict[str, str]]:
    """What the commands' words stand for, and a temporary directory for them, with a path that is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name, socket.create_server(("127.0.0.1", 0)) as silent:
        place = Path(name)
        (place / "tmp").mkdir()
        (place / "prompts").write_text("import\n" * 40)
        line = '{{"custom_id": "{}", "method": "POST", "url": "/v1/completions", "body": {}}}\n'
        body = '{"prompt": "x", "max_tokens": 900, "ignore_eos": true}'
        (place / "batch").write_text("".join(line.format(number, body) for number in range(200)))
        flags = "{kv-cache-memory: 32MiB, transport: shm, input-len: 8, output-len: 900}"
        (place / "sweep").write_text(
            f"command: latency\nmodel: {MODEL}\nflags: {flags}\ngrid: {{batch-size: [4, 8]}}\n"
        )
        yield {
            "MODEL": str(MODEL), "PROMPTS": str(place / "prompts"), "BATCH": str(place / "batch"),
            "SWEEP": str(place / "sweep"), "OUT": str(place / "out"), "TMP": str(place / "tmp"),
            "SERVER": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }  # fmt: skip


def shared_memory() -> set[str]:
    """Names in it, but for those of Open MPI's jobs, which other tests run meanwhile."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sm_segment")}


@pytest.mark.parametrize("command, ending", CASES)
def test_it_ends_in_order(command: list[str], ending: signal.Signals, files: dict[str, str]) -> None:
    shared = shared_memory()
    process = begin(command, files)
    wait(lambda: process.poll() is not None or is_in_the_middle(command, process), 100)
    assert process.poll() is None, process.communicate()
    begun = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(ending)
    _, said = process.communicate(timeout=ENDS_S)
    assert process.returncode == (0 if command[0] == "serve" else 128 + ending), said
    assert "Traceback" not in said and "Exception" not in said, said
    wait(lambda: not any(map(psutil.pid_exists, begun)), 10)
    assert not [pid for pid in begun if psutil.pid_exists(pid)], said
    assert not os.listdir(files["TMP"]) and not shared_memory() - shared, said


@pytest.mark.parametrize("ending", BOTH, ids=lambda part: part.name)
def test_while_it_begins(ending: signal.Signals, files: dict[str, str]) -> None:
    """As soon as it minds signals at all, in the middle of imports."""
    process = begin(["generate", "MODEL", "--prompt", "x", *SMALL], files)
    wait(lambda: ending in caught(process.pid), 30)
    process.send_signal(ending)
    _, said = process.communicate(timeout=ENDS_S)
    assert process.returncode == 128 + ending and said == f"interrupted by {ending.name}\n"


@pytest.mark.parametrize("command", ["generate", pytest.param("serve", marks=pytest.mark.slow)])
def test_under_nohup(command: str, files: dict[str, str]) -> None:
    """A terminal that goes does not end it."""
    rest = ["--prompt", "x", "--max-tokens", "2"] if command == "generate" else ["--port", "0"]
    process = begin([command, "MODEL", *rest, *SMALL], files, launcher=["nohup"])
    wait(lambda: signal.SIGTERM in caught(process.pid), 30)
    process.send_signal(signal.SIGHUP)
    wait(lambda: len(psutil.Process(process.pid).children()) > 0, 60)
    process.send_signal(signal.SIGHUP)
    if command == "serve":
        assert process.stderr is not None
        assert any(b"listening on" in line for line in process.stderr.buffer)  # type: ignore[attr-defined]
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=ENDS_S)
    assert process.returncode == 0, said


def test_a_server_that_is_left_while_it_loads(files: dict[str, str]) -> None:
    """It ends at once, as what it has begun does, and its directory goes."""
    process = begin(["serve", "MODEL", "--port", "0", *SMALL], files)
    wait(lambda: any(name.startswith("fastdecode-r-") for name in os.listdir(files["TMP"])), 60)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=ENDS_S)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert not os.listdir(files["TMP"]), said


def test_more_of_them_in_a_row(files: dict[str, str]) -> None:
    """One in the clean-up of the one before."""
    process = begin(GENERATE, files)
    wait(lambda: is_in_the_middle(GENERATE, process), 100)
    begun = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.003)
    _, said = process.communicate(timeout=ENDS_S)
    assert process.returncode == 143 and "Traceback" not in said and "Exception" not in said, said
    wait(lambda: not any(map(psutil.pid_exists, begun)), 10)
    assert not os.listdir(files["TMP"]), said


class Swallows:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def swallow() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        pass


@pytest.mark.parametrize("kind", [Swallows, swallow])
def test_one_that_is_swallowed(kind: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    """Where Python lets no exception out, and by code that catches everything; many times, for the one that comes once
    more may come just before the main thread goes to sleep, whom it does not wake then.
    """
    slept = []

    def action() -> int:
        kind()
        time.sleep(5)
        slept.append(True)
        return 0

    for _ in range(100):
        assert run_program(action, is_last=False) == 143 and not slept
        assert capsys.readouterr().err == "interrupted by SIGTERM\n"


def test_what_unwinds_and_what_is_left_alone() -> None:
    def action() -> int:
        with unhandled():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            with handled(), pytest.raises(StoppedBySignal, match="SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        with taken_over() as numbers:
            assert set(numbers) == {signal.SIGINT, signal.SIGTERM}
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_program(action, is_last=False) == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def begin(command: list[str], files: dict[str, str], launcher: list[str] | None = None) -> subprocess.Popen[str]:
    words = [files.get(word, word) for word in command]
    return subprocess.Popen(
        [*(launcher or []), sys.executable, "-m", "fastdecode", *words],
        cwd=ROOT, env=os.environ | {"TMPDIR": files["TMP"]}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def is_in_the_middle(command: list[str], process: subprocess.Popen[str]) -> bool:
    """It has begun what it has to end: R-workers, another engine, or else much work of its own."""
    running = psutil.Process(process.pid)
    if command[:2] == ["bench", "serve"]:
        return any(one.status == psutil.CONN_ESTABLISHED for one in running.net_connections())
    if command[0] == "simulate":
        return signal.SIGTERM in caught(process.pid) and running.cpu_times().user > 1.0
    started_last = {"throughput": "peers.py", "transport": "wire"}.get(command[1], "cpu_attention")
    return any(is_used(child, started_last) for child in running.children(recursive=True))


def is_used(child: psutil.Process, name: str) -> bool:
    try:
        return any(name in word for word in child.cmdline()) and child.cpu_times().user > 0.5
    except psutil.Error:
        return False


def caught(pid: int) -> set[int]:
    """Signals for which the process has handlers."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def wait(is_done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.02)
