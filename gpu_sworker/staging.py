"""Between the device and host memory: the only file that moves tensors out and in.

    compute stream    S-block A │ S-block B │ …
    out stream                  │ q, k, v of A │ …        behind A, beside B, into pinned memory
    in stream           o of B  │ …                       ahead of B, beside A

On a GPU nothing here waits: `Transfer.is_done` tells when q, k, v are there.  On the CPU they always are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
        """May share the array's memory, so it is for reading."""


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
        return Arrived([_array(tensor.detach().contiguous()) for tensor in tensors])

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return _tensor(array)


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
                pinned.append(torch.empty(source.shape, dtype=source.dtype, pin_memory=True))
                pinned[-1].copy_(source, non_blocking=True)
            copied.record(self._out)
        return _CudaTransfer(pinned, self._began, computed, copied)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        source = _tensor(array).pin_memory()
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            tensor = source.to(self._device, non_blocking=True)
        compute.wait_stream(self._in)
        tensor.record_stream(compute)
        return tensor


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
        return [_array(tensor) for tensor in self.pinned]


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
