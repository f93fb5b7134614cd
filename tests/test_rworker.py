"""The R-worker as a function: messages in, messages out; and the loop around it, fed with garbage."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpu_attention import KV_DTYPES, RWorker, kernel, reference, serve
from cpu_attention.multicore import Kernel
from cpu_attention.warm_kernels import MAX_KINDS
from transport import (
    Admit,
    Attend,
    Attended,
    Channel,
    Failure,
    Fork,
    Goodbye,
    Hello,
    LayerSpec,
    Listener,
    Message,
    Ping,
    Pong,
    Release,
    Rewind,
    Rows,
    Welcome,
    connect,
    listen,
)
from transport.messages import KV_DTYPE_NAMES

SPECS = (LayerSpec(4, 2, 16, 0.25), LayerSpec(2, 1, 24, 0.3, window=5, softcap=20.0, sinks=(0.5, -1.0)))
HELLO = Hello(SPECS, "float32", 16)
SESSION = 99


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture
def worker() -> Iterator[RWorker]:
    worker = RWorker(kv_cache_bytes=1 << 20, num_threads=2)
    assert isinstance(worker.handle(SESSION, HELLO), Welcome)
    yield worker
    worker.close()


def fails(worker: RWorker, message: Message, kind: str, text: str = "", session: int = SESSION) -> None:
    """Directly, or at the next Attend if the message has no answer of its own."""
    reply = worker.handle(session, message)
    if reply is None:
        reply = worker.handle(session, attend_message(SPECS[0], 0, 1, 1, 0, step=10**6))
    assert isinstance(reply, Failure), reply
    assert reply.kind == kind and text in reply.text, reply


def attend_message(spec: LayerSpec, layer: int, num_tokens: int, num_queries: int, seed: int, step: int = 1) -> Attend:
    generator = np.random.default_rng(seed)
    q = generator.standard_normal((num_queries, spec.num_q_heads, spec.head_dim)).astype(np.float32)
    k, v = (generator.standard_normal((num_tokens, spec.num_kv_heads, spec.head_dim)).astype(np.float32) for _ in "kv")
    return Attend(step, 0, layer, q, k, v)


def causal_attention(spec: LayerSpec, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One sequence straight from the formula; q are its last rows."""
    group, rows = spec.num_q_heads // spec.num_kv_heads, []
    for i, query in enumerate(q):
        position = len(k) - len(q) + i
        first = 0 if spec.window is None else max(0, position + 1 - spec.window)
        keys = np.repeat(k[first : position + 1], group, axis=1)
        values = np.repeat(v[first : position + 1], group, axis=1)
        scores = np.einsum("hd,thd->ht", query, keys) * spec.scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        weights = np.exp(scores)
        total = weights.sum(1) + (np.exp(np.array(spec.sinks)) if spec.sinks else 0)
        rows.append(np.einsum("ht,thd->hd", weights / total[:, None], values))
    return np.array(rows)


def test_prompt_then_decodes(worker: RWorker) -> None:
    """K, V of a prompt are appended without attending; each decode sees all of it and itself; so do chunks."""
    assert worker.handle(SESSION, Admit(ids(7, 8), ints(40, 40))) is None
    kept: dict[tuple[int, int], list[np.ndarray]] = {}
    plan = [  # per step: (sequence, start, tokens, queries)
        [(7, 0, 11, 0), (8, 0, 3, 0)],
        [(7, 11, 1, 1), (8, 3, 1, 1)],
        [(8, 4, 6, 6), (7, 12, 1, 1)],
        [(7, 13, 1, 1)],
    ]
    for step, rows in enumerate(plan):
        seqs, starts, counts, queries = zip(*rows, strict=True)
        assert worker.handle(SESSION, Rows(step, 0, ids(*seqs), ints(*starts), ints(*counts), ints(*queries))) is None
        for layer, spec in enumerate(SPECS):
            message = attend_message(spec, layer, sum(counts), sum(queries), seed=10 * step + layer, step=step)
            reply = worker.handle(SESSION, message)
            if sum(queries) == 0 and layer < len(SPECS) - 1:
                assert reply is None, "without queries there is one answer, after the last layer"
            else:
                assert isinstance(reply, Attended) and (reply.step, reply.layer) == (step, layer)
            token, query = 0, 0
            for seq, _, count, num_queries in rows:
                kv = kept.setdefault((seq, layer), [np.empty((0, *message.k.shape[1:]))] * 2)
                kv[0] = np.concatenate([kv[0], message.k[token : token + count]])
                kv[1] = np.concatenate([kv[1], message.v[token : token + count]])
                expected = causal_attention(spec, message.q[query : query + num_queries], *kv)
                if num_queries and isinstance(reply, Attended):
                    np.testing.assert_allclose(reply.o[query : query + num_queries], expected, atol=1e-5)
                token, query = token + count, query + num_queries


def one_step(worker: RWorker, rows: Rows, seed: int) -> list[tuple[Attend, Attended]]:
    """Every layer's."""
    assert worker.handle(SESSION, rows) is None
    asked = []
    for layer, spec in enumerate(SPECS):
        counts = int(rows.num_tokens.sum()), int(rows.num_queries.sum())
        message = attend_message(spec, layer, *counts, seed=seed + layer, step=rows.step)
        reply = worker.handle(SESSION, message)
        assert isinstance(reply, Attended), reply
        asked.append((message, reply))
    return asked


@pytest.mark.parametrize("cut", [1, 7, 16, 20])
def test_a_sequence_in_two_parts(cut: int) -> None:
    """K and V of its first tokens on one R-worker, of the others on another: merged, their answers are those of one."""
    workers = [RWorker(kv_cache_bytes=1 << 20, num_threads=number) for number in (1, 2, 1)]
    for worker in workers:
        worker.handle(SESSION, HELLO)
        worker.handle(SESSION, Admit(ids(1), ints(40)))
    whole, first, second = workers
    asked = one_step(whole, Rows(1, 0, ids(1), ints(0), ints(21), ints(21)), seed=0)
    for worker, part, begin in ((first, slice(0, cut), 0), (second, slice(cut, 21), cut)):
        num_tokens = part.stop - part.start
        worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(num_tokens), ints(0)))
        for layer, (message, _) in enumerate(asked):
            worker.handle(SESSION, Attend(1, 0, layer, message.q[:0], message.k[part], message.v[part]))
        # Of each query those that are not before the part see something of it, if it is within their window.
        rows = Rows(2, 0, ids(1), ints(num_tokens), ints(0), ints(21 - begin), ints(0), is_partial=True)
        assert worker.handle(SESSION, rows) is None
    for layer, (spec, (message, expected)) in enumerate(zip(SPECS, asked, strict=True)):
        parts = []
        for worker, begin in ((first, 0), (second, cut)):
            reply = worker.handle(SESSION, Attend(2, 0, layer, message.q[begin:], message.k[:0], message.v[:0]))
            assert isinstance(reply, Attended) and reply.lse is not None
            o, lse = np.zeros(message.q.shape), np.full(message.q.shape[:2], -np.inf)
            o[begin:], lse[begin:] = reply.o, reply.lse
            parts.append((o, lse))
        total = np.logaddexp(parts[0][1], parts[1][1])
        if spec.sinks:
            total = np.logaddexp(total, np.array(spec.sinks))
        merged = sum(o * np.exp(lse - total)[..., None] for o, lse in parts)
        np.testing.assert_allclose(merged, expected.o, atol=1e-5)
        window = spec.window or 100
        assert np.isneginf(parts[0][1][min(cut - 1 + window, 21) :]).all(), "they see nothing of the first part"
    for worker in workers:
        worker.close()


