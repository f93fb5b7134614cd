"""Packed weights: the same numbers, for every kind of linear layer and batch, and only where they may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Case, quiet
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.pytorch_utils import Conv1D

from fastdecode import LLM, SamplingParams
from gpu_sworker import FlatBatch, SWorker
from gpu_sworker import linear as room
from gpu_sworker.linear import PackedLinear, pack_linears


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.up, self.down = nn.Linear(24, 40), Conv1D(24, 40)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.down.bias)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(self.embedding(ids)))))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 64), (1, 500)])
@torch.inference_mode()
def test_same_numbers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(50, shape)
    expected = model(ids)
    assert pack_linears(model, "onednn") == "onednn"
    kinds = (type(model.up), type(model.down), type(model.head))
    assert kinds == (PackedLinear,) * 3
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_tied_weight_stays_where_it_is_shared() -> None:
    model = Model()
    before = model.embedding.weight.clone()
    pack_linears(model, "onednn")
    assert torch.equal(model.embedding.weight, before)
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"], "no weight is kept twice"
    assert (model.up.weight.shape, model.up.weight.dtype) == ((40, 24), torch.float32)


@pytest.mark.parametrize(
    "cpu, dtype, shape, chosen",
    [
        ("AVX512", torch.float32, (2816, 1024), "onednn"),
        ("AVX512", torch.bfloat16, (2816, 1024), "onednn"),
        ("AVX512", torch.float32, (256, 256), "onednn"),
        ("AVX512", torch.float32, (96, 64), "plain"),
        ("AVX2", torch.float32, (2816, 1024), "plain"),
        ("DEFAULT", torch.float32, (2816, 1024), "plain"),
    ],
)
def test_the_rule(cpu: str, dtype: torch.dtype, shape: tuple[int, int], chosen: str) -> None:
    made = room.choose_kernel(cpu, dtype, shape)
    assert made.kernel == chosen and str(list(shape)) in made.reason and cpu in made.reason
    assert str(dtype).removeprefix("torch.") in made.reason


def test_auto_goes_by_processor_and_the_shape_that_does_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And by nothing else, clocks least of all; the log tells what it chose and why."""

    def no_clock(*_: object) -> float:
        raise AssertionError("a choice by a measurement is another one in the next run")

    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(f"time.{clock}", no_clock)
    for cpu, width, chosen in (("AVX512", 300, "onednn"), ("AVX512", 100, "plain"), ("AVX2", 300, "plain")):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda cpu=cpu: cpu)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(width, width), nn.Linear(width, width))
        with torch.inference_mode(), caplog.at_level("INFO", logger="gpu_sworker.linear"):
            assert pack_linears(model, "auto") == chosen
        said = caplog.records[-1].getMessage()
        assert said.startswith(f"linear layers: {chosen} (float32 weights like [{width}, {width}], {cpu}")


def test_what_was_asked_for_and_cannot_be_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        pack_linears(Model(torch.float64), "onednn")
    (record,) = [record for record in caplog.records if record.name == "gpu_sworker.linear"]
    assert record.levelname == "WARNING" and "plain (oneDNN cannot pack them here" in record.getMessage()


@pytest.mark.parametrize("kernel", ["auto", "onednn"])
def test_what_cannot_be_packed_stays_plain(kernel: str) -> None:
    with torch.inference_mode():
        double = Model(torch.float64)
        assert pack_linears(double, kernel) == "plain"
        assert double(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float64
        assert pack_linears(nn.LayerNorm(4), kernel) == "plain"


def test_subclasses_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    with torch.inference_mode():
        pack_linears(model, "onednn")
    assert [type(layer) for layer in model] == [Doubled, PackedLinear]


def test_facts_tell_the_kernel(llama: Case) -> None:
    for kernel in ("plain", "onednn"):
        facts = SWorker(llama.directory, linear_kernel=kernel).facts
        assert facts.linear_kernel == kernel
    assert facts.num_parameters == SWorker(llama.directory, linear_kernel="plain").facts.num_parameters


def test_the_same_run_twice_is_equal_to_the_bit(llama: Case) -> None:
    """Tokens and log-probabilities, greedy and sampled, prompts cut and two micro-batches in a step."""
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=24, logprobs=2) for i in range(len(llama.prompts))]
    runs = []
    for _ in range(2):
        with LLM(
            llama.directory, skip_tokenizer_init=True, num_r_workers=2, micro_batches=2, max_num_batched_tokens=64,
            kv_cache_memory="16MiB",
        ) as llm:  # fmt: skip
            runs.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in quiet(llm, llama.prompts, params)])
    assert runs[0] == runs[1]


def test_padded_rows() -> None:
    numbers = range(4097)
    padded = [room.padded_rows(n) for n in numbers]
    assert padded[:65] == list(range(65)) and padded == sorted(padded)
    assert all(n <= p <= 1.04 * n and room.padded_rows(p) == p for n, p in zip(numbers, padded, strict=True))
    assert len(set(padded[1:])) == 256


def _run(sworker: SWorker, num_tokens: int, logits_rows: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and all q, where attention answers each token with its own value heads."""
    positions = np.arange(num_tokens)
    forward, queries = sworker.forward(FlatBatch(positions % 97, positions, np.array(logits_rows))), []
    try:
        call = next(forward)
        while True:
            queries.append(call.q.clone())
            assert len(call.q) == len(call.k) == len(call.v) == num_tokens
            call = forward.send(call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1))
    except StopIteration as end:
        return end.value, queries


def test_packed_weights_meet_few_numbers_of_rows(llama: Case) -> None:
    """oneDNN keeps code for each for ever; and what is there to make them few changes nothing."""
    seen = set()

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, PackedLinear):
            seen.add(args[0].numel() // module.in_features)

    plain, packed = (SWorker(llama.directory, linear_kernel=kernel) for kernel in ("plain", "onednn"))
    with plain.inference(), register_module_forward_pre_hook(note):
        for num_tokens in range(65, 130):
            rows = list(range(0, num_tokens, 1 + num_tokens % 3))
            (logits, queries), (expected, expected_queries) = (_run(s, num_tokens, rows) for s in (packed, plain))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            for q, expected_q in zip(queries, expected_queries, strict=True):
                torch.testing.assert_close(q, expected_q, rtol=1e-4, atol=1e-5)
    assert seen == {room.padded_rows(n) for n in seen}
    assert len({n for n in seen if n > 64}) == 33
