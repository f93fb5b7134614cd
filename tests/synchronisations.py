"""A device that computes nothing, and what would make the host wait for a real one.

Tensors on torch's `meta` device stand for those on a GPU: they have shapes and no numbers, so whatever wants a number
of them, or a shape that depends on numbers, is a wait.  `Waits` notes it, and where in this project it was asked for.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_sworker import SWorker, staging
from gpu_sworker.device_kv import DeviceKV
from gpu_sworker.paged_attention import attend_paged_plainly
from gpu_sworker.prefill import PromptKV

DEVICE = torch.device("meta")
ROOT = Path(__file__).parents[1]
ROOMS = ("fastdecode", "gpu_sworker")

# Operators that give the host a number, or a tensor as long as there are some of a kind.
_NUMBERS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
_SHAPES = {
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
    "bincount", "repeat_interleave",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """On any device while `device` is None, a processor too: asking for numbers is what is noted then, and no copies.

    `found`: an operator, and the line that asked for it, of each wait.
    """

    def __init__(self, device: torch.device | None = DEVICE) -> None:
        super().__init__()
        self._device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [t for t in tensors if self._device is None or t.device == self._device]
        is_asked = name in _NUMBERS or (name in _SHAPES and isinstance(args[0], torch.Tensor))
        if there and is_asked and not (name == "repeat_interleave" and len(tensors) == 1 and "Tensor" not in str(func)):
            self._note(name)
            if self._device is not None and name in _NUMBERS:
                return 0
        if self._device is None:
            return func(*args, **kwargs)
        with self:  # what is made of others comes by in its parts
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if name in ("_to_copy", "copy_"):
            return self._copy(func, args, kwargs)
        if name == "detach_" and there:  # the last that `torch.tensor` does, and all of it that is to be seen
            self._note("a tensor made of numbers")
        if there and name != "set_" and any(t.device != self._device and t.ndim for t in tensors):
            self._note(f"{name} with a tensor of the host's")
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        is_new = func.overloadpacket.__name__ == "_to_copy"
        source = args[0] if is_new else args[1]
        target = torch.device(kwargs.get("device") or source.device) if is_new else args[0].device
        is_behind = bool(kwargs.get("non_blocking") if is_new else (*args, *kwargs.values())[-1] is True)
        if self._device not in (source.device, target) or source.device == target:
            return func(*args, **kwargs)
        host = source if source.device != self._device else None if is_new else args[0]
        if not is_behind or host is None or host.untyped_storage().data_ptr() not in _PINNED:
            self._note(f"a copy from {source.device} to {target}")
        if target == self._device:
            return func(*args, **kwargs)
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype) if is_new else args[0].zero_()

    def _note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
        ours = [f for f in frames if Path(f.filename).relative_to(ROOT).parts[0] in ROOMS]
        frame = (ours or frames)[-1]
        self.found.append(f"{what}: {Path(frame.filename).relative_to(ROOT)}: {frame.line}")


_PINNED: set[int] = set()  # where memory lies that stands for pinned memory; it is kept, so that no other lies there
_KEPT: list[torch.Tensor] = []


class _Moment:
    """A stream or an event, where all is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def _nothing(self, *args: Any) -> None:
        pass

    record = wait_event = wait_stream = synchronize = _nothing


class OnPaper(SWorker):
    """Loads and vets its model on a processor, and moves it to the device then: all code for a GPU runs, on nothing."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options | {"device": "cpu", "linear_kernel": "plain"})
        self.device, self.is_asynchronous = DEVICE, True
        self._staging = staging.CudaStaging(DEVICE)
        self._model.to(DEVICE)
        budget = self._prompt_kv.store.num_blocks * self._prompt_kv.store.block_bytes
        store = DeviceKV(
            self.facts.layers,
            dtype=self.dtype,
            device=DEVICE,
            budget_bytes=budget,
            block_tokens=self._prompt_kv.store.block_tokens,
        )
        self._prompt_kv = PromptKV(store, self.facts.layers)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, mask: None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that are opened meanwhile have an `OnPaper`."""

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    def pinned_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.zeros(shape, dtype=dtype)
        _KEPT.append(made)
        _PINNED.add(made.untyped_storage().data_ptr())
        return made

    monkeypatch.setattr(staging, "pinned_memory", pinned_memory)
    for name, one in {"Stream": _Moment, "Event": _Moment, "stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, one)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Moment())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr("gpu_sworker.device_attention.fused_kernel", lambda *_: _fused)
    monkeypatch.setattr("gpu_sworker.device_kv.paged_kernel", lambda *_: attend_paged_plainly)
    monkeypatch.setattr("fastdecode.engine.runtime.SWorker", OnPaper)
    yield
    _PINNED.clear()
    _KEPT.clear()
