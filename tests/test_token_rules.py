"""logit_bias, allowed_token_ids, bad_words and min_tokens: what may come, through every door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import quiet
from test_sampler import penalties, rows
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastdecode import LLM, SamplingParams
from fastdecode.api.token_rules import TokenRules
from fastdecode.errors import RequestError
from fastdecode.openai_api import read_line, read_request
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import RowFault
from gpu_sworker.sampler import sample

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
WORDS = "the cat sat on the mat and the concatenated cats ate a cat\nwe met at the gate "


# The sampler


def naive(logits: np.ndarray, allowed: list[int] | None, banned: list[int], biases: dict[int, float]) -> np.ndarray:
    """One row, after vLLM's order: allowed, banned, biases."""
    made = logits.copy()
    if allowed is not None:
        made[[i for i in range(len(made)) if i not in allowed]] = -np.inf
    made[banned] = -np.inf
    for token_id, bias in biases.items():
        made[token_id] += np.float32(bias)
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_has_its_own(temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((40, 50)).astype(np.float32)
    kinds = generator.integers(0, 8, 40)
    allowed, banned, biases, expected = [], [], [], []
    for row, kind in enumerate(kinds.tolist()):
        own = generator.choice(50, 6, replace=False).tolist() if kind & 1 else None
        never = generator.choice(50, 9, replace=False).tolist() if kind & 2 else []
        added = {int(t): float(generator.uniform(-5, 5)) for t in generator.choice(50, 4, replace=False)}
        added = added if kind & 4 else {}
        if own is not None and not set(own) - set(never):
            never = []
        allowed += [(row, own)] if own is not None else []
        banned += [(row, never)] if never else []
        biases += [(row, list(added), np.array(list(added.values())))] if added else []
        expected.append(naive(logits[row], own, never, added))
    draws = generator.random(40)
    constrained = rows(40, temperature=temperature, uniforms=draws, allowed=allowed, banned=banned, biases=biases)
    given = torch.from_numpy(logits.copy())
    sampled = sample(given, constrained)
    plain = sample(torch.from_numpy(np.array(expected)), rows(40, temperature=temperature, uniforms=draws))
    assert sampled.token_ids.tolist() == plain.token_ids.tolist() and not sampled.faults.any()
    assert np.array_equal(given.numpy(), logits), "the caller's logits stay as they are"


def test_biases_come_before_penalties_and_leave_logprobs_alone() -> None:
    logits = torch.tensor([[1.75, 0.0, -1.0]])
    given = penalties(0, [], [2], presence=0.0, frequency=0.0, repetition=2.0)

    def best(bias: float) -> tuple[int, float]:
        biased = rows(1, biases=[(0, [2], np.array([bias]))], penalties=[given], num_logprobs=0)
        result = sample(logits, biased)
        return int(result.token_ids[0]), result.logprobs[0][0].logprob

    raw = logits[0].log_softmax(0).tolist()
    assert best(4.0) == (0, pytest.approx(raw[0])), "(-1 + 4) / 2 = 1.5, not -1 * 2 + 4"
    assert best(5.0) == (2, pytest.approx(raw[2]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_faults(temperature: float) -> None:
    """Each row's own, whatever stands beside it; what a request forbids does not hide what the model got wrong."""
    fine = [2.0, 1.0, 0.0, -1.0, 3.0]
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([
        fine, [nan] * 5, [0.0, nan, 0.0, 0.0, 0.0], [0.0, inf, 0.0, 0.0, 0.0], [-inf] * 5,
        [-inf, -inf, 0.5, -inf, -inf], [0.0, nan, 0.0, 0.0, 0.0], fine, fine, fine,
    ])  # fmt: skip
    columns: dict[str, Any] = {"temperature": temperature, "uniforms": 0.999, "num_logprobs": 2}
    lists = {"allowed": [(6, [0, 2]), (7, [1, 2])], "banned": [(7, [1]), (8, [0, 1, 2, 3, 4])]}
    result = sample(logits, rows(10, **columns, **lists))
    none, bad, nothing = RowFault.NONE, RowFault.NOT_FINITE, RowFault.NOTHING_LEFT
    assert result.faults.tolist() == [none, bad, bad, bad, bad, none, bad, none, nothing, none]
    alone = sample(logits[:1], rows(1, **columns)).token_ids[0]
    assert result.token_ids[[0, 5, 7, 9]].tolist() == [alone, 2, 2, alone]
    assert ((result.token_ids >= 0) & (result.token_ids < 5)).all()


# The rules


@pytest.mark.parametrize(
    "bad_words, output, banned",
    [
        ([(7,)], [], [7]),
        ([(7,)], [1, 7], [7]),
        ([(1, 2)], [], []),
        ([(1, 2)], [1], [2]),
        ([(1, 2)], [1, 3], []),
        ([(1, 2, 3)], [2], []),
        ([(1, 2, 3)], [0, 1, 2], [3]),
        ([(1, 1)], [1], [1]),
        ([(1, 2), (5, 6), (9,)], [4, 5], [6, 9]),
    ],
)
def test_bad_words(bad_words: list[tuple[int, ...]], output: list[int], banned: list[int]) -> None:
    assert TokenRules(bad_words=tuple(bad_words)).banned(output) == banned


def test_ends_before_min_tokens() -> None:
    rules = TokenRules(ends=np.array([2, 3]), min_tokens=2, bad_words=((9,),))
    assert [sorted(rules.banned([0] * n)) for n in range(4)] == [[2, 3, 9], [2, 3, 9], [9], [9]]


# Tokens of words


def byte_level(directory: Path) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([WORDS] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    return directory


def sentencepiece(directory: Path) -> Path:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"])
    backend.train_from_iterator([WORDS] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("word", ["cat", " cat", "gate", "ate a", "\n"])
def test_a_word_anywhere_in_a_text(make: Any, word: str, tmp_path: Path) -> None:
    """The tokens that spell it at the beginning, after a space, and where no word begins: none can be completed."""
    tokenizer = Tokenizer(make(tmp_path))
    forms = tokenizer.encode_anywhere(word)
    assert forms and len(set(forms)) == len(forms)
    bare = word.lstrip() or word
    for text in (bare, "the " + bare, "\n" + bare):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        assert any(ids[-len(form) :] == form for form in forms), (text, ids, forms)


# Requests


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[LLM]:
    with LLM(demo_model, kv_cache_memory="64MiB") as llm:
        yield llm


PROMPT = "def fib(n):"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logit_bias(temperature: float, llm: LLM) -> None:
    """Of 100 nothing else comes, of -100 it does not; what comes otherwise is what others have, too."""
    base: dict[str, Any] = {"temperature": temperature, "max_tokens": 12, "seed": 1, "ignore_eos": True}
    (plain,) = quiet(llm, [PROMPT], SamplingParams(**base))
    common = max(set(plain.outputs[0].token_ids), key=plain.outputs[0].token_ids.count)
    always, never, numpy, unchanged = quiet(llm, [PROMPT] * 4, [
        SamplingParams(**base, logit_bias={77: 100}),
        SamplingParams(**base, logit_bias={common: -100.0}),
        SamplingParams(**base, logit_bias={np.int64(77): np.float32(100)}),
        SamplingParams(**base),
    ])  # fmt: skip
    assert always.outputs[0].token_ids == numpy.outputs[0].token_ids == [77] * 12
    assert common not in never.outputs[0].token_ids and not never.error
    assert unchanged.outputs[0].token_ids == plain.outputs[0].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_token_ids(temperature: float, llm: LLM) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=30, allowed_token_ids=np.array([70, 71, 72]), n=2)
    (output,) = quiet(llm, [PROMPT], params)
    for completion in output.outputs:
        assert set(completion.token_ids) <= {70, 71, 72} and completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_bad_words_do_not_come(temperature: float, llm: LLM) -> None:
    """Words of the text that comes without them, of one token and of several."""
    base: dict[str, Any] = {"temperature": temperature, "max_tokens": 40, "seed": 4, "ignore_eos": True}
    text = quiet(llm, [PROMPT], SamplingParams(**base))[0].outputs[0].text
    words: list[str] = sorted(set(text.split()), key=len)[-3:]
    assert words and all(word in text for word in words)
    tokenizer = llm._tokenizer
    assert tokenizer and any(len(ids) > 1 for word in words for ids in tokenizer.encode_anywhere(word))
    (output,) = quiet(llm, [PROMPT], SamplingParams(**base, bad_words=words))
    banned = {ids for word in words for ids in tokenizer.encode_anywhere(word)}
    tokens = output.outputs[0].token_ids
    assert not output.error and len(tokens) == 40
    assert not [ids for ids in banned for at in range(40) if tuple(tokens[at : at + len(ids)]) == ids]


@pytest.mark.parametrize(
    "options, said, param",
    [
        ({"logit_bias": {10**6: 1}}, "logit_bias: token id 1000000 is not in the vocabulary; ids are", "logit_bias"),
        ({"allowed_token_ids": [5, 4096]}, "allowed_token_ids: token id 4096 is not in the vo", "allowed_token_ids"),
        ({"allowed_token_ids": [0], "min_tokens": 2}, "min_tokens leave none of \\[0\\] to take", "allowed_token_ids"),
    ],
)
def test_refused_at_the_door(options: dict[str, Any], said: str, param: str, llm: LLM) -> None:
    assert llm.facts.eos_token_ids == (0,)
    outputs = quiet(llm, [PROMPT] * 2, [SamplingParams(**options), SamplingParams(max_tokens=2, temperature=0)])
    assert outputs[0].error and outputs[0].error.code == "invalid_request" and not outputs[1].error
    with pytest.raises(RequestError, match=said) as refused:
        llm._engine.add_request(llm._engine.next_request_id(), [5], SamplingParams(**options))
    assert refused.value.param == param


def test_bad_words_that_ban_all_that_is_allowed(llm: LLM) -> None:
    """Of one token at the door, of several when they come to it."""
    tokenizer = llm._tokenizer
    assert tokenizer
    (one, *_) = next(ids for ids in map(tokenizer.encode_anywhere, "abcdefgh") if len(ids[0]) == 1)[0]
    params = SamplingParams(allowed_token_ids=[one], bad_words=[tokenizer.decode([one], skip_special_tokens=False)])
    (output,) = quiet(llm, [PROMPT], params)
    assert output.error and "allowed_token_ids: bad_words leave none of" in output.error.message
    twice, pair = next((c + c, ids) for c in "QZ~%^" if len(ids := tokenizer.encode_anywhere(c + c)[0]) == 2)
    assert pair[0] == pair[1]
    params = SamplingParams(allowed_token_ids=pair, bad_words=[twice], temperature=0)
    (output,) = quiet(llm, [PROMPT], params)
    assert output.error and output.error.code == "invalid_request"
    assert "after 1 new tokens" in output.error.message and "allowed_token_ids, bad_words leave" in output.error.message


def test_bad_words_need_a_tokenizer(demo_model: Path) -> None:
    with LLM(demo_model, skip_tokenizer_init=True, kv_cache_memory="16MiB") as llm:
        (output,) = quiet(llm, [[5]], SamplingParams(bad_words=["x"]))
    assert output.error and "bad_words: need a tokenizer" in output.error.message


# Bodies


@pytest.mark.parametrize("read", [read_line, read_request])
@pytest.mark.parametrize("url, said", [(COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HI})])
def test_bodies(url: str, said: dict[str, Any], read: Any) -> None:
    fields = {"logit_bias": {"15": -100, "2": 0.5}, "allowed_token_ids": [1, 2, 15], "bad_words": ["a", " b"]}
    params = read(url, json.loads(json.dumps(said | fields)), SamplingParams()).params
    assert params.logit_bias == {15: -100.0, 2: 0.5} and params.allowed_token_ids == (1, 2, 15)
    assert params.bad_words == ("a", " b")
    empty = read(url, {**said, "logit_bias": {}, "allowed_token_ids": None, "bad_words": []}, SamplingParams()).params
    assert (empty.logit_bias, empty.allowed_token_ids, empty.bad_words) == (None, None, None)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"logit_bias": {"x": 1}}, "logit_bias must hold token ids, .* got 'x'"),
        ({"logit_bias": {"-1": 1}}, "got '-1'"),
        ({"logit_bias": {"5": 101}}, "logit_bias of token 5 must be a number from -100 to 100, got 101"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least one"),
        ({"allowed_token_ids": [-5]}, "allowed_token_ids must hold token ids, .* got -5"),
        ({"allowed_token_ids": "5"}, "allowed_token_ids"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words must hold strings that are not empty, got ''"),
        ({"bad_words": ["x"] * 2000}, "bad_words takes at most 1024 entries, got 2000"),
    ],
)
def test_bodies_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        read_request(COMPLETIONS, {"prompt": "x", **fields}, SamplingParams())
    assert refused.value.param and refused.value.param.startswith(next(iter(fields)))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 must be a number from -100 to 100, got nan"),
        ({"logit_bias": {True: 1}}, "got True"),
        ({"logit_bias": {5: True}}, "got True"),
        ({"logit_bias": [(5, 1)]}, "logit_bias must map token ids to numbers"),
        ({"allowed_token_ids": [1.5]}, "got 1.5"),
        ({"allowed_token_ids": 5}, "allowed_token_ids must be a list, got 5"),
        ({"bad_words": "word"}, "bad_words must be a list, got 'word'"),
        ({"bad_words": [5]}, "bad_words must hold strings"),
    ],
)
def test_params_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**options)


def test_params_are_normal() -> None:
    params = SamplingParams(logit_bias={np.int32(5): 1, "6": 2}, allowed_token_ids=(9, np.int64(9), 4), bad_words=["a"])
    assert params.logit_bias == {5: 1.0, 6: 2.0} and params.allowed_token_ids == (9, 4)
    assert hash(params) == hash(SamplingParams(allowed_token_ids=[9, 4], bad_words=("a",), logit_bias={7: 1}))
