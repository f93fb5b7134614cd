"""The key of a job: whoever holds its file may talk to the job's R-workers over ``tcp://``, and nobody else.

A pair of CURVE keys (ZeroMQ's own encryption, by libsodium) that all workers of a job share, as munge's machines share
theirs: an R-worker proves with it that it is one, an S-worker that it may come in.  It says that somebody belongs to
the job, not which of its workers it is.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

import zmq

from transport.errors import KeyFileError

_FIRST_LINE = "FastDecode key 1: secret; copy it to the machines of one job, and give it to nobody else"
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Keys:
    """In Z85, as ZeroMQ wants them."""

    public: bytes
    secret: bytes = field(repr=False)


def make_keys() -> Keys:
    """Raises KeyFileError where ZeroMQ was built without encryption."""
    _check_curve()
    return Keys(*zmq.curve_keypair())


def write_keys(path: str | os.PathLike[str], keys: Keys) -> None:
    """A new file that only its owner may read.  Raises KeyFileError; a file that is there is left alone."""
    text = f"{_FIRST_LINE}\npublic {keys.public.decode()}\nsecret {keys.secret.decode()}\n"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(
            f"{path} exists already and may be in use: name another file, or remove it if no worker needs it"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:  # half a key is in the way of a whole one
        os.unlink(path)
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error


def read_keys(path: str | os.PathLike[str]) -> Keys:
    """What `write_keys` wrote.

    Raises KeyFileError for a file that is not there, that others may read or write, or that holds something else, and
    where ZeroMQ was built without encryption.
    """
    _check_curve()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is to be refused, not waited for
    except FileNotFoundError:
        raise KeyFileError(
            f"there is no {path}: copy the job's key there, or make one with `fastdecode keygen`"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    try:
        _check_owner(path, os.fstat(fd))
        content = os.read(fd, _MAX_BYTES)
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return _parse(path, content)


def _check_curve() -> None:
    if not zmq.has("curve"):
        raise KeyFileError("ZeroMQ was built without libsodium here and cannot encrypt; pip install pyzmq brings one")


def _check_owner(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileError(f"{path} is no file")
    if status.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(f"{path} belongs to another user, who could change it: make a copy of your own")
    if status.st_mode & 0o077:
        raise KeyFileError(
            f"others may read or write {path} (its mode is {stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}, "
            "and make a new key if somebody may have read it"
        )


def _parse(path: str | os.PathLike[str], content: bytes) -> Keys:
    lines = content.splitlines()
    if len(lines) == 3 and lines[0] == _FIRST_LINE.encode():
        (name, _, public), (other_name, _, secret) = (line.partition(b" ") for line in lines[1:])
        try:
            is_pair = (name, other_name) == (b"public", b"secret") and zmq.curve_public(secret) == public
        except (ValueError, zmq.ZMQError):  # no Z85, or not 40 letters of it
            is_pair = False
        if is_pair:
            return Keys(public, secret)
    raise KeyFileError(f"{path} is no key file, or a damaged one: copy it again, or make one with `fastdecode keygen`")
