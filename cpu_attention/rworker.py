"""An R-worker as a function from messages to messages.  Knows no sockets, processes or clocks.

    state             takes                              to
    ───────────────   ────────────────────────────────   ─────────────────────────────
    no session        Hello                              in session (a KV store exists)
    in session        Admit, Fork, Rows, Release,        in session
                      Rewind, Ping
      per micro-batch   Rows → Attend 0 → Attend 1 → …    one Attended each; layers in order; without queries one
                                                          at the end
    in session        Goodbye                            no session (the store is dropped)

Everything else is answered with a Failure and changes nothing; but a Hello that fails leaves no session.
A message without an answer (Admit, Fork, Rows, Release, Rewind, an Attend without queries) fails at the next Attend
that has one.  What reaches a kernel has been checked here or in the message itself: numba would not.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cpu_attention import kernel as compiled
from cpu_attention.errors import BadRequest, KVBudgetExceeded, MessageRefused, UnknownSequence
from cpu_attention.kvstore import KVStore
from cpu_attention.layout import AttentionRule, KVLayout, LayerShape
from cpu_attention.machine import available_memory_bytes, format_bytes
from cpu_attention.microbatch import MAX_WINDOWS, MicroBatch, NewRows, check_room
from cpu_attention.multicore import Attention, Kernel
from cpu_attention.state import log_sum_exp
from cpu_attention.warm_kernels import WarmKernels
from cpu_attention.work import NewTokens
from transport import (
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
    Refusals,
    Release,
    Rewind,
    Rows,
    Welcome,
)

logger = logging.getLogger(__name__)


_UNANSWERED = (Admit, Fork, Rows, Release, Rewind, Goodbye)


@dataclass
class _Session:
    nonce: int
    layers: tuple[LayerSpec, ...]
    rules: tuple[AttentionRule, ...]
    store: KVStore
    micro_batches: dict[int, MicroBatch]
    failure: Failure | None = None  # of a message that has no answer; told at the next Attend


class RWorker:
    def __init__(
        self, *, kv_cache_bytes: int, num_threads: int = 1, kernel: Kernel = compiled, cores: Sequence[int] = ()
    ) -> None:
        """`kernel` may be `reference`; `kv_cache_bytes` is the most any session gets; see `Attention` for cores."""
        self._kv_cache_bytes = kv_cache_bytes
        self._num_threads = num_threads
        self._attention = Attention(num_threads, kernel, cores)
        self._kernels = WarmKernels()
        self._session: _Session | None = None
        self._refusals = Refusals(logger)

    @property
    def session(self) -> int | None:
        """Nonce of the session that is open."""
        return self._session.nonce if self._session else None

    def handle(self, session: int, message: Message) -> Message | None:
        """The answer to `message`, if it has one.  Never raises on account of the message."""
        try:
            return self._handle(session, message)
        except MessageRefused as error:
            failure = Failure(type(error).__name__, str(error)[:4096])
        except Exception as error:  # ours, not the peer's; the other sequences still deserve a worker
            logger.exception("failed on %s", type(message).__name__)
            failure = Failure("InternalError", f"{type(error).__name__}: {error}"[:4096])
        if self._is_answered(session, message):
            return failure
        self._refusals.tell(f"{type(message).__name__} failed: {failure.text}")
        if self._session and self._session.nonce == session:
            self._session.failure = self._session.failure or failure
        return None

    def _is_answered(self, nonce: int, message: Message) -> bool:
        if not isinstance(message, Attend):
            return not isinstance(message, _UNANSWERED)
        if self._session is None or self._session.nonce != nonce:
            return True
        return len(message.q) > 0 or message.layer >= len(self._session.layers) - 1

    def close(self) -> None:
        self._session = None
        self._attention.close()

    def _handle(self, nonce: int, message: Message) -> Message | None:
        if isinstance(message, Hello):
            return self._open(nonce, message)
        session = self._session
        if isinstance(message, Ping):
            if session and session.nonce == nonce:
                session.failure = None
            return Pong(message.token)
        if isinstance(message, Goodbye) and (session is None or message.dismiss):
            self._session = None
            return None
        if session is None or session.nonce != nonce:
            raise BadRequest("this R-worker does not know the session; it was restarted or given to another S-worker")
        match message:
            case Attend():
                is_answered = self._is_answered(nonce, message)
                if session.failure and is_answered:
                    failure, session.failure = session.failure, None
                    return failure
                answer = None if session.failure else self._append_and_attend(session, message)
                return answer if is_answered else None
            case Rows():
                self._begin_micro_batch(session, message)
            case Admit():
                self._admit(session.store, message)
            case Fork():
                self._fork(session, message)
            case Release():
                self._release(session, message)
            case Rewind():
                self._rewind(session, message)
            case Goodbye():
                self._session = None
            case _:
                raise BadRequest(f"{type(message).__name__} is not for an R-worker")
        return None

    def _open(self, nonce: int, hello: Hello) -> Welcome:
        self._session = None  # before the new store is made: the two may not fit side by side
        shapes = tuple(LayerShape(spec.num_kv_heads, spec.head_dim) for spec in hello.layers)
        try:
            layout = KVLayout(shapes, hello.kv_dtype, hello.block_tokens)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        asked = self._kv_cache_bytes if hello.kv_cache_bytes is None else hello.kv_cache_bytes
        budget = min(asked, self._kv_cache_bytes)
        try:
            store = KVStore(layout, budget)
        except (OSError, MemoryError) as error:
            raise KVBudgetExceeded(
                f"the system has no {format_bytes(budget)} for the KV ({error}); of memory "
                f"{format_bytes(available_memory_bytes())} are free. Start this R-worker with less --kv-cache-memory, "
                "or ask it for less (kv_cache_memory)"
            ) from error
        rules = tuple(
            AttentionRule(
                spec.scale, spec.window, spec.softcap, None if spec.sinks is None else np.array(spec.sinks, np.float32)
            )
            for spec in hello.layers
        )
        if len({rule.window for rule in rules}) > MAX_WINDOWS:
            raise BadRequest(f"layers of more than {MAX_WINDOWS} different windows")
        groups = (spec.num_q_heads // spec.num_kv_heads for spec in hello.layers)
        self._kernels.prepare(list(zip(layout.heads, groups, rules, strict=True)))
        self._attention.start()
        self._session = _Session(nonce, hello.layers, rules, store, {})
        logger.info(
            "session opened: %d layers, %s KV, %s per token, room for %d tokens",
            len(hello.layers),
            layout.dtype,
            format_bytes(layout.token_bytes),
            store.num_blocks * layout.block_tokens,
        )
        return Welcome(
            num_blocks=store.num_blocks,
            block_tokens=layout.block_tokens,
            block_bytes=layout.block_bytes,
            host=platform.node() or "unknown",
            pid=os.getpid(),
            num_threads=self._num_threads,
        )

    def _admit(self, store: KVStore, message: Admit) -> None:
        """All of them or none."""
        admitted: list[int] = []
        store.check_room(len(message.seq_ids))
        try:
            for seq_id, max_tokens in zip(message.seq_ids.tolist(), message.max_tokens.tolist(), strict=True):
                store.admit(seq_id, max_tokens)
                admitted.append(seq_id)
        except MessageRefused:
            for seq_id in admitted:
                store.release(seq_id)
            raise

    def _fork(self, session: _Session, message: Fork) -> None:
        """All of them or none."""
        _check_count(session.store, message.children)
        parents, num_tokens = message.parents.tolist(), message.num_tokens.tolist()
        for parent, count in zip(parents, num_tokens, strict=True):
            for batch in session.micro_batches.values():
                if parent in batch.seq_ids and count > batch.start(parent):
                    raise BadRequest(f"the last of {count} tokens of sequence {parent} are still on their way")
        session.store.fork(message.children.tolist(), parents, num_tokens)

    def _release(self, session: _Session, message: Release) -> None:
        _check_count(session.store, message.seq_ids)
        seq_ids = message.seq_ids.tolist()
        for seq_id in seq_ids:
            session.store.num_tokens(seq_id)  # raises UnknownSequence before anything is freed
        if len(set(seq_ids)) != len(seq_ids):
            raise UnknownSequence("a sequence is released twice")
        _drop_micro_batches(session, seq_ids)
        for seq_id in seq_ids:
            session.store.release(seq_id)

    def _rewind(self, session: _Session, message: Rewind) -> None:
        """All of them or none."""
        _check_count(session.store, message.seq_ids)
        targets = dict(zip(message.seq_ids.tolist(), message.num_tokens.tolist(), strict=True))
        for seq_id, num_tokens in targets.items():
            stored = session.store.num_tokens(seq_id)
            if not 0 <= num_tokens <= stored:
                raise BadRequest(f"sequence {seq_id} holds {stored} tokens; it cannot go back to {num_tokens}")
        _drop_micro_batches(session, targets)
        for seq_id, num_tokens in targets.items():
            session.store.truncate(seq_id, num_tokens)

    def _begin_micro_batch(self, session: _Session, message: Rows) -> None:
        store = session.store
        # A failure below leaves no half-begun micro-batch to attend to.
        session.micro_batches.pop(message.micro_batch, None)
        _check_count(store, message.seq_ids)
        windows = {rule.window for rule in session.rules}
        new = NewRows.of(message.seq_ids, message.starts, message.num_tokens, message.num_queries, message.query_starts)
        rows = list(
            zip(
                message.seq_ids.tolist(),
                message.starts.tolist(),
                message.num_tokens.tolist(),
                message.num_queries.tolist(),
                new.query_starts.tolist(),
                strict=True,
            )
        )
        if len({seq_id for seq_id, *_ in rows}) != len(rows):
            raise BadRequest("a sequence comes twice in one micro-batch")
        for seq_id, start, num_tokens, num_queries, query_start in rows:
            stored = store.num_tokens(seq_id)
            if start != stored or min(num_tokens, num_queries, query_start) < 0 or num_tokens + num_queries < 1:
                raise BadRequest(
                    f"sequence {seq_id} holds {stored} tokens; cannot append {num_tokens} at {start} "
                    f"with {num_queries} queries at {query_start}"
                )
        num_bytes = new.num_bytes(store, len(windows))
        check_room(store, num_bytes, session.micro_batches.values())
        store.extend({seq_id: num_tokens for seq_id, _, num_tokens, *_ in rows})
        try:
            session.micro_batches[message.micro_batch] = MicroBatch(
                message.step, new, store, self._attention, windows, num_bytes, is_partial=message.is_partial
            )
        except BaseException:  # no memory, say
            for seq_id, start, *_ in rows:
                store.truncate(seq_id, start)
            raise

    def _append_and_attend(self, session: _Session, message: Attend) -> Attended:
        batch = session.micro_batches.get(message.micro_batch)
        if batch is None or batch.step != message.step:
            raise BadRequest(f"micro-batch {message.micro_batch} of step {message.step} was not begun")
        if message.layer != batch.next_layer or message.layer >= len(session.layers):
            raise BadRequest(f"layer {message.layer} came, layer {batch.next_layer} was due")
        spec, layer = session.layers[message.layer], message.layer
        k_shape = (len(batch.blocks), spec.num_kv_heads, spec.head_dim)
        q_shape = (len(batch.block_tables), spec.num_q_heads, spec.head_dim)
        if message.k.shape != k_shape or message.q.shape != q_shape:
            raise BadRequest(
                f"layer {layer} wants k {k_shape} and q {q_shape}, got {message.k.shape}, {message.q.shape}"
            )
        data, head, rule = session.store.data[layer], session.store.layout.heads[layer], session.rules[layer]
        new = NewTokens(message.k, message.v, batch.blocks, batch.offsets, batch.append_shares)
        what = message.q, data, head, batch.block_tables, batch.works[rule.window], rule, new
        lse = None
        if batch.is_partial:
            state = self._attention.attend_part(*what)
            out, lse = state.out, log_sum_exp(state)
        else:
            out = self._attention.attend(*what)
        batch.next_layer += 1
        if batch.next_layer == len(session.layers):
            del session.micro_batches[message.micro_batch]
        return Attended(message.step, message.micro_batch, layer, out, lse=lse)


def _drop_micro_batches(session: _Session, seq_ids: Collection[int]) -> None:
    """One that was not finished must not write to blocks that get a new owner, or to tokens that come again."""
    session.micro_batches = {
        index: batch for index, batch in session.micro_batches.items() if batch.seq_ids.isdisjoint(seq_ids)
    }


def _check_count(store: KVStore, seq_ids: np.ndarray) -> None:
    """Before a list is made of them.  Raises UnknownSequence."""
    if len(seq_ids) > store.num_sequences:
        raise UnknownSequence(f"{len(seq_ids)} sequences are named, {store.num_sequences} are here")
