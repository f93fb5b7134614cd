"""What lies in a model directory, read from the headers of its files: names, dtypes and shapes, but no weights.

Quantised weights are told by any of their signs, because the others may be missing: a section of config.json, a file of
a quantisation tool, scales beside the weights, or the dtype they are stored in.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gpu_sworker.errors import ModelNotFound, UnsupportedModel, foreign_errors

# Sections of config.json and files beside it -> the format, where they do not name it themselves.
_SECTIONS = {
    "quantization_config": "format not named",
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
    "quant_config": "format not named",
    "quantize_config": "gptq",
}
_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "format not named",
    "hf_quant_config.json": "modelopt",
    "quant_model_description.json": "modelslim",
}
_ADAPTER = "adapter_config.json"
_METHOD_KEYS = ("quant_method", "quant_algo", "quantization_method")

# Endings of tensors that lie beside quantised weights, or are them -> the format.
_COMPANIONS = {
    ".g_idx": "gptq",
    ".qzeros": "awq or gptq",
    ".qweight": "awq or gptq",
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_2": "modelopt",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".q_weight": "exl2",
    ".trellis": "exl3",
    ".W_q": "hqq",
    ".Qidxs": "quip#",
    ".codebooks": "aqlm",
    "_blocks": "mxfp4",
}
# ... and those that say so only beside the tensor of the same name without the ending.
_SCALES = ("_scale", "_scales", "_scale_inv", "_zero_point", "_zeros", "_absmax", "_qdata")

_POINTER = b"version https://git-lfs"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NEVER_PACKED = (*_FLOATS, "BOOL", "C64", "I64", "U64")
# Buffers of whole numbers that older transformers stored: causal masks, positions.
_HARMLESS_INTEGERS = re.compile(r"(^|[._])(bias|mask|ids)$")
_FORMAT_OF_DTYPE = {"F8": "fp8", "F6": "fp6", "F4": "fp4", "I8": "int8", "U8": "in uint8", "I32": "in int32"}


@dataclass(frozen=True)
class StoredTensor:
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every shard is there and whole: safetensors says in its header how long the file has to be.

    Raises ModelNotFound.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _shards(directory):
        with foreign_errors(partial(_damaged, path)), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                part = file.get_slice(name)
                tensors[name] = StoredTensor(part.get_dtype(), tuple(part.get_shape()))
    return tensors


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """That of most numbers."""
    count = Counter[torch.dtype]()
    for tensor in tensors.values():
        if tensor.dtype in _FLOATS:
            count[_FLOATS[tensor.dtype]] += prod(tensor.shape)
    return count.most_common(1)[0][0] if count else None


def refuse_adapter(directory: Path) -> None:
    """An adapter (LoRA) without its model, or beside one: whose weights are then not the ones that are meant.

    Raises ModelNotFound.
    """
    path = directory / _ADAPTER
    if not path.is_file():
        return
    with foreign_errors(partial(_damaged, path)):
        described = json.loads(path.read_text(encoding="utf-8"))
    base = described.get("base_model_name_or_path") if isinstance(described, Mapping) else None
    raise ModelNotFound(
        f"{directory} holds an adapter of {base or 'another model'}: adapters are not supported; merge it into its "
        f"model (peft: merge_and_unload, then save_pretrained). If that was done here, remove {_ADAPTER}"
    )


def refuse_quantised_config(directory: Path, raw: Mapping[str, Any], model_type: str) -> None:
    """raw: config.json.  Raises UnsupportedModel."""
    for key, section in _sections(raw):
        raise _quantised(model_type, _method(section) or _SECTIONS[key], f"config.json has {key}")
    for name, method in _FILES.items():
        if (directory / name).is_file():
            with foreign_errors(partial(_damaged, directory / name)):
                described = json.loads((directory / name).read_text(encoding="utf-8"))
            raise _quantised(model_type, _method(described) or method, f"{name} lies beside it")


def refuse_quantised_tensors(tensors: Mapping[str, StoredTensor], model_type: str) -> None:
    """Raises UnsupportedModel."""
    for ending, method in _COMPANIONS.items():
        for name in tensors:
            if name.endswith(ending) and (ending[0] == "." or name.removesuffix(ending) + "_scales" in tensors):
                raise _quantised(model_type, method, f"the weights have {name}")
    for name, tensor in tensors.items():
        if _is_packed(name, tensor):
            method = _FORMAT_OF_DTYPE.get(tensor.dtype.split("_")[0], "format not named")
            raise _quantised(model_type, method, f"{name} is stored as {tensor.dtype}")
    for name in tensors:
        if any(name.endswith(ending) and name.removesuffix(ending) in tensors for ending in _SCALES):
            raise _quantised(model_type, "format not named", f"the weights have {name}")


def _is_packed(name: str, tensor: StoredTensor) -> bool:
    """Stored in a dtype in which no weights are computed."""
    if name.endswith("weight"):
        return tensor.dtype not in _FLOATS
    is_buffer = tensor.dtype[0] in "IU" and _HARMLESS_INTEGERS.search(name)
    return tensor.dtype not in _NEVER_PACKED and not is_buffer


def _quantised(model_type: str, method: str, sign: str) -> UnsupportedModel:
    return UnsupportedModel(model_type, f"its weights are quantised ({method}): {sign}; use the unquantised checkpoint")


def _damaged(path: Path, what: str) -> ModelNotFound:
    told = f"{path} is missing, truncated or damaged: {what}"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                told = f"{path} is a pointer of Git LFS, not the file itself: fetch that with `git lfs pull`"
    return ModelNotFound(told)


def _shards(directory: Path) -> list[Path]:
    """The files that transformers reads; others may lie beside them."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    paths = [whole] if whole.exists() else []
    if index.exists():
        with foreign_errors(partial(_damaged, index)):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths += [directory / name for name in names]
    if not paths:
        raise ModelNotFound(f"{directory} has a config.json but no *.safetensors weights to read{_hint(directory)}")
    return paths


def _hint(directory: Path) -> str:
    """What lies there instead of weights to read."""
    for path in sorted(directory.iterdir()):
        if path.suffix in (".bin", ".pt", ".pth"):
            return f"; {path.name} is a pickle, which is never opened: convert it with save_pretrained"
        if path.suffix == ".gguf":
            return f"; {path.name} is GGUF, a format for other programs: fetch the model in safetensors"
        if path.suffix == ".safetensors":
            return f"; {path.name} is none of model.safetensors and what model.safetensors.index.json names"
    return ""


def _sections(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Also those inside of others, text_config say."""
    for key, value in raw.items():
        if key in _SECTIONS and value:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _sections(value)


def _method(described: Any) -> str | None:
    """How a section or file names its format."""
    if not isinstance(described, Mapping):
        return described if isinstance(described, str) else None
    named = [str(described[key]) for key in _METHOD_KEYS if described.get(key)]
    inner = [_method(value) for value in described.values() if isinstance(value, Mapping)]
    return next(iter((*named, *filter(None, inner))), None)
