"""What is told to CUDA where there is none: which card is meant, and how the thread that drives it sleeps."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Case

from fastdecode.benchmark import calibrate
from fastdecode.modelling.perf_model import PerfModel
from gpu_sworker import SWorker, choose_device

_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30  # <linux/prctl.h>, in ns


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which this thread is at the second one."""
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize("asked, meant", [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_card_is_known_by_its_number(asked: str, meant: int) -> None:
    assert choose_device(asked) == torch.device("cuda", meant)


def test_the_thread_that_drives_a_card_is_at_it(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its sleeps are as short as they are asked to be."""
    entered: list[object] = []

    @contextmanager
    def at(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.append(None)

    def drive() -> None:
        if sys.platform == "linux":  # a thread begins with that of who made it
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 50_000, 0, 0, 0)
        with sworker.inference():
            seen.append((list(entered), _timer_slack()))

    seen: list[Any] = []
    sworker = SWorker(llama.directory, device="cpu")
    sworker.device, sworker.is_asynchronous = torch.device("cuda", 1), True
    monkeypatch.setattr(torch.cuda, "device", at)
    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    ((at_first, slack),) = seen
    assert at_first == [torch.device("cuda", 1)] and entered[-1] is None
    if sys.platform == "linux":
        assert slack == 1


def _timer_slack() -> int:
    return int(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)) if sys.platform == "linux" else 0


def test_a_calibration_names_the_card_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"the card at {device}")
    monkeypatch.setattr(calibrate, "measure", lambda *_: PerfModel((1, 4), (1e-3, 1e-3), 1e-9, 3))
    facts = SimpleNamespace(model_type="llama", device="cuda:1", dtype="bfloat16", layers=(None,) * 3)
    runtime: Any = SimpleNamespace(
        sworker=SimpleNamespace(facts=facts),
        layout=SimpleNamespace(dtype="int8"),
        welcomes=[SimpleNamespace(num_threads=2)],
    )
    assert calibrate._calibrate(runtime, 4, lambda line: None).device == "the card at cuda:1"
