"""A first pass over the input: is it whole, how long is it, which file is it.

What stays in memory is eight bytes per line, a hash of its custom_id: enough to find ids that come twice, and on
resume the lines that are done.  (Two of ten million ids share a hash once in 400 000 files.)
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdecode.batch.source import opened
from fastdecode.errors import ConfigError

MAX_LINE_BYTES = 64 << 20
_NO_JSON = "the line is no JSON"
_MOST_SHOWN = 100  # characters of what is quoted
_BEGIN, _COLON, _COMMA = (re.compile(rf"\s*{sign}\s*") for sign in "{:,")  # of a JSON object
_NAMELESS = ("line-", "nameless-line-")  # what a line without an id is called, with its number


class Digest:
    """SHA-256 of what was read, and how much that was."""

    def __init__(self) -> None:
        self._digest, self.num_bytes = hashlib.sha256(), 0

    def update(self, data: bytes) -> None:
        self._digest.update(data)
        self.num_bytes += len(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Line:
    """A line of the input.  error: why it is no request; then body is None."""

    index: int  # among those that are not blank, from 0
    number: int  # among all, from 1
    custom_id: str
    url: str | None = None
    body: Any = None
    error: str | None = None
    is_guess: bool = False  # custom_id: it was read out of what is no JSON


@dataclass(frozen=True)
class Survey:
    path: Path
    sha256: str  # of what is in it, unpacked
    ids: np.ndarray  # [num_lines] uint64, hashes of the custom_ids in the order of the lines
    nameless: str = _NAMELESS[0]  # what a line without an id is called, with its number: no id begins like it
    name: str = ""  # what its owner calls it
    num_bytes: int = 0  # unpacked
    contested: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # indices of lines, see `lines`

    @property
    def num_lines(self) -> int:
        return len(self.ids)


def survey(path: Path, name: str = "") -> Survey:
    """Reads the whole file once.  name: what its owner calls it, if that is not its path.

    Raises ConfigError: it cannot be read, or a custom_id comes twice.
    """
    digest, ids = Digest(), array("Q")
    nameless, guesses = array("Q"), array("Q")  # index and number of each, in turn
    name, first, num_broken = name or str(path), b"", 0
    try:
        with opened(path) as file:
            for number, raw in enumerate(_raw_lines(file, digest.update), 1):
                digest.update(raw)
                if raw.strip():
                    line = read_line(raw, len(ids), number, "")
                    first = first or raw.strip()
                    num_broken += (line.error or "").startswith(_NO_JSON)
                    if not line.custom_id:
                        nameless.extend((len(ids), number))
                    elif line.is_guess:
                        guesses.extend((len(ids), number))
                    ids.append(hash_id(line.custom_id))
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error}") from error
    if num_broken * 2 >= len(ids) and (way_out := _other_json(first)):
        raise ConfigError(f"{name} is JSON, but not JSONL, a request a line: {way_out} IN > OUT makes it so")
    hashes = np.array(ids, np.uint64)
    contested = _contested(hashes, np.array(guesses, np.int64).reshape(-1, 2))
    unnamed = np.concatenate((np.array(nameless, np.int64).reshape(-1, 2), contested))
    prefix = _name(hashes, unnamed, digest.hexdigest())
    found = Survey(path, digest.hexdigest(), hashes, prefix, name, digest.num_bytes, contested[:, 0])
    _check_unique(found)
    return found


def prefix_sha256(path: Path, num_bytes: int) -> str | None:
    """Of so many bytes at the beginning, unpacked; None if they end in the middle of a line.  Raises ConfigError."""
    digest, last = hashlib.sha256(), b""
    try:
        with opened(path) as file:
            while num_bytes and (part := file.read(min(num_bytes, 1 << 20))):
                digest.update(part)
                num_bytes, last = num_bytes - len(part), part[-1:]
            ends_a_line = last == b"\n" or file.read(2).startswith((b"\n", b"\r\n"))
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error}") from error
    return digest.hexdigest() if ends_a_line and not num_bytes else None


def lines(
    path: Path,
    nameless: str = _NAMELESS[0],
    contested: np.ndarray | None = None,
    digest: Digest | None = None,
) -> Iterator[Line]:
    """nameless, contested: as in the Survey; contested lines, which are no JSON and have an id that another line has,
    too, are called as if they had none.  digest: is given all that was read.  Raises ConfigError: it cannot be read.
    """
    digest, unnamed = digest or Digest(), np.empty(0, np.int64) if contested is None else contested
    try:
        with opened(path) as file:
            index = 0
            for number, raw in enumerate(_raw_lines(file, digest.update), 1):
                digest.update(raw)
                if raw.strip():
                    line = read_line(raw, index, number, nameless + str(number))
                    if line.is_guess and index in unnamed[np.searchsorted(unnamed, index) :][:1]:
                        line = replace(line, custom_id=nameless + str(number))
                    yield line
                    index += 1
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error}") from error


def read_line(raw: bytes, index: int, number: int, nameless: str) -> Line:
    """A line that is no request still has an id, so that its error can be told and found again."""

    def broken(why: str, custom_id: str = nameless) -> Line:
        return Line(index, number, custom_id, error=why)

    def unreadable(why: str) -> Line:
        guess = _id_before_the_break(raw)
        return Line(index, number, guess or nameless, error=why, is_guess=guess is not None)

    if len(raw) > MAX_LINE_BYTES:
        return unreadable(f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return unreadable(f"{_NO_JSON}: {error}")
    if not isinstance(record, dict):
        return broken(f"{_NO_JSON} object")
    custom_id, method, url = record.get("custom_id"), record.get("method"), record.get("url")
    if custom_id is None:
        return broken("custom_id is missing; it is a string that is not empty")
    if not isinstance(custom_id, str) or not custom_id:
        return broken(f"custom_id must be a string that is not empty, got {json.dumps(custom_id)[:_MOST_SHOWN]}")
    if method is not None and (not isinstance(method, str) or method.upper() != "POST"):
        return broken(f"method must be POST, got {json.dumps(method)[:_MOST_SHOWN]}", custom_id)
    if url is not None and not isinstance(url, str):
        return broken(f"url must be a string, got {json.dumps(url)[:_MOST_SHOWN]}", custom_id)
    return Line(index, number, custom_id, url, record.get("body"))


def _id_before_the_break(raw: bytes) -> str | None:
    """The custom_id of a line that is no JSON, or cut off, if it can be read up to there.  None: it cannot."""
    text, decode, found = raw.decode(errors="replace"), json.JSONDecoder().raw_decode, None
    begin = _BEGIN.match(text)
    place = begin.end() if begin else len(text)
    try:
        while place < len(text):
            name, place = decode(text, place)
            colon = _COLON.match(text, place)
            if not isinstance(name, str) or not colon:
                break
            value, place = decode(text, colon.end())
            if name == "custom_id":
                found = value
            comma = _COMMA.match(text, place)
            place = comma.end() if comma else len(text)
    except (ValueError, RecursionError):
        pass
    return found if isinstance(found, str) and found and "\ufffd" not in found else None


def _contested(ids: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """Those of `guesses` ([n, 2], index and number of each) whose id comes more than once."""
    if not len(guesses):
        return guesses
    values, counts = np.unique(ids, return_counts=True)
    return guesses[np.isin(ids[guesses[:, 0]], values[counts > 1])]


def _other_json(first: bytes) -> str | None:
    """What makes lines of requests of it, if it begins with this line; None: it may be lines already."""
    if first == b"[" or (first.startswith(b"[") and first.removeprefix(b"[").lstrip().startswith(b"{")):
        return "jq -c '.[]'"
    if first == b"{":
        return "jq -c ."
    return "tr '\\r' '\\n' <" if b"}\r{" in first else None


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
        first, second = (line for line in lines(found.path, found.nameless, found.contested) if line.index in wanted)
        raise ConfigError(
            f"{found.name}: custom_id {first.custom_id[:_MOST_SHOWN]!r} comes on line {first.number} and again on line "
            f"{second.number}; results are told apart by it ({len(twice)} such lines)"
        )