def test_queries_that_see_nothing(worker: RWorker) -> None:
    worker.handle(SESSION, Admit(ids(1), ints(40)))
    fails(worker, Rows(1, 0, ids(1), ints(0), ints(0), ints(3), ints(0)), "BadRequest", "sees none of the tokens")
    rows = Rows(1, 0, ids(1), ints(0), ints(0), ints(3), ints(0), is_partial=True)
    for _, reply in one_step(worker, rows, seed=0):
        assert reply.lse is not None and np.isneginf(reply.lse).all() and not reply.o.any()
    one_step(worker, Rows(2, 0, ids(1), ints(0), ints(20), ints(20)), seed=0)
    fails(worker, Rows(3, 0, ids(1), ints(20), ints(0), ints(2), ints(24)), "BadRequest", "sees none")  # by its window
    fails(worker, Rows(3, 0, ids(1), ints(20), ints(0), ints(0)), "BadRequest", "cannot append 0 at 20 with 0 queries")
    fails(worker, Rows(3, 0, ids(1), ints(20), ints(0), ints(1), ints(-1)), "BadRequest", "queries at -1")


def test_children_begin_with_their_parents_tokens(worker: RWorker) -> None:
    worker.handle(SESSION, Admit(ids(1, 2, 3), ints(60, 60, 20)))
    one_step(worker, Rows(1, 0, ids(1), ints(0), ints(37), ints(1)), seed=0)
    store = worker._session.store  # type: ignore[union-attr]
    free = store.num_free_blocks
    assert worker.handle(SESSION, Fork(ids(2, 3), ids(1, 1), ints(37, 16))) is None
    assert store.num_free_blocks == free - 1, "what is full is shared"
    for refused, kind, why in (
        (Fork(ids(9), ids(1), ints(1)), "UnknownSequence", ""),
        (Fork(ids(2), ids(1), ints(1)), "BadRequest", "holds 37 tokens already"),
        (Fork(ids(2, 2), ids(1, 1), ints(1, 1)), "BadRequest", "twice"),
    ):
        fails(worker, refused, kind, why)
        store.check_integrity()
    # Both go on alike: what they say is the same.
    rows = Rows(2, 0, ids(1, 2), ints(37, 37), ints(1, 1), ints(1, 1))
    assert worker.handle(SESSION, rows) is None
    for layer, spec in enumerate(SPECS):
        one = attend_message(spec, layer, 1, 1, seed=9 + layer, step=2)
        twice = Attend(2, 0, layer, *(np.repeat(array, 2, axis=0) for array in (one.q, one.k, one.v)))
        reply = worker.handle(SESSION, twice)
        assert isinstance(reply, Attended) and np.array_equal(reply.o[0], reply.o[1])


def test_nobody_begins_with_tokens_that_are_on_their_way(worker: RWorker) -> None:
    worker.handle(SESSION, Admit(ids(1, 2), ints(60, 60)))
    one_step(worker, Rows(1, 0, ids(1), ints(0), ints(20), ints(1)), seed=0)
    worker.handle(SESSION, Rows(2, 0, ids(1), ints(20), ints(5), ints(1)))
    fails(worker, Fork(ids(2), ids(1), ints(21)), "BadRequest", "still on their way")
    assert worker.handle(SESSION, Fork(ids(2), ids(1), ints(20))) is None


def test_reference_kernel_serves_too() -> None:
    workers = [RWorker(kv_cache_bytes=1 << 20), RWorker(kv_cache_bytes=1 << 20, kernel=reference)]
    replies = []
    for worker in workers:
        worker.handle(SESSION, HELLO)
        worker.handle(SESSION, Admit(ids(1), ints(20)))
        worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(20), ints(20)))
        replies.append(worker.handle(SESSION, attend_message(SPECS[0], 0, 20, 20, 0)))
        worker.close()
    np.testing.assert_allclose(replies[0].o, replies[1].o, atol=1e-5)  # type: ignore[union-attr]


def test_half_precision_on_the_wire(worker: RWorker) -> None:
    worker.handle(SESSION, Admit(ids(1), ints(4)))
    worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(4), ints(4)))
    full = attend_message(SPECS[0], 0, 4, 4, 0)
    half = Attend(1, 0, 0, *(array.astype(np.float16) for array in (full.q, full.k, full.v)))
    reply = worker.handle(SESSION, half)
    assert isinstance(reply, Attended) and reply.o.dtype == np.float16
    np.testing.assert_allclose(reply.o.astype(float), causal_attention(SPECS[0], full.q, full.k, full.v), atol=5e-3)


