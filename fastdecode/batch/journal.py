"""The output file: results are appended as they come, and a run that was cut off anywhere goes on from here.

    OUT                    a result per line
    OUT.manifest.json      which input, model and settings it belongs to; written before the first result

A result is one write, so a run that is killed leaves whole lines and at most one torn one, which `resume` cuts off.
Once a second it is made safe against a machine that goes down, too.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from fastdecode.batch.survey import Survey, hash_id
from fastdecode.errors import ConfigError

_SYNC_S = 1.0
# Written as escapes: halves of surrogate pairs, which UTF-8 has not, and what some readers end a line at.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Recorded:
    """What a file already holds."""

    ids: np.ndarray  # [n] uint64, hashes of the custom_ids
    num_errors: int


class Journal:
    def __init__(
        self, path: Path, survey: Survey, settings: dict[str, Any], *, resume: bool, retry_errors: bool
    ) -> None:
        """settings: what results depend on.  Raises ConfigError if the file is another job's, or somebody's now, or if
        the disk is full; then every result that was in it still is."""
        if path.exists() and path.samefile(survey.path):
            raise ConfigError("the output is the input; give another path for the output")
        self.path, self._manifest = path, path.with_name(path.name + ".manifest.json")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write the output: {error}") from error
        try:
            self._lock()
            if os.fstat(self._fd).st_size and not resume:
                raise ConfigError(f"{path} is not empty; go on with it by --resume, or give another path")
            self._check_manifest(survey, settings)
            self.recorded = self._recover(retry_errors)
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):
                raise ConfigError(
                    f"cannot write beside {path}: {error}. What it holds is as it was; make room and start again"
                ) from error
            raise
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Raises OSError: the disk is full, say; ValueError for NaN and infinities, which JSON has not."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]
        if time.monotonic() - self._synced >= _SYNC_S:
            os.fdatasync(self._fd)
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another run writes {self.path} at this moment") from error

    def _check_manifest(self, survey: Survey, settings: dict[str, Any]) -> None:
        ours = {"input_sha256": survey.sha256, "num_lines": survey.num_lines, **settings}
        if self._manifest.exists() and os.fstat(self._fd).st_size:
            try:
                theirs = dict(json.loads(self._manifest.read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(f"{self._manifest} cannot be read: {error}") from error
            other = [name for name in ours if theirs.get(name) != ours[name]]
            if "input_sha256" in other:
                raise ConfigError(
                    f"the input is not the one that {self.path} was begun with ({theirs.get('input')}); give that one, "
                    "or another output"
                )
            if other:
                changes = ", ".join(f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in other)
                raise ConfigError(f"{self.path} was begun with other settings: {changes}")
        elif os.fstat(self._fd).st_size:
            raise ConfigError(f"{self.path} is no output of run-batch: {self._manifest.name} is not beside it")
        else:
            with _replacing(self._manifest) as file:
                file.write((json.dumps({"input": survey.name, **ours}, indent=1) + "\n").encode())

    def _recover(self, retry_errors: bool) -> Recorded:
        """Cuts a torn line off, and with `retry_errors` takes errors out, so that they are done again."""
        if not retry_errors:
            return self._read(kept=None)
        old = self._fd
        try:
            with _replacing(self.path) as kept:
                recorded = self._read(kept)
                self._fd = os.open(kept.name, os.O_RDWR | os.O_APPEND)
                self._lock()  # of the new file, before anybody else can find it
        finally:
            if self._fd != old:
                os.close(old)
        return recorded

    def _read(self, kept: BinaryIO | None) -> Recorded:
        """kept: where lines without an error are written, and the others left out."""
        ids, num_errors, whole = array("Q"), 0, 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    custom_id, is_error = str(record["custom_id"]), record["error"] is not None
                except (ValueError, TypeError, KeyError) as error:
                    raise ConfigError(f"{self.path}, line {number} is no result of run-batch: {error}") from error
                whole += len(raw)
                if kept and is_error:
                    continue
                if kept:
                    kept.write(raw)
                ids.append(hash_id(custom_id))
                num_errors += is_error
        os.ftruncate(self._fd, whole)
        return Recorded(np.frombuffer(ids, np.uint64) if ids else np.empty(0, np.uint64), num_errors)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole and on the disk, and is gone if it does not get so far."""
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
