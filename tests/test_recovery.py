"""R-workers lost at any moment: nothing that was asked for is lost with them, and no token changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import Case, quiet

from bench.near_ties import assert_same_tokens
from cpu_attention import KV_DTYPES, RWorker
from fastdecode import LLM, RequestOutput, SamplingParams
from fastdecode.errors import RWorkerError, RWorkerLost
from transport import (
    Admit,
    Attend,
    Attended,
    Channel,
    Failure,
    Hello,
    LayerSpec,
    Message,
    PeerLost,
    PeerTimeout,
    ProtocolError,
    Release,
    Rewind,
    Rows,
    Welcome,
)

GREEDY = SamplingParams(temperature=0, max_tokens=32)
SPEC = LayerSpec(4, 2, 16, 0.25)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert not any(output.error for output in outputs), [output.error for output in outputs]
    return [output.outputs[0].token_ids for output in outputs]


class Faulty:
    """A channel that works for so many calls and then does harm, as long as it is used."""

    def __init__(self, channel: Channel, calls: int, harm: Callable[[], Message | None]) -> None:
        self._channel, self.left, self._harm = channel, calls, harm

    def send(self, message: Message, *, timeout_s: float) -> None:
        self.left -= 1
        if self.left < 0:
            self._harm()
            return
        self._channel.send(message, timeout_s=timeout_s)

    def recv(self, *, timeout_s: float) -> Message:
        self.left -= 1
        said = self._harm() if self.left < 0 else None
        return said or self._channel.recv(timeout_s=timeout_s)

    def is_readable(self) -> bool:
        return self.left < 1 or self._channel.is_readable()

    def close(self) -> None:
        self._channel.close()


def gone() -> Message:
    raise PeerLost("pulled")


def hung() -> Message:
    raise PeerTimeout("no answer")


def garbled() -> Message:
    raise ProtocolError("garbage")


def wrong() -> Message:
    return Attended(10**6, 0, 0, np.zeros((1, 1, 1), np.float32))


def refusing() -> Message:
    return Failure("InternalError", "out of order")


HARMS = (gone, hung, garbled, wrong, refusing)


def make_faulty(llm: LLM, worker: int, calls: int, harm: Callable[[], Message | None]) -> None:
    rpool = llm._engine._rpool
    handle = rpool._workers[worker]
    rpool._workers[worker] = dataclasses.replace(handle, channel=Faulty(handle.channel, calls, harm))  # type: ignore[arg-type]


@pytest.fixture
def r_workers(monkeypatch: pytest.MonkeyPatch) -> list[RWorker]:
    """Those that are started as threads from now on."""
    workers: list[RWorker] = []

    class Noted(RWorker):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            workers.append(self)

    monkeypatch.setattr("fastdecode.holders.launch.RWorker", Noted)
    return workers


def assert_at_rest(llm: LLM, r_workers: list[RWorker]) -> None:
    """Those that are left hold nothing but what others may begin with, and nothing is reserved."""
    engine = llm._engine
    engine._rpool.settle()
    for index in engine._rpool.alive:
        session = r_workers[index]._session
        assert session and not session.failure and not session.micro_batches
        session.store.check_integrity()
        assert session.store.seq_ids == engine._scheduler.kept(index)
    engine._scheduler.check_integrity()
    assert not engine.has_work and len(engine._sworker._prompt_kv) == 0  # type: ignore[union-attr]


@contextmanager
def three_workers(case: Case, **options: Any) -> Iterator[LLM]:
    with LLM(case.directory, num_r_workers=3, skip_tokenizer_init=True, worker_timeout_s=60, **options) as llm:
        yield llm


SMALL_STEPS = {"max_num_batched_tokens": 48, "micro_batches": 2}
TIGHT = {
    "kv_cache_memory": 768 * 240, "block_tokens": 16, "kv_policy": "greedy", "start_policy": "eager",
    "max_num_batched_tokens": 48,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, SMALL_STEPS, TIGHT], ids=["whole", "chunked", "preempting"])
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("num_rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_lost_at_any_moment(
    num_rounds: int, harm: Callable[[], Message | None], options: dict[str, Any], llama: Case, r_workers: list[RWorker]
) -> None:
    """Of three workers one, then another; the one that is left finishes all, and the next batch, too."""
    generator = np.random.default_rng(len(harm.__name__) + len(options))
    for _ in range(num_rounds):
        r_workers.clear()
        with three_workers(llama, **options) as llm:
            first, second = generator.permutation(3)[:2]
            make_faulty(llm, int(first), int(generator.integers(0, 150)), harm)
            make_faulty(llm, int(second), int(generator.integers(0, 400)), harm)
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
            assert_at_rest(llm, r_workers)


def test_two_at_once(llama: Case, r_workers: list[RWorker]) -> None:
    """The second is found lost while the first loss is dealt with."""
    for calls in range(0, 60, 7):
        r_workers.clear()
        with three_workers(llama, micro_batches=2) as llm:
            make_faulty(llm, 0, calls, gone)
            make_faulty(llm, 1, calls, gone)
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
            assert_at_rest(llm, r_workers)


def test_the_last_one(llama: Case) -> None:
    """What is finished was delivered; then, and from then on, the loss is told."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 30)]
    with LLM(llama.directory, num_r_workers=2, skip_tokenizer_init=True) as llm:
        make_faulty(llm, 0, 40, gone)
        make_faulty(llm, 1, 60, gone)
        outputs = llm.generate_iter([[5, 6], [7, 8]], params)
        assert len(next(outputs).outputs[0].token_ids) == 3
        with pytest.raises(RWorkerLost, match="pulled"):
            list(outputs)
        with pytest.raises(RWorkerError):
            quiet(llm, [[5]], GREEDY)


