"""The oracle itself: each token is the best one of a forward over all before it, with the model's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_rope import ORIGINAL, ROPES, STRETCHED
from transformers import AutoModelForCausalLM

from gpu_sworker import generate_reference
from models import VOCAB, make_model

NEW_TOKENS = 24
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": STRETCHED,
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {k: v for k, v in ROPES["longrope"].items() if k != "factor"},
    "sliding_window": None,
}


def without_cache(directory: Path, prompt: list[int], new_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


# What transformers leaves out up to 5.20, and loses up to 5.19.
@pytest.mark.parametrize(
    "family, changes", [("gemma2", {"attn_logit_softcapping": 2.0}), ("phi3", LONGROPE)], ids=["soft cap", "LongRoPE"]
)
def test_reference_is_the_whole_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of prompts that never outgrow LongRoPE's original length, do so late or at once, or are longer from the start."""
    directory = make_model(family, tmp_path, **changes)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, VOCAB, length).tolist() for length in (30, 50, ORIGINAL, ORIGINAL + 1, 90)]
    expected = [without_cache(directory, prompt, NEW_TOKENS) for prompt in prompts]
    assert generate_reference(directory, prompts, NEW_TOKENS, stop_at_eos=False) == expected


def test_reference_stops_where_longrope_changes(tmp_path: Path) -> None:
    """An end that is the last token before all is computed anew is the end."""
    directory = make_model("phi3", tmp_path, **LONGROPE)
    prompt = np.random.default_rng(1).integers(3, VOCAB, ORIGINAL - 2).tolist()
    (whole,) = generate_reference(directory, [prompt], NEW_TOKENS, stop_at_eos=False)
    end = whole[2]
    assert end not in whole[:2], "it is the first of its kind"
    assert generate_reference(directory, [prompt], NEW_TOKENS, eos_token_ids=[end]) == [whole[:3]]
