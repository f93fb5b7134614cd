"""An exception (Ctrl-C) at any line of a step, and another in its clean-up: the LLM goes on, and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from conftest import Case, quiet
from interrupts import Interrupted, interrupted, run_until

from fastdecode import LLM, SamplingParams
from fastdecode.engine.guard import Guard
from fastdecode.engine.pipeline import Pipeline
from fastdecode.errors import ConfigError
from fastdecode.scheduling.load_control import LoadControl

GREEDY = SamplingParams(temperature=0, max_tokens=5)
FILES = "fastdecode", "transport"
# Sequences are preempted, prompts come in chunks, and two micro-batches are in flight.
TIGHT = {
    "kv_cache_memory": 768 * 240, "block_tokens": 16, "kv_policy": "greedy", "start_policy": "eager",
    "max_num_batched_tokens": 48, "micro_batches": 2, "num_r_workers": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["inproc", "shm", "ipc", "tcp"])
def llm(request: pytest.FixtureRequest, llama: Case) -> Iterator[LLM]:
    with LLM(llama.directory, skip_tokenizer_init=True, transport=request.param, **TIGHT) as made:
        yield made


def prompts_of(llama: Case) -> list[list[int]]:
    return [llama.prompts[i] for i in (1, 2, 5)]


def check(llm: LLM, llama: Case) -> None:
    """It serves, nobody was lost, and nothing of the past is left but what others may begin with."""
    outputs = quiet(llm, prompts_of(llama), GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [llama.reference[i][:5] for i in (1, 2, 5)]
    engine = llm._engine
    assert not engine._rpool.lost and not engine._rpool.totals.num_lost and not engine.has_work
    assert not engine._requests and not engine._requests.sequences
    assert {seq_id for worker, seq_id in engine._rpool.held if worker == 0} == engine._scheduler.kept(0)
    assert {seq_id for worker, seq_id in engine._rpool.held if worker == 1} == engine._scheduler.kept(1)
    engine._requests.check_integrity()
    engine._scheduler.check_integrity()


def num_lines(llm: LLM, llama: Case) -> int:
    with interrupted(1 << 60, *FILES, by="line") as counted:
        quiet(llm, prompts_of(llama), GREEDY)
    return counted.count


def test_interrupted_at_any_line(llm: LLM, llama: Case) -> None:
    """Of a whole generate; of some hundred lines those that are taken differ from one transport to the next."""
    last = num_lines(llm, llama)
    first = 7 * len(llm.config.transport)
    for number in range(first, last, last // 12):
        came = run_until(number, lambda: quiet(llm, prompts_of(llama), GREEDY), *FILES, by="line")
        assert came or number > last // 2  # the number of lines depends on who answers first
        check(llm, llama)


class MendInterrupted:
    """The engine's clean-up, whose `number`-th line raises the first time that there is something to do."""

    def __init__(self, number: int) -> None:
        self._number, self._mend = number, Guard.mend
        self.is_begun = self.came = False

    def __call__(self, guard: Guard, begin_anew: Callable[[], None]) -> None:
        if not guard.is_torn or self.is_begun:
            return self._mend(guard, begin_anew)
        self.is_begun = True
        with interrupted(self._number, *FILES, by="line") as interruption:
            try:
                self._mend(guard, begin_anew)
            finally:
                self.came = interruption.came


def test_interrupted_again_while_it_cleans_up(llm: LLM, llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the lines of the clean-up of a step that was broken off while its rows were on their way."""
    collect, stride = Pipeline._collect, 11
    for second in itertools.count(0, stride):
        mend, calls = MendInterrupted(second), itertools.count()

        def broken_off(pipeline: Pipeline, flight: Any, calls: Iterator[int] = calls, at: int = second) -> Any:
            if next(calls) == at // stride % 9:
                raise Interrupted
            return collect(pipeline, flight)

        with monkeypatch.context() as patch, suppress(Interrupted):
            patch.setattr(Guard, "mend", lambda guard, begin_anew, mend=mend: mend(guard, begin_anew))
            patch.setattr(Pipeline, "_collect", broken_off)
            quiet(llm, prompts_of(llama), GREEDY)
        assert mend.is_begun
        if second % 3 == 0 or not mend.came:
            check(llm, llama)
        if not mend.came:
            break
    assert second > 50


def test_an_iteration_that_is_interrupted_is_over(llm: LLM, llama: Case) -> None:
    """Also where the exception, and with it the frames it went through, is kept."""
    kept: list[BaseException] = []
    iteration = llm.generate_iter(prompts_of(llama), GREEDY)
    next(iteration)
    with pytest.raises(ConfigError, match="generating already"):
        quiet(llm, prompts_of(llama), GREEDY)
    try:
        with interrupted(5, "fastdecode/llm.py", by="line"):
            list(iteration)
    except Interrupted as error:
        kept.append(error)
    check(llm, llama)
    try:
        for _ in llm.generate_iter(prompts_of(llama), GREEDY):
            raise Interrupted
    except Interrupted as error:
        kept.append(error)
    check(llm, llama)


def test_every_line_that_adds_a_request(llm: LLM, llama: Case) -> None:
    """What was added before it ends with it: the scheduler and the engine agree about what there is."""
    engine, number, came = llm._engine, 0, True
    while came:
        engine.add_request(engine.next_request_id(), llama.prompts[1], GREEDY)
        add = partial(engine.add_request, engine.next_request_id(), llama.prompts[2], GREEDY)
        came = run_until(number, add, "fastdecode/engine", "fastdecode/scheduling", by="line")
        assert len(engine._requests.sequences) == engine.num_waiting == len(engine._requests)
        engine._requests.check_integrity()
        engine.abort_all()
        assert not engine.has_work
        number += 1
    check(llm, llama)


def test_interrupted_in_an_admission(llm: LLM, llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence runs for the one, and was never started for the other of two that have to agree."""
    start, calls = LoadControl.start, itertools.count()

    def interrupted_before(load: LoadControl, *arguments: Any) -> None:
        if next(calls) == 1:
            raise Interrupted
        start(load, *arguments)

    monkeypatch.setattr(LoadControl, "start", interrupted_before)
    with pytest.raises(Interrupted):
        quiet(llm, prompts_of(llama), GREEDY)
    check(llm, llama)
