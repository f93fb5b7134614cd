"""`bench/fuzz.py` in small: garbage and lies for the codec and for live R-workers."""

from __future__ import annotations

import os
from collections import Counter
from typing import get_args

import pytest

from bench import fuzz_codec
from bench.fuzz_codec import feed, guided, mutate, pack, unpack
from bench.fuzz_messages import Maker
from bench.fuzz_worker import KV_MIB, STAGING_MIB, attack
from transport import Codec, ProtocolError
from transport.messages import ANY_MESSAGE

SEED = int(os.environ.get("FASTDECODE_SEED", "0"))


def test_codec() -> None:
    record = mutate(30_000, SEED)
    assert "failure" not in record, record
    assert 1_000 < record["valid"] < 29_000, "harms that leave a message, and harms that do not"


@pytest.mark.skipif(not fuzz_codec.IS_GUIDED, reason="atheris is not installed")
def test_guided() -> None:
    record = guided(5_000, SEED)
    assert "failure" not in record and record["coverage"] > 50, record


def test_makers_reach_everything() -> None:
    """All kinds are made, what is made is valid, and frames survive libFuzzer's one string of bytes."""
    maker, codec = Maker(SEED), Codec()
    kinds = Counter()
    for _ in range(500):
        message = maker.message()
        frames = maker.frames(message)
        assert feed(codec, frames) and unpack(pack(frames)) == frames
        kinds[type(message).__name__] += 1
    assert len(kinds) == len(get_args(ANY_MESSAGE))


def test_a_codec_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Codec, frames: list[bytes]) -> object:
        if len(frames) > 3 and b"float16" in frames[0]:
            raise KeyError("not checked")
        raise ProtocolError("refused")

    monkeypatch.setattr(fuzz_codec.Codec, "decode", decode)
    record = mutate(30_000, SEED)
    assert "KeyError" in record["failure"] and "--first-batch 0" in record["failure"] and record["frames_hex"]


@pytest.mark.parametrize("num_frames", [1_500, pytest.param(8_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("transport", ["shm", "ipc", "tcp"])
def test_worker(transport: str, num_frames: int) -> None:
    record = attack(transport, num_frames, SEED, num_strange=1)
    assert "failure" not in record, record["failure"]
    answers = record["answers"]
    assert {"Welcome", "Attended", "Pong", "Failure: ProtocolError", "Failure: BadRequest"} <= answers.keys()
    assert record["memory_over_start_mib"] < KV_MIB + STAGING_MIB
