"""The public API: what comes back, in which order, and what bad input does."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Case, quiet
from tqdm import tqdm

from fastdecode import LLM, RequestOutput, SamplingParams
from fastdecode.engine.engine import Engine
from fastdecode.errors import ConfigError
from fastdecode.text.prompts import ReadPrompt, read_prompt
from gpu_sworker import generate_reference

GREEDY = SamplingParams(temperature=0, max_tokens=12)
CODE = "def read(path):\n    with open("


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[LLM]:
    with LLM(demo_model, num_r_workers=2) as llm:
        yield llm


def token_ids(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


# --- forms of input and output


def test_forms_of_a_prompt(llm: LLM) -> None:
    ids = quiet(llm, CODE, GREEDY)[0].prompt_token_ids
    forms: list[Any] = [CODE, ids, {"prompt": CODE}, {"prompt_token_ids": ids}, tuple(ids)]
    results = token_ids(quiet(llm, forms, GREEDY))
    assert all(result == results[0] for result in results)
    assert token_ids(quiet(llm, ids, GREEDY)) == results[:1]  # one bare list of ids is one prompt
    assert quiet(llm, [], GREEDY) == []


def test_output_fields(llm: LLM) -> None:
    (output,) = quiet(llm, [CODE], GREEDY)
    (completion,) = output.outputs
    assert output.prompt == CODE and output.finished and output.error is None
    assert completion.text and len(completion.token_ids) == 12 and completion.finish_reason == "length"
    assert completion.stop_reason is None and completion.logprobs is None and completion.index == 0
    metrics = output.metrics
    assert metrics and 0 <= metrics.queue_s <= metrics.first_token_s <= metrics.total_s < 60


def test_results_come_in_input_order(llm: LLM) -> None:
    prompts = [f"x{i} = {i}\n" for i in range(30)]
    params = [SamplingParams(temperature=0, max_tokens=1 + (i * 7) % 13) for i in range(30)]
    outputs = quiet(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in params]


def test_the_first_step_does_not_wait_for_the_last_prompt(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read as they are needed; what is drawn, ids and order are those of all queued at once."""
    prompts: list[Any] = [f"x{i} = {i}\n" for i in range(60)]
    prompts[3] = prompts[50] = ""  # refused, and not to shift the others' seeds
    params = [SamplingParams(temperature=0.8, max_tokens=1 + i % 3, n=1 + i % 2) for i in range(60)]
    num_read: list[int] = [0]
    leads: list[int] = []

    def counted(*arguments: Any) -> ReadPrompt:
        num_read[0] += 1
        return read_prompt(*arguments)

    with LLM(demo_model, max_num_seqs=4, order="fcfs") as llm:
        step = llm._engine.step

        def watched() -> list[RequestOutput]:
            leads.append(num_read[0])
            return step()

        monkeypatch.setattr("fastdecode.llm.read_prompt", counted)
        monkeypatch.setattr(llm._engine, "step", watched)
        few = quiet(llm, prompts, params)
    assert num_read == [60] and leads[0] <= 16 and sorted(set(leads))[1] - leads[0] <= 8
    with LLM(demo_model, max_num_seqs=4, order="fcfs") as llm, monkeypatch.context() as patch:
        patch.setattr(Engine, "wants_more", True)
        all_at_once = quiet(llm, prompts, params)
    assert [output.request_id for output in few] == [str(index) for index in range(60)]
    assert token_ids(few) == token_ids(all_at_once) and [o.error for o in few] == [o.error for o in all_at_once]


def test_generate_iter_gives_results_as_they_finish(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=m) for m in (30, 3, 15)]
    lengths = [len(o.outputs[0].token_ids) for o in llm.generate_iter([CODE] * 3, params)]
    assert lengths == [3, 15, 30]


def test_leaving_an_iteration_frees_everything(llm: LLM) -> None:
    for _ in llm.generate_iter([CODE] * 5, [SamplingParams(temperature=0, max_tokens=2 + 40 * i) for i in range(5)]):
        break
    scheduler = llm._engine._scheduler
    scheduler.check_integrity()
    assert not scheduler.has_work and not scheduler.num_running
    assert len(quiet(llm, [CODE], GREEDY)) == 1


