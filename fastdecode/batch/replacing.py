"""A file of the user's is written anew: whole or not at all, under its own name, and nothing else is touched."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole and on the disk, and is gone if it does not get so far.

    A link stays a link; mode and owner stay, the owner as far as this user may give files away.  Until then the file
    has a name that nobody else's has.
    """
    target = Path(os.path.realpath(path))
    fresh = target.with_name(f".fastdecode-{secrets.token_hex(8)}")
    try:
        with fresh.open("xb") as file:
            _take_after(target, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


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
