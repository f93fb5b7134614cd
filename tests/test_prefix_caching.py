"""Prompts that begin alike are computed and held once; and nobody can tell by what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import quiet

from fastdecode import LLM, SamplingParams
from fastdecode.observe.step_log import read_step_log


def tokens(kind: int, length: int) -> list[int]:
    return [(7 * kind + 5 * j + j * j) % 400 + 3 for j in range(length)]


# Two system prompts, one a bit longer than a whole number of blocks, with questions of all lengths after each; one
# question twice; and prompts that begin like nobody.
PROMPTS = [
    *(
        tokens(kind, 130 + 11 * kind) + tokens(10 + question, 3 + 17 * question)
        for question in range(4)
        for kind in (1, 2)
    ),
    tokens(1, 141) + tokens(12, 37),
    tokens(1, 141) + tokens(12, 37),
    tokens(3, 80),
    tokens(4, 5),
]
PARAMS = [
    SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=3 + 7 * i % 23, ignore_eos=True, logprobs=1, n=1 + i % 2)
    for i in range(len(PROMPTS))
]
OPTIONS: dict[str, dict[str, Any]] = {
    "in one process": {},
    "two lanes, small blocks": {"micro_batches": 2, "num_r_workers": 2, "block_tokens": 16},
    "three lanes, another process each": {"micro_batches": 3, "num_r_workers": 3, "transport": "shm"},
    "in chunks": {"max_num_batched_tokens": 60, "num_r_workers": 2, "transport": "ipc"},
    "memory for few": {"kv_cache_memory": "6MiB", "block_tokens": 16, "kv_policy": "greedy"},
    "memory for few, two lanes": {
        "kv_cache_memory": "3MiB",
        "block_tokens": 32,
        "num_r_workers": 2,
        "micro_batches": 2,
    },
}
Texts = list[list[list[int]]]


def turns(model: Path, log: Path, **options: Any) -> tuple[list[Texts], int]:
    """Tokens of all samples, of the first turn of all conversations and of the next; prompt tokens computed."""
    defaults = {"kv_cache_memory": "64MiB", "skip_tokenizer_init": True, "step_log": str(log)}
    told = []
    with LLM(model, **defaults | options) as llm:
        prompts = PROMPTS
        for _ in range(2):
            outputs = quiet(llm, prompts, PARAMS)
            assert not any(output.error for output in outputs)
            told.append([[one.token_ids for one in output.outputs] for output in outputs])
            prompts = [
                output.prompt_token_ids + output.outputs[0].token_ids + tokens(20 + i, 6)
                for i, output in enumerate(outputs)
            ]
    return told, sum(record.num_prompt_tokens for record in read_step_log(log))


@pytest.fixture(scope="module")
def without(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Texts], int]:
    """What comes out where nobody shares anything."""
    return turns(demo_model, tmp_path_factory.mktemp("without") / "log", enable_prefix_caching=False, max_num_seqs=1)


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_the_same(name: str, demo_model: Path, without: tuple[list[Texts], int], tmp_path: Path) -> None:
    told, computed = turns(demo_model, tmp_path / "log", **OPTIONS[name])
    assert told == without[0]
    assert computed < without[1] / (1 if name.startswith("memory") else 2)