def test_out_of_turn(worker: RWorker) -> None:
    ok = attend_message(SPECS[0], 0, 3, 1, 0)
    fails(worker, ok, "BadRequest", "was not begun")
    worker.handle(SESSION, Admit(ids(1, 2), ints(10, 10)))
    fails(worker, Admit(ids(2), ints(3)), "SequenceExists")
    worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(3), ints(1)))
    fails(worker, attend_message(SPECS[1], 1, 3, 1, 0), "BadRequest", "layer 0 was due")
    fails(worker, attend_message(SPECS[0], 0, 2, 1, 0), "BadRequest", "wants k (3, 2, 16)")
    fails(worker, attend_message(SPECS[1], 0, 3, 1, 0), "BadRequest", "wants k")
    fails(worker, attend_message(SPECS[0], 0, 3, 1, 0, step=2), "BadRequest", "step 2 was not begun")
    assert isinstance(worker.handle(SESSION, ok), Attended)
    fails(worker, Rows(2, 0, ids(1), ints(0), ints(1), ints(1)), "BadRequest", "holds 3 tokens")
    fails(worker, Rows(2, 0, ids(1, 1), ints(3, 4), ints(1, 1), ints(1, 1)), "BadRequest", "twice")
    fails(worker, Rows(2, 0, ids(5), ints(0), ints(1), ints(1)), "UnknownSequence")
    fails(worker, Rows(2, 0, ids(1), ints(3), ints(8), ints(1)), "KVBudgetExceeded", "admitted for 10")
    fails(worker, Rows(2, 0, ids(2), ints(0), ints(-1), ints(0)), "BadRequest")
    fails(worker, Rows(2, 0, ids(2), ints(0), ints(1), ints(2)), "BadRequest")
    fails(worker, Release(ids(2, 9)), "UnknownSequence")
    fails(worker, Welcome(1, 1, 1, "", 1, 1), "BadRequest", "not for an R-worker")
    assert worker.handle(SESSION, Release(ids(2, 1))) is None  # the refused release freed nothing


def test_admission_is_all_or_nothing(worker: RWorker) -> None:
    fails(worker, Admit(ids(1, 2), ints(10, 10**9)), "KVBudgetExceeded")
    assert worker.handle(SESSION, Admit(ids(1), ints(10))) is None


def test_sessions(worker: RWorker) -> None:
    fails(worker, Admit(ids(1), ints(1)), "BadRequest", "does not know the session", session=5)
    assert worker.handle(5, Ping(3)) == Pong(3)
    assert isinstance(worker.handle(5, HELLO), Welcome)  # a new life: the old one's sequences are gone
    fails(worker, Admit(ids(1), ints(1)), "BadRequest", "does not know the session", session=SESSION)
    assert worker.handle(5, Goodbye()) is None and worker.session is None
    fails(worker, Admit(ids(1), ints(1)), "BadRequest", session=5)


def test_budget_of_a_session() -> None:
    worker = RWorker(kv_cache_bytes=1 << 20)
    small = worker.handle(1, Hello(SPECS, "float32", 16, kv_cache_bytes=1 << 16))
    large = worker.handle(1, Hello(SPECS, "float32", 16, kv_cache_bytes=1 << 40))
    assert isinstance(small, Welcome) and isinstance(large, Welcome)
    assert small.num_blocks * small.block_bytes <= 1 << 16 < large.num_blocks * large.block_bytes <= 1 << 20
    fails(worker, Hello(SPECS, "float32", 16, kv_cache_bytes=100), "KVBudgetExceeded", "bytes per block", session=1)