def test_one_iteration_at_a_time(llm: LLM) -> None:
    iteration = llm.generate_iter([CODE], GREEDY)
    next(iteration)
    with pytest.raises(ConfigError, match="generating already"):
        quiet(llm, [CODE], GREEDY)
    iteration.close()  # type: ignore[attr-defined]
    assert quiet(llm, [CODE], GREEDY)


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    def make(**options: Any) -> tqdm[Any]:
        made.append(tqdm(**options))
        return made[0]

    llm.generate([CODE] * 3, GREEDY, use_tqdm=make)
    assert made[0].n == made[0].total == 3
    quiet(llm, [CODE], GREEDY)
    assert "prompts" in capsys.readouterr().err


def test_params_per_prompt_must_match(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="3 prompts and 2 sampling params"):
        quiet(llm, [CODE] * 3, [GREEDY] * 2)
    with pytest.raises(ConfigError, match="1 prompts and 0 sampling params"):
        quiet(llm, [CODE], [])
    with pytest.raises(ConfigError, match="must be SamplingParams, got dict"):
        quiet(llm, [CODE], [{"temperature": 0}])
    for given, name in (({"temperature": 0}, "dict"), ((GREEDY for _ in "ab"), "generator")):
        with pytest.raises(ConfigError, match=f"SamplingParams, or a list of them, got {name}"):
            quiet(llm, [CODE], given)


def test_defaults_are_those_of_generate(case: Callable[[str], Case], tmp_path: Path) -> None:
    """A repetition penalty in generation_config.json counts for greedy generation, too."""
    llama = case("llama")
    directory = Path(shutil.copytree(llama.directory, tmp_path / "model"))
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5}))
    with LLM(directory, skip_tokenizer_init=True) as llm:
        params = dataclasses.replace(llm.get_default_sampling_params(), max_tokens=32)
        assert params.repetition_penalty == 1.5
        result = [output.outputs[0].token_ids for output in quiet(llm, llama.prompts, params)]
    assert result == generate_reference(directory, llama.prompts, 32) != llama.reference


def test_tiny_temperatures_are_greedy_enough(llm: LLM) -> None:
    """They would overflow fp32; one such request must not spoil another."""
    params = [SamplingParams(temperature=t, max_tokens=8) for t in (0.0, 1e-300, 1e-38, 1e-6, 1e-3)]
    results = token_ids(quiet(llm, [CODE] * 5, params))
    assert results[0] == results[1] == results[2] == results[3]


def test_defaults_come_from_the_model(llm: LLM) -> None:
    assert llm.get_default_sampling_params().temperature == 0
    assert token_ids(quiet(llm, CODE)) == token_ids(quiet(llm, CODE, SamplingParams(temperature=0)))


# --- one bad prompt


def test_a_bad_prompt_fails_alone(llm: LLM) -> None:
    too_long = [5] * (llm.max_model_len)
    prompts: list[Any] = [CODE, "", too_long, [1, 4096], [1, -1], [1, 2.5], 17, {"text": "x"}, b"bytes", "\ud800", CODE]
    outputs = quiet(llm, prompts, GREEDY)
    assert token_ids(outputs[:1]) == token_ids(outputs[-1:])
    texts = [
        "the prompt is empty",
        "has 1024 tokens; with one of output the limit is max_model_len = 1024",
        "token id 4096 is not in the vocabulary.*0 to 4095",
        "token id -1 is not",
        "token id 2.5 is not",
        "a prompt is a string, .* not int",
        "'text' is not supported beside a prompt",
        "not bytes",
        "the tokenizer does not take this prompt",
    ]
    for output, text in zip(outputs[1:-1], texts, strict=True):
        assert output.error is not None
        with pytest.raises(ValueError, match=text):
            _raise(output.error.message)
        assert output.outputs[0].finish_reason == "error" and output.outputs[0].token_ids == []
        assert output.error.code == ("context_length_exceeded" if "max_model_len" in text else "invalid_request")


