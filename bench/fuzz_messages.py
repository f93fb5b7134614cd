"""What a fuzzer sends: valid messages of every kind, conversations that nearly make sense, and the damage done to both.

Knows the protocol and a source of randomness, no sockets and no processes.  The same seed gives the same frames.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from msgspec import structs

from transport import (
    DTYPES,
    FLOAT_DTYPES,
    Admit,
    Attend,
    Attended,
    Codec,
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

Frames = list[bytes]

# Layers that are compiled once; what random ones cost is seconds each.
SPECS = (LayerSpec(4, 2, 16, 0.25), LayerSpec(2, 1, 24, 0.3, window=5, softcap=20.0, sinks=(0.5, -1.0)))
BLOCK_TOKENS = 16
_PREFIX_BYTES = 16
_ODD = (
    0, 1, -1, 2, 15, 16, 17, 127, 128, 255, 256, 4096, 4097, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63),
    2**64 - 1, float("nan"), float("inf"), -0.0, 1e300, "", "float32", "Attend", "int4", "\0", "x" * 300, b"",
    None, True, [], [[]], b"\xff" * 9, [1, "int64", [3]], [1, "float32", [0, 2**31 - 1, 2**31 - 1]], {}, {"a": 1},
)  # fmt: skip


class Maker:
    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self._arrays = np.random.default_rng(self.random.getrandbits(64))
        self._codec = Codec()
        self._kinds: tuple[Callable[[], Message], ...] = (
            self.hello, self._welcome, self.admit, self.step, self.attend, self._attended,
            lambda: Release(self._ids(self._few())), self._rewind, lambda: Ping(self._count()),
            self._fork, lambda: Pong(self._count()), lambda: Goodbye(self.random.random() < 0.5),
            lambda: Failure("Busy", "x" * self.random.randrange(50)),
        )  # fmt: skip

    def message(self) -> Message:
        """Any of them."""
        return self.random.choice(self._kinds)()

    def frames(self, message: Message, session: int | None = None) -> Frames:
        nonce = self.random.getrandbits(64) if session is None else session
        return [bytes(frame) for frame in self._codec.encode(nonce, message)]

    def hello(self) -> Hello:
        budget = self.random.choice((None, None, 0, 1, 1 << 14, 1 << 20, 1 << 40, 2**62))
        return Hello(SPECS, "float32", BLOCK_TOKENS, budget)

    def strange_hello(self) -> Hello:
        """Of layers nobody has seen: each takes a compilation."""
        r = self.random
        layers = []
        for _ in range(r.choice((1, 1, 2, 3))):
            kv_heads, group = r.choice((1, 2, 8, 64)), r.choice((1, 3, 8, 64))
            layers.append(LayerSpec(kv_heads * group, kv_heads, r.choice((1, 8, 48, 112)), r.uniform(-2, 2)))
        budget = r.choice((None, 2**62, r.getrandbits(30)))
        return Hello(tuple(layers), r.choice(("float32", "bfloat16", "int8", "int4")), r.choice((16, 64, 4096)), budget)

    def overfull_hello(self) -> Hello:
        """Valid, and more than anybody should do for it: layers that all differ, or that hold more than there is."""
        r = self.random
        if r.random() < 0.5:
            return Hello(
                tuple(LayerSpec(1, 1, 1 + i % 1024, 1.0, window=1 + i) for i in range(4096)), "int4", 16, 2**62
            )
        return Hello((LayerSpec(4096, 4096, 1024, 1.0),) * r.choice((1, 4096)), "float32", 4096, 2**62)

    def admit(self) -> Admit:
        count = self._few()
        return Admit(self._ids(count), self._ints(count))

    def step(self) -> Rows:
        count, r = self._few(), self.random
        rows = Rows(self._count(), self._index(), self._ids(count), *(self._ints(count) for _ in range(3)))
        query_starts = self._ints(count) if r.random() < 0.3 else None
        return structs.replace(rows, query_starts=query_starts, is_partial=r.random() < 0.3)

    def attend(self) -> Attend:
        rows, dim, dtype = self._few(), self.random.choice((1, 16, 24)), self.random.choice(FLOAT_DTYPES)
        queries = self.random.randint(0, rows)
        k, v = (self.floats((rows, self.random.choice((1, 2)), dim), dtype) for _ in "kv")
        q = self.floats((queries, self.random.choice((1, 2, 4)), dim), dtype)
        return Attend(self._count(), self._index(), self._index(), q, k, v if v.shape == k.shape else k)

    def floats(self, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        """Any bits, NaN and infinity among them."""
        raw = self._arrays.bytes(int(np.prod(shape)) * DTYPES[dtype].itemsize)
        return np.frombuffer(raw, np.uint8).view(DTYPES[dtype]).reshape(shape)

    def damage(self, frames: Frames) -> Frames:
        """One to three harms, each of which may leave a valid message."""
        frames = list(frames)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            self.random.choice(_HARMS)(self.random, frames)
        return frames

    def _welcome(self) -> Welcome:
        return Welcome(self.random.randint(1, 2**31 - 1), BLOCK_TOKENS, 2048, "host", 1, 1)

    def _attended(self) -> Attended:
        return Attended(self._count(), self._index(), self._index(), self.floats((self._few(), 2, 16)))

    def _fork(self) -> Fork:
        count = self._few()
        return Fork(self._ids(count), self._ids(count), self._ints(count))

    def _rewind(self) -> Rewind:
        count = self._few()
        return Rewind(self._ids(count), self._ints(count))

    def _few(self) -> int:
        return self.random.choice((0, 1, 1, 2, 3, 5, 40))

    def _index(self) -> int:
        return self.random.choice((0, 0, 0, 1, 1, 2, 63, 2**31 - 1))

    def _count(self) -> int:
        return self.random.choice((0, 1, self.random.getrandbits(63)))

    def _ids(self, count: int) -> np.ndarray:
        return self._arrays.integers(*self.random.choice(((0, 8), (0, 8), (-(2**63), 2**63 - 1))), count, np.int64)

    def _ints(self, count: int) -> np.ndarray:
        return self._arrays.integers(*self.random.choice(((0, 4), (0, 40), (-(2**31), 2**31 - 1))), count, np.int32)


def _flip(r: random.Random, frames: Frames) -> None:
    index = r.randrange(len(frames)) if frames else 0
    if frames and frames[index]:
        changed = bytearray(frames[index])
        for _ in range(r.choice((1, 1, 2, 8))):
            changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
        frames[index] = bytes(changed)


def _cut(r: random.Random, frames: Frames) -> None:
    if frames:
        index = r.randrange(len(frames))
        frames[index] = frames[index][: r.randint(0, len(frames[index]))]


def _lengthen(r: random.Random, frames: Frames) -> None:
    if frames:
        frames[r.randrange(len(frames))] += r.randbytes(r.choice((1, 4, 64, 9000)))


def _swap(r: random.Random, frames: Frames) -> None:
    r.shuffle(frames)


def _drop(r: random.Random, frames: Frames) -> None:
    if len(frames) > 1:
        del frames[r.randrange(len(frames))]


def _add(r: random.Random, frames: Frames) -> None:
    for _ in range(r.choice((1, 1, 2, 12))):
        frames.insert(r.randint(0, len(frames)), r.choice((b"", r.randbytes(r.randrange(64)), *frames[:1])))


def _prefix(r: random.Random, frames: Frames) -> None:
    """Magic, version, number of arrays or nonce."""
    if frames and len(frames[0]) >= _PREFIX_BYTES:
        at, length = r.choice(((0, 4), (4, 2), (6, 2), (8, 8)))
        frames[0] = frames[0][:at] + r.randbytes(length) + frames[0][at + length :]


def _nest(r: random.Random, frames: Frames) -> None:
    if frames:
        opening = r.choice(
            (b"\x91", b"\x81\xa1a", b"\x92\xa5Hello", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff")
        )
        frames[0] = frames[0][:_PREFIX_BYTES] + opening * r.choice((1, 40, 3000))


def _change(r: random.Random, frames: Frames) -> None:
    """One value of the message becomes another one: a shape, a dtype, a count, a tag."""
    if not frames:
        return
    try:
        body = msgspec.msgpack.decode(frames[0][_PREFIX_BYTES:])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    place: Any = body
    while isinstance(place, list) and place:
        index = r.randrange(len(place))
        if isinstance(place[index], list) and place[index] and r.random() < 0.8:
            place = place[index]
            continue
        kind = r.random()
        if kind < 0.8:
            place[index] = copy.deepcopy(r.choice(_ODD))
        elif kind < 0.9:
            del place[index]
        else:
            place.insert(index, copy.deepcopy(r.choice(_ODD)))
        break
    frames[0] = frames[0][:_PREFIX_BYTES] + msgspec.msgpack.encode(body)


_HARMS = (_flip, _cut, _lengthen, _swap, _drop, _add, _prefix, _nest, _change, _change, _change)
