"""A tokenizer that cannot decode some of what is generated: that request ends, and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from conftest import quiet
from serving import live_server
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdecode import LLM, SamplingParams
from models import make_scripted

BAD = 5  # the position of a token that the decoder panics at
WORDS = ["<unk>", "a", "</s>", "boom"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says "a", and after six tokens "boom", of which the decoder makes nothing, and strips that."""
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    backend.decoder = decoders.Sequence([decoders.Replace("boom", ""), decoders.Strip(" ", 0, 1)])  # type: ignore[assignment]
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tokenizer)
    script = {position: 3 if position == BAD else 1 for position in range(40)}
    return make_scripted(tmp_path_factory.mktemp("model"), tokenizer, script, len(WORDS))


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"logprobs": 1}, {"stop": "zz"}, {"prompt_logprobs": 0}], ids=str)
def test_such_a_request_ends_alone(more: dict[str, int | str], model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, **more)  # type: ignore[arg-type]
    prompts = [[1], [1] * 4, [1] * 2, [3, 1, 1, 1, 1, 1, 1], [1] * 10]  # one has it in its prompt
    with LLM(model) as llm:
        outputs = quiet(llm, prompts, params)
        for i in (1, 3):
            error = outputs[i].error
            assert error and error.code == "tokenizer_failed" and "PanicException" in error.message
            assert [each.finish_reason for each in outputs[i].outputs] == ["error"] * params.n
        assert [each.text for i in (0, 2, 4) for each in outputs[i].outputs] == ["aaaa"] * 3 * params.n
        engine = llm._engine
        assert not (engine.has_work or engine._requests or engine._requests.sequences)
        engine._scheduler.check_integrity()


def test_served(model: Path) -> None:
    """500 with the code, at the end of a stream an event with it; the server goes on."""
    broken = {"prompt": [1] * 4, "max_tokens": 8, "temperature": 0}

    async def run() -> None:
        async with live_server(model, {"num_r_workers": 1, "kv_cache_memory": 1 << 22}) as live:
            whole = await live.post(broken)
            assert whole.status_code == 500 and whole.json()["error"]["code"] == "tokenizer_failed"
            for more in ({}, {"n": 2}, {"logprobs": 1}, {"stop": "zz"}):
                streamed = await live.post(broken | {"stream": True} | more)
                events = [line for line in streamed.text.split("\n\n") if line]
                assert streamed.status_code == 200
                assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "tokenizer_failed"
            good = await live.post({"prompt": [1], "max_tokens": 3, "temperature": 0})
            assert good.status_code == 200 and good.json()["choices"][0]["text"] == "aaa"
            await live.idle()

    asyncio.run(run())