def test_small_messages_do_not_take_much(worker: RWorker) -> None:
    """A step's tables, sequences without a block, layers that all differ: counted before memory or time is taken."""
    num_blocks = worker.handle(SESSION, HELLO).num_blocks  # type: ignore[union-attr]
    many = np.arange(num_blocks + 1)
    fails(worker, Admit(many, np.ones(len(many), np.int32)), "KVBudgetExceeded", "there are")
    fails(worker, Release(np.arange(10**6)), "UnknownSequence", "1000000 sequences are named, 0 are here")
    worker.handle(SESSION, Goodbye())
    roomy = RWorker(kv_cache_bytes=256 << 20)
    assert isinstance(roomy.handle(SESSION, HELLO), Welcome)
    tokens = 500_000  # x 31,250 blocks x 4 bytes
    roomy.handle(SESSION, Admit(ids(1, 2), ints(tokens, 16)))
    fails(roomy, Rows(1, 0, ids(1), ints(0), ints(tokens), ints(tokens)), "BadRequest", "58.3 GiB beside its KV")
    assert roomy.handle(SESSION, Rows(2, 0, ids(1), ints(0), ints(500), ints(500))) is None
    assert isinstance(roomy.handle(SESSION, attend_message(SPECS[0], 0, 500, 500, 0, step=2)), Attended)
    roomy.close()


def test_steps_that_are_never_finished_are_counted() -> None:
    roomy = RWorker(kv_cache_bytes=256 << 20)
    roomy.handle(SESSION, HELLO)
    roomy.handle(SESSION, Admit(ids(1), ints(500_000)))
    roomy.handle(SESSION, Rows(0, 0, ids(1), ints(0), ints(400_000), ints(0)))
    for step in range(1, 2000):
        roomy.handle(SESSION, Rows(step, step, ids(1), ints(400_000 + 9 * (step - 1)), ints(9), ints(9)))
    reply = roomy.handle(SESSION, attend_message(SPECS[0], 0, 1, 1, 0))
    assert isinstance(reply, Failure) and "unfinished" in reply.text
    assert sum(batch.block_tables.nbytes for batch in roomy._session.micro_batches.values()) < 100 << 20  # type: ignore[union-attr]
    roomy.close()


def test_layers_that_all_differ() -> None:
    worker = RWorker(kv_cache_bytes=1 << 30)
    kinds = Hello(tuple(LayerSpec(1, 1, 1 + i, 1.0) for i in range(MAX_KINDS + 1)), "float32", 16)
    fails(worker, kinds, "BadRequest", f"takes {MAX_KINDS}")
    windows = Hello(tuple(LayerSpec(1, 1, 16, 1.0, window=1 + i) for i in range(65)), "float32", 16)
    fails(worker, windows, "BadRequest", "different windows")
    assert worker.session is None
    assert isinstance(worker.handle(SESSION, HELLO), Welcome)
    worker.close()


def test_a_step_without_memory_changes_nothing(worker: RWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError("none left")

    worker.handle(SESSION, Admit(ids(1), ints(40)))
    with monkeypatch.context() as patch:
        patch.setattr("cpu_attention.kvstore.KVStore.block_tables", no_memory)
        fails(worker, Rows(1, 0, ids(1), ints(0), ints(20), ints(1)), "InternalError", "none left")
    worker._session.store.check_integrity()  # type: ignore[union-attr]
    worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(20), ints(1)))
    with monkeypatch.context() as patch:
        patch.setattr("cpu_attention.multicore.State.empty", no_memory)
        fails(worker, attend_message(SPECS[0], 0, 20, 1, 0), "InternalError", "none left")
    assert isinstance(worker.handle(SESSION, attend_message(SPECS[0], 0, 20, 1, 0)), Attended)


def test_one_answer_per_attend(worker: RWorker) -> None:
    """A refused Admit spoils the Rows that relies on it, too; the S-worker hears of it once, and the first cause."""
    assert worker.handle(SESSION, Admit(ids(1), ints(10**9))) is None
    assert worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(3), ints(1))) is None
    reply = worker.handle(SESSION, attend_message(SPECS[0], 0, 3, 1, 0))
    assert isinstance(reply, Failure) and reply.kind == "KVBudgetExceeded"
    assert worker.handle(SESSION, Ping(1)) == Pong(1)
    worker.handle(SESSION, Admit(ids(1), ints(10)))
    worker.handle(SESSION, Rows(2, 0, ids(1), ints(0), ints(3), ints(1)))
    assert isinstance(worker.handle(SESSION, attend_message(SPECS[0], 0, 3, 1, 0, step=2)), Attended)


