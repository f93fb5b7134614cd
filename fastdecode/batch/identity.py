"""Which run it is: everything that decides what is answered, as short values that can be compared.

A model is what is in its files; where it lies, and when they were written, is no part of it.  What differs between
machines alone (processor, number of R-workers, batch sizes) is left out: it moves results by roundings at most.

Weights of up to 4 GiB are read as a whole.  Of more, every tensor is sampled: its beginning and end, and a page for
each 16 MiB between.  So other weights are told from these, even if few tensors differ; a few numbers somewhere in a
large tensor are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import fastdecode
from fastdecode.engine.config import LINEAR_KERNELS
from fastdecode.errors import ModelError

_PACKAGES = ("torch", "transformers", "tokenizers", "numba")  # whose versions move numbers, or words
_WHOLE_BYTES = 4 << 30  # of all weights together; more are sampled
_SAMPLE_BYTES, _PAGE_BYTES, _LEAST_PAGES = 16 << 20, 4096, 3
_CHUNK_BYTES = 1 << 20
_LONGEST_HEADER = 100 << 20  # of safetensors

_MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
# Of a tokenizer's directory: transformers' own names, those that its classes give their vocabularies, and templates.
_TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab*.txt", "merges*.txt",
    "dict.txt", "emoji.json", "byte_maps.json", "*.model", "*.spm", "*.tiktoken", "*.tokenizer", "*.codes", "*.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip

_FROM_THE_MODEL = ("device", "dtype", "kv_cache_dtype", "linear_kernel", "max_model_len")  # if nobody says otherwise
_EMULATED = "emulated"


def versions() -> dict[str, str | None]:
    """Of the packages that decide numbers and words."""
    return {"fastdecode": fastdecode.__version__} | {name: _version(name) for name in _PACKAGES}


def decided_by(options: Mapping[str, Any]) -> dict[str, Any]:
    """What these options of the engine decide, whatever the model is."""
    device = kind_of(options["device"])
    decided = {"is_emulated": device == _EMULATED}
    names = {"kv_cache_dtype", "max_model_len"} if device == _EMULATED else set(_FROM_THE_MODEL)
    decided |= {name: options[name] for name in sorted(names) if options[name] not in ("auto", None)}
    if decided.get("linear_kernel") != "plain":  # the other one is not to be had everywhere
        decided.pop("linear_kernel", None)
    return decided | ({} if device == "auto" else {"device": device})


def as_begun(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that nobody has set, as the first run had them in the end: `auto` may choose otherwise here.

    settings: a manifest's.
    """
    if _EMULATED in (settings.get("device"), kind_of(options["device"])):
        return {}
    begun = {name: settings.get(name) for name in _FROM_THE_MODEL if options[name] in ("auto", None)}
    if begun.get("linear_kernel") not in LINEAR_KERNELS:
        begun.pop("linear_kernel", None)
    return {name: value for name, value in begun.items() if value is not None}


def kind_of(device: str) -> str:
    """``cuda:1`` -> ``cuda``"""
    return device.split(":")[0]


def identify(model: Path, tokenizer: Path, on_read: Callable[[int], None] = lambda num_bytes: None) -> dict[str, Any]:
    """Digests of a model directory's files, and of those of its tokenizer's.

    on_read: told how many more bytes of weights were read.  Raises ModelError.
    """
    try:
        weights = weight_files(model)
        is_whole = sum(path.stat().st_size for path in weights) <= _WHOLE_BYTES
        return {
            "weights": {path.name: _describe(path, is_whole, on_read) for path in weights},
            "model_files": {name: _sha256(model / name) for name in _MODEL_FILES},
            "tokenizer_files": {
                str(path.relative_to(tokenizer)): _sha256(path)
                for path in sorted({path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern)})
            },
        }
    except OSError as error:
        raise ModelError(f"cannot read the model's files: {error}") from error


def weight_files(model: Path) -> list[Path]:
    """Those that a load reads and that are there, in order; one that is missing is the load's to tell."""
    names = {"model.safetensors", "adapter_model.safetensors"}
    try:
        index = json.loads((model / "model.safetensors.index.json").read_bytes())
        names |= set(map(str, index["weight_map"].values()))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return [path for name in sorted(names) if (path := model / name).is_file()]


def _describe(path: Path, is_whole: bool, on_read: Callable[[int], None]) -> str:
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with path.open("rb") as file:
        for part in _chunks(file) if is_whole else _samples(file, size):
            digest.update(part)
            on_read(len(part))
    return f"{size} bytes, {'' if is_whole else 'sampled '}{digest.hexdigest()}"


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(_CHUNK_BYTES):
        yield part


def _samples(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The header, and pages of every tensor; of a file with a damaged header, of all of it."""
    start = file.read(8)
    num_bytes = int.from_bytes(start, "little")
    header = file.read(num_bytes) if num_bytes <= min(size, _LONGEST_HEADER) else b""
    yield start + header
    base = 8 + len(header)
    try:
        tensors = json.loads(header)
        places = [tensors[name]["data_offsets"] for name in tensors if name != "__metadata__"]
        ends = {int(end) for place in places for end in place}
    except (ValueError, TypeError, KeyError):
        ends = {0, size - base}
    for begin, end in pairwise(sorted(ends)):
        for offset in _pages(begin, end):
            file.seek(base + offset)
            yield file.read(min(_PAGE_BYTES, end - offset))


def _pages(begin: int, end: int) -> list[int]:
    """Where to look between two places: at both ends, and evenly in between."""
    count = max(_LEAST_PAGES, (end - begin) // _SAMPLE_BYTES)
    room = max(0, end - begin - _PAGE_BYTES)
    return sorted({begin + room * i // (count - 1) for i in range(count)})


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path.is_file() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
