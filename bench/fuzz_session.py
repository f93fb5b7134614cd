"""A session like any S-worker's, and an R-worker that nobody has disturbed: what the answers have to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.fuzz_messages import SPECS
from cpu_attention import RWorker
from transport import Admit, Attend, Attended, Hello, Message, Release, Rows, Welcome

KV_MIB = 64
TIMEOUT_S = 120.0


class Untouched:
    """An R-worker that is called by hand, in the place of a channel to one."""

    def __init__(self) -> None:
        self._worker = RWorker(kv_cache_bytes=KV_MIB << 20)
        self._reply: Message | None = None

    def send(self, message: Message, timeout_s: float) -> None:
        self._reply = self._worker.handle(1, message)

    def recv(self, timeout_s: float) -> Message:
        assert self._reply
        return self._reply


def session(channel: Any) -> Any:
    """Prompts, then decode steps of two sequences: the answers, Welcome first."""
    generator = np.random.default_rng(0)

    def ask(message: Message) -> Message:
        channel.send(message, timeout_s=TIMEOUT_S)
        return channel.recv(timeout_s=TIMEOUT_S)

    welcome = ask(Hello(SPECS, "float32", 16))
    yield welcome
    if not isinstance(welcome, Welcome):
        return
    ids, stored = np.array([3, 7], np.int64), np.array([0, 0], np.int32)
    channel.send(Admit(ids, np.array([100, 100], np.int32)), timeout_s=TIMEOUT_S)
    for step in range(6):
        counts = np.array([1, 1] if step else [40, 33], np.int32)
        channel.send(Rows(step, 0, ids, stored, counts, np.array([1, 1], np.int32)), timeout_s=TIMEOUT_S)
        for layer, spec in enumerate(SPECS):
            shapes = ((2, spec.num_q_heads), (counts.sum(), spec.num_kv_heads), (counts.sum(), spec.num_kv_heads))
            q, k, v = (generator.standard_normal((*shape, spec.head_dim)).astype(np.float32) for shape in shapes)
            yield ask(Attend(step, 0, layer, q, k, v))
        stored = stored + counts
    channel.send(Release(ids), timeout_s=TIMEOUT_S)


def equal(one: Message, other: Message) -> bool:
    if isinstance(one, Attended) and isinstance(other, Attended):
        return one.o.shape == other.o.shape and bool(np.allclose(one.o, other.o, atol=1e-6))
    return isinstance(one, Welcome) and isinstance(other, Welcome) and one.num_blocks == other.num_blocks
