"""From a Hugging Face directory to a model that can be split, or a reason why not.

Weights come from safetensors only, code from transformers only: nothing in the directory is executed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from gpu_sworker.checkpoint import (
    StoredTensor,
    refuse_adapter,
    refuse_quantised_config,
    refuse_quantised_tensors,
    stored_dtype,
)
from gpu_sworker.errors import NOT_THROUGH_INTERFACE, ModelNotFound, UnsupportedModel, first_line, foreign_errors
from gpu_sworker.suspension import ATTENTION_NAME

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_HAS_BFLOAT16 = (8, 0)  # compute capability: Ampere; before it is emulated

_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "attention", "chunked_attention"}
_ALIBI_MODELS = {"bloom", "mpt"}  # whose configuration does not say so


def choose_device(device: str) -> torch.device:
    """``auto``: CUDA if there is one.  Raises UnsupportedModel if the asked device is not there.

    A card has its number: in another thread one without would be that thread's own.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModel("any", f"{device!r} is no device; write auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedModel("any", f"{device!r} is not supported as a device; write auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UnsupportedModel("any", f"device {device!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def choose_dtype(
    dtype: str, config: PretrainedConfig, device: torch.device, tensors: Mapping[str, StoredTensor]
) -> torch.dtype:
    """``auto``: on CUDA what config.json says, or else the weights' own if they have 16 bits, or else 16 bits; float32
    on CPUs, most of which are slow at anything less.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cuda":
        return torch.float32
    half = torch.bfloat16 if torch.cuda.get_device_capability(device) >= _HAS_BFLOAT16 else torch.float16
    for said in (config, config.get_text_config(decoder=True)):
        if getattr(said, "dtype", None) in DTYPES.values():
            chosen: torch.dtype = said.dtype
            if chosen == torch.float32:
                logger.warning(
                    "config.json says torch.float32, and so it is; dtype=%s takes half the memory of weights and KV, "
                    "and a GPU multiplies several times as fast in it", str(half).removeprefix("torch."),
                )  # fmt: skip
            return chosen
    stored = stored_dtype(tensors)
    if stored is not None and stored in (torch.float16, torch.bfloat16):
        logger.warning("config.json names no dtype to compute in; %s is taken, that of the weights", stored)
        return stored
    logger.warning(
        "config.json names no dtype to compute in, and the weights are %s; %s is taken, as by vLLM: write "
        "dtype=float32 to compute in that, at twice the memory and a fraction of the speed", stored, half,
    )  # fmt: skip
    return half


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration, vetted as far as it tells.  Raises ModelNotFound, UnsupportedModel."""
    path = directory / "config.json"
    with foreign_errors(lambda what: ModelNotFound(f"{path} cannot be read: {what}")):
        is_directory, is_there = directory.is_dir(), path.exists()
    if not is_directory:
        raise ModelNotFound(
            f"{directory} is no directory; give the path of a Hugging Face model directory (with config.json and "
            "*.safetensors). Nothing is downloaded: fetch a model first, for example with "
            "`hf download NAME --local-dir DIR`"
        )
    refuse_adapter(directory)
    if not is_there:
        raise ModelNotFound(f"{directory} has no config.json; it is not a Hugging Face model directory")
    with foreign_errors(lambda what: ModelNotFound(f"{path} is not JSON, or cannot be read: {what}")):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ModelNotFound(f"{path} is not JSON of a configuration: it holds a {type(raw).__name__}")
    model_type = str(raw.get("model_type", "unknown"))
    refuse_quantised_config(directory, raw, model_type)
    if "auto_map" in raw:
        reason = "it brings its own code, which is never run"
    elif model_type in CONFIG_MAPPING:
        reason = "its config.json is not valid"
    else:
        reason = "transformers does not know it"
    with foreign_errors(lambda what: UnsupportedModel(model_type, f"{reason} ({what})")):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        _vet_config(config, model_type)
        config.return_dict = True  # an output format for scripts; everything here reads fields by name
    return config


