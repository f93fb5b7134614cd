"""The output file: results are appended as they come, and a run that was cut off anywhere goes on from here.

    OUT                    a result per line
    OUT.manifest.json      which input, model and settings it belongs to; written before the first result

A result is one write, so a run that is killed leaves whole lines and at most one torn one, which `start` cuts off.
Once a second it is made safe against a machine that goes down, too, and looked after: whether it is still where its
user will look for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from fastdecode.batch.manifest import Manifest
from fastdecode.batch.replacing import remove_leftovers, replacing
from fastdecode.batch.result import BatchResult
from fastdecode.batch.survey import Survey, hash_id
from fastdecode.errors import ConfigError

logger = logging.getLogger(__name__)

_SYNC_S = 1.0
# Written as escapes: halves of surrogate pairs, which UTF-8 has not, and what some readers end a line at.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_KINDS = (
    (stat.S_ISFIFO, "a pipe"), (stat.S_ISDIR, "a directory"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip
_OPEN_FILES = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/.*")  # names that stand for what is open already


class OutputLost(ConfigError):
    """The output's name does not stand for what was written any more."""


@dataclass(frozen=True)
class Recorded:
    """What a file already holds."""

    ids: np.ndarray  # [n] uint64, hashes of the custom_ids
    num_errors: int


def check_kind(path: Path) -> None:
    """Raises ConfigError for what cannot be read again, before anything waits for its other end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise ConfigError(f"cannot write the output: {error}") from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
    if kind is None and _OPEN_FILES.fullmatch(os.path.abspath(path)):
        kind = "a name of a file that is open"
    if kind:
        raise ConfigError(
            f"the output {path} is {kind}: what has been done is read from it when a run goes on, so it has "
            "to be a file with a name of its own; send that on when it is whole"
        )


class Journal:
    """Opened, it has changed nothing of what was there; `start` it before the first result."""

    def __init__(
        self,
        path: Path,
        survey: Survey,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        retry_errors: bool,
        is_forced: bool = False,
    ) -> None:
        """settings: what results depend on, as far as it is known; `settle` takes more.

        retry_errors: lines that failed are to be done again.  is_forced: go on although settings differ.  Raises
        ConfigError if the file is another job's, or somebody's now, or no file that could be gone on with, or if the
        disk is full; then every result that was in it still is.
        """
        self.path, self._survey, self._retries = path, survey, retry_errors
        check_kind(path)
        if path.exists() and survey.path.exists() and path.samefile(survey.path):
            raise ConfigError("the output is the input; give another path for the output")
        num_bytes = path.stat().st_size if path.exists() else 0
        if num_bytes and not resume:
            raise ConfigError(f"{path} is not empty; go on with it by --resume, or give another path")
        self.manifest = Manifest(path, survey, num_bytes=num_bytes, is_forced=is_forced)
        self.run_id = secrets.token_hex(4)  # so that no two results ever have the same id
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write the output: {error}") from error
        try:
            self._lock()
            self._num_bytes = num_bytes
            self._check_place()  # between the look at it and the lock another run may have begun
            self.recorded = self._read(kept=None)
            self.settle(settings)
        except BaseException:
            os.close(self._fd)
            raise
        self._is_started = False
        self._synced = time.monotonic()

    def progress(self) -> BatchResult:
        """How far the job is by what is recorded."""
        num_done = int(self.is_done().sum())
        return BatchResult(self._survey.num_lines, num_done, self.recorded.num_errors)

    def is_done(self) -> np.ndarray:
        """# [num_lines] bool"""
        return np.isin(self._survey.ids, self.recorded.ids)

    def settle(self, settings: Mapping[str, Any]) -> None:
        """More of what results depend on, which is known now.  Raises ConfigError if it was other when it began."""
        try:
            self.manifest.settle(settings, len(self.recorded.ids))
        except OSError as error:
            raise self._unwritable(error) from error

    def start(self) -> None:
        """Cuts a torn line off, takes errors out that are to be done again, and notes with what it goes on.

        Raises ConfigError: the disk is full, say; then every result is where it was.
        """
        if self._is_started:
            return
        self._check_place()
        try:
            if self._is_locked:
                remove_leftovers(self.path)
                remove_leftovers(self.manifest.path)
            self.manifest.write()
            if self._retries and self._has_errors:
                self._leave_errors_out()
            elif self._whole_bytes < self._num_bytes:
                os.ftruncate(self._fd, self._whole_bytes)
        except OSError as error:
            raise self._unwritable(error) from error
        self._num_bytes, self._is_started = self._whole_bytes, True

    def append(self, record: dict[str, Any]) -> None:
        """Raises OSError: the disk is full, say; OutputLost; ValueError for NaN and infinities, which JSON has not."""
        self.start()
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"
        while line:
            written = os.write(self._fd, line)
            self._num_bytes, line = self._num_bytes + written, line[written:]
        if time.monotonic() - self._synced >= _SYNC_S:
            self.check()

    def check(self) -> None:
        """What was written is on the disk, and where it is looked for.  Raises OSError, OutputLost."""
        os.fdatasync(self._fd)
        self._check_place()
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
            self._is_locked = True
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise ConfigError(f"another run writes {self.path} at this moment") from error
            self._is_locked = False
            logger.warning(
                "the file system of %s has no locks (%s): nothing guards it against a second run at the same time",
                self.path, error.strerror,
            )  # fmt: skip

    def _check_place(self) -> None:
        """Raises OutputLost."""
        ours = os.fstat(self._fd)
        try:
            theirs = self.path.stat()
        except FileNotFoundError:
            what = "was removed or renamed"
        else:
            if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
                what = "was replaced by another file"
            elif ours.st_size < self._num_bytes:
                what = f"was cut from {self._num_bytes} to {ours.st_size} bytes"
            elif ours.st_size > self._num_bytes:
                what = "was written by somebody else, too"
            else:
                return
        raise OutputLost(
            f"the output {self.path} {what} while this run had it open: not all of its results are there. With "
            "--resume the same command does the lines that are missing then"
        )

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"cannot write beside {self.path}: {error}. What it holds is as it was; make room and start again"
        )

    def _leave_errors_out(self) -> None:
        old = self._fd
        try:
            with replacing(self.path) as kept:
                self._read(kept)
                self._fd = os.open(kept.name, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
                self._lock()  # of the new file, before anybody else can find it
        except BaseException:
            if self._fd != old:
                os.close(self._fd)
                self._fd = old
            raise
        os.close(old)

    def _read(self, kept: BinaryIO | None) -> Recorded:
        """Without a torn line at the end, and without errors if they are to be done again.

        kept: where the lines are written that stay.
        """
        ids, num_errors, whole_bytes = array("Q"), 0, 0
        self._has_errors = False
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    custom_id, is_error = str(record["custom_id"]), record["error"] is not None
                except (ValueError, TypeError, KeyError) as error:
                    raise ConfigError(f"{self.path}, line {number} is no result of run-batch: {error}") from error
                self._has_errors |= is_error
                if is_error and self._retries:
                    continue
                if kept:
                    kept.write(raw)
                ids.append(hash_id(custom_id))
                num_errors += is_error
                whole_bytes += len(raw)
        self._whole_bytes = whole_bytes
        return Recorded(np.frombuffer(ids, np.uint64) if ids else np.empty(0, np.uint64), num_errors)
