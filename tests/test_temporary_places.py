"""Sockets of R-workers find a place: a job's temporary directory is often too long for one, or full, or not there."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fastdecode.errors import ConfigError
from fastdecode.holders import directory
from fastdecode.holders.directory import SocketDirectory
from fastdecode.holders.launch import start_r_workers
from transport import MAX_PATH_BYTES, Ping, Pong


@pytest.mark.parametrize("transport", ["shm", "ipc"])
def test_a_long_temporary_directory(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 50) / ("y" * 50)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    workers = start_r_workers(transport=transport, num_workers=1, threads_each=1, kv_cache_bytes_each=1 << 20)
    try:
        channel = workers.handles[0].channel
        channel.send(Ping(7), timeout_s=20)
        assert channel.recv(timeout_s=20) == Pong(7)
    finally:
        workers.close()
    assert not list(long.iterdir())


def test_the_longest_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the byte, and with the longest name of a socket in it."""
    monkeypatch.setattr(directory, "_OTHER_PLACES", ())
    for num_bytes in range(60, 110):
        place = "/" + "é" * (num_bytes // 2) + "x" * (num_bytes % 2)
        monkeypatch.setattr(tempfile, "tempdir", place)
        path = f"{place}/fastdecode-r-12345678/{10**7}"
        assert bool(directory._places()) == (len(path.encode()) <= MAX_PATH_BYTES), num_bytes


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EDQUOT])
def test_a_place_that_takes_nothing_is_passed_over(cause: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tempfile.mkdtemp

    def refuse(dir: str, **named: Any) -> str:
        if dir == "/first":
            raise OSError(cause, os.strerror(cause))
        return make(dir=dir, **named)

    monkeypatch.setattr(tempfile, "tempdir", "/first")
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(directory, "_OTHER_PLACES", (tempfile.gettempdir(), "/tmp"))
    made = SocketDirectory()
    assert made.path.is_dir() and made.path.parent == Path("/tmp")
    made.close()
    monkeypatch.setattr(directory, "_OTHER_PLACES", ())
    with pytest.raises(ConfigError, match=rf"/first \({os.strerror(cause)}\).*TMPDIR"):
        SocketDirectory()