def _raise(text: str) -> None:
    raise ValueError(text)


def test_a_prompt_that_just_fits(llm: LLM) -> None:
    (output,) = quiet(llm, [[5] * (llm.max_model_len - 1)], SamplingParams(temperature=0, max_tokens=9))
    assert output.error is None and len(output.outputs[0].token_ids) == 1


def test_bad_prompts_do_not_shift_seeds(llm: LLM, demo_model: Path) -> None:
    params = SamplingParams(temperature=1, max_tokens=10)
    results = []
    for bad in ("", 17, CODE):
        with LLM(demo_model) as fresh:
            results.append(token_ids(quiet(fresh, [bad, CODE], params))[1])
    assert results[0] == results[1] == results[2]


# --- sampling

RANDOM = SamplingParams(temperature=0.8, top_p=0.95, seed=11, max_tokens=20)


@pytest.fixture(scope="module")
def random_tokens(llm: LLM) -> list[list[list[int]]]:
    return token_ids(quiet(llm, CODE, RANDOM))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_r_workers": 3},
        {"micro_batches": 1},
        {"transport": "shm", "num_r_workers": 2},
        {"seed": 5},
    ],
    ids=str,
)
def test_draws_depend_on_seed_and_position_only(
    options: dict[str, Any], random_tokens: list[Any], demo_model: Path
) -> None:
    """Alone or in company, first or last, on any split: the same tokens for the same seed."""
    with LLM(demo_model, **options) as llm:
        company = [SamplingParams(temperature=1, max_tokens=3 + i) for i in range(7)]
        outputs = quiet(llm, [f"# {i}\nimport" for i in range(7)] + [CODE], [*company, RANDOM])
    assert token_ids(outputs)[-1:] == random_tokens


def test_seeds_differ(llm: LLM, random_tokens: list[Any]) -> None:
    assert token_ids(quiet(llm, CODE, dataclasses.replace(RANDOM, seed=12))) != random_tokens
    unseeded = dataclasses.replace(RANDOM, seed=None)
    first, second = token_ids(quiet(llm, [CODE] * 2, unseeded))
    assert first != second


def test_n_samples(llm: LLM) -> None:
    (output,) = quiet(llm, CODE, dataclasses.replace(RANDOM, n=5))
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 5
    (again,) = quiet(llm, CODE, dataclasses.replace(RANDOM, n=2))
    assert token_ids([again])[0] == token_ids([output])[0][:2]  # sample i is the same for every n


def test_greedy_samples_are_all_the_same(llm: LLM) -> None:
    """As with OpenAI's API; vLLM refuses to compute the same n times."""
    (one,), (three,) = quiet(llm, CODE, GREEDY), quiet(llm, CODE, dataclasses.replace(GREEDY, n=3))
    assert token_ids([three])[0] == token_ids([one])[0] * 3


def test_logprobs(llm: LLM) -> None:
    (output,) = quiet(llm, CODE, SamplingParams(temperature=0, max_tokens=5, logprobs=3))
    completion = output.outputs[0]
    assert completion.logprobs and len(completion.logprobs) == 5
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entries) == 3 and entries[token].rank == 1 and entries[token].decoded_token is not None
        assert sorted(entry.rank for entry in entries.values()) == [1, 2, 3]
    chosen = [entries[token].logprob for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen)) and max(chosen) <= 0


def test_penalties_change_the_outcome(llm: LLM) -> None:
    plain, penalised = (
        quiet(llm, "for i in range(", SamplingParams(temperature=0, max_tokens=40, repetition_penalty=p))[0].outputs[0]
        for p in (1.0, 1.8)
    )
    assert len(set(penalised.token_ids)) > len(set(plain.token_ids))


# --- ends


