"""A first pass over the input: is it whole, how long is it, which file is it.

What stays in memory is eight bytes per line, a hash of its custom_id: enough to find ids that come twice, and on
resume the lines that are done.  (Two of ten million ids share a hash once in 400 000 files.)
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdecode.errors import ConfigError

MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Line:
    """A line of the input.  error: why it is no request; then body is None."""

    number: int  # from 1
    custom_id: str
    url: str = ""
    body: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Survey:
    path: Path
    sha256: str
    ids: np.ndarray  # [num_lines] uint64, hashes of the custom_ids in the order of the lines

    @property
    def num_lines(self) -> int:
        return len(self.ids)


def survey(path: Path) -> Survey:
    """Reads the whole file once.  Raises ConfigError: it cannot be read, or a custom_id comes twice."""
    digest, ids = hashlib.sha256(), array("Q")
    try:
        with path.open("rb") as file:
            for raw in _raw_lines(file, digest.update):
                digest.update(raw)
                if raw.strip():
                    ids.append(hash_id(read_line(raw, len(ids) + 1).custom_id))
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error}") from error
    found = Survey(path, digest.hexdigest(), np.frombuffer(ids, np.uint64) if ids else np.empty(0, np.uint64))
    _check_unique(found)
    return found


def lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        number = 0
        for raw in _raw_lines(file):
            if raw.strip():
                number += 1
                yield read_line(raw, number)


def read_line(raw: bytes, number: int) -> Line:
    """A line that is no request still has an id, so that its error can be told and found again."""
    nameless = f"line-{number}"
    if len(raw) > MAX_LINE_BYTES:
        return Line(number, nameless, error=f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Line(number, nameless, error=f"the line is no JSON: {error}")
    if not isinstance(record, dict):
        return Line(number, nameless, error="the line is no JSON object")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Line(number, nameless, error="custom_id is missing; it is a string that is not empty")
    if record.get("method", "POST") != "POST":
        return Line(number, custom_id, error=f"method {record['method']!r} is not POST")
    return Line(number, custom_id, str(record.get("url", "")), record.get("body"))


def hash_id(custom_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _raw_lines(file: Any, drop: Callable[[bytes], None] = lambda rest: None) -> Iterator[bytes]:
    """Lines of at most a little more than MAX_LINE_BYTES; the rest of a longer one is read and dropped, in parts."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        yield raw
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            drop(raw)


def _check_unique(found: Survey) -> None:
    order = np.argsort(found.ids, kind="stable")
    ordered = found.ids[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        first, second = (int(order[twice[0] + i]) + 1 for i in (0, 1))
        custom_id = next(line.custom_id for line in lines(found.path) if line.number == first)
        raise ConfigError(
            f"{found.path}: custom_id {custom_id!r} comes on line {first} and again on line {second}; "
            f"results are told apart by it ({len(twice)} such lines)"
        )
