"""A peer's side of a conversation that nearly makes sense: it gets far into a session before it goes wrong."""

from __future__ import annotations

from collections import deque

import numpy as np

from bench.fuzz_messages import SPECS, Frames, Maker
from transport import Admit, Attend, Fork, Goodbye, Hello, Message, Ping, Release, Rewind, Rows

_MOST_TOKENS = 131_072  # of a sequence; what 64 MiB hold of these layers
_SEQUENCES = 8


class Talk:
    """Right messages in the right order, one in fifteen of them wrong; what seems stored may be gone."""

    def __init__(self, maker: Maker, strange: float = 0.0) -> None:
        """strange: share of the sessions with layers nobody has seen."""
        self._maker, self._strange = maker, strange
        self._due: deque[Message] = deque()
        self._begin()

    def next(self) -> Frames:
        r, maker = self._maker.random, self._maker
        luck = r.random()
        if luck < 0.02:
            message = maker.message()
        elif luck < 0.04:
            message = self._begin()
        elif luck < 0.043:
            message = maker.overfull_hello()
        else:
            message = self._due.popleft() if self._due else self._go_on()
        session = self._session if r.random() < 0.995 else r.getrandbits(64)
        frames = maker.frames(message, session)
        return maker.damage(frames) if r.random() < 0.05 else frames

    def _begin(self) -> Message:
        r = self._maker.random
        self._session, self._step, self._stored = r.getrandbits(64), 0, dict[int, int]()
        self._due.clear()
        if r.random() < self._strange:
            return self._maker.strange_hello()
        return self._maker.hello() if r.random() < 0.2 else Hello(SPECS, "float32", 16)

    def _go_on(self) -> Message:
        r, stored = self._maker.random, self._stored
        kinds = ("admit", "step", "step", "step", "step", "fork", "release", "rewind", "ping", "goodbye", "greed")
        kind = r.choice(kinds)
        if kind == "admit" or not stored:
            new = [seq_id for seq_id in range(_SEQUENCES) if seq_id not in stored][: r.randint(1, 3)] or [0]
            stored |= dict.fromkeys(new, 0)
            return Admit(_ids(new), _ints([r.choice((40, 400, 4000))] * len(new)))
        chosen = r.sample(sorted(stored), r.randint(1, len(stored)))
        match kind:
            case "step":
                return self._begin_step(chosen)
            case "fork":
                return self._fork(chosen)
            case "release":
                for seq_id in chosen:
                    del stored[seq_id]
                return Release(_ids(chosen))
            case "rewind":
                stored |= {seq_id: r.randint(0, stored[seq_id]) for seq_id in chosen}
                return Rewind(_ids(chosen), _ints([stored[seq_id] for seq_id in chosen]))
            case "greed":
                return self._ask_for_much()
            case "goodbye" if r.random() < 0.2:
                return Goodbye(r.random() < 0.5)
            case _:
                return Ping(r.getrandbits(40))

    def _begin_step(self, chosen: list[int]) -> Message:
        r, maker = self._maker.random, self._maker
        is_decode = r.random() < 0.6
        counts = [1 if is_decode else r.choice((0, 1, 2, 17, 300)) for _ in chosen]
        queries = [1 if is_decode else r.randint(count == 0, count or 2) for count in counts]
        query_starts = _ints([r.choice((0, 1, 40, 700)) for _ in chosen]) if r.random() < 0.2 else None
        starts = [self._stored[seq_id] for seq_id in chosen]
        self._stored |= {seq_id: start + n for seq_id, start, n in zip(chosen, starts, counts, strict=True)}
        self._step += 1
        micro_batch = r.randrange(3)
        for layer, spec in enumerate(SPECS):
            if r.random() < 0.98:
                k, v = (maker.floats((sum(counts), spec.num_kv_heads, spec.head_dim)) for _ in "kv")
                q = maker.floats((sum(queries), spec.num_q_heads, spec.head_dim))
                self._due.append(Attend(self._step, micro_batch, layer, q, k, v))
        columns = _ids(chosen), _ints(starts), _ints(counts), _ints(queries), query_starts
        return Rows(self._step, micro_batch, *columns, is_partial=r.random() < 0.3)

    def _fork(self, parents: list[int]) -> Message:
        """New ones begin with tokens of these."""
        r, stored = self._maker.random, self._stored
        children = [seq_id for seq_id in range(_SEQUENCES, 2 * _SEQUENCES) if seq_id not in stored]
        parents = parents[: min(3, len(children))]
        children = children[: len(parents)]
        counts = [r.choice((stored[parent], r.randint(0, stored[parent]))) for parent in parents]
        stored |= dict(zip(children, counts, strict=True))
        self._due.append(Fork(_ids(children), _ids(parents), _ints(counts)))
        return Admit(_ids(children), _ints([4000] * len(children)))

    def _ask_for_much(self) -> Message:
        """Small messages that ask for a lot of memory."""
        r = self._maker.random
        if r.random() < 0.05:
            many = np.arange(100, 100 + r.choice((1000, 100_000)))
            return Admit(many, np.full(len(many), 40, np.int32))
        seq_id, count = r.randrange(50, 10**6), r.choice((_MOST_TOKENS, 20_000))
        queries = r.choice((0, 1, count, count))
        self._step += 1
        self._due.append(Rows(self._step, r.randrange(64), _ids([seq_id]), *(_ints([n]) for n in (0, count, queries))))
        self._due.append(Rewind(_ids([seq_id]), _ints([0])))
        return Admit(_ids([seq_id]), _ints([_MOST_TOKENS]))


def _ids(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)
