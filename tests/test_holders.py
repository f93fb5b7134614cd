"""Every holder of K and V keeps the same promises: the store on the S-worker's device, and R-workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from holder_conformance import (
    BLOCK_TOKENS,
    CHECKS,
    LAYERS,
    NUM_BLOCKS,
    Answer,
    Holder,
    Make,
    Refused,
    Row,
    Tensors,
    check_anything_in_any_order,
)

from cpu_attention import KVLayout, LayerShape, RWorker, kernel, reference, serve
from cpu_attention.multicore import Kernel
from gpu_sworker import AttentionSpec, DeviceKV, DeviceKVError
from gpu_sworker.device_kv import token_bytes
from transport import (
    Admit,
    Attend,
    Attended,
    Channel,
    Failure,
    Fork,
    Hello,
    LayerSpec,
    Message,
    Release,
    Rewind,
    Rows,
    Welcome,
    connect,
    listen,
)

SPECS = tuple(AttentionSpec(x.num_q_heads, x.num_kv_heads, x.head_dim, x.scale, x.window, x.softcap, x.sinks)
              for x in LAYERS)  # fmt: skip


class DeviceHolder:
    is_partial = True

    def __init__(self, device: torch.device) -> None:
        budget = NUM_BLOCKS * BLOCK_TOKENS * token_bytes(SPECS, torch.float32)
        self.store = DeviceKV(SPECS, dtype=torch.float32, device=device, budget_bytes=budget, block_tokens=BLOCK_TOKENS)

    def admit(self, max_tokens: Mapping[int, int]) -> None:
        admitted: list[int] = []
        try:
            for seq_id, limit in max_tokens.items():
                self.store.admit(seq_id, limit)
                admitted.append(seq_id)
        except DeviceKVError as error:
            self.store.release(admitted)
            raise Refused from error

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        with self._refusing():
            self.store.fork(children, parents, num_tokens)

    def step(self, rows: Sequence[Row], layers: Sequence[Tensors]) -> list[Answer]:
        seq_ids, counts = [row.seq_id for row in rows], [row.num_tokens for row in rows]
        with self._refusing():
            if len(set(seq_ids)) < len(seq_ids):
                raise DeviceKVError("a sequence comes twice")
            self.store.extend(dict(zip(seq_ids, counts, strict=True)))
            device_rows = self.store.rows(seq_ids, counts, [row.num_queries for row in rows])
        answers = []
        for layer, tensors in enumerate(layers):
            q, k, v = (torch.from_numpy(x).to(self.store.device) for x in (tensors.q, tensors.k, tensors.v))
            self.store.write(layer, device_rows, k, v)
            state = self.store.attend(layer, device_rows, q)
            answers.append(Answer(state.o.cpu().numpy(), state.lse.cpu().numpy()))
        return answers

    def rewind(self, num_tokens: Mapping[int, int]) -> None:
        with self._refusing():
            self.store.rewind(num_tokens)

    def release(self, seq_ids: Sequence[int]) -> None:
        with self._refusing():
            self.store.release(seq_ids)

    def num_free_blocks(self) -> int:
        return self.store.num_free_blocks

    def check_integrity(self) -> None:
        self.store.check_integrity()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except DeviceKVError as error:
            raise Refused from error


class RWorkerHolder:
    """An R-worker behind a channel, by its messages alone; its store is looked into between them."""

    def __init__(self, channel: Channel, worker: RWorker, *, is_partial: bool = False) -> None:
        self._channel, self._worker, self._step, self.is_partial = channel, worker, 0, is_partial
        specs = tuple(LayerSpec(x.num_q_heads, x.num_kv_heads, x.head_dim, x.scale, x.window, x.softcap, x.sinks)
                      for x in LAYERS)  # fmt: skip
        welcome = self._ask(Hello(specs, "float32", BLOCK_TOKENS))
        assert isinstance(welcome, Welcome) and welcome.num_blocks == NUM_BLOCKS

    def admit(self, max_tokens: Mapping[int, int]) -> None:
        self._tell(Admit(_ids(max_tokens), _ints(max_tokens.values())))

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        self._tell(Fork(_ids(children), _ids(parents), _ints(num_tokens)))

    def step(self, rows: Sequence[Row], layers: Sequence[Tensors]) -> list[Answer]:
        self._step += 1
        seq_ids, starts = _ids(row.seq_id for row in rows), _ints(row.start for row in rows)
        counts, queries = _ints(row.num_tokens for row in rows), _ints(row.num_queries for row in rows)
        self._tell(Rows(self._step, 0, seq_ids, starts, counts, queries, is_partial=self.is_partial))
        answers = []
        for layer, tensors in enumerate(layers):
            attend = Attend(self._step, 0, layer, tensors.q, tensors.k, tensors.v)
            if len(tensors.q) == 0 and layer < len(layers) - 1:  # written behind, and answered after the last layer
                self._channel.send(attend, timeout_s=10)
                answers.append(Answer(tensors.q, None))
                continue
            reply = self._ask(attend)
            assert isinstance(reply, Attended), reply
            answers.append(Answer(reply.o, reply.lse))
        return answers

    def rewind(self, num_tokens: Mapping[int, int]) -> None:
        self._tell(Rewind(_ids(num_tokens), _ints(num_tokens.values())))

    def release(self, seq_ids: Sequence[int]) -> None:
        self._tell(Release(_ids(seq_ids)))

    def num_free_blocks(self) -> int:
        assert self._worker._session
        return self._worker._session.store.num_free_blocks

    def check_integrity(self) -> None:
        assert self._worker._session
        self._worker._session.store.check_integrity()

    def _tell(self, message: Message) -> None:
        """A message without an answer.  How it went is told at the next Attend, here one of a step that never was."""
        self._channel.send(message, timeout_s=10)
        x = np.zeros((1, 1, 1), np.float32)
        reply = self._ask(Attend(10**9, 1, 0, x, x, x))
        assert isinstance(reply, Failure), reply
        if "was not begun" not in reply.text:
            raise Refused(reply.text)

    def _ask(self, message: Message) -> Message:
        self._channel.send(message, timeout_s=10)
        return self._channel.recv(timeout_s=60)


def _ids(numbers: object) -> np.ndarray:
    return np.array(list(numbers), np.int64)  # type: ignore[call-overload]


def _ints(numbers: object) -> np.ndarray:
    return np.array(list(numbers), np.int32)  # type: ignore[call-overload]


def device_holder(device: str) -> Make:
    @contextmanager
    def make() -> Iterator[Holder]:
        with torch.inference_mode():
            yield DeviceHolder(torch.device(device))

    return make


def r_worker_holder(compiled: Kernel, num_threads: int, *, is_partial: bool = False) -> Make:
    @contextmanager
    def make() -> Iterator[Holder]:
        layout = KVLayout(tuple(LayerShape(x.num_kv_heads, x.head_dim) for x in LAYERS), "float32", BLOCK_TOKENS)
        worker = RWorker(kv_cache_bytes=NUM_BLOCKS * layout.block_bytes, num_threads=num_threads, kernel=compiled)
        listener = listen("inproc://holder")
        thread = threading.Thread(target=serve, args=(listener, worker))
        thread.start()
        try:
            with connect(listener.address) as channel:
                yield RWorkerHolder(channel, worker, is_partial=is_partial)
        finally:
            listener.close()
            thread.join(10)
            worker.close()
            assert not thread.is_alive()

    return make


HOLDERS = {
    "device": device_holder("cpu"),
    "R-worker": r_worker_holder(kernel, 1),
    "R-worker of two threads": r_worker_holder(kernel, 2),
    "R-worker of partial states": r_worker_holder(kernel, 2, is_partial=True),
    "plain R-worker": r_worker_holder(reference, 1),
    "plain R-worker of partial states": r_worker_holder(reference, 1, is_partial=True),
    **({"GPU": device_holder("cuda")} if torch.cuda.is_available() else {}),
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_holder(name: str, check: Callable[[Make], None]) -> None:
    check(HOLDERS[name])


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("seed", range(8))
def test_anything_in_any_order(name: str, seed: int) -> None:
    check_anything_in_any_order(HOLDERS[name], seed)
