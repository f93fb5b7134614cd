"""Messages to frames and back: one header frame, then the arrays as raw buffers.

    frame 0   magic "FDEC" │ version u16 │ num_arrays u16 │ session u64 │ msgpack of the message
    frame 1…  one per array, C order, little-endian, exactly as long as its shape says

In the msgpack an array is ``[frame index, dtype name, shape]``.  Decoding is typed (msgspec) and leaves
floats where they lie; whatever is not known, not the right length or not the right shape is a ProtocolError.
There is no pickle and no way to name a class.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from transport.errors import BrokenOff, MessageTooLarge, ProtocolError
from transport.messages import ANY_MESSAGE, DTYPE_NAMES, DTYPES, PROTOCOL_VERSION, Message

Buffer = bytes | bytearray | memoryview

_PREFIX = struct.Struct("<4sHHQ")
_MAGIC = b"FDEC"


@dataclass(frozen=True)
class Limits:
    """The most that one message may hold; both ends enforce them."""

    max_arrays: int = 8
    max_header_bytes: int = 1 << 20  # as objects it may take a hundred times as much
    max_array_bytes: int = 1 << 30
    max_dims: int = 4

    @property
    def max_frames(self) -> int:
        return 1 + self.max_arrays


LIMITS = Limits()


@dataclass(frozen=True)
class Envelope:
    """A decoded message with the nonce of the session it belongs to."""

    session: int
    message: Message


class Codec:
    """Encodes and decodes; one per channel and thread, because a decoder holds the frames it reads."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._describe_array)
        self._decoder = msgspec.msgpack.Decoder(ANY_MESSAGE, dec_hook=self._view_array)
        self._arrays_out: list[Buffer] = []
        self._frames_in: Sequence[Buffer] = ()
        self._num_viewed = 0

    def encode(self, session: int, message: Message) -> list[Buffer]:
        """Frames of `message`; the array frames are views of its arrays.  Raises MessageTooLarge."""
        self._arrays_out = []
        body = self._encoder.encode(message)
        arrays, self._arrays_out = self._arrays_out, []
        limits, name = self._limits, type(message).__name__
        if len(arrays) > limits.max_arrays or len(body) + _PREFIX.size > limits.max_header_bytes:
            raise MessageTooLarge(
                f"{name} has {len(arrays)} arrays and a header of {len(body)} bytes; "
                f"the limits are {limits.max_arrays} and {limits.max_header_bytes}"
            )
        for array in arrays:
            if memoryview(array).nbytes > limits.max_array_bytes:
                raise MessageTooLarge(
                    f"{name} has an array of {memoryview(array).nbytes} bytes, the limit is "
                    f"{limits.max_array_bytes}: send fewer tokens per step"
                )
        return [_PREFIX.pack(_MAGIC, PROTOCOL_VERSION, len(arrays), session) + body, *arrays]

    def decode(self, frames: Sequence[Buffer]) -> Envelope:
        """The message in `frames`; its arrays are views of them, for reading.  Raises ProtocolError, BrokenOff."""
        try:
            return self._decode(frames)
        except ProtocolError as error:
            if frames and not memoryview(frames[-1]).nbytes:
                raise BrokenOff(f"a message that its sender broke off: {error}") from error
            raise

    def _decode(self, frames: Sequence[Buffer]) -> Envelope:
        if not frames or len(frames) > self._limits.max_frames:
            raise ProtocolError(f"a message has 1 to {self._limits.max_frames} frames, not {len(frames)}")
        header = memoryview(frames[0]).cast("B")
        if not _PREFIX.size <= header.nbytes <= self._limits.max_header_bytes:
            raise ProtocolError(f"a header of {header.nbytes} bytes is truncated or oversized")
        magic, version, num_arrays, session = _PREFIX.unpack_from(header)
        if magic != _MAGIC:
            raise ProtocolError("not a FastDecode frame: wrong magic bytes")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"the peer speaks protocol {version}, this side {PROTOCOL_VERSION}: upgrade one")
        if num_arrays != len(frames) - 1:
            raise ProtocolError(f"the header announces {num_arrays} arrays, {len(frames) - 1} came")
        self._frames_in, self._num_viewed = frames, 0
        try:
            message = self._decoder.decode(header[_PREFIX.size :])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8
            raise ProtocolError(f"not a message of this protocol: {error}") from error
        finally:
            viewed, self._frames_in, self._num_viewed = self._num_viewed, (), 0
        if viewed != num_arrays:
            raise ProtocolError(f"{num_arrays} arrays came, the message uses {viewed}")
        return Envelope(session, message)

    def _describe_array(self, value: object) -> tuple[int, str, tuple[int, ...]]:
        name = DTYPE_NAMES.get(value.dtype) if isinstance(value, np.ndarray) else None
        if not isinstance(value, np.ndarray) or name is None:
            kind = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{kind} cannot travel; little-endian arrays of {', '.join(DTYPES)} can")
        # A byte view, because bfloat16 has no buffer format of its own.
        self._arrays_out.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return len(self._arrays_out), name, value.shape

    def _view_array(self, wanted: type, description: object) -> np.ndarray:
        # Raises ValueError, which msgspec turns into its ValidationError with the path of the field.
        if wanted is not np.ndarray:
            raise ValueError(f"no such type: {wanted}")
        if not isinstance(description, list | tuple) or len(description) != 3:
            raise ValueError("an array is [frame index, dtype name, shape]")
        index, name, shape = description
        if index != self._num_viewed + 1 or index >= len(self._frames_in):
            raise ValueError(f"array frame {index!r} is missing or out of order")
        if not isinstance(name, str) or name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}")
        if not isinstance(shape, list | tuple) or len(shape) > self._limits.max_dims:
            raise ValueError("bad shape")
        if not all(type(extent) is int and 0 <= extent < 2**31 for extent in shape):
            raise ValueError("bad extent in shape")
        dtype, buffer = DTYPES[name], memoryview(self._frames_in[index]).cast("B")
        num_bytes = math.prod(shape) * dtype.itemsize
        if buffer.nbytes != num_bytes or num_bytes > self._limits.max_array_bytes:
            raise ValueError(f"{name} {tuple(shape)} needs {num_bytes} bytes, the frame has {buffer.nbytes}")
        self._num_viewed += 1
        array = np.frombuffer(buffer, np.uint8).view(dtype) if num_bytes else np.empty(0, dtype)
        # Frames may start anywhere in a receive buffer, and kernels need aligned rows.  Whole numbers are what gets
        # checked, and in shared memory their sender could change them afterwards.
        if not array.flags.aligned or dtype.kind == "i":
            array = np.frombuffer(bytearray(buffer), np.uint8).view(dtype)
        return array.reshape(shape)
