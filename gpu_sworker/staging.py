"""Between the device and host memory: the only file that moves tensors out and in.

    compute stream    S-block A │ S-block B │ …
    out stream                  │ q, k, v of A │ …        behind A, beside B, into pinned memory
    in stream           o of B  │ …                       ahead of B, beside A

On a GPU nothing here waits: `Transfer.is_done` tells when q, k, v are there.  On the CPU they always are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
import torch

# numpy has no bfloat16 of its own: the bits travel as int16 and are named again on the other side.
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Transfer(Protocol):
    """Tensors on their way to the host, behind the S-block that makes them."""

    def is_done(self) -> bool: ...

    def wait(self) -> list[np.ndarray]:
        """The arrays, C-ordered; keep them for reading until the R-workers have answered."""

    @property
    def block_ns(self) -> tuple[int, int] | None:
        """When the device began and ended the S-block, on the monotonic clock; None: while it was called."""


class Staging(Protocol):
    def begin(self) -> None:
        """The next S-block is about to be launched."""

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Transfer: ...

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A copy of a small array, in float32."""

    def gather(self, shape: tuple[int, ...], dtype: torch.dtype) -> Gathering: ...


class Gathering(Protocol):
    """o of a call, put together on the device; rows that nobody puts are zeros."""

    def put(self, rows: slice, o: np.ndarray) -> None:
        """Of R-workers, as it arrives.  Its memory is held for as long as the model may read it, or not at all."""

    def finish(self, others: Iterable[tuple[slice | np.ndarray, torch.Tensor]]) -> torch.Tensor:
        """o of all rows, for reading.  # [T, num_q_heads, head_dim]

        others: rows that were made on the device; what was put has room for them.
        """


def make_staging(device: torch.device) -> Staging:
    return CudaStaging(device) if device.type == "cuda" else HostStaging()


@dataclass(frozen=True)
class Arrived:
    """Arrays that are there already; of the tensors' own memory where they lie in C order."""

    arrays: list[np.ndarray]
    block_ns: tuple[int, int] | None = None

    def is_done(self) -> bool:
        return True

    def wait(self) -> list[np.ndarray]:
        return self.arrays


class HostStaging:
    """The device is the host."""

    def begin(self) -> None:
        pass

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Arrived:
        return Arrived([as_array(tensor.detach().contiguous()) for tensor in tensors])

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.empty(array.shape, dtype=torch.float32)
        _copy(array, tensor)
        return tensor

    def gather(self, shape: tuple[int, ...], dtype: torch.dtype) -> HostGathering:
        return HostGathering(shape, dtype)


