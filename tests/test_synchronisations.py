"""What makes the host wait for the device: nothing in the layers of a step, and once per step the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case
from synchronisations import Waits, on_paper

from fastdecode import LLM, SamplingParams
from fastdecode.engine.engine import Engine
from fastdecode.engine.pipeline import Pipeline
from gpu_sworker import FlatBatch, SWorker
from models import FAMILIES

__all__ = ["on_paper"]  # a fixture

LIKELIEST = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
TOKEN_BYTES = 768  # of the small llama's KV, fp32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_asks_the_device_for_no_number(family: str, case: Callable[[str], Case]) -> None:
    sworker = SWorker(case(family).directory, device="cpu", linear_kernel="plain")
    batch = FlatBatch(np.array([5, 6, 7]), np.array([3, 40, 9]), np.arange(3))
    with sworker.inference(), Waits(device=None) as waits:
        forward = sworker.forward(batch)
        call = next(forward)
        with pytest.raises(StopIteration):
            while True:
                call = forward.send(torch.zeros_like(call.q))
    assert not waits.found


@contextmanager
def stepping(model: Case, params: SamplingParams = LIKELIEST, **options: Any) -> Iterator[tuple[Engine, Waits]]:
    """Some prompts are added, and nothing is done yet."""
    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "r_worker_threads": 1, "block_tokens": 16}
    with LLM(model.directory, **defaults | options) as llm:
        engine = llm._engine
        for prompt in model.prompts:
            engine.add_request(engine.next_request_id(), prompt, params)
        yield engine, Waits()


PLACES: dict[str, dict[str, Any]] = {
    "R-workers": {"num_r_workers": 2},
    "two lanes": {"num_r_workers": 2, "micro_batches": 2},
    "prompts in chunks": {"max_num_batched_tokens": 40},
    "prompts attend on R-workers": {"max_num_batched_tokens": 40, "prompt_kv_memory": 0},
    "the device": {"num_r_workers": 0, "device_kv_memory": TOKEN_BYTES * 2048, "max_num_batched_tokens": 60},
    "both": {"device_kv_memory": TOKEN_BYTES * 400, "max_num_batched_tokens": 60},
    "parts": {"num_r_workers": 3, "kv_cache_memory": TOKEN_BYTES * 128, "max_num_batched_tokens": 60},
}


def places(waits: Waits) -> list[str]:
    """Files."""
    found = [wait.partition(": ")[2].partition(": ")[0] for wait in waits.found]
    waits.found.clear()
    return found


@pytest.mark.usefixtures("on_paper")
@pytest.mark.parametrize("place", PLACES)
def test_a_step_waits_for_its_tokens_alone(place: str, llama: Case) -> None:
    """Whatever it has of prompts and decodes, and wherever they attend."""
    with stepping(llama, **PLACES[place]) as (engine, waits):
        for _ in range(40):
            with waits:
                engine.step()
            assert places(waits) == ["gpu_sworker/sampler.py"]


@pytest.mark.usefixtures("on_paper")
def test_draws_and_rules_wait_for_what_they_give_alone(llama: Case) -> None:
    params = SamplingParams(
        temperature=0.8, top_k=7, top_p=0.9, min_p=0.01, frequency_penalty=0.1, repetition_penalty=1.2,
        logit_bias={5: 1.0}, min_tokens=10, logprobs=3, max_tokens=20,
    )  # fmt: skip
    with stepping(llama, params) as (engine, waits):
        for _ in range(10):
            with waits:
                engine.step()
            # The tokens, and then numbers and values of log-probabilities.
            assert places(waits) == ["gpu_sworker/sampler.py"] * 3


INJECTED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda q: q.sum().item(),
    "a condition": lambda q: bool((q > 0).all()),
    "a copy to the host": lambda q: q.cpu(),
    "a copy to the device": lambda q: torch.from_numpy(np.zeros(3)).to(q.device),
    "one from memory that is not pinned": lambda q: torch.from_numpy(np.zeros(3)).to(q.device, non_blocking=True),
    "an index on the host": lambda q: q[torch.from_numpy(np.array([0]))],
    "numbers of the host": lambda q: torch.tensor([1, 2], device=q.device),
}


@pytest.mark.usefixtures("on_paper")
@pytest.mark.parametrize("wait", INJECTED)
def test_a_wait_in_the_layers_is_noticed(wait: str, llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per layer, where it is."""

    def collect(self: Pipeline, flight: Any) -> torch.Tensor:
        INJECTED[wait](flight.call.q)
        return collect_all(self, flight)

    collect_all = Pipeline._collect
    with stepping(llama) as (engine, waits):
        with waits:
            engine.step()
            waits.found.clear()
            monkeypatch.setattr(Pipeline, "_collect", collect)
            engine.step()
        assert places(waits) == ["fastdecode/engine/pipeline.py"] * 3 + ["gpu_sworker/sampler.py"]
