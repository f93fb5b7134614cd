"""The input as bytes of UTF-8, whatever it comes as: a file, a pipe, compressed, with a byte order mark.

Two passes read it.  So a pipe is kept, as it comes, in a file without a name beside the output: the disk has it back
when the run ends, however it ends.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastdecode.errors import ConfigError

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_FOREIGN = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet"}
_WIDE_MARKS = {  # the longer one first
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_UTF8_MARK = b"\xef\xbb\xbf"


@contextmanager
def kept(path: Path, beside: Path) -> Iterator[Path]:
    """A path that can be opened again and again: this one, or of a copy of what comes through it.

    beside: the output.  Raises ConfigError.
    """
    try:
        if path.exists() and not stat.S_ISFIFO(mode := path.stat().st_mode) and not stat.S_ISCHR(mode):
            yield path
            return
        source = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error}") from error
    with source, _nameless(beside) as copy:
        try:
            shutil.copyfileobj(source, copy)
            copy.flush()
        except OSError as error:
            raise ConfigError(f"cannot keep the input, which is a pipe, beside {beside}: {error}") from error
        yield Path(f"/proc/self/fd/{copy.fileno()}")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Raises ConfigError for what is no UTF-8, and OSError."""
    with path.open("rb") as file:
        head = file.read(8)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    name = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)
    if name:
        raise ConfigError(f"the input is {name}: unpack it, into a file or a pipe like <(zstdcat IN)")
    try:
        with path.open("rb") if opener is None else opener(path, "rb") as file:
            _skip_mark(file)
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ConfigError(f"the input is packed, and damaged or cut off: {error}") from error


def _skip_mark(file: Any) -> None:
    """Raises ConfigError for wider characters, which show by their mark or by every other byte."""
    head = file.read(4)
    name = next((name for mark, name in _WIDE_MARKS.items() if head.startswith(mark)), None)
    if name or (len(head) > 1 and 0 in head[:2]):
        name = name or "UTF-16"
        raise ConfigError(f"the input is {name}; this reads UTF-8: iconv -f {name} -t UTF-8 IN > OUT makes it so")
    file.seek(len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0)


@contextmanager
def _nameless(beside: Path) -> Iterator[Any]:
    try:
        copy = tempfile.TemporaryFile(dir=beside.parent)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot keep the input, which is a pipe, beside {beside}: {error}") from error
    with copy:
        yield copy
