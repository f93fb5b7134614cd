"""What was found of prompts is told; salts keep it apart, a reset forgets it, and whoever says so does without."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import quiet
from serving import live_server
from test_prefix_caching import tokens

from fastdecode import LLM, SamplingParams
from fastdecode.commands import bench, generate, run_batch, serve
from fastdecode.commands.engine_flags import engine_options
from fastdecode.errors import ConfigError
from fastdecode.observe.step_log import read_step_log

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = tokens(1, 150)


def an_llm(model: Path, **options: Any) -> LLM:
    return LLM(model, skip_tokenizer_init=True, kv_cache_memory="64MiB", **options)


@pytest.fixture(scope="module")
def opened(demo_model: Path) -> Iterator[LLM]:
    with an_llm(demo_model) as llm:
        yield llm


@pytest.fixture
def llm(opened: LLM) -> LLM:
    """With nothing to find."""
    assert opened.reset_prefix_cache() is True
    return opened


def test_a_chat_computes_what_is_new(demo_model: Path, tmp_path: Path) -> None:
    """The documentation's own example."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "num_cached_tokens" in block)
    told: dict[str, Any] = {}
    exec(example.replace('LLM("path/to/model")', f"LLM({str(demo_model)!r}, step_log={str(tmp_path / 'log')!r})"), told)
    first, second, *_ = turns = told["turns"]
    prompt, output, longer = first.prompt_token_ids, first.outputs[0].token_ids, second.prompt_token_ids
    assert longer[: len(prompt) + len(output)] == prompt + output and len(longer) > len(prompt) + len(output)
    # All but the token that was sampled last, which never went through the model.
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == len(prompt) + len(output) - 1
    each = [record.num_prompt_tokens for record in read_step_log(tmp_path / "log") if record.num_prompt_tokens]
    assert each == [len(turn.prompt_token_ids) - turn.num_cached_tokens for turn in turns]
    assert each[1] == len(longer) - (len(prompt) + len(output) - 1)


def test_nothing_is_lost_by_finding_it(llm: LLM) -> None:
    """Nor by several that come at once."""
    quiet(llm, PROMPT, GREEDY)
    for prompts in ([PROMPT], [PROMPT] * 2, [PROMPT] * 3, [PROMPT]):
        found = [output.num_cached_tokens for output in quiet(llm, prompts, GREEDY)]
        assert found == [len(PROMPT) - 1] * len(prompts)


def test_salts_never_share(demo_model: Path, tmp_path: Path) -> None:
    num_prompt = len(PROMPT)
    salts = (None, "a", "b", "a", "b", None)
    prompts = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in salts]
    with an_llm(demo_model, step_log=tmp_path / "log") as llm:
        apart = [quiet(llm, prompt, GREEDY)[0] for prompt in prompts]
        llm.reset_prefix_cache()
        at_once = quiet(llm, prompts, GREEDY)
    assert [output.num_cached_tokens for output in apart] == [0, 0, 0, *[num_prompt - 1] * 3]
    assert sorted(output.num_cached_tokens for output in at_once) == [0, 0, 0, *[num_prompt - 1] * 3]
    assert len({tuple(output.outputs[0].token_ids) for output in apart + at_once}) == 1
    computed = sum(record.num_prompt_tokens for record in read_step_log(tmp_path / "log"))
    assert computed == 2 * (3 * num_prompt + 3)


@pytest.mark.parametrize("salt", ["", 5, ["a"]])
def test_what_is_no_salt(salt: Any, llm: LLM) -> None:
    bad, good = quiet(llm, [{"prompt_token_ids": PROMPT, "cache_salt": salt}, PROMPT], GREEDY)
    assert bad.error and bad.error.code == "invalid_request" and bad.error.param == "cache_salt"
    assert "a string that is not empty" in bad.error.message and not good.error


def test_a_request_counts_its_prompt_once(llm: LLM) -> None:
    """However many samples are forked from the first one."""
    params = SamplingParams(temperature=1, seed=1, n=3, max_tokens=8)
    first, again = (quiet(llm, PROMPT, params)[0] for _ in range(2))
    assert first.num_cached_tokens == 0 and again.num_cached_tokens == len(PROMPT) - 1
    assert [one.token_ids for one in first.outputs] == [one.token_ids for one in again.outputs]


