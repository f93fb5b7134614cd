"""The unsplit model: transformers as it comes, one prompt at a time.  The oracle for tokens.

Where an older transformers computes something else than the model by its own configuration, newer ones are followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_sworker.model import eos_token_ids as named_ends
from gpu_sworker.rope import TRANSFORMERS, reach


def load_reference(model_directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unsplit model on the CPU, in evaluation mode, with all that its attention is."""
    text = AutoConfig.from_pretrained(model_directory, local_files_only=True).get_text_config(decoder=True)
    # Up to transformers 5.20 the default is SDPA, which leaves a soft cap out.
    is_capped = getattr(text, "attn_logit_softcapping", None) is not None
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_directory,
        dtype=dtype,
        attn_implementation="eager" if is_capped else None,
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval()


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
    model = load_reference(model_directory)
    # Up to 5.19 a cache that is dropped where LongRoPE changes is not computed anew, so generate has to begin anew.
    restart = reach(model.config).restart_tokens if TRANSFORMERS < (5, 20) else None
    ends = (eos_token_ids or named_ends(model.generation_config)) if stop_at_eos else ()
    outputs = []
    for prompt in prompts:
        tokens, longest = list(prompt), len(prompt) + max_new_tokens
        parts = [restart, longest] if restart and len(prompt) < restart < longest else [longest]
        for until in parts:
            limits: dict[str, Any] = {"eos_token_id": list(eos_token_ids)} if eos_token_ids else {}
            if not stop_at_eos:
                limits = {"eos_token_id": None, "min_new_tokens": until - len(tokens)}
            ids = torch.tensor([tokens])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=until - len(tokens),
                    do_sample=False,
                    pad_token_id=0,
                    **limits,
                )
            tokens = out[0].tolist()
            if tokens[-1] in ends:
                break
        outputs.append(tokens[len(prompt) :])
    return outputs