class HostGathering:
    """What makes up all rows is read where it lies; parts are copied once, into their places."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._all: torch.Tensor | None = None
        self._end = self._num_there = 0  # of the rows that are there, and how many they are

    def put(self, rows: slice, o: np.ndarray) -> None:
        assert rows.start >= self._end, "rows come in order"
        # A tensor of memory that is not to be written would be one that torch lets everybody write to.
        if o.flags.writeable:
            self._put(rows, as_tensor(o))
        else:
            _copy(o, self._place(rows, len(o)))

    def finish(self, others: Iterable[tuple[slice | np.ndarray, torch.Tensor]]) -> torch.Tensor:
        for rows, o in others:
            self._put(rows, o)
        assert self._num_there == self._end, "rows that nobody puts are the last ones"
        if self._all is None or self._end < self._shape[0]:
            self._place(slice(self._end, self._shape[0]), 0).zero_()
        assert self._all is not None
        return self._all

    def _put(self, rows: slice | np.ndarray, o: torch.Tensor) -> None:
        if len(o) == self._shape[0] and o.dtype == self._dtype and o.is_contiguous():
            self._all, self._end, self._num_there = o, len(o), len(o)
        elif isinstance(rows, slice):
            self._place(rows, len(o)).copy_(o)
        else:
            place = self._place(slice(int(rows[0]), int(rows[-1]) + 1), len(o))
            place[torch.from_numpy(rows - rows[0])] = o.to(self._dtype)

    def _place(self, rows: slice, count: int) -> torch.Tensor:
        """Of these rows, so many of which are to be put there."""
        self._num_there += count
        if self._all is None:
            self._all = torch.empty(self._shape, dtype=self._dtype)
        self._end = max(self._end, rows.stop)
        return self._all[rows]


class CudaStaging:
    """Copies on streams of their own; torch's allocators take pinned and device memory back once they are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._began = torch.cuda.Event(enable_timing=True)

    def begin(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record(torch.cuda.current_stream(self._device))

    def to_host(self, tensors: Sequence[torch.Tensor]) -> _CudaTransfer:
        computed, copied = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        pinned = []
        with torch.cuda.stream(self._out):
            self._out.wait_event(computed)
            for tensor in tensors:
                tensor.record_stream(self._out)
                source = tensor.detach().contiguous()
                pinned.append(pinned_memory(source.shape, source.dtype).copy_(source, non_blocking=True))
            copied.record(self._out)
        return _CudaTransfer(pinned, self._began, computed, copied)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        pinned = pinned_memory(array.shape, torch.float32)
        _copy(array, pinned)
        return pinned.to(self._device, non_blocking=True)

    def gather(self, shape: tuple[int, ...], dtype: torch.dtype) -> CudaGathering:
        return CudaGathering(shape, dtype, self._device, self._in)


class CudaGathering:
    """Each part is copied once on the host, into pinned memory, and is on its way while the next one is waited for."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, incoming: torch.cuda.Stream
    ) -> None:
        self._device, self._in = device, incoming
        with torch.cuda.stream(incoming):
            self._all = torch.empty(shape, dtype=dtype, device=device)
        self._end = self._num_there = 0  # of the rows that are there, or on their way, and how many they are

    def put(self, rows: slice, o: np.ndarray) -> None:
        with torch.cuda.stream(self._in):
            pinned = pinned_memory(o.shape, self._all.dtype)
            _copy(o, pinned)
            self._all[rows].copy_(pinned, non_blocking=True)
        self._end = rows.stop
        self._num_there += len(o)

    def finish(self, others: Iterable[tuple[slice | np.ndarray, torch.Tensor]]) -> torch.Tensor:
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._in)
        self._all.record_stream(compute)
        for rows, o in others:
            self._num_there += len(o)
            if isinstance(rows, slice):
                self._all[rows].copy_(o)
                self._end = max(self._end, rows.stop)
            else:
                self._all[on_device(rows, self._device)] = o.to(self._all.dtype)
                self._end = max(self._end, int(rows[-1]) + 1)
        assert self._num_there == self._end, "rows that nobody puts are the last ones"
        self._all[self._end :].zero_()
        return self._all


@dataclass
class _CudaTransfer:
    pinned: list[torch.Tensor]
    began: torch.cuda.Event
    computed: torch.cuda.Event
    copied: torch.cuda.Event
    block_ns: tuple[int, int] | None = None

    def is_done(self) -> bool:
        return bool(self.copied.query())

    def wait(self) -> list[np.ndarray]:
        self.copied.synchronize()
        if self.block_ns is None:  # the duration is the device's; that it has just ended is what the host knows
            now = time.monotonic_ns()
            self.block_ns = now - round(self.began.elapsed_time(self.computed) * 1e6), now
        return [as_array(tensor) for tensor in self.pinned]


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """What the host has made for the device: of the array's own memory on a processor, elsewhere a copy on its way.

    Whatever is launched behind it finds it there.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    # From pageable memory the copy would wait for all that the device has to do.  torch's allocator gives pinned memory
    # out again when the copies that were begun from it have ended.
    return pinned_memory(tensor.shape, tensor.dtype).copy_(tensor).to(device, non_blocking=True)


def pinned_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory of the host that a device copies from and to by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Of a tensor on the host, its own memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _copy(array: np.ndarray, to: torch.Tensor) -> None:
    """Of the same shape, on the host."""
    np.copyto(as_array(to), array, casting="unsafe")  # numpy has bfloat16 and float16 in no order; rounded as by torch


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The other way round."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