def test_stop_strings_across_tokens(llm: LLM) -> None:
    text = quiet(llm, CODE, SamplingParams(temperature=0, max_tokens=40))[0].outputs[0].text
    stop = text[11:17]  # somewhere in the middle, whatever the token borders
    (output,) = quiet(llm, CODE, SamplingParams(temperature=0, max_tokens=40, stop=["never", stop]))
    completion = output.outputs[0]
    assert completion.text == text[: text.find(stop)] and completion.stop_reason == stop
    assert completion.finish_reason == "stop" and len(completion.token_ids) < 40
    (output,) = quiet(
        llm, CODE, SamplingParams(temperature=0, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    )
    assert output.outputs[0].text == text[: text.find(stop)] + stop


def test_a_short_stop_before_the_minimum_is_not_found_again(llm: LLM) -> None:
    """It was completed before min_tokens; a longer stop beside it must not keep it alive."""
    (free,) = quiet(llm, CODE, SamplingParams(temperature=0, max_tokens=12))
    early = free.outputs[0].text[:4]
    assert free.outputs[0].text.count(early) == 1
    params = SamplingParams(temperature=0, max_tokens=12, min_tokens=6, stop=[early, "x" * 60])
    (output,) = quiet(llm, CODE, params)
    assert output.outputs[0].token_ids == free.outputs[0].token_ids


def test_stop_tokens_and_minimum(llm: LLM) -> None:
    ids = quiet(llm, CODE, GREEDY)[0].outputs[0].token_ids
    stop = next(t for i, t in enumerate(ids) if i >= 2 and t not in ids[:i])
    place = ids.index(stop)
    (output,) = quiet(llm, CODE, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]))
    assert output.outputs[0].token_ids == ids[: place + 1] and output.outputs[0].stop_reason == stop
    (longer,) = quiet(
        llm, CODE, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop], min_tokens=place + 3)
    )
    assert len(longer.outputs[0].token_ids) >= place + 3 and stop not in longer.outputs[0].token_ids[: place + 2]


def test_end_of_sequence(case: Callable[[str], Case]) -> None:
    """A token made the end token ends the text; ignore_eos goes on."""
    llama = case("llama")
    end = llama.reference[0][5]
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        llm._engine._intake._eos_token_ids = frozenset({end})
        first = llama.reference[0].index(end)
        (output,) = quiet(llm, [llama.prompts[0]], SamplingParams(temperature=0, max_tokens=32))
        assert output.outputs[0].token_ids == llama.reference[0][: first + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
        (output,) = quiet(llm, [llama.prompts[0]], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
        assert output.outputs[0].token_ids == llama.reference[0]


def test_text_options(llm: LLM) -> None:
    (output,) = quiet(llm, CODE, SamplingParams(temperature=0, max_tokens=5, detokenize=False))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 5


def test_chat(llm: LLM) -> None:
    template = (
        "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}#:{% endif %}"
    )
    conversation = [{"role": "user", "content": "sort a list"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False, chat_template=template)
    assert token_ids([output]) == token_ids(quiet(llm, "# user: sort a list\n#:", GREEDY))
    good, bad, also_good = llm.chat(
        [conversation, ["no message"], conversation],
        GREEDY,
        use_tqdm=False,  # type: ignore[list-item]
        chat_template=template,
    )
    assert token_ids([good]) == token_ids([also_good]) == token_ids([output]) and good.prompt == output.prompt
    assert bad.error and bad.error.param == "messages[0]" and "a message is an object" in bad.error.message
    with pytest.raises(ConfigError, match="no chat template"):
        llm.chat(conversation, GREEDY)


def test_an_engine_goes_with_its_last_reference(demo_model: Path) -> None:
    """And with it the memory of its model: no cycle keeps it until garbage is collected."""
    with LLM(demo_model, num_r_workers=1, kv_cache_memory="16MiB") as llm:
        quiet(llm, [CODE], GREEDY)
        engine = weakref.ref(llm._engine)
    gc.collect()
    gc.disable()
    try:
        del llm
        assert engine() is None
    finally:
        gc.enable()
