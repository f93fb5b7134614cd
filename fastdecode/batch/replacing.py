"""A file of the user's is written anew: whole or not at all, under its own name, and nothing else is touched."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TOKEN_BYTES = 8
_MOST_OF_A_NAME = 50  # characters, of up to four bytes each; a name may have 255 bytes


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole and on the disk, and is gone if it does not get so far.

    A link stays a link; mode and owner stay, the owner as far as this user may give files away.  Until then the file
    has a name that nobody else's has.
    """
    target = Path(os.path.realpath(path))
    fresh = target.with_name(_prefix(target) + secrets.token_hex(_TOKEN_BYTES))
    file = fresh.open("xb")
    try:
        with file:
            _take_after(target, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Of `replacing` this path in processes that were killed; for who knows that nobody else does it now."""
    target = Path(os.path.realpath(path))
    pattern = re.compile(re.escape(_prefix(target)) + rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
    for name in filter(pattern.fullmatch, os.listdir(target.parent)):
        target.with_name(name).unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name[:_MOST_OF_A_NAME]}.fastdecode-"


def _take_after(old: Path, fd: int) -> None:
    try:
        theirs = old.stat()
    except FileNotFoundError:
        return
    ours = os.fstat(fd)
    if (ours.st_uid, ours.st_gid) != (theirs.st_uid, theirs.st_gid):
        with suppress(OSError):  # only root may
            os.fchown(fd, theirs.st_uid, theirs.st_gid)
    with suppress(OSError):  # file systems without modes
        os.fchmod(fd, theirs.st_mode & 0o7777)
