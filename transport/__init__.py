"""Messages between S-workers and R-workers, and the channels that carry them.

Knows no model, no kernel and no scheduler; imports nothing else of this project and never torch.
"""

from transport.channel import BadDelivery, Channel, Delivery, Listener
from transport.codec import LIMITS, Codec, Envelope, Limits
from transport.errors import (
    AddressError,
    ChannelClosed,
    KeyFileError,
    MessageTooLarge,
    PeerLost,
    PeerRefused,
    PeerTimeout,
    ProtocolError,
    TransportError,
)
from transport.forked import let_go_in_children
from transport.keys import Keys, make_keys, read_keys, write_keys
from transport.log_limit import limited_handler
from transport.memory import keep_freed_memory
from transport.messages import (
    DTYPES,
    FLOAT_DTYPES,
    PROTOCOL_VERSION,
    Admit,
    Attend,
    Attended,
    Failure,
    Fork,
    Goodbye,
    Hello,
    LayerSpec,
    Message,
    Ping,
    Pong,
    Release,
    Rewind,
    Rows,
    Welcome,
)
from transport.mpi_start import import_mpi
from transport.paths import MAX_PATH_BYTES
from transport.refusals import Refusals
from transport.registry import BACKENDS, connect, listen

__all__ = [
    "BACKENDS",
    "DTYPES",
    "FLOAT_DTYPES",
    "LIMITS",
    "MAX_PATH_BYTES",
    "PROTOCOL_VERSION",
    "AddressError",
    "Admit",
    "Attend",
    "Attended",
    "BadDelivery",
    "Channel",
    "ChannelClosed",
    "Codec",
    "Delivery",
    "Envelope",
    "Failure",
    "Fork",
    "Goodbye",
    "Hello",
    "KeyFileError",
    "Keys",
    "LayerSpec",
    "Limits",
    "Listener",
    "Message",
    "MessageTooLarge",
    "PeerLost",
    "PeerRefused",
    "PeerTimeout",
    "Ping",
    "Pong",
    "ProtocolError",
    "Refusals",
    "Release",
    "Rewind",
    "Rows",
    "TransportError",
    "Welcome",
    "connect",
    "import_mpi",
    "keep_freed_memory",
    "let_go_in_children",
    "limited_handler",
    "listen",
    "make_keys",
    "read_keys",
    "write_keys",
]
