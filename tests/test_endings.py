"""Whatever was begun ends, however the program ends, and forked children hold nothing of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastdecode.r_workers.directory import SocketDirectory, remove_leftovers

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "kinds, transports",
    [
        (["garbage in a cycle", "sys.exit in the middle", "SIGKILL"], ["inproc", "ipc", "shm"]),
        pytest.param(["garbage in a thread", "script ends", "SIGTERM"], ["shm", "tcp"], marks=pytest.mark.slow),
    ],
    ids=["some", "others"],
)
def test_nothing_is_left_however_it_ends(kinds: list[str], transports: list[str]) -> None:
    """While a child that was forked from the process lives on, after it has tried to use the LLM and to close it."""
    command = [sys.executable, "bench/endings.py", "--kinds", *kinds, "--each", "1", "--transports", *transports]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stdout + out.stderr[-2000:]
    assert out.stdout.count("left: 0") == len(kinds)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _crash() -> Path:
    """A directory as a killed process leaves it."""
    directory = SocketDirectory()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(directory.path / "0"))
    directory.let_go()
    return directory.path


def test_what_a_killed_run_left_is_gone_at_the_next_start(place: Path) -> None:
    lives, left = SocketDirectory(), _crash()
    assert left.is_dir()
    directory = SocketDirectory()
    assert set(place.iterdir()) == {lives.path, directory.path}
    lives.close()
    lives.close()
    directory.close()
    assert list(place.iterdir()) == []


def test_what_is_not_ours_stays(place: Path) -> None:
    """A directory of the user's that looks alike, one with files in it, a link, a file."""
    kept = [place / name for name in ("fastdecode-models", "fastdecode-r-mine", "fastdecode-r-12345678")]
    for path in kept:
        path.mkdir()
        (path / "weights").write_text("w")
    (place / "fastdecode-r-abcdefgh").symlink_to(kept[0])
    (place / "fastdecode-r-aaaaaaaa").write_text("")
    before = sorted(path for path in place.rglob("*"))
    remove_leftovers()
    assert sorted(path for path in place.rglob("*")) == before


def test_a_forked_child_removes_and_locks_nothing(place: Path) -> None:
    directory = SocketDirectory()
    ready, tell = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if not child:
        directory.close()
        os.write(tell, b"1")
        os.close(end)
        os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    assert directory.path.is_dir()
    remove_leftovers()
    assert directory.path.is_dir(), "its lock is held by this process"
    directory.let_go()
    remove_leftovers()
    assert not directory.path.exists(), "and by this one alone"
    for descriptor in (end, wait, ready, tell):
        os.close(descriptor)
    assert os.waitpid(child, 0)[1] == 0
