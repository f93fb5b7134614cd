"""Fields that are not supported, at the values that ask for nothing: clients write their defaults out.

Any other value of them is refused by the field's name.  Names are those of OpenAI's, vLLM's and llama.cpp's bodies.
"""

from __future__ import annotations

from typing import Any

_BOTH: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),  # or what n is
    "documents": ([],),
    "dry_multiplier": (0.0,),
    "dynatemp_range": (0.0,),
    "early_stopping": (False,),
    "echo": (False,),
    "extra_body": ({},),
    "grammar": ("",),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "lora": ([],),
    "mirostat": (0,),
    "detokenize": (True,),
    "repeat_penalty": (1.0,),
    "repetition_detection": ({},),
    "response_format": ({"type": "text"},),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": ({},),
    "thinking_token_budget": (-1,),
    "timings_per_token": (False,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # of what is not truncated
    "typical_p": (1.0,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "xtc_probability": (0.0,),
}
NEUTRAL_FOR_COMPLETIONS = _BOTH | {
    "add_special_tokens": (True,),
    "logprobs": (False,),
    "prompt_embeds": ([],),
    "suffix": ("",),
}
NEUTRAL_FOR_CHAT = _BOTH | {
    "add_special_tokens": (False,),
    "audio": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "moderation": (),
    "prediction": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


def asks_for_nothing(name: str, value: object, neutral: dict[str, tuple[Any, ...]]) -> bool:
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in neutral.get(name, ())
    )
