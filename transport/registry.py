"""From an address to a backend: ``scheme://...``.  To add a transport, write its module and name it here."""

from __future__ import annotations

from typing import Protocol

from transport import inproc, mpi, shm, zeromq
from transport.channel import Channel, Link, Listener, Port
from transport.errors import AddressError


class Backend(Protocol):
    def connect(self, address: str) -> Link: ...

    def listen(self, address: str) -> Port: ...


BACKENDS: dict[str, Backend] = {"inproc": inproc, "shm": shm, "ipc": zeromq, "tcp": zeromq, "mpi": mpi}


def connect(address: str) -> Channel:
    """An S-worker's channel to the R-worker at `address`.  Raises AddressError.

    Returns at once; whether anybody is there shows at the first answer awaited.
    """
    return Channel(_backend(address).connect(address))


def listen(address: str) -> Listener:
    """An R-worker's listener on `address`; ``tcp://127.0.0.1:0`` takes a free port.  Raises AddressError."""
    return Listener(_backend(address).listen(address))


def _backend(address: str) -> Backend:
    scheme, separator, _ = address.partition("://")
    if not separator or scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in BACKENDS)
        raise AddressError(f"{address!r} is no address this runtime knows; known: {known}")
    return BACKENDS[scheme]
