"""The frame codec: everything that can be said survives the trip, and nothing else gets through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
    Limits,
    Message,
    MessageTooLarge,
    Ping,
    Pong,
    ProtocolError,
    Release,
    Rewind,
    Rows,
    Welcome,
)

counts = st.integers(0, 2**31 - 1)
positives = st.integers(1, 2**31 - 1)
tokens = st.integers(0, 2**63 - 1)
texts = st.text(max_size=50)


def columns(n: int, dtype: str) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.dtype(dtype), n)


def floats(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    bits = st.binary(min_size=4 * int(np.prod(shape)), max_size=4 * int(np.prod(shape)))
    return st.builds(
        lambda raw, name: (
            np.frombuffer(raw, np.uint8)[: int(np.prod(shape)) * DTYPES[name].itemsize]
            .view(DTYPES[name])
            .reshape(shape)
        ),
        bits,
        st.sampled_from(FLOAT_DTYPES),
    )


@st.composite
def layer_specs(draw: st.DrawFn) -> LayerSpec:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    finite = st.floats(-10, 10, width=32)
    return LayerSpec(
        kv_heads * group,
        kv_heads,
        draw(st.integers(1, 256)),
        draw(finite),
        draw(st.none() | positives),
        draw(st.none() | st.floats(0.5, 100)),
        draw(st.none() | st.tuples(*[finite] * (kv_heads * group))),
    )


@st.composite
def messages(draw: st.DrawFn) -> Message:
    n, rows, queries = draw(st.integers(0, 5)), draw(st.integers(0, 4)), draw(st.integers(0, 2))
    queries = min(queries, rows)
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return draw(
        st.one_of(
            st.builds(
                Hello,
                st.lists(layer_specs(), min_size=1, max_size=3).map(tuple),
                st.sampled_from(FLOAT_DTYPES),
                st.integers(1, 4096),
                st.none() | st.integers(0, 2**62),
            ),
            st.builds(Welcome, positives, positives, positives, texts, positives, positives),
            st.builds(Admit, columns(n, "int64"), columns(n, "int32")),
            st.builds(Fork, columns(n, "int64"), columns(n, "int64"), columns(n, "int32")),
            st.builds(
                Rows,
                tokens,
                counts,
                columns(n, "int64"),
                *[columns(n, "int32")] * 3,
                st.none() | columns(n, "int32"),
                st.booleans(),
            ),
            st.builds(
                Attend,
                tokens,
                counts,
                counts,
                floats((queries, heads, dim)),
                floats((rows, 1, dim)),
                floats((rows, 1, dim)),
            ),
            st.builds(Attended, tokens, counts, counts, floats((rows, heads, dim))),
            st.builds(
                Attended, tokens, counts, counts, floats((rows, heads, dim)), lse=st.just(np.ones((rows, heads), "f4"))
            ),
            st.builds(Release, columns(n, "int64")),
            st.builds(Rewind, columns(n, "int64"), columns(n, "int32")),
            st.builds(Ping, tokens),
            st.builds(Pong, tokens),
            st.builds(Goodbye, st.booleans()),
            st.builds(Failure, texts, texts),
        )
    )


def as_plain(message: Message) -> object:
    """Comparable: arrays become their type, shape and bytes."""
    return type(message).__name__, [
        (value.dtype.name, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for value in (getattr(message, name) for name in message.__struct_fields__)
    ]


@given(messages(), st.integers(0, 2**64 - 1))
def test_round_trip(message: Message, session: int) -> None:
    codec = Codec()
    envelope = codec.decode([bytes(frame) for frame in codec.encode(session, message)])
    assert envelope.session == session
    assert as_plain(envelope.message) == as_plain(message)


@given(st.lists(st.binary(max_size=200), max_size=12))
@example([b"FDEC\x01\x00\x00\x00" + bytes(8)])
@example([b"FDEC\x01\x00\x00\x00" + bytes(8) + b"\x91\xa5\xc1dmit"])  # a tag that is no text
@example([b"FDEC\x01\x00\x00\x00" + bytes(8) + b"\x91" * 5000])
def test_arbitrary_bytes(frames: list[bytes]) -> None:
    """Never anything but a message or a ProtocolError."""
    try:
        Codec().decode(frames)
    except ProtocolError:
        pass


@settings(max_examples=1000)
@given(messages(), st.data())
def test_damaged_messages(message: Message, data: st.DataObject) -> None:
    """A flipped byte, a cut, an added or lost frame: a message or a ProtocolError, and arrays that fit their frames."""
    codec = Codec()
    frames = [bytearray(frame) for frame in codec.encode(7, message)]
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(frames) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "drop", "add"]))
        if kind == "flip" and frames[index]:
            position = data.draw(st.integers(0, len(frames[index]) - 1))
            frames[index][position] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del frames[index][data.draw(st.integers(0, len(frames[index]))) :]
        elif kind == "drop" and len(frames) > 1:
            del frames[index]
        elif kind == "add":
            frames.insert(index, bytearray(data.draw(st.binary(max_size=40))))
    try:
        decoded = codec.decode(frames).message
    except ProtocolError:
        return
    for name in decoded.__struct_fields__:
        value = getattr(decoded, name)
        if isinstance(value, np.ndarray):
            assert value.nbytes <= sum(map(len, frames))


def test_views_not_copies() -> None:
    q = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    frames = Codec().encode(0, Attended(0, 0, 0, q))
    assert np.shares_memory(np.frombuffer(frames[1], np.float32), q)
    decoded = Codec().decode(frames).message
    assert isinstance(decoded, Attended) and np.shares_memory(decoded.o, q)


def test_unaligned_frames_become_aligned_arrays() -> None:
    q = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    header, body = Codec().encode(0, Attended(0, 0, 0, q))
    shifted = memoryview(bytearray(b"x" + bytes(body)))[1:]
    decoded = Codec().decode([header, shifted]).message
    assert isinstance(decoded, Attended) and decoded.o.flags.aligned and np.array_equal(decoded.o, q)


def test_limits_hold_both_ways() -> None:
    q = np.zeros((4, 1, 4), np.float32)
    message = Attended(0, 0, 0, q)
    with pytest.raises(MessageTooLarge, match="limit is 63"):
        Codec(Limits(max_array_bytes=63)).encode(0, message)
    with pytest.raises(ProtocolError):
        Codec(Limits(max_array_bytes=63)).decode(Codec().encode(0, message))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attend(0, 0, 0, np.zeros((1, 2, 4)), np.zeros((1, 2, 4)), np.zeros((1, 2, 4))),  # float64
        lambda: Attend(0, 0, 0, *[np.zeros((2, 4), np.float32)] * 3),
        lambda: Attend(0, 0, 0, np.zeros((1, 1, 4), np.float32), *[np.zeros((1, 1, 5), np.float32)] * 2),
        lambda: Attended(0, 0, 0, np.zeros((1, 2, 4), np.float32), lse=np.zeros((1, 1), np.float32)),
        lambda: Attended(0, 0, 0, np.zeros((1, 2, 4), np.float32), lse=np.zeros((1, 2), np.float16)),
        lambda: Admit(np.zeros(2, np.int64), np.zeros(3, np.int32)),
        lambda: Admit(np.zeros(2, np.int32), np.zeros(2, np.int32)),
        lambda: LayerSpec(5, 2, 64, 1.0),
        lambda: LayerSpec(4, 2, 64, float("nan")),
        lambda: LayerSpec(4, 2, 64, 1.0, softcap=0.0),
        lambda: LayerSpec(4, 2, 64, 1.0, sinks=(1.0,)),
        lambda: LayerSpec(1, 1, 64, 1.0, sinks=(float("inf"),)),
        lambda: Hello((LayerSpec(4, 2, 64, 1.0),), "float64", 16),
    ],
)
def test_wrong_shapes_cannot_even_be_said(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_big_endian_arrays_do_not_travel() -> None:
    with pytest.raises(ValueError, match=">f4"):
        Attended(0, 0, 0, np.zeros((1, 1, 4), ">f4"))
    with pytest.raises(TypeError, match="little-endian"):
        Codec().encode(0, Release(np.zeros(3, ">i8")))


def test_oversized_header_is_refused() -> None:
    with pytest.raises(ProtocolError, match="oversized"):
        Codec().decode([bytes(Codec().encode(0, Ping(1))[0]) + bytes(5 << 20)])
