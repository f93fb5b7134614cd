"""Models of the shape of large ones, made here: a few layers, random weights; and their S-Part driven by hand.

A layer, what a layer takes and the LM head are those of the whole model; its depth is `WHOLE_LAYERS`, and what is said
of that depth is scaled, not measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from gpu_sworker import AttentionCall, FlatBatch, SWorker

WHOLE_LAYERS = 32
_NUM_LAYERS, _NUM_TINY_LAYERS = 4, 2
_LARGE: dict[str, dict[str, int]] = {
    "7b": dict(  # Llama 2 7B: as many KV heads as query heads
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "8b": dict(  # Llama 3 8B
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
_TINY: dict[str, dict[str, int]] = {
    "7b": dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4),
    "8b": dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
}
NAMES = tuple(_LARGE)


def model_directory(name: str, work: Path, dry: bool) -> Path:
    """Of the model with that shape: made once, in bfloat16 (in a dry run float32, of tiny layers)."""
    directory = work / (f"{name}-tiny" if dry else name)
    if directory.exists():
        return directory
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    config = LlamaConfig(
        **(_TINY if dry else _LARGE)[name],
        num_hidden_layers=_NUM_TINY_LAYERS if dry else _NUM_LAYERS,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    unfinished = tempfile.mkdtemp(dir=work)  # a stage that is ended leaves no half model under the name
    model.save_pretrained(unfinished)
    os.rename(unfinished, directory)
    del model
    if not dry:
        torch.cuda.empty_cache()
    return directory


def load(name: str, work: Path, dry: bool) -> SWorker:
    """With no room for prompts on their way in."""
    return SWorker(
        model_directory(name, work, dry),
        dtype="float32" if dry else "bfloat16",
        device="cpu" if dry else "cuda",
        linear_kernel="plain",
        prompt_kv_bytes=0,
    )


def linears(sworker: SWorker) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Those of the layers, and the LM head."""
    named = [(name, module) for name, module in sworker._model.named_modules() if isinstance(module, nn.Linear)]
    heads = [module for name, module in named if name == "lm_head"]
    assert heads, "a Llama has its head by this name"
    return [module for name, module in named if name != "lm_head"], heads


def decode_batch(num_sequences: int, position: int = 100) -> FlatBatch:
    """A token of each, and the logits of all."""
    rows = np.arange(num_sequences)
    return FlatBatch(rows % 250, np.full(num_sequences, position), rows)


def run_forward(sworker: SWorker, batch: FlatBatch, answer: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor:
    """Within `SWorker.inference`; answer: o of each call.  # [num_samples, vocab]"""
    forward = sworker.forward(batch)
    try:
        call = next(forward)
        while True:
            call = forward.send(answer(call))
    except StopIteration as end:
        logits: torch.Tensor = end.value
        return logits


def made_up_o(sworker: SWorker, num_sequences: int) -> torch.Tensor:
    """An answer to every call, on the device.  # [num_sequences, num_q_heads, head_dim]"""
    spec = sworker.facts.layers[0]
    return torch.randn(num_sequences, spec.num_q_heads, spec.head_dim, device=sworker.device).to(sworker.dtype)


def config(directory: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(directory, local_files_only=True)
