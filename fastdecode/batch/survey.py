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

from fastdecode.batch.source import opened
from fastdecode.errors import ConfigError

MAX_LINE_BYTES = 64 << 20
_NAMELESS = ("line-", "nameless-line-")  # what a line without an id is called, with its number


@dataclass(frozen=True)
class Line:
    """A line of the input.  error: why it is no request; then body is None."""

    index: int  # among those that are not blank, from 0
    number: int  # among all, from 1
    custom_id: str
    url: str | None = None
    body: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Survey:
    path: Path
    sha256: str  # of what is in it, unpacked
    ids: np.ndarray  # [num_lines] uint64, hashes of the custom_ids in the order of the lines
    nameless: str = _NAMELESS[0]  # what a line without an id is called, with its number: no id begins like it
    name: str = ""  # what its owner calls it

    @property
    def num_lines(self) -> int:
        return len(self.ids)


def survey(path: Path, name: str = "") -> Survey:
    """Reads the whole file once.  name: what its owner calls it, if that is not its path.

    Raises ConfigError: it cannot be read, or a custom_id comes twice.
    """
    digest, ids, nameless = hashlib.sha256(), array("Q"), array("Q")  # nameless: index and number of each, in turn
    name = name or str(path)
    try:
        with opened(path) as file:
            for number, raw in enumerate(_raw_lines(file, digest.update), 1):
                digest.update(raw)
                if raw.strip():
                    custom_id = read_line(raw, len(ids), number, "").custom_id
                    if not custom_id:
                        nameless.extend((len(ids), number))
                    ids.append(hash_id(custom_id))
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error}") from error
    hashes = np.array(ids, np.uint64)
    prefix = _name(hashes, np.array(nameless, np.int64).reshape(-1, 2), digest.hexdigest())
    found = Survey(path, digest.hexdigest(), hashes, prefix, name)
    _check_unique(found)
    return found


def lines(path: Path, nameless: str = _NAMELESS[0]) -> Iterator[Line]:
    """nameless: as in the Survey."""
    with opened(path) as file:
        index = 0
        for number, raw in enumerate(_raw_lines(file), 1):
            if raw.strip():
                yield read_line(raw, index, number, nameless + str(number))
                index += 1


def read_line(raw: bytes, index: int, number: int, nameless: str) -> Line:
    """A line that is no request still has an id, so that its error can be told and found again."""

    def broken(why: str, custom_id: str = nameless) -> Line:
        return Line(index, number, custom_id, error=why)

    if len(raw) > MAX_LINE_BYTES:
        return broken(f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return broken(f"the line is no JSON: {error}")
    if not isinstance(record, dict):
        return broken("the line is no JSON object")
    custom_id, method, url = record.get("custom_id"), record.get("method"), record.get("url")
    if custom_id is None:
        return broken("custom_id is missing; it is a string that is not empty")
    if not isinstance(custom_id, str) or not custom_id:
        return broken(f"custom_id must be a string that is not empty, got {json.dumps(custom_id)[:100]}")
    if method is not None and (not isinstance(method, str) or method.upper() != "POST"):
        return broken(f"method must be POST, got {json.dumps(method)[:100]}", custom_id)
    if url is not None and not isinstance(url, str):
        return broken(f"url must be a string, got {json.dumps(url)[:100]}", custom_id)
    return Line(index, number, custom_id, url, record.get("body"))


def _name(ids: np.ndarray, nameless: np.ndarray, sha256: str) -> str:
    """Fills in the hashes of lines without an id, under names that no line has.  The same for the same file.

    nameless: [n, 2], index and number of each.
    """
    if not len(nameless):
        return _NAMELESS[0]
    theirs = np.delete(ids, nameless[:, 0])
    for prefix in (*_NAMELESS, f"nameless-{sha256[:16]}-"):  # nobody can write down the hash of what he writes
        ids[nameless[:, 0]] = [hash_id(f"{prefix}{number}") for number in nameless[:, 1]]
        if not np.isin(ids[nameless[:, 0]], theirs).any():
            break
    return prefix


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
        wanted = {int(order[twice[0] + i]) for i in (0, 1)}
        first, second = (line for line in lines(found.path, found.nameless) if line.index in wanted)
        raise ConfigError(
            f"{found.name}: custom_id {first.custom_id!r} comes on line {first.number} and again on line "
            f"{second.number}; results are told apart by it ({len(twice)} such lines)"
        )
