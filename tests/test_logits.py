"""Logits that are no distribution end their request with an error; those that allow a few tokens only are fine."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet
from safetensors.torch import load_file, save_file
from serving import live_server
from transformers import PhiConfig, PhiForCausalLM

from fastdecode import LLM, SamplingParams
from fastdecode.batch.journal import Journal
from fastdecode.batch.runner import run_batch
from fastdecode.batch.survey import survey
from fastdecode.engine.row_faults import RowFaults
from fastdecode.scheduling.request import Request, Sequence
from gpu_sworker import RowFault
from models import VOCAB, make_model

NAN, INFINITE = 250, 251  # tokens that the model cannot stand
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True, seed=3, n=3)
GOOD = [[5, 6, 7], [8] * 40, [9, 10]]
ALLOWED = (10, 11, 12)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two embeddings that are broken."""
    directory = make_model("llama", tmp_path_factory.mktemp("fragile"))
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][NAN] = torch.nan
    weights["model.embed_tokens.weight"][INFINITE] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head allows three tokens."""
    directory = tmp_path_factory.mktemp("masked")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=VOCAB, max_position_embeddings=128, **sizes))
    model.lm_head.bias.data[:] = -torch.inf
    model.lm_head.bias.data[list(ALLOWED)] = 0
    model.save_pretrained(directory)
    return directory


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in quiet(llm, prompts, params)]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int4"])
def test_such_a_request_ends_alone(kv_cache_dtype: str, fragile: Path) -> None:
    """Its neighbours have the tokens that they have without it, in its micro-batch and in its KV blocks after it."""
    options: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "block_tokens": 16, "micro_batches": 2}
    with LLM(fragile, skip_tokenizer_init=True, kv_cache_memory=1 << 20, max_num_seqs=24, **options) as llm:
        expected = {params: tokens(llm, GOOD, params) for params in (GREEDY, SAMPLED)}
        for params in (GREEDY, SAMPLED):
            # In the prompt, and as the first of the new tokens.
            later = SamplingParams(temperature=params.temperature, max_tokens=8, n=params.n, allowed_token_ids=[NAN])
            prompts = [GOOD[0], [5, NAN], GOOD[1], [INFINITE] * 40, GOOD[2], [7, 8]]
            outputs = quiet(llm, prompts, [params] * 5 + [later])
            assert [[each.token_ids for each in outputs[i].outputs] for i in (0, 2, 4)] == expected[params]
            for place, num_new in ((1, 0), (3, 0), (5, 1)):
                error = outputs[place].error
                assert error and error.code == "invalid_logits", place
                assert f"after {num_new} new tokens" in error.message and "computed in float32" in error.message
                assert "weights are whole" in error.message and "another dtype" not in error.message
                assert [each.finish_reason for each in outputs[place].outputs] == ["error"] * params.n
            engine = llm._engine
            assert not (engine.has_work or engine._requests or engine._requests.sequences)
            engine._scheduler.check_integrity()
            assert tokens(llm, GOOD * 4, params) == expected[params] * 4


def test_one_sample_of_several_ends_its_request(fragile: Path) -> None:
    """The others had begun well, or had even ended."""
    params = SamplingParams(temperature=1, max_tokens=30, n=8, seed=1, logit_bias={NAN: 100 / 28}, ignore_eos=True)
    with LLM(fragile, skip_tokenizer_init=True) as llm:
        (output,) = quiet(llm, [[5, 6]], params)
        assert output.error and output.error.code == "invalid_logits" and len(output.outputs) == 8
        assert not llm._engine.has_work and not llm._engine._requests.sequences


def test_scores_of_a_prompt_that_are_nan(fragile: Path) -> None:
    """Also where no token is wanted after it."""
    params = [SamplingParams(temperature=0, max_tokens=n, prompt_logprobs=1) for n in (0, 0, 2)]
    with LLM(fragile, skip_tokenizer_init=True) as llm:
        bad, good, later = quiet(llm, [[5, NAN, 6], [5, 7, 6], [5, NAN, 6]], params)
    assert bad.error and later.error and bad.error.code == later.error.code == "invalid_logits"
    assert not good.error and good.prompt_logprobs and len(good.prompt_logprobs) == 3


def test_a_vocabulary_with_few_tokens_is_fine(masked: Path) -> None:
    with LLM(masked, skip_tokenizer_init=True) as llm:
        greedy, sampled = quiet(
            llm,
            [[5, 6], [5, 6]],
            [SamplingParams(temperature=t, max_tokens=20, logprobs=5, ignore_eos=True) for t in (0.0, 1.0)],
        )
    for output in (greedy, sampled):
        (completion,) = output.outputs
        assert not output.error and len(completion.token_ids) == 20 and set(completion.token_ids) <= set(ALLOWED)
        assert completion.logprobs
        for entries in completion.logprobs:
            finite = {token_id for token_id, entry in entries.items() if math.isfinite(entry.logprob)}
            assert finite == set(ALLOWED) and len(entries) == 5
            assert all(entry.logprob == -math.inf for token_id, entry in entries.items() if token_id not in finite)


def test_what_the_request_forbids_is_no_fault_of_the_model(masked: Path) -> None:
    with LLM(masked, skip_tokenizer_init=True) as llm:
        (output,) = quiet(llm, [[5, 6]], SamplingParams(temperature=0, allowed_token_ids=[20, 21]))
    assert output.error and output.error.code == "invalid_request"
    assert "allowed_token_ids leave no token that the model can take" in output.error.message


def test_a_batch_file_has_a_line_for_it(fragile: Path, masked: Path, tmp_path: Path) -> None:
    def body(prompt: list[int]) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 5}

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"custom_id": str(prompt[0]), "method": "POST", "url": "/v1/completions", "body": body(prompt)}
        for prompt in ([5, 6], [NAN], [7])
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(model: Path) -> dict[str, Any]:
        found = survey(source)
        with (
            LLM(model, skip_tokenizer_init=True) as llm,
            Journal(out, found, {}, resume=False, retry_errors=False) as journal,
        ):
            run_batch(llm, found, journal, model_names=["m"], seed=0)
        records = [json.loads(line, parse_constant=_no_constant) for line in out.read_text().splitlines()]
        out.unlink()
        return {record["custom_id"]: record for record in records}

    records = run(fragile)
    assert [records[name]["response"]["status_code"] for name in ("5", str(NAN), "7")] == [200, 500, 200]
    assert records[str(NAN)]["error"]["code"] == "invalid_logits"
    for record in run(masked).values():
        (choice,) = record["response"]["body"]["choices"]
        assert min(choice["logprobs"]["top_logprobs"][0].values()) in (-9999.0, choice["logprobs"]["token_logprobs"][0])


def _no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def test_served(fragile: Path) -> None:
    """500 with the code, at the end of a stream an event with it."""
    engine = {"skip_tokenizer_init": True, "num_r_workers": 1, "kv_cache_memory": 1 << 22}
    broken = {"prompt": [5, 6], "max_tokens": 8, "allowed_token_ids": [NAN], "temperature": 0}

    async def run() -> None:
        async with live_server(fragile, engine) as live:
            whole = await live.post(broken)
            assert whole.status_code == 500 and whole.json()["error"]["code"] == "invalid_logits"
            streamed = await live.post(broken | {"stream": True, "logprobs": 0})
            events = [line for line in streamed.text.split("\n\n") if line]
            assert streamed.status_code == 200 and '"token_logprobs"' in events[0]
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "invalid_logits"
            good = await live.post({"prompt": [5, 6], "max_tokens": 3})
            assert good.status_code == 200
            await live.idle()

    asyncio.run(run())


def test_the_log_names_one_request_a_second(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fastdecode.engine.row_faults.time.monotonic", lambda: now[0])
    faults = RowFaults("float16")

    def sequence(name: str) -> Sequence:
        request = Request(name, (1,), GREEDY, 8, frozenset(), frozenset())
        return Sequence(0, request, 0, 0, output_token_ids=[4, 5])

    with caplog.at_level(logging.ERROR, logger="fastdecode.engine.row_faults"):
        for name in ("a", "b", "c"):
            told = faults.explain(RowFault.NOT_FINITE, sequence(name), 17)
            assert told.code == "invalid_logits" and "try another dtype, bfloat16 or float32" in str(told)
        now[0] += 1.5
        faults.explain(RowFault.NOT_FINITE, sequence("d"), 18)
        faults.explain(RowFault.NOTHING_LEFT, sequence("e"), 18)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "what a request asks for is not logged as the model's fault"
    assert said[0].startswith("request a ends: after 2 new tokens (step 17)") and "float16" in said[0]
    assert said[1].startswith("request d ends") and "(2 more requests since the last such line)" in said[1]
