"""The directory where R-workers of this machine have their sockets, and what killed runs left of theirs.

made ─► locked by who made it ─► close(): removed
                │ killed: the lock is free ─► removed by whoever makes one next
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
import weakref
from pathlib import Path

from fastdecode.errors import ConfigError
from transport import MAX_PATH_BYTES, let_go_in_children

# Beside the temporary directory, which may be full, not writable, or too long for a socket's path: a job's often is.
_OTHER_PLACES = ("/tmp", "/var/tmp", "/dev/shm", f"/run/user/{os.geteuid()}")
_SOCKET_BYTES = 8  # of a socket's name in its directory
_PREFIX = "fastdecode-r-"
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # as `tempfile` makes them


_own: weakref.WeakSet[SocketDirectory] = weakref.WeakSet()


class SocketDirectory:
    """For this user alone.  `path` is a name in it away from any other's."""

    def __init__(self) -> None:
        """Raises ConfigError if there is no place for temporary files."""
        remove_leftovers()
        self.path, lock = _make()
        self._lock: int | None = lock  # None: not, or no more, this process's
        _own.add(self)
        let_go_in_children(self)

    def close(self) -> None:
        """Not by a forked child."""
        if self._lock is not None:
            _remove(self.path)
            self.let_go()

    def let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_own() -> None:
    """All that this process has, which ends without closing them."""
    for directory in list(_own):
        directory.close()


def remove_leftovers() -> None:
    """Directories of this user's killed runs, which nobody locks any more."""
    for place in _places():
        try:
            entries = list(os.scandir(place))
        except OSError:
            continue
        _remove_leftovers_of(entries)


def _remove_leftovers_of(entries: list[os.DirEntry[str]]) -> None:
    for entry in entries:
        if not _NAME.fullmatch(entry.name):
            continue
        try:
            lock = _open(entry.path)
        except OSError:  # gone meanwhile, or no directory, or another user's
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(Path(entry.path))
        except OSError:  # in use, or on a file system without locks
            pass
        finally:
            os.close(lock)


def _places() -> list[str]:
    """Where sockets' paths are short enough, in the order in which they are tried."""
    try:
        usual = [tempfile.gettempdir()]
    except OSError:  # none that can be written
        usual = []
    longest = MAX_PATH_BYTES - len(f"/{_PREFIX}12345678/") - _SOCKET_BYTES
    places = dict.fromkeys(os.path.abspath(place) for place in (*usual, *_OTHER_PLACES))
    return [place for place in places if len(os.fsencode(place)) <= longest]


def _make() -> tuple[Path, int]:
    """The directory, and a file descriptor that holds its lock.  Raises ConfigError."""
    refused = []
    for place in _places():
        try:
            return _make_in(place)
        except OSError as error:
            refused.append(f"{place} ({error.strerror or error})")
    raise ConfigError(
        f"there is no place for the sockets of R-workers in {', '.join(refused)}: set TMPDIR to a directory that this "
        f"user can write, with a path of at most {MAX_PATH_BYTES - len(_PREFIX) - _SOCKET_BYTES - 10} bytes, or take "
        "transport tcp or inproc"
    )


def _make_in(place: str) -> tuple[Path, int]:
    """Raises OSError."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        lock = _open(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: it is never taken for a leftover there
            return path, lock
        try:
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return path, lock
        except FileNotFoundError:  # taken for a leftover before it was locked
            pass
        os.close(lock)


def _open(path: str | Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove(path: Path) -> None:
    """With the sockets in it; anything else in it is not ours, and stays."""
    try:
        for entry in list(os.scandir(path)):
            if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                Path(entry.path).unlink(missing_ok=True)
        path.rmdir()
    except OSError:
        pass
