"""From a Hugging Face directory to a model that can be split, or a reason why not.

Weights come from safetensors only, code from transformers only: nothing in the directory is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gpu_sworker.attention import ATTENTION_NAME
from gpu_sworker.errors import NOT_THROUGH_INTERFACE, ModelNotFound, UnsupportedModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "attention", "chunked_attention"}
_ALIBI_MODELS = {"bloom", "mpt"}  # whose configuration does not say so


def choose_device(device: str) -> torch.device:
    """``auto``: CUDA if there is one.  Raises UnsupportedModel if the asked device is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModel("any", f"{device!r} is no device; write auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedModel("any", f"{device!r} is not supported as a device; write auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UnsupportedModel("any", f"device {device!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    return chosen


def choose_dtype(dtype: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """``auto``: the checkpoint's own on CUDA; float32 on CPUs, most of which are slow at anything less."""
    if dtype == "auto":
        stored = getattr(config, "dtype", None)
        return stored if device.type == "cuda" and isinstance(stored, torch.dtype) else torch.float32
    return DTYPES[dtype]


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration, vetted as far as it tells.  Raises ModelNotFound, UnsupportedModel."""
    if not directory.is_dir():
        raise ModelNotFound(
            f"{directory} is no directory; give the path of a Hugging Face model directory (with config.json and "
            "*.safetensors). Nothing is downloaded: fetch a model first, for example with "
            "`huggingface-cli download NAME --local-dir DIR`"
        )
    try:
        raw = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise ModelNotFound(f"{directory} has no config.json; it is not a Hugging Face model directory") from None
    except ValueError as error:
        raise ModelNotFound(f"{directory / 'config.json'} is not JSON: {error}") from error
    model_type = str(raw.get("model_type", "unknown")) if isinstance(raw, dict) else "unknown"
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        if "auto_map" in raw:
            reason = "it brings its own code, which is never run"
        elif model_type in CONFIG_MAPPING:
            reason = "its config.json is not valid"
        else:
            reason = "transformers does not know it"
        raise UnsupportedModel(model_type, f"{reason} ({_first_line(error)})") from error
    _vet_config(config, model_type)
    config.return_dict = True  # an output format for scripts; everything here reads fields by name
    return config


def load(directory: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its attention suspended, on `device`, in evaluation mode.

    Raises ModelNotFound, UnsupportedModel.
    """
    _check_weights(directory)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError) as error:  # how models say that they know only their own attention
        if ATTENTION_NAME in str(error):
            raise UnsupportedModel(config.model_type, NOT_THROUGH_INTERFACE) from error
        raise UnsupportedModel(config.model_type, f"transformers does not load it: {_first_line(error)}") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelNotFound(f"the weights in {directory} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelNotFound(
            f"the weights in {directory} lack {len(missing)} tensors that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}, ...); is the download complete, and does config.json belong to it?"
        )
    return model.to(device).eval()


def _vet_config(config: PretrainedConfig, model_type: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(model_type, "it is an encoder-decoder, with cross-attention between two stacks")
    if getattr(config, "quantization_config", None):
        method = config.quantization_config
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else type(method).__name__
        raise UnsupportedModel(model_type, f"its weights are quantised ({name}); use the unquantised checkpoint")
    model_class = _causal_lm_class(config)
    if model_class is None:
        raise UnsupportedModel(model_type, "it is no causal language model")
    text = config.get_text_config(decoder=True)
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    if others or getattr(model_class, "_is_stateful", False):
        kinds = ", ".join(sorted(map(str, others))) or "state-space"
        raise UnsupportedModel(
            model_type, f"it has layers that are not attention and keep a state of their own ({kinds})"
        )
    if getattr(text, "alibi", False) or model_type in _ALIBI_MODELS:
        raise UnsupportedModel(model_type, "it adds ALiBi biases to its attention scores")


def _causal_lm_class(config: PretrainedConfig) -> Any:
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return model_class[0] if isinstance(model_class, list | tuple) else model_class


def _check_weights(directory: Path) -> None:
    """Every shard is there and whole: safetensors says in its header how long the file has to be."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelNotFound(f"{index} is damaged: {error}") from error
    if not names:
        pickled = [path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it with save_pretrained" if pickled else ""
        raise ModelNotFound(f"{directory} has a config.json but no *.safetensors weights{hint}")
    for name in names:
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelNotFound(f"{directory / name} is missing, truncated or damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
