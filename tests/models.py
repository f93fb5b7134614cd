"""Small random models of many families, made from transformers' own configurations and kept for a test session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 256

_LLAMA_LIKE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# family -> (model type, configuration); windows are shorter than the prompts of the equality tests.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 32}),
    "mistral-window": ("mistral", _LLAMA_LIKE | {"sliding_window": 24}),
    "opt": (
        "opt",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "gemma2": ("gemma2", _LLAMA_LIKE | {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        _LLAMA_LIKE | {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 7},
    ),
    "phi3": ("phi3", _LLAMA_LIKE | {"sliding_window": 40}),
    "mixtral": ("mixtral", _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        _LLAMA_LIKE | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "gpt-neox": (
        "gpt_neox",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "gpt2": (
        "gpt2",
        dict(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "gpt-oss": (
        "gpt_oss",
        _LLAMA_LIKE
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granite": ("granite", _LLAMA_LIKE | {"attention_multiplier": 0.2, "residual_multiplier": 0.8}),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "cohere": ("cohere", _LLAMA_LIKE),
    "starcoder2": ("starcoder2", _LLAMA_LIKE | {"sliding_window": 40}),
    "stablelm": ("stablelm", _LLAMA_LIKE),
    "glm4": ("glm4", _LLAMA_LIKE | {"head_dim": 16}),
}


def make_model(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random model of the family to `directory` and returns it."""
    model_type, settings = FAMILIES[family]
    config = CONFIG_MAPPING[model_type](**settings | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Larger than the usual initialisation, embeddings smaller: attention is peaked and outweighs the residual.
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "sinks" in name:
                parameter.normal_(0.0, 0.25 if "embed" not in name else 0.05)
    model.generation_config.do_sample = False
    model.save_pretrained(directory, safe_serialization=True)
    return directory


SCRIPT_POSITIONS = 255


def make_scripted(directory: Path, tokenizer: Path, script: dict[int, int], vocab: int) -> Path:
    """A model that says what it is told: behind position p comes token script[p], whatever came before.

    A GPT-2 whose layer does nothing: each position's embedding is orthogonal to the others, and the head looks it up.
    """
    width = SCRIPT_POSITIONS + 1
    config = CONFIG_MAPPING["gpt2"](
        vocab_size=vocab,
        n_embd=width,
        n_layer=1,
        n_head=4,
        n_positions=SCRIPT_POSITIONS,
        n_inner=8,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    noise = torch.randn(width, SCRIPT_POSITIONS, generator=torch.Generator().manual_seed(0))
    # [positions, width], orthonormal, each of mean 0, so that the last norm only scales them
    places = torch.linalg.qr(noise - noise.mean(0)).Q.T
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wpe.weight.copy_(places)
        model.transformer.ln_f.weight.fill_(1.0)
        for position, token in script.items():
            model.lm_head.weight[token] += 2.0 * places[position]
    model.generation_config.do_sample = False
    model.save_pretrained(directory, safe_serialization=True)
    for file in tokenizer.iterdir():
        shutil.copy(file, directory / file.name)
    return directory