def test_draws_stay_the_same(llama: Case) -> None:
    params = SamplingParams(temperature=1.3, max_tokens=32, seed=5, n=2)
    with three_workers(llama) as llm:
        expected = quiet(llm, llama.prompts, params)
    with three_workers(llama, micro_batches=2) as llm:
        make_faulty(llm, 1, 90, gone)
        assert_same_tokens(llama.directory, llama.prompts, params, quiet(llm, llama.prompts, params), expected)


def test_what_fits_nowhere_any_more_says_so(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest R-worker goes: what only it could hold ends with an error, everything else goes on."""
    made: list[int] = []

    class Unequal(RWorker):
        def __init__(self, **options: Any) -> None:
            made.append(1)
            super().__init__(**options | {"kv_cache_bytes": 768 * (320 if len(made) == 1 else 64)})

    monkeypatch.setattr("fastdecode.holders.launch.RWorker", Unequal)
    with LLM(llama.directory, num_r_workers=2, skip_tokenizer_init=True, block_tokens=16) as llm:
        make_faulty(llm, 0, 30, gone)
        outputs = quiet(llm, llama.prompts, GREEDY)
    for prompt, output, expected in zip(llama.prompts, outputs, llama.reference, strict=True):
        if len(prompt) + 31 <= 64:
            assert not output.error and output.outputs[0].token_ids == expected
        else:
            assert (
                output.error
                and output.error.code == "worker_lost"
                and "the others have no room" in output.error.message
            )


def test_interrupted_while_recovering(llama: Case, r_workers: list[RWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the narrowest place: the next call is right all the same."""
    with three_workers(llama, micro_batches=2) as llm:
        make_faulty(llm, 2, 40, gone)
        rewind = llm._engine._pipeline.rewind

        def interrupted(kept: Any) -> None:
            monkeypatch.setattr(llm._engine._pipeline, "rewind", rewind)
            raise KeyboardInterrupt

        monkeypatch.setattr(llm._engine._pipeline, "rewind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet(llm, llama.prompts, GREEDY)
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert_at_rest(llm, r_workers)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_step_that_is_redone(dtype: str) -> None:
    """After Rewind the same step gives the same answer, and so does the one after it."""
    ids, one = np.array([3, 4], np.int64), np.array([1, 1], np.int32)
    generator = np.random.default_rng(0)

    def rows(heads: int, count: int) -> np.ndarray:
        return generator.standard_normal((count, heads, 16)).astype(np.float32)

    prompt, first, second = [(rows(4, n), rows(2, n), rows(2, n)) for n in (40, 2, 2)]

    def attend(worker: RWorker, step: int, starts: list[int], new: tuple[np.ndarray, ...]) -> np.ndarray:
        worker.handle(1, Rows(step, 0, ids, np.array(starts, np.int32), one, one))
        answer = worker.handle(1, Attend(step, 0, 0, *new))
        assert isinstance(answer, Attended), answer
        return answer.o

    def worker() -> RWorker:
        made = RWorker(kv_cache_bytes=1 << 20)
        assert isinstance(made.handle(1, Hello((SPEC,), dtype, 16)), Welcome)
        made.handle(1, Admit(ids, np.array([64, 64], np.int32)))
        lengths = np.array([16, 24], np.int32)
        made.handle(1, Rows(0, 0, ids, np.zeros(2, np.int32), lengths, lengths * 0))
        assert isinstance(made.handle(1, Attend(0, 0, 0, prompt[0][:0], *prompt[1:])), Attended)
        return made

    plain, redone = worker(), worker()
    expected = [attend(plain, 1, [16, 24], first), attend(plain, 2, [17, 25], second)]
    attend(redone, 1, [16, 24], second)  # another step's, which was broken off
    redone.handle(1, Rewind(ids, np.array([16, 24], np.int32)))
    redone.handle(1, Rewind(ids, np.array([16, 24], np.int32)))
    for (step, starts, new), wanted in zip(((5, [16, 24], first), (6, [17, 25], second)), expected, strict=True):
        assert np.array_equal(attend(redone, step, starts, new), wanted)
    store = redone._session.store  # type: ignore[union-attr]
    store.check_integrity()
    redone.handle(1, Rewind(ids[:1], np.array([20], np.int32)))  # more than it has
    answer = redone.handle(1, Attend(7, 0, 0, *first))
    assert isinstance(answer, Failure) and "cannot go back to 20" in answer.text
    redone.handle(1, Rewind(ids, np.zeros(2, np.int32)))
    redone.handle(1, Release(ids))
    assert store.num_free_blocks == store.num_blocks
    plain.close()
    redone.close()


@pytest.mark.parametrize("num_rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [SMALL_STEPS, TIGHT], ids=["chunked", "preempting"])
def test_beginnings_that_are_lost(
    num_rounds: int, options: dict[str, Any], llama: Case, r_workers: list[RWorker]
) -> None:
    """What others began with, or waited for, is gone with its R-worker: they compute it themselves."""
    beginning = llama.prompts[-1][:50]
    prompts = [beginning + prompt[:40] for prompt in llama.prompts]
    options = {**options, "block_tokens": 16}
    with LLM(llama.directory, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        expected = [tokens(quiet(llm, prompts[:count], GREEDY)) for count in (len(prompts), 5)]
    generator = np.random.default_rng(7)
    for _ in range(num_rounds):
        r_workers.clear()
        with three_workers(llama, **options) as llm:
            first, second = generator.permutation(3)[:2]
            make_faulty(llm, int(first), int(generator.integers(0, 150)), gone)
            make_faulty(llm, int(second), int(generator.integers(0, 600)), gone)
            assert tokens(quiet(llm, prompts, GREEDY)) == expected[0]
            assert tokens(quiet(llm, prompts[:5], GREEDY)) == expected[1]
            assert tokens(quiet(llm, prompts, GREEDY)) == expected[0]
            assert_at_rest(llm, r_workers)
