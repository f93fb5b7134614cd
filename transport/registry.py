"""From an address to a backend: ``scheme://...``.  To add a transport, write its module and name it here."""

from __future__ import annotations

from typing import Protocol

from transport import inproc, mpi, shm, zeromq
from transport.channel import Channel, Link, Listener, Port
from transport.errors import AddressError
from transport.keys import Keys


class Backend(Protocol):
    def connect(self, address: str) -> Link: ...

    def listen(self, address: str) -> Port: ...


BACKENDS: dict[str, Backend] = {"inproc": inproc, "shm": shm, "ipc": zeromq, "tcp": zeromq, "mpi": mpi}


def connect(address: str, keys: Keys | None = None) -> Channel:
    """An S-worker's channel to the R-worker at `address`.  Raises AddressError.

    keys: those that the R-worker was given, if it was; for tcp:// alone.
    Returns at once; whether anybody is there, and takes the keys, shows at the first answer awaited.
    """
    backend = _backend(address)
    if keys is None:
        return Channel(backend.connect(address))
    _check_network(address, "keys are")
    return Channel(zeromq.connect(address, keys))


def listen(address: str, keys: Keys | None = None, insecure_network: bool = False) -> Listener:
    """An R-worker's listener on `address`; ``tcp://127.0.0.1:0`` takes a free port.  Raises AddressError.

    keys: lets in only who has them, too, and encrypts.  insecure_network: listens on an address of a network without
    keys, open to everybody on it.  Both for tcp:// alone.
    """
    backend = _backend(address)
    if keys is None and not insecure_network:
        return Listener(backend.listen(address))
    _check_network(address, "keys and insecure_network are")
    return Listener(zeromq.listen(address, keys, insecure_network))


def _check_network(address: str, what: str) -> None:
    if not address.startswith("tcp://"):
        raise AddressError(f"{what} for tcp:// alone, and {address} is none; leave them out")


def _backend(address: str) -> Backend:
    scheme, separator, _ = address.partition("://")
    if not separator or scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in BACKENDS)
        raise AddressError(f"{address!r} is no address this runtime knows; known: {known}")
    return BACKENDS[scheme]