def test_refused_step_changes_nothing(worker: RWorker) -> None:
    """The first row would be fine; it must not be extended for the second one's sake."""
    worker.handle(SESSION, Admit(ids(1, 2), ints(10, 10)))
    fails(worker, Rows(1, 0, ids(1, 2), ints(0, 0), ints(5, 11), ints(0, 0)), "KVBudgetExceeded", "sequence 2")
    assert worker.handle(SESSION, Rows(2, 0, ids(1, 2), ints(0, 0), ints(5, 10), ints(0, 0))) is None
    made = [attend_message(spec, layer, 15, 0, 0, step=2) for layer, spec in enumerate(SPECS)]
    *others, last = (worker.handle(SESSION, message) for message in made)
    assert not any(others) and isinstance(last, Attended) and len(last.o) == 0


def test_what_was_written_behind_and_failed_is_told_by_the_next_answer(worker: RWorker) -> None:
    worker.handle(SESSION, Admit(ids(1, 2), ints(10, 10)))
    worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(5), ints(0)))
    worker.handle(SESSION, Rows(1, 1, ids(2), ints(0), ints(1), ints(1)))
    assert worker.handle(SESSION, attend_message(SPECS[0], 0, 4, 0, 0, step=1)) is None  # a token is missing
    made = attend_message(SPECS[0], 0, 1, 1, 0, step=1)
    reply = worker.handle(SESSION, Attend(1, 1, 0, made.q, made.k, made.v))
    assert isinstance(reply, Failure) and "got (4," in reply.text


def test_released_blocks_are_out_of_reach(worker: RWorker) -> None:
    """A micro-batch left unfinished cannot write into blocks that have a new owner."""
    worker.handle(SESSION, Admit(ids(1), ints(8)))
    worker.handle(SESSION, Rows(1, 0, ids(1), ints(0), ints(8), ints(0)))
    worker.handle(SESSION, Release(ids(1)))
    fails(worker, attend_message(SPECS[0], 0, 8, 1, 0), "BadRequest", "was not begun")


def test_finished_micro_batches_are_forgotten(worker: RWorker) -> None:
    worker.handle(SESSION, Admit(ids(1), ints(100)))
    for step in range(50):
        worker.handle(SESSION, Rows(step, step, ids(1), ints(step), ints(1), ints(1)))
        for layer, spec in enumerate(SPECS):
            made = attend_message(spec, layer, 1, 1, 0, step=step)
            assert isinstance(worker.handle(SESSION, Attend(step, step, layer, made.q, made.k, made.v)), Attended)
    assert worker._session and worker._session.micro_batches == {}


rows_of_a_step = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=3)  # tokens, queries


