"""Addresses on a network, ``tcp://HOST:PORT``: what one looks like, and where an R-worker may listen.

loopback                 always
one numeric address      with keys, or by the explicit wish to be open to that network
every address (*, ::)    never: a machine has more networks than the one that was thought of
a name                   never: what it stands for is not seen, and may change
"""

from __future__ import annotations

import ipaddress
import logging
from urllib.parse import urlsplit

from transport.errors import AddressError

logger = logging.getLogger(__name__)

_NAME_ONE = "name the one address of the network that S-workers come over, like tcp://10.0.0.5:5555"


def check_host(address: str) -> None:
    """Raises AddressError for what is not ``tcp://HOST:PORT``."""
    try:
        parts = urlsplit(address)
        is_complete = bool(parts.hostname) and parts.port is not None
    except ValueError:
        is_complete = False
    if not is_complete:
        raise AddressError(f"{address!r}: a tcp address is tcp://HOST:PORT with a port from 0 to 65535")


def check_bind(address: str, *, has_keys: bool, insecure_network: bool) -> None:
    """Raises AddressError where an R-worker must not listen; warns of an open one.  address: checked by `check_host`"""
    if has_keys and insecure_network:
        raise AddressError(f"{address}: with keys the network is no longer insecure; leave insecure_network out")
    if _is_loopback(address):
        if insecure_network:
            raise AddressError(f"{address} is this machine's own, not a network's; leave insecure_network out")
        return
    if has_keys:
        return
    if not insecure_network:
        raise AddressError(
            f"{address} is not loopback (tcp://127.0.0.1:PORT): whoever reaches it could read and change the KV. Give "
            "it the job's key (`fastdecode keygen` makes one, --key-file takes it), or say --insecure-network if you "
            "trust everybody on that network"
        )
    logger.warning(
        "%s is open: whoever reaches it on that network can read and change the KV, and nothing on the wire is "
        "encrypted or proved to come from whom it says; `fastdecode keygen` and --key-file end that",
        address,
    )


def _is_loopback(address: str) -> bool:
    """Raises AddressError for every address at once, and for names."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        what = "every network of this machine" if host == "*" else "a name, not an address"
        raise AddressError(f"{address} is {what}: {_NAME_ONE}") from None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_unspecified:
        raise AddressError(f"{address} is every network of this machine: {_NAME_ONE}")
    return ip.is_loopback
