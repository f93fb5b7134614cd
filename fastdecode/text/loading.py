"""A model directory's tokenizer, or the reason why there is none, and which package would make one."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdecode.errors import ConfigError
from gpu_sworker import foreign_errors

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_SENTENCEPIECE_START = b"\n"  # field 1 of its message: the pieces


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Raises ConfigError if there is none, or only one that would need its own code or a package that is not there."""

    def explain(what: str) -> ConfigError:
        return ConfigError(
            f"no tokenizer could be loaded from {directory} ({missing_packages(Path(directory)) or what}); give one "
            "with tokenizer=DIR, or pass token ids and skip_tokenizer_init=True"
        )

    with foreign_errors(explain):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        is_empty = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    if is_empty:  # transformers makes one of special tokens alone where there is no vocabulary
        raise explain("it has no vocabulary: tokenizer.json, say, or tokenizer.model; is the download complete?")
    return tokenizer


@dataclass(frozen=True)
class EndToken:
    """The tokenizer's end of sequence."""

    token_id: int
    text: str


def end_token(tokenizer: PreTrainedTokenizerBase) -> EndToken | None:
    with foreign_errors(lambda what: ConfigError(f"the tokenizer's end of sequence cannot be read: {what}")):
        token_id = tokenizer.eos_token_id
        return EndToken(token_id, str(tokenizer.eos_token)) if isinstance(token_id, int) else None


def missing_packages(directory: Path) -> str | None:
    """What the vocabulary there needs and this Python has not; transformers names the last package that it tried."""
    if (directory / "tokenizer.json").exists():
        return None
    for path in sorted(directory.glob("*.model")) if directory.is_dir() else []:
        with path.open("rb") as file:
            start = file.read(1024)
        if start.startswith(_SENTENCEPIECE_START):
            kind, packages = "a SentencePiece model", {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        elif _TIKTOKEN_LINE.match(start):
            kind, packages = "a tiktoken vocabulary", {"tiktoken": "tiktoken"}
        else:
            continue
        absent = [package for package, module in packages.items() if not is_installed(module)]
        if absent:
            return f"{path.name} is {kind}; reading it needs {' and '.join(packages)}: pip install {' '.join(absent)}"
    return None


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