@settings(max_examples=150)
@given(steps=st.lists(rows_of_a_step, min_size=1, max_size=4), data=st.data())
def test_any_conversation(steps: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    """Right messages get the reference's answers; one wrong number gets a Failure, and a sound store."""
    workers = [RWorker(kv_cache_bytes=1 << 17), RWorker(kv_cache_bytes=1 << 17, kernel=reference)]
    stored = [0, 0, 0]
    for worker in workers:
        worker.handle(SESSION, HELLO)
        worker.handle(SESSION, Admit(ids(0, 1, 2), ints(40, 40, 40)))
    for number, drawn in enumerate(steps):
        rows = [(count, min(count, queries)) for count, queries in drawn]
        columns = [list(range(len(rows))), stored[: len(rows)], [c for c, _ in rows], [q for _, q in rows]]
        wrong = data.draw(
            st.none()
            | st.tuples(st.sampled_from([0, 1, 3]), st.integers(0, len(rows) - 1), st.integers(-50, 50).filter(bool))
        )
        if wrong is not None:
            column, row, by = wrong
            columns[column][row] += by
            if column == 0 and columns[0][row] in (0, 1, 2) and len(set(columns[0])) == len(rows):
                wrong = None if stored[columns[0][row]] == columns[1][row] else wrong
                if wrong is None:
                    return  # another sequence that stands at the same place: right, too
            if column == 3 and 0 <= columns[3][row] <= rows[row][0]:
                wrong = None  # another number of queries is right as well
        num_tokens, num_queries = sum(columns[2]), min(sum(columns[2]), max(0, sum(columns[3])))
        for layer, spec in enumerate(SPECS):
            made = attend_message(spec, layer, num_tokens, num_queries, seed=number, step=number)
            replies = []
            for worker in workers:
                if layer == 0:
                    step = Rows(number, 0, ids(*columns[0]), *(ints(*column) for column in columns[1:]))
                    assert worker.handle(SESSION, step) is None
                replies.append(worker.handle(SESSION, made))
                worker._session.store.check_integrity()  # type: ignore[union-attr]
            if num_queries == 0 and layer < len(SPECS) - 1:
                assert replies == [None, None]
            elif wrong is None:
                assert all(isinstance(reply, Attended) for reply in replies), replies
                np.testing.assert_allclose(replies[0].o, replies[1].o, atol=1e-4)  # type: ignore[union-attr]
            else:
                assert all(isinstance(r, Failure) and r.kind != "InternalError" for r in replies), replies
        if wrong is not None:
            return
        for row, (count, _) in enumerate(rows):
            stored[row] += count
    for worker in workers:
        worker.close()


@settings(max_examples=10)
@example(turns=[(5, 1, 2, 2)])
@example(turns=[(20, 3, 2, 3), (2, 2, 1, 0)])
@given(
    turns=st.lists(
        # new tokens, queries, layers that are done, tokens to go back
        st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 2), st.integers(0, 25)),
        min_size=1,
        max_size=5,
    )
)
@pytest.mark.parametrize("dtype", ["float16", "k8v4", "int4"])
@pytest.mark.parametrize("which", [kernel, reference], ids=["kernel", "reference"])
def test_rewound_tokens_leave_no_trace(dtype: str, which: Kernel, turns: list[tuple[int, int, int, int]]) -> None:
    """Steps, some of them broken off between two layers, and ways back: the answers then are to the bit those of a
    worker that was told only the tokens that stayed."""
    tried, fresh = (RWorker(kv_cache_bytes=1 << 17, kernel=which) for _ in range(2))
    for worker in (tried, fresh):
        worker.handle(SESSION, Hello(SPECS, dtype, 16))
        worker.handle(SESSION, Admit(ids(0), ints(200)))
    stays: list[list[Attend]] = []  # of each token that stays, one for each layer

    def tell(worker: RWorker, number: int, start: int, made: list[Attend], num_layers: int) -> list[np.ndarray]:
        worker.handle(SESSION, Rows(number, 0, ids(0), ints(start), ints(len(made[0].k)), ints(len(made[0].q))))
        replies = [worker.handle(SESSION, message) for message in made[:num_layers]]
        answers = [reply for reply in replies if isinstance(reply, Attended)]
        is_queried = len(made[0].q) > 0
        assert len(answers) == (num_layers if is_queried else max(0, num_layers - len(SPECS) + 1)), replies
        return [answer.o for answer in answers]

    for number, (count, queries, num_layers, back) in enumerate(turns):
        made = [attend_message(s, i, count, min(count, queries), 7 * number + i, number) for i, s in enumerate(SPECS)]
        tell(tried, number, len(stays), made, num_layers)
        stays += [[Attend(0, 0, m.layer, m.q[:0], m.k[i : i + 1], m.v[i : i + 1]) for m in made] for i in range(count)]
        # Tokens that did not go through all layers cannot stay.
        del stays[len(stays) - max(min(back, len(stays)), count if num_layers < len(SPECS) else 0) :]
        assert tried.handle(SESSION, Rewind(ids(0), ints(len(stays)))) is None
    if stays:
        rows = [
            Attend(0, 0, i, stays[0][i].q, *(np.concatenate([getattr(m[i], kv) for m in stays]) for kv in "kv"))
            for i in range(len(SPECS))
        ]
        tell(fresh, 0, 0, rows, len(SPECS))
    last = [attend_message(s, i, 3, 3, 99 + i, 100) for i, s in enumerate(SPECS)]
    outs = [tell(worker, 100, len(stays), last, len(SPECS)) for worker in (tried, fresh)]
    assert all(np.array_equal(*layer) for layer in zip(*outs, strict=True))
    for worker in (tried, fresh):
        worker.close()


