"""Every value out of range is refused by name, with its range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdecode import SamplingParams


@pytest.mark.parametrize(
    "options, text",
    [
        ({"n": 0}, "n must be from 1 to 1024, got 0"),
        ({"n": 10**6}, "n must be from 1"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"n": True}, "n must be a whole number"),
        ({"temperature": -0.1}, "temperature must be from 0 to 100"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -2}, "top_k must be from 0"),
        ({"min_p": 2}, "min_p must be from 0 to 1"),
        ({"max_tokens": -1}, "max_tokens must be from 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be from 0 to 1000"),
        ({"prompt_logprobs": 1001}, "prompt_logprobs must be from 0 to 1000"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be a whole number"),
        ({"min_tokens": -1}, "min_tokens must be from 0"),
        ({"presence_penalty": 3}, "presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100"),
        ({"logprobs": -1}, "logprobs must be from 0"),
        ({"seed": 2**64}, "seed must be from"),
        ({"stop": ""}, "stop must hold strings"),
        ({"stop": ["a", 3]}, "stop must hold strings"),
        ({"stop": 5}, "stop must be a list, got 5"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be from 0"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens \\(9\\) must be at most max_tokens \\(8\\)"),
        ({"stop": "x", "detokenize": False}, "set detokenize=True"),
        ({"stop": ["a"] * 300}, "at most 256"),
    ],
)
def test_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_unknown_field() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_normalised() -> None:
    params = SamplingParams(stop="END", top_k=-1)
    assert params.stop_strings == ("END",) and params.top_k == 0 and params.max_tokens == 16
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "name, given, plain",
    [
        ("max_tokens", np.int64(5), 5),
        ("seed", np.uint64(2**63), 2**63),
        ("top_k", np.array(5), 5),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", np.float64(0.5), 0.5),
        ("ignore_eos", np.bool_(True), True),
        ("stop_token_ids", np.array([1, 2]), (1, 2)),
        ("stop_token_ids", [np.int32(1), 2], (1, 2)),
        ("stop_token_ids", np.array([], dtype=int), ()),
        ("stop", np.array(["a", "b"]), ("a", "b")),
        ("stop", np.str_("a"), ("a",)),
    ],
)
def test_numpys_numbers_and_arrays_are_taken(name: str, given: Any, plain: Any) -> None:
    made = getattr(SamplingParams(**{name: given}), name)
    assert made == plain and type(made) is type(plain)
    if isinstance(made, tuple):
        assert all(type(item) in (int, str) for item in made)


def test_numpys_numbers_have_the_same_bounds() -> None:
    with pytest.raises(ValueError, match="max_tokens must be a whole number"):
        SamplingParams(max_tokens=np.float64(1.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_p must be"):
        SamplingParams(top_p=np.float32("nan"))  # type: ignore[arg-type]