def test_what_is_computed_again_was_not_found(demo_model: Path, tmp_path: Path) -> None:
    """A sequence that is preempted begins again with what is left of its own."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    options: dict[str, Any] = {
        "kv_cache_memory": "1MiB",
        "kv_policy": "greedy",
        "start_policy": "eager",
        "block_tokens": 16,
    }
    with LLM(demo_model, skip_tokenizer_init=True, step_log=tmp_path / "log", **options) as llm:
        outputs = quiet(llm, [tokens(20 + i, 30 + i) for i in range(6)], params)
    assert sum(record.num_preempted for record in read_step_log(tmp_path / "log")) > 0
    assert [output.num_cached_tokens for output in outputs] == [0] * 6


@pytest.mark.parametrize(
    ("options", "is_found"),
    [
        ({"enable_prefix_caching": False}, False),
        ({"enable_prefix_caching": None}, True),
        ({"kv_cache_dtype": "int8"}, False),
        ({"kv_cache_dtype": "int8", "enable_prefix_caching": True}, True),
    ],
)
def test_whether_it_is_on(options: dict[str, Any], is_found: bool, demo_model: Path) -> None:
    with an_llm(demo_model, **options) as llm:
        _, again = (quiet(llm, PROMPT, GREEDY)[0] for _ in range(2))
    assert again.num_cached_tokens == (len(PROMPT) - 1 if is_found else 0)


def test_benchmarks_compute_every_round_anew() -> None:
    """Unless they are asked to find what was there; whoever serves finds it where that changes no token."""

    def says(command: Any, *words: str) -> object:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return engine_options(parser.parse_args(words))["enable_prefix_caching"]

    for what in ("throughput", "latency"):
        assert says(bench, what, "m") is False and says(bench, what, "m", "--enable-prefix-caching") is True
    for command, words in (
        (generate, ["m", "--prompt", "x"]),
        (serve, ["m"]),
        (run_batch, ["--model", "m", "-i", "i", "-o", "o"]),
    ):
        assert says(command, *words) is None and says(command, *words, "--no-enable-prefix-caching") is False
        assert says(command, *words, "--enable-prefix-caching") is True


def test_a_reset_forgets_what_has_ended(llm: LLM) -> None:
    quiet(llm, PROMPT, GREEDY)
    assert llm.reset_prefix_cache() is True and llm.reset_prefix_cache() is True
    (again,) = quiet(llm, PROMPT, GREEDY)
    assert again.num_cached_tokens == 0
    # What runs keeps its own KV, and goes on with the same tokens.
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (8, 60)]
    lengths = []
    for output in llm.generate_iter([PROMPT, tokens(2, 70)], params):
        lengths.append(len(output.outputs[0].token_ids))
        llm.reset_prefix_cache()
    assert lengths == [8, 60]
    llm._engine._scheduler.check_integrity()


def test_a_closed_one_is_not_reset(demo_model: Path) -> None:
    with an_llm(demo_model) as llm:
        pass
    with pytest.raises(ConfigError, match="closed"):
        llm.reset_prefix_cache()


def test_over_http(demo_model: Path) -> None:
    """Whole, streamed and with a salt; then the counters, and a reset, for who has the key."""
    headers = {"Authorization": "Bearer sesame"}
    asks = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    found, reset = len(PROMPT) - 1, "/reset_prefix_cache"

    async def run() -> None:
        engine = {"num_r_workers": 1}
        async with (
            live_server(demo_model, engine, api_keys=("sesame",)) as server,
            httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client,
        ):

            async def cached(**more: Any) -> int:
                answer = await client.post("/v1/completions", json=asks | more)
                assert answer.status_code == 200, answer.text
                return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            async def streamed(**options: bool) -> list[int | None]:
                body = asks | {"prompt": [PROMPT, PROMPT], "stream": True, "stream_options": options}
                answer = await client.post("/v1/completions", json=body)
                events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                usages = [event["usage"] for event in events]
                return [usage and usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]

            assert [await cached(), await cached(), await cached(cache_salt="a")] == [0, found, 0]
            assert await cached(cache_salt="a", prompt=[PROMPT, PROMPT]) == 2 * found
            *before, last = await streamed(include_usage=True)
            assert not any(before) and last == 2 * found
            so_far = await streamed(continuous_usage_stats=True)
            assert set(so_far) <= {found, 2 * found} and so_far[-1] == 2 * found  # of those that have begun
            refused = await client.post("/v1/completions", json=asks | {"cache_salt": ""})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "cache_salt"
            standing = server.service.standing
            assert (standing.num_prefix_queried, standing.num_prefix_found) == (9 * len(PROMPT), 7 * found)

            assert (await httpx.AsyncClient().post(server.url + reset, json={})).status_code == 401
            assert (await client.post(reset, json={})).status_code == 200
            assert await cached() == 0

    asyncio.run(run())
