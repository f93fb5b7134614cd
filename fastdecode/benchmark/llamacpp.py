"""llama.cpp as a peer: the model goes over as GGUF, ``llama-batched-bench`` measures.

The binary builds from the `llama-cpp-python` source package (`scripts/build_llamacpp.sh`).  It makes up its own tokens
and decodes all sequences in one batch, so it serves workloads of equal lengths only.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from fastdecode.errors import ConfigError

WEIGHT_TYPES = ("f32", "f16", "bf16")
_TIMEOUT_S = 3600.0
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # llama.cpp's enum llama_ftype

# Hugging Face name -> GGUF name, of a layer
_TENSORS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(directory: Path, path: Path, weights: str) -> None:
    """Writes a Llama of `directory` as GGUF, without a vocabulary, in one of WEIGHT_TYPES.  Raises ConfigError."""
    try:
        import gguf
        from safetensors.torch import load_file  # not at the top: it brings torch, and help is to be instant
    except ImportError as error:
        raise ConfigError(
            "llama.cpp takes the model by way of the gguf package: pip install 'fastdecode[bench]'"
        ) from error
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ConfigError(f"only Llama models are converted for llama.cpp, not {config.get('model_type')}")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[weights])

    def add(name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array, np.float32)
        kind = {"f32": None, "f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}[weights]
        if kind is None or array.ndim < 2:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    if not config.get("tie_word_embeddings"):
        add("output.weight", tensors["lm_head.weight"])
    for layer in range(layers):
        for ours, theirs in _TENSORS.items():
            array = tensors[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                array = _interleaved(array, heads if theirs == "attn_q" else kv_heads)
            add(f"blk.{layer}.{theirs}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def batched_bench(
    binary: str, path: Path, *, input_len: int, output_len: int, num_prompts: int, threads: int, flash_attention: bool
) -> dict[str, Any]:
    """One run of llama-batched-bench; its own record, with t_pp and t_tg in seconds.  Raises ConfigError."""
    command = [
        *(binary, "-m", str(path), "-npp", str(input_len), "-ntg", str(output_len), "-npl", str(num_prompts)),
        *("-c", str(num_prompts * (input_len + output_len)), "-b", "2048", "-ub", "512"),
        *("-fa", "on" if flash_attention else "off", "-t", str(threads), "-tb", str(threads)),
        *("--output-format", "jsonl"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{binary}: {error}") from error
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return dict(json.loads(line))
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise ConfigError(f"{binary} ended with exit code {done.returncode}: {last}")


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: it rotates neighbours, transformers rotates halves."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
