"""What a benchmark asks for: prompts as token ids and how many tokens each is to get.  Pure but for reading files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdecode.errors import ConfigError

DATASETS = ("random", "sharegpt", "custom")

_LEAST_TOKENS = 4  # of a ShareGPT prompt or answer; vLLM's filter, as the next two
_LONGEST_PROMPT, _LONGEST_TOTAL = 1024, 2048

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class BenchRequest:
    prompt_token_ids: tuple[int, ...]
    output_len: int


def random_requests(
    num_prompts: int, input_len: int, output_len: int, *, vocab_size: int, range_ratio: float = 0.0, seed: int = 0
) -> list[BenchRequest]:
    """Uniform tokens.  Lengths are uniform in [length * (1 - range_ratio), length * (1 + range_ratio)]."""
    generator = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        low, high = max(1, int(mean * (1 - range_ratio))), int(mean * (1 + range_ratio))
        return generator.integers(low, high + 1, num_prompts).tolist()

    return [
        BenchRequest(tuple(generator.integers(0, vocab_size, prompt_len).tolist()), new)
        for prompt_len, new in zip(lengths(input_len), lengths(output_len), strict=True)
    ]


def sharegpt_requests(
    path: str | Path, num_prompts: int, encode: Encode, *, output_len: int | None = None, seed: int = 0
) -> list[BenchRequest]:
    """First turns of conversations in ShareGPT's JSON; output lengths are those of the answers unless given."""
    try:
        conversations = json.loads(Path(path).read_text(encoding="utf-8"))
        turns = [
            (str(c["conversations"][0]["value"]), str(c["conversations"][1]["value"]))
            for c in conversations
            if len(c.get("conversations") or c.get("conversation") or ()) >= 2
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no ShareGPT file: {error}") from error
    requests: list[BenchRequest] = []
    for index in np.random.default_rng(seed).permutation(len(turns)):
        if len(requests) == num_prompts:
            break
        prompt, answer = (encode(text) for text in turns[index])
        new = len(answer) if output_len is None else output_len
        if min(len(prompt), new) < _LEAST_TOKENS or len(prompt) > _LONGEST_PROMPT:
            continue
        if len(prompt) + new <= _LONGEST_TOTAL:
            requests.append(BenchRequest(tuple(prompt), new))
    return _enough(requests, num_prompts, path)


def custom_requests(path: str | Path, num_prompts: int, encode: Encode, *, output_len: int) -> list[BenchRequest]:
    """Lines of JSON: {"prompt": TEXT or "prompt_token_ids": [...], and "output_len": N if not `output_len`}."""
    requests = [_custom(number, line, path, encode, output_len) for number, line in _lines(path)]
    return _enough(requests[:num_prompts], num_prompts, path)


def _custom(number: int, line: str, path: str | Path, encode: Encode, output_len: int) -> BenchRequest:
    try:
        fields = json.loads(line)
        ids = fields["prompt_token_ids"] if "prompt_token_ids" in fields else encode(fields["prompt"])
        request = BenchRequest(tuple(int(i) for i in ids), int(fields.get("output_len", output_len)))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if not request.prompt_token_ids or request.output_len < 1:
        raise ConfigError(f"{path}, line {number}: a request needs a prompt and at least one new token")
    return request


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _enough(requests: list[BenchRequest], num_prompts: int, path: str | Path) -> list[BenchRequest]:
    if len(requests) < num_prompts:
        raise ConfigError(f"{path} has {len(requests)} usable requests, {num_prompts} were asked for")
    return requests
