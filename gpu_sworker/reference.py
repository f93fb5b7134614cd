"""The unsplit model: transformers as it comes, one prompt at a time.  The oracle for tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def generate_reference(
    model_directory: str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_at_eos: bool = True,
    eos_token_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Greedy continuations by ``transformers.generate`` in fp32 on the CPU, without padding.

    eos_token_ids: where it stops, if not where the model's configuration says.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()
    limits: dict[str, Any] = {"eos_token_id": list(eos_token_ids)} if eos_token_ids else {}
    if not stop_at_eos:
        limits = {"eos_token_id": None, "min_new_tokens": max_new_tokens}
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                **limits,
            )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs
