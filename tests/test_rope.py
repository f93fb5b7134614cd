"""Stretched contexts: how far they reach, and that each sequence has the positions it would have alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import quiet
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError
from fastdecode.observe.step_log import read_step_log
from gpu_sworker import generate_reference
from gpu_sworker.rope import make_rope_per_sequence, reach
from gpu_sworker.suspension import Forward
from models import VOCAB, make_model

ORIGINAL, FACTOR = 64, 4.0
THETA = {"rope_theta": 10000.0}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": FACTOR},
    "proportional": {"factor": FACTOR, "partial_rotary_factor": 0.5},
    "dynamic": {"factor": FACTOR},
    "yarn": {"factor": FACTOR, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": FACTOR,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": FACTOR,
        "short_factor": [1.0 + i / 9 for i in range(8)],
        "long_factor": [1.5 + i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}
ROPES = {kind: THETA | {"rope_type": kind} | rope for kind, rope in SCALED.items()}
STRETCHED = int(ORIGINAL * FACTOR)
DECLARED = {kind: ORIGINAL for kind in ROPES} | {"llama3": STRETCHED}


# model type, configuration as in config.json -> longest sequence
REACHES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"max_position_embeddings": 100}, 100),
    ("llama", {"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.5}}, 250),
    ("llama", {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 200),
    ("llama", {"max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 400),
    (  # Qwen3's way: room for output beyond the original length, before scaling
        "qwen3",
        {
            "max_position_embeddings": 120,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
        },
        400,
    ),
    (  # DeepSeek's and gpt-oss's way: stretched already
        "llama",
        {
            "max_position_embeddings": 400,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
        },
        400,
    ),
    (  # Llama 3.2: the factor says more than the model is meant for
        "llama",
        {"max_position_embeddings": 400, "rope_scaling": SCALED["llama3"] | {"rope_type": "llama3", "factor": 32.0}},
        400,
    ),
    (
        "phi3",
        {
            "max_position_embeddings": 400,
            "original_max_position_embeddings": 100,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        },
        400,
    ),
    ("llama", {"max_position_embeddings": 100, "rope_scaling": ROPES["longrope"]}, STRETCHED),
    ("gemma3_text", {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 100),
    ("olmo3", {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, 800),
    (
        "gemma3_text",
        {
            "max_position_embeddings": 100,
            "rope_parameters": {
                "full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
            },
        },
        100,
    ),
    (
        "hunyuan_v1_dense",
        {"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 9.0}},
        100,
    ),
    ("gpt_neox", {"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 200),
    ("gpt2", {"n_positions": 100}, 100),
]


@pytest.mark.parametrize("model_type, settings, longest", REACHES)
def test_reach(model_type: str, settings: dict[str, Any], longest: int) -> None:
    found = reach(CONFIG_MAPPING[model_type].from_dict({"model_type": model_type} | settings))
    assert found.longest == longest and "max_position_embeddings = " in found.reason


def _rotary(family: str, **changes: Any) -> torch.nn.Module:
    model_type = {"gemma3": "gemma3_text"}.get(family, family)
    config = CONFIG_MAPPING[model_type](
        vocab_size=VOCAB, hidden_size=64, intermediate_size=8, num_hidden_layers=6, num_attention_heads=4, head_dim=16,
        max_position_embeddings=ORIGINAL, pad_token_id=0, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).model


NESTED = {"full_attention": ROPES["dynamic"], "sliding_attention": ROPES["longrope"]}
PHI_MOE = ROPES["longrope"] | {"short_mscale": 1.1, "long_mscale": 1.3}
ROTARIES = {kind: ("llama", rope, None) for kind, rope in ROPES.items()} | {
    "interleaved": ("cohere", ROPES["dynamic"], None),
    "phimoe": ("phimoe", PHI_MOE, None),
    "full layers": ("gemma3", NESTED, "full_attention"),
    "sliding layers": ("gemma3", NESTED, "sliding_attention"),
    "partial": ("llama", ROPES["dynamic"] | {"partial_rotary_factor": 0.5}, None),
}


@pytest.mark.parametrize("name", ROTARIES)
def test_rotary_tables_are_those_of_each_sequence_alone(name: str) -> None:
    """To the bit, in a flat batch of sequences on both sides of the original length, in any order, twice."""
    family, rope, layer_type = ROTARIES[name]
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    x, lengths = torch.zeros(1, 1, 1), (5, 200, ORIGINAL, 63, 130, ORIGINAL + 1, 200, 17)
    alone = []
    for length in lengths:
        fresh = _rotary(family, rope_parameters=rope).rotary_emb
        alone.append(fresh(x, torch.arange(length)[None], **arguments))
    model = _rotary(family, rope_parameters=rope)
    make_rope_per_sequence(model)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    for _ in range(2):
        forward = Forward(
            lambda: model.rotary_emb(x, positions, **arguments), positions[0].numpy(), np.repeat(lengths, lengths)
        )
        forward.resume()
        for flat, parts in zip(forward.result, zip(*alone, strict=True), strict=True):
            assert torch.equal(flat, torch.cat(parts, dim=1))
    if any(kind in str(rope) for kind in ("dynamic", "longrope")):
        assert not torch.equal(alone[0][0], alone[1][0][:, :5]), "frequencies depend on the length"


# In the order in which transformers, which remembers the longest sequence so far, begins each with a clean slate.
PROMPT_LENGTHS, NEW_TOKENS = (64, 40, 56, 90, 150), 16
FAMILIES = {kind: ("llama", rope) for kind, rope in ROPES.items()} | {
    "phi3": ("phi3", {k: v for k, v in ROPES["longrope"].items() if k != "factor"}),
    "gemma3": ("gemma3", {"full_attention": ROPES["dynamic"], "sliding_attention": THETA | {"rope_type": "default"}}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_beyond_the_original_length(name: str, tmp_path: Path) -> None:
    """Prompts beyond it, and prompts that outgrow it, in whole, in chunks, and computed again after a preemption."""
    family, rope = FAMILIES[name]
    changes = {"original_max_position_embeddings": ORIGINAL, "sliding_window": None} if name == "phi3" else {}
    declared = STRETCHED if name == "phi3" else DECLARED.get(name, ORIGINAL)
    directory = make_model(family, tmp_path, max_position_embeddings=declared, rope_parameters=rope, **changes)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, VOCAB, length).tolist() for length in PROMPT_LENGTHS]
    expected = generate_reference(directory, prompts, NEW_TOKENS, stop_at_eos=False)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(directory, skip_tokenizer_init=True) as llm:
        assert llm.max_model_len == STRETCHED
        assert [o.outputs[0].token_ids for o in quiet(llm, prompts, params)] == expected
        token_bytes = 8 * sum(layer.num_kv_heads * layer.head_dim for layer in llm.facts.layers)
    with LLM(
        directory,
        skip_tokenizer_init=True,
        max_num_batched_tokens=24,
        max_model_len=176,
        kv_cache_memory=token_bytes * 192,
        block_tokens=16,
        kv_policy="greedy",
        start_policy="eager",
        step_log=tmp_path / "steps.jsonl",
    ) as llm:
        assert [o.outputs[0].token_ids for o in quiet(llm, prompts, params)] == expected
    assert sum(record.num_preempted for record in read_step_log(tmp_path / "steps.jsonl")) >= 1
    with pytest.raises(ConfigError, match=f"{STRETCHED} tokens only.*max_position_embeddings = {declared}.*rope scal"):
        LLM(directory, skip_tokenizer_init=True, max_model_len=STRETCHED + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_begin_alike(name: str, tmp_path: Path) -> None:
    """One after the other, shorter and longer ones: KV of one is begun with where positions are the same."""
    family, rope = FAMILIES[name]
    changes = {"original_max_position_embeddings": ORIGINAL, "sliding_window": None} if name == "phi3" else {}
    declared = STRETCHED if name == "phi3" else DECLARED.get(name, ORIGINAL)
    directory = make_model(family, tmp_path, max_position_embeddings=declared, rope_parameters=rope, **changes)
    whole = np.random.default_rng(1).integers(3, VOCAB, max(PROMPT_LENGTHS)).tolist()
    prompts = [whole[:length] for length in PROMPT_LENGTHS]
    expected = generate_reference(directory, prompts, NEW_TOKENS, stop_at_eos=False)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, n=2)
    with LLM(directory, skip_tokenizer_init=True, block_tokens=16) as llm:
        outputs = [quiet(llm, prompt, params)[0] for prompt in prompts]
    assert [one.token_ids for output in outputs for one in output.outputs] == [e for e in expected for _ in range(2)]
    assert any(output.num_cached_tokens for output in outputs) == (
        name not in ("dynamic", "longrope", "phi3", "gemma3")
    )


def test_decoding_sequences_of_many_lengths() -> None:
    """Each newest token's row is that of a sequence that was computed up to it, kept or new, in any order."""
    model = _rotary("llama", rope_parameters=ROPES["dynamic"])
    make_rope_per_sequence(model)
    x = torch.zeros(1, 1, 1)
    for places in ((70, 10, 90, 70, 63, 64, 200), (200, 90, 65, 11), (150, 150)):
        positions = torch.tensor(places)[None]
        forward = Forward(
            lambda ids=positions: model.rotary_emb(x, ids), positions[0].numpy(), positions[0].numpy() + 1
        )
        forward.resume()
        for row, place in enumerate(places):
            alone = _rotary("llama", rope_parameters=ROPES["dynamic"]).rotary_emb(x, torch.tensor([[place]]))
            for flat, single in zip(forward.result, alone, strict=True):
                assert torch.equal(flat[:, row : row + 1], single)
