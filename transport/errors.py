"""What can go wrong between two workers, and whose fault it is.

TransportError
├── AddressError       the caller's: an address that cannot be used, or a backend that is not installed
├── KeyFileError       the caller's: a key file that cannot be used, or not be written
├── ProtocolError      the peer's: it sent something that is not a valid message; the channel lives on
│   └── BrokenOff      nobody's: its sender was interrupted; channels and listeners pass it over
├── MessageTooLarge    the caller's: refused before a byte was sent; the channel lives on
├── PeerTimeout        the peer's: no answer before the deadline; the channel lives on
├── PeerLost           the peer is gone; every later call on this channel says so again
├── PeerRefused        the two do not hold the same key, or the peer is no R-worker; like PeerLost
└── ChannelClosed      ours: used after close()
"""

from __future__ import annotations


class TransportError(Exception):
    """Root of everything this package raises on purpose."""


class AddressError(TransportError, ValueError):
    """An address nobody can listen on or connect to; the text lists what is possible."""


class KeyFileError(TransportError, ValueError):
    """A key file that is missing, readable by others, damaged, or in the way of a new one."""


class ProtocolError(TransportError):
    """Frames that are not a message of this protocol: unknown, truncated, oversized or wrong-shaped."""


class BrokenOff(ProtocolError):
    """No message, and an empty frame at its end: its sender was interrupted between two frames.

    One whose last frame is empty anyway, and lacks no other, is whole and decoded like any.
    """


class MessageTooLarge(TransportError, ValueError):
    """A message over this side's own limits; nothing of it was sent."""


class PeerTimeout(TransportError, TimeoutError):
    """The named peer did not answer in time."""


class PeerLost(TransportError, ConnectionError):
    """The named peer is gone and will not come back on this channel."""


class PeerRefused(TransportError, ConnectionError):
    """This end and the named peer cannot come together, however often they try; the text says which key is missing."""


class ChannelClosed(TransportError):
    """The channel was closed by this side."""