@dataclass
class Served:
    channel: Channel
    address: str


@pytest.fixture
def served() -> Iterator[Served]:
    """A worker in its loop, as a thread."""
    worker = RWorker(kv_cache_bytes=1 << 20)
    listener = listen("inproc://served")
    thread = threading.Thread(target=serve, args=(listener, worker))
    thread.start()
    with connect(listener.address) as channel:
        yield Served(channel, listener.address)
    listener.close()
    thread.join(10)
    assert not thread.is_alive()


def ask(channel: Channel, message: Message) -> Message:
    channel.send(message, timeout_s=5)
    return channel.recv(timeout_s=30)


def test_serving_survives_garbage(served: Served) -> None:
    assert isinstance(ask(served.channel, HELLO), Welcome)
    for broken_off in ([b""], [b"FDEC", b""]):  # of a sender that was interrupted: passed over, see `BrokenOff`
        served.channel._link.send_frames(broken_off, 5)
    for garbage in ([], [b"FDEC"], [b"\xff" * 64, b"x"], [bytes(10_000)]):
        served.channel._link.send_frames(garbage, 5)
        refusal = served.channel._codec.decode(served.channel._link.recv_frames(5)).message
        assert isinstance(refusal, Failure) and refusal.kind == "ProtocolError"
    assert ask(served.channel, Ping(4)) == Pong(4)
    served.channel.send(Admit(ids(1), ints(3)), timeout_s=5)  # the session is still the same
    assert ask(served.channel, Ping(5)) == Pong(5)


def test_one_s_worker_at_a_time(served: Served) -> None:
    assert isinstance(ask(served.channel, HELLO), Welcome)
    second = connect(served.address)
    busy = ask(second, HELLO)
    assert isinstance(busy, Failure) and busy.kind == "Busy"
    served.channel.send(Goodbye(), timeout_s=5)
    assert isinstance(ask(second, HELLO), Welcome)
    second.close()


def test_answers_there_is_no_memory_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their place is taken by a Failure; what came and cannot be read for want of memory is refused."""
    assert isinstance(ask(served.channel, HELLO), Welcome)
    served.channel.send(Admit(ids(1), ints(3)), timeout_s=5)
    served.channel.send(Rows(1, 0, ids(1), ints(0), ints(3), ints(1)), timeout_s=5)
    attend, send = attend_message(SPECS[0], 0, 3, 1, 0), Listener.send

    def send_little(self: Listener, peer: Any, session: int, message: Message, *, timeout_s: float) -> None:
        if isinstance(message, Attended):
            raise MemoryError("none left for o")
        send(self, peer, session, message, timeout_s=timeout_s)

    with monkeypatch.context() as patch:
        patch.setattr(Listener, "send", send_little)
        assert ask(served.channel, attend) == Failure("MemoryError", "none left for o")
    with monkeypatch.context() as patch:
        patch.setattr("transport.codec.np.frombuffer", lambda *_: _out_of_memory())
        served.channel.send(Release(ids(1)), timeout_s=5)
        refusal = served.channel._codec.decode(served.channel._link.recv_frames(5)).message
        assert isinstance(refusal, Failure) and "none at all" in refusal.text
    assert ask(served.channel, Ping(1)) == Pong(1)


def _out_of_memory() -> np.ndarray:
    raise MemoryError("none at all")


def test_vanished_s_worker_is_replaced(served: Served) -> None:
    first = connect(served.address)
    assert isinstance(ask(first, HELLO), Welcome)
    first.close()  # no goodbye
    assert isinstance(ask(served.channel, HELLO), Welcome)


def test_not_everybody_may_dismiss(served: Served) -> None:
    refusal = ask(served.channel, Goodbye(dismiss=True))
    assert isinstance(refusal, Failure) and "dismissed" in refusal.text
    assert ask(served.channel, Ping(1)) == Pong(1)


def test_what_a_hello_may_ask_for_is_what_can_be_stored() -> None:
    assert tuple(KV_DTYPES) == KV_DTYPE_NAMES