def load(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    tensors: Mapping[str, StoredTensor],
) -> PreTrainedModel:
    """The model with its attention suspended, on `device`, in evaluation mode.  tensors: what the directory holds.

    Raises ModelNotFound, UnsupportedModel.
    """
    refuse_quantised_tensors(tensors, config.model_type)
    wishes = _generation_config(directory)
    with foreign_errors(lambda what: _not_loaded(config.model_type, what)), _quiet_transformers():
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
                ignore_mismatched_sizes=True,  # told below
                generation_config=wishes,
            )
        except (OSError, SafetensorError) as error:
            raise ModelNotFound(f"the weights in {directory} cannot be loaded: {first_line(error)}") from error
    _check_loaded(directory, model, info)
    # Nothing is padded here, and GPT-2 would look for padding in every forward, which waits for the device.
    for one in (model.config, model.config.get_text_config(decoder=True)):
        one.pad_token_id = None
    with foreign_errors(lambda what: UnsupportedModel(config.model_type, f"its weights do not go to {device}: {what}")):
        return model.to(device).eval()


def eos_token_ids(*configs: object) -> tuple[int, ...]:
    """All that any of the configurations names, in their order: many chat models name one here and another there."""
    named: list[object] = []
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [ids]
    return tuple(dict.fromkeys(i for i in named if isinstance(i, int) and i >= 0))


def _not_loaded(model_type: str, what: str) -> UnsupportedModel:
    if ATTENTION_NAME in what:  # how models say that they know only their own attention
        return UnsupportedModel(model_type, NOT_THROUGH_INTERFACE)
    return UnsupportedModel(model_type, f"transformers does not load it: {what}")


def _check_loaded(directory: Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raises ModelNotFound for tensors that are not there or do not fit; one line for those nobody asked for."""
    name = type(model).__name__
    if adapter := next((key for key in sorted(info["unexpected_keys"]) if ".lora_" in key), None):
        raise ModelNotFound(
            f"the weights in {directory} hold an adapter ({adapter}, ...) that {name} has no place for: merge it into "
            "its model (peft: merge_and_unload, then save_pretrained)"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, stored, wanted = mismatched[0]
        raise ModelNotFound(
            f"{len(mismatched)} tensors in {directory} cannot be loaded into {name}, because their shapes differ "
            f"({tensor}: {list(stored)} is stored, {list(wanted)} wanted, ...); does config.json belong to the weights?"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFound(
            f"the weights in {directory} lack {len(missing)} tensors that {name} needs "
            f"({', '.join(missing[:3])}, ...); is the download complete, and does config.json belong to it?"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning(
            "%d tensors in %s are of no use to %s and left out: %s%s",
            len(unexpected), directory, name, ", ".join(unexpected[:3]), ", ..." if len(unexpected) > 3 else "",
        )  # fmt: skip


def _generation_config(directory: Path) -> GenerationConfig | None:
    """None: there is none.  One that cannot be read keeps no model from loading."""
    path = directory / "generation_config.json"
    if not path.exists():
        return None
    try:
        with foreign_errors(ModelNotFound):
            return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except ModelNotFound as error:
        logger.warning("%s is left out, because transformers does not take it: %s", path, error)
        return GenerationConfig()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """What it would say about tensors is said here, in a line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(max(before, transformers_logging.ERROR))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _vet_config(config: PretrainedConfig, model_type: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(model_type, "it is an encoder-decoder, with cross-attention between two stacks")
    model_class = _causal_lm_class(config)
    if model_class is None:
        raise UnsupportedModel(model_type, "it is no causal language model")
    text = config.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "num_attention_heads"):
        if isinstance(number := getattr(text, name, None), int) and number < 1:
            raise UnsupportedModel(model_type, f"its config.json is not valid: {name} is {number}")
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
