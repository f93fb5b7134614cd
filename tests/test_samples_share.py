"""The n samples of a request have one prompt, which is computed once; and nobody can tell by what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import quiet

from fastdecode import LLM, SamplingParams
from fastdecode.observe.step_log import read_step_log

PROMPTS = [[(7 * i + j) % 400 + 3 for j in range(length)] for i, length in enumerate((150, 9, 70, 131))]
PARAMS = [
    SamplingParams(n=n, temperature=temperature, seed=i, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    for i, (n, temperature, max_tokens) in enumerate(((5, 1.0, 20), (3, 1.0, 4), (2, 0.7, 9), (4, 1.0, 1)))
]
OPTIONS: dict[str, dict[str, Any]] = {
    "in one process": {},
    "two lanes": {"micro_batches": 2, "num_r_workers": 2},
    "three lanes, another process each": {"micro_batches": 3, "num_r_workers": 3, "transport": "shm"},
    "in chunks": {"max_num_batched_tokens": 40, "num_r_workers": 2, "transport": "ipc"},
    "int8": {"kv_cache_dtype": "int8"},
    "memory for half of them": {"kv_cache_memory": "24MiB", "block_tokens": 16},
}


def samples(model: Path, options: dict[str, Any], log: Path) -> tuple[list[list[list[int]]], int]:
    """Tokens of every sample, and how many tokens of prompts went through the model."""
    defaults = {
        "enable_prefix_caching": False,
        "kv_cache_memory": "64MiB",
        "skip_tokenizer_init": True,
        "step_log": str(log),
    }
    with LLM(model, **defaults | options) as llm:
        outputs = quiet(llm, PROMPTS, PARAMS)
    assert not any(output.error for output in outputs)
    assert all(len(one.logprobs or ()) == len(one.token_ids) for output in outputs for one in output.outputs)
    computed = sum(record.num_prompt_tokens for record in read_step_log(log))
    return [[one.token_ids for one in output.outputs] for output in outputs], computed


@pytest.mark.parametrize("name", OPTIONS)
def test_samples_are_those_of_one_after_the_other(name: str, demo_model: Path, tmp_path: Path) -> None:
    """With one seat nobody meets another sample of its request, and computes its prompt."""
    options = OPTIONS[name]
    alone, computed_alone = samples(
        demo_model, {"max_num_seqs": 1, "kv_cache_dtype": options.get("kv_cache_dtype", "auto")}, tmp_path / "alone"
    )
    assert computed_alone == sum(params.n * len(prompt) for prompt, params in zip(PROMPTS, PARAMS, strict=True))
    together, computed = samples(demo_model, options, tmp_path / "together")
    if name == "int8":  # what is stored is not what a prompt's own tokens attend to, so everybody computes its own
        assert computed == computed_alone
        return
    assert together == alone
    # A short prompt is computed by each; those that end with their first token leave nothing to share.
    once = 150 + 4 + 3 * 9 + 70 + 1 + 4 * 131
    if name != "memory for half of them":
        assert computed <= (once if options.get("num_r_workers", 1) == 1 else once + 150 + 70)
    assert computed < computed_alone
