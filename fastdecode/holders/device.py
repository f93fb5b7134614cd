"""K and V on the S-worker's own device, beside those that R-workers have: the same promises, and no wire.

    rows of a step        [decodes on the device][… of R-workers …][prompts on the device]
    begin(step)           room for their tokens; which rows these are
    attend(rows, call)    their K and V are written, their queries answered

Where the device is a processor, an R-worker in the S-worker's thread does it, with its kernels; a GPU has a store of
its own, and an emulated one takes its time.  What the scheduler calls R-worker `DEVICE` is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch

from cpu_attention import RWorker
from fastdecode.errors import DeviceKVFailed
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.plan import Admission, Forking, Step
from gpu_sworker import AttentionCall, AttentionSpec, DeviceKV, DeviceRows, as_array, as_tensor, finished
from transport import Admit, Attend, Attended, Fork, Hello, Message, Release, Rewind, Rows, Welcome

_SESSION = 1
_DECODES, _WRITTEN, _ATTENDING = range(3)  # prompts that attend to what they bring, and those that attend here


class Store(Protocol):
    """K and V of sequences, and attention over them."""

    num_blocks: int

    def admit(self, max_tokens: Mapping[int, int]) -> None: ...

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None: ...

    def release(self, seq_ids: Sequence[int]) -> None: ...

    def rewind(self, num_tokens: Mapping[int, int]) -> None: ...

    def begin(
        self, key: int, step: int, seq_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, queries: np.ndarray
    ) -> None:
        """The next rows under `key`: of each sequence so many tokens that are written, and so many that attend."""

    def attend(self, key: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of the rows begun last under `key`, the next layer; q may be none.  # like q"""

    def reset(self) -> None:
        """Nothing is there any more, whatever this was in the middle of."""

    def close(self) -> None: ...


class HeldRows(NamedTuple):
    """Rows of a step of one kind."""

    key: int  # as the store knows them
    rows: slice
    are_queried: bool


