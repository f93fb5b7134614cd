"""Addresses that are files: ``ipc://PATH`` and ``shm://PATH``."""

from __future__ import annotations

import errno
import socket

from transport.errors import AddressError

MAX_PATH_BYTES = 100  # sockaddr_un holds 107


def check_path(address: str) -> None:
    scheme, _, path = address.partition("://")
    if not path or len(path.encode()) > MAX_PATH_BYTES:
        raise AddressError(
            f"{address!r}: an {scheme} address is {scheme}://PATH with a path of at most {MAX_PATH_BYTES} bytes"
        )


def check_not_taken(path: str, address: str) -> None:
    """A second listener would take a living one's socket file away from it without a word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # a living socket of another kind
                return  # no file, or one left behind by a process that was killed
    raise AddressError(f"{address} is taken: somebody listens there already")
