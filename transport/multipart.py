"""A message's frames through a ZeroMQ socket, and the checksum behind them where nothing else tells damage.

    the message's frames │ xxh3_64 over their lengths and their bytes, u64

TCP's own sum is 16 bits wide and lets through what bad memory in a switch or a card does to a few packets of a billion;
attention over such a number is a wrong token that nobody sees.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash
import zmq

from transport.codec import LIMITS, Buffer
from transport.errors import BrokenOff, ProtocolError

# Frames under this size are cheaper to copy than to track (pyzmq's own threshold is the same order).
COPY_BELOW_BYTES = 16 << 10

_CHECKSUM = struct.Struct("<Q")


def send(over: zmq.Socket, frames: Sequence[Buffer]) -> None:
    """Interrupted, it leaves nobody the wiser: whoever calls sees to it that `end_message` comes before the next one.

    Signals are looked at within pyzmq's calls, when the frame may have gone already, or not.
    """
    last, sent = len(frames) - 1, 0
    try:
        for i, frame in enumerate(frames):
            large = memoryview(frame).nbytes >= COPY_BELOW_BYTES
            over.send(frame, zmq.SNDMORE if i < last else 0, copy=not large)
            sent += 1
    except BaseException as error:
        is_open = 0 < sent <= last if isinstance(error, zmq.ZMQError) else sent < last  # one that fails sends nothing
        if is_open:
            end_message(over)
        raise


def end_message(over: zmq.Socket) -> None:
    """So that the next message is not taken for the rest of one that was broken off.

    Its reader knows one by the empty frame at its end (see `BrokenOff`), and so this does no harm where none is open.
    """
    try:
        over.send(b"", zmq.NOBLOCK)
    except zmq.ZMQError:  # nobody is there to take it
        pass


def drop_rest(over: zmq.Socket) -> None:
    """Of a message whose reader was interrupted."""
    while over.get(zmq.RCVMORE):
        over.recv(zmq.NOBLOCK)


def receive(over: zmq.Socket, *, has_checksum: bool) -> list[memoryview]:
    """What is left of a multipart message that is there.

    Interrupted, it leaves the rest to `drop_rest`.  Raises ProtocolError for too many parts, once they are read to
    their end, and for a checksum that does not fit.
    """
    max_frames = LIMITS.max_frames + has_checksum
    frames, num_frames, more = [], 0, True
    while more:
        frame = over.recv(zmq.NOBLOCK, copy=False)
        num_frames, more = num_frames + 1, frame.more
        if num_frames <= max_frames:
            frames.append(frame.buffer)
    if num_frames > max_frames:
        raise ProtocolError(f"a message of {num_frames} frames; the limit is {max_frames}")
    if has_checksum:
        _check(frames)
    return frames


def checksum(frames: Sequence[Buffer]) -> bytes:
    lengths = [memoryview(frame).nbytes for frame in frames]
    digest = xxhash.xxh3_64(struct.pack(f"<{len(lengths)}Q", *lengths))
    for frame in frames:
        digest.update(frame)
    return _CHECKSUM.pack(digest.intdigest())


def _check(frames: list[memoryview]) -> None:
    """Takes the checksum off."""
    told = frames.pop()
    if not told.nbytes:
        raise BrokenOff("a message that its sender broke off")
    if not frames or told.nbytes != _CHECKSUM.size:
        raise ProtocolError("a message without a checksum: the other end is no FastDecode, or another version of it")
    if told != checksum(frames):
        raise ProtocolError("a message that was damaged on its way: its checksum is that of another one")