class DeviceHolder:
    def __init__(self, store: Store, host_bytes: int = 0) -> None:
        """host_bytes: that it will have taken of this machine's memory when it is full."""
        self._store, self.host_bytes = store, host_bytes
        self._held: set[int] = set()  # sequences it may know; written before it is told

    @property
    def num_blocks(self) -> int:
        return self._store.num_blocks

    def admit(self, admissions: Iterable[Admission]) -> None:
        own = {admission.seq_id: admission.max_tokens for admission in admissions if admission.r_worker == DEVICE}
        if own:
            self._held |= own.keys()
            self._store.admit(own)

    def fork(self, forkings: Iterable[Forking]) -> None:
        """Sequences that were admitted begin with tokens of others."""
        own = [forking for forking in forkings if forking.r_worker == DEVICE]
        if own:
            self._store.fork([f.seq_id for f in own], [f.parent for f in own], [f.num_tokens for f in own])

    def release(self, released: Mapping[int, Iterable[int]]) -> None:
        """R-worker -> sequences that nothing in flight uses any more; others than those held are ignored."""
        own = self._held.intersection(released.get(DEVICE, ()))
        if own:
            self._held -= own
            self._store.release(sorted(own))

    def cut(self, cut: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence that has ended -> how many tokens of it stay."""
        own = cut.get(DEVICE, {})
        self.release({DEVICE: [seq_id for seq_id, stays in own.items() if not stays]})
        self.rewind({DEVICE: {seq_id: stays for seq_id, stays in own.items() if stays}})

    def rewind(self, kept: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence -> how many tokens of it stay."""
        if own := kept.get(DEVICE):
            self._store.rewind(own)

    def forget_all(self) -> None:
        """After an interrupt anywhere, too; and it may be called again."""
        self._store.reset()
        self._held.clear()

    def begin(self, step: Step) -> list[HeldRows]:
        """Room for the step's tokens.  Its rows here, in their order."""
        decodes, num_decodes, held = step.decodes, step.num_device_decodes, list[HeldRows]()
        if num_decodes:
            held.append(HeldRows(_key(step, _DECODES), slice(0, num_decodes), True))
            seq_ids, positions = decodes.seq_ids[:num_decodes], decodes.positions[:num_decodes]
            ones = np.ones(num_decodes, np.int32)
            self._store.begin(held[-1].key, step.number, seq_ids, positions.astype(np.int32), ones, ones)
        row = step.stored.stop
        for are_queried, prompts in groupby(step.device_prompts, key=lambda prompt: prompt.is_remote):
            columns = np.array([(s.seq_id, s.start, s.num_tokens) for s in prompts], np.int64).T
            starts, counts = columns[1:].astype(np.int32)
            end = row + int(counts.sum())
            held.append(HeldRows(_key(step, _ATTENDING if are_queried else _WRITTEN), slice(row, end), are_queried))
            queries = counts if are_queried else np.zeros_like(counts)
            self._store.begin(held[-1].key, step.number, columns[0].copy(), starts, counts, queries)
            row = end
        return held

    def attend(self, held: Iterable[HeldRows], call: AttentionCall) -> list[tuple[slice, torch.Tensor]]:
        """Rows, and their o; K and V of all of them are written."""
        answers = []
        for key, rows, are_queried in held:
            q = call.q[rows] if are_queried else call.q[:0]
            o = self._store.attend(key, call.layer, q, call.k[rows], call.v[rows])
            if are_queried:
                answers.append((rows, o))
        return answers

    def close(self) -> None:
        self._store.close()


def _key(step: Step, kind: int) -> int:
    return 3 * step.lane + kind


class HostStore:
    """An R-worker, called where others are told."""

    def __init__(self, hello: Hello, *, kv_bytes: int, num_threads: int, cores: Sequence[int] = ()) -> None:
        """Raises DeviceKVFailed with the reason if there is no memory, or no kernel for such heads."""
        self._worker = RWorker(kv_cache_bytes=kv_bytes, num_threads=num_threads, cores=cores)
        self._steps: dict[int, int] = {}
        self._hello, self.num_blocks = hello, 0
        self.reset()

    def reset(self) -> None:
        """A new session: its store is empty, and it remembers no failure."""
        welcome = self._worker.handle(_SESSION, self._hello)
        if not isinstance(welcome, Welcome):
            raise DeviceKVFailed(f"K and V on the S-worker's device: {welcome}")
        self.num_blocks = welcome.num_blocks

    def admit(self, max_tokens: Mapping[int, int]) -> None:
        self._tell(Admit(_ids(max_tokens), _counts(max_tokens.values())))

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        self._tell(Fork(_ids(children), _ids(parents), _counts(num_tokens)))

    def release(self, seq_ids: Sequence[int]) -> None:
        self._tell(Release(_ids(seq_ids)))

    def rewind(self, num_tokens: Mapping[int, int]) -> None:
        self._tell(Rewind(_ids(num_tokens), _counts(num_tokens.values())))

    def begin(
        self, key: int, step: int, seq_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, queries: np.ndarray
    ) -> None:
        self._steps[key] = step
        self._tell(Rows(step, key, seq_ids, starts, counts, queries))

    def attend(self, key: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        arrays = (as_array(tensor.detach().contiguous()) for tensor in (q, k, v))
        reply = self._worker.handle(_SESSION, Attend(self._steps[key], key, layer, *arrays))
        if reply is None and not len(q):
            return q  # it is told with the last layer whether all went well
        if not isinstance(reply, Attended):
            raise DeviceKVFailed(f"K and V on the S-worker's device: {reply}")
        return as_tensor(reply.o)

    def close(self) -> None:
        self._worker.close()

    def _tell(self, message: Message) -> None:
        """What goes wrong is told by the next `attend`."""
        self._worker.handle(_SESSION, message)


class EmulatedStore:
    """That of an emulated device: it takes the time of reading, and keeps how much there would be to read."""

    def __init__(
        self, num_blocks: int, spend: Callable[[float], None], attention_seconds: Callable[[int], float]
    ) -> None:
        """spend: takes the device's time; attention_seconds: of one layer over so many tokens' KV."""
        self.num_blocks, self._spend, self._attention_seconds = num_blocks, spend, attention_seconds
        self._stored: dict[int, int] = {}  # sequence -> tokens
        self._reads: dict[int, int] = {}  # by key, tokens' KV that the rows begun last read

    def admit(self, max_tokens: Mapping[int, int]) -> None:
        assert not self._stored.keys() & max_tokens.keys()
        self._stored |= dict.fromkeys(max_tokens, 0)

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        for child, parent, count in zip(children, parents, num_tokens, strict=True):
            assert self._stored[child] == 0 and count <= self._stored[parent]
            self._stored[child] = count

    def release(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            del self._stored[seq_id]

    def rewind(self, num_tokens: Mapping[int, int]) -> None:
        for seq_id, count in num_tokens.items():
            assert count <= self._stored[seq_id]
            self._stored[seq_id] = count

    def begin(
        self, key: int, step: int, seq_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, queries: np.ndarray
    ) -> None:
        for seq_id, start, count in zip(seq_ids.tolist(), starts.tolist(), counts.tolist(), strict=True):
            assert self._stored[seq_id] == start, "positions follow one another"
            self._stored[seq_id] = start + count
        self._reads[key] = int((starts + counts)[queries > 0].sum())

    def attend(self, key: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._reads[key]:
            self._spend(self._attention_seconds(self._reads[key]))
        return q

    def reset(self) -> None:
        self._stored.clear()

    def close(self) -> None:
        self.reset()


class TorchStore:
    """A store of tensors, on any device."""

    def __init__(self, kv: DeviceKV, layers: Sequence[AttentionSpec]) -> None:
        """Raises DeviceKVFailed if not even one block fits."""
        if kv.num_blocks < 1:
            raise DeviceKVFailed(f"K and V on {kv.device} have a budget of less than a block of {kv.block_bytes} bytes")
        self._kv, self._layers, self.num_blocks = kv, layers, kv.num_blocks
        self._rows: dict[int, DeviceRows] = {}

    def admit(self, max_tokens: Mapping[int, int]) -> None:
        for seq_id, most in max_tokens.items():
            self._kv.admit(seq_id, most)

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        self._kv.fork(children, parents, num_tokens)

    def release(self, seq_ids: Sequence[int]) -> None:
        self._kv.release(seq_ids)

    def rewind(self, num_tokens: Mapping[int, int]) -> None:
        self._kv.rewind(num_tokens)

    def begin(
        self, key: int, step: int, seq_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, queries: np.ndarray
    ) -> None:
        ids, new = seq_ids.tolist(), counts.tolist()
        assert [self._kv.num_tokens(i) for i in ids] == starts.tolist(), "positions follow one another"
        self._kv.extend(dict(zip(ids, new, strict=True)))
        self._rows[key] = self._kv.rows(ids, new, queries.tolist())

    def attend(self, key: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = self._rows[key]
        self._kv.write(layer, rows, k, v)
        if not len(q):
            return q
        return finished(self._kv.attend(layer, rows, q), self._layers[layer].sinks)

    def reset(self) -> None:
        self._kv.clear()
        self._rows.clear()

    def close(self) -> None:
        self.reset()


def _ids(seq_ids: Iterable[int]) -> np.ndarray:
    return np.array(list(seq_ids), np.int64)


def _counts(num_tokens: Iterable[int]) -> np.ndarray:
    return np.array(list(num_tokens), np.int32)
