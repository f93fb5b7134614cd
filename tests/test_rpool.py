"""The R-workers as one pool, without R-workers: who is sent what, and what it refuses to send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdecode.errors import RWorkerFailed
from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.holders.rpool import RPool, Ticket
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.plan import Admission, Segment, Step
from transport import Admit, Attend, Attended, Message, Pong, Rows


class Recorder:
    """A channel that keeps what it is to send."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.answers: list[Message] = []

    def send(self, message: Message, *, timeout_s: float) -> None:
        self.sent.append(message)

    def recv(self, *, timeout_s: float) -> Message:
        return self.answers.pop(0)

    def is_readable(self) -> bool:
        return bool(self.answers)

    def close(self) -> None:
        pass


@pytest.fixture
def channels() -> list[Any]:
    return [Recorder() for _ in range(3)]


@pytest.fixture
def rpool(channels: list[Any]) -> RPool:
    return RPool([RWorkerHandle(f"R-worker {i}", channel) for i, channel in enumerate(channels)], 1.0)


def collected(rpool: RPool, ticket: Ticket) -> list[tuple[slice, np.ndarray]]:
    """Rows and their o."""
    parts: list[tuple[slice, np.ndarray]] = []
    rpool.collect(ticket, lambda rows, o: parts.append((rows, o)))
    return parts


# Two that decode on each R-worker.
STEP = Step.of([Segment(10 * worker + i, worker, 5, (1,), 0) for worker in range(3) for i in range(2)])


def test_everybody_is_told_of_its_rows(rpool: RPool, channels: list[Any]) -> None:
    ticket = rpool.begin(STEP)
    assert STEP.queries == slice(0, 6) and [share.queries for share in ticket.shares] == [
        slice(0, 2), slice(2, 4), slice(4, 6)
    ]  # fmt: skip
    for worker, channel in enumerate(channels):
        [rows] = channel.sent
        assert isinstance(rows, Rows) and rows.seq_ids.tolist() == [10 * worker, 10 * worker + 1]


def test_answers_are_handed_on_as_they_come(rpool: RPool, channels: list[Any]) -> None:
    """In row order, each where it arrived: nothing is put together, or copied, between."""
    ticket, rows = rpool.begin(STEP), np.arange(6 * 4 * 8, dtype=np.float32).reshape(6, 4, 8)
    rpool.submit(ticket, rows, rows, rows)
    answers = [-rows[2 * worker : 2 * worker + 2] for worker in range(3)]
    for channel, o in zip(channels, answers, strict=True):
        assert np.shares_memory(channel.sent[-1].q, rows) and np.shares_memory(channel.sent[-1].k, rows)
        channel.answers = [Attended(0, 0, 0, o)]
    still_to_come = []

    def put(rows: slice, o: np.ndarray) -> None:
        still_to_come.append(sum(len(channel.answers) for channel in channels))
        assert o is answers[rows.start // 2] and rows.stop == rows.start + 2

    rpool.collect(ticket, put)
    assert still_to_come == [2, 1, 0]


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_rows_of_a_dead_one_are_not_left_out(rpool: RPool, channels: list[Any], dead: int) -> None:
    """Nobody hears of a step with rows for it: the rows of those behind it would be taken for the wrong ones."""
    rpool.drop(dead)
    with pytest.raises(AssertionError, match=rf"R-workers \[{dead}\], which do not serve"):
        rpool.begin(STEP)
    with pytest.raises(AssertionError, match="do not serve"):
        rpool.admit([Admission(5, worker, 8) for worker in range(3)])
    assert not any(channel.sent for channel in channels)
    rpool.admit([Admission(5, worker, 8) for worker in range(3) if worker != dead])
    assert [len(channel.sent) for channel in channels] == [worker != dead for worker in range(3)]
    assert all(isinstance(message, Admit) for channel in channels for message in channel.sent)


def test_prompts_are_written_behind(rpool: RPool, channels: list[Any]) -> None:
    """In messages of their own, which nobody answers before the last layer."""
    rpool._last_layer = 1
    prompt = Segment(7, 1, 0, (1, 2, 3), 3)
    ticket = rpool.begin(Step.of([Segment(5, 1, 4, (9,), 0), prompt, Segment(6, 0, 2, (9,), 0)]))
    q, kv = np.zeros((2, 4, 8), np.float32), np.arange(5 * 2 * 8, dtype=np.float32).reshape(5, 2, 8)
    for layer in range(2):
        rpool.submit(ticket, q, kv, kv)
        sent = [message for channel in channels for message in channel.sent if isinstance(message, Attend)]
        assert [len(m.q) for m in sent[-2:]] == [1, 0] and [len(m.k) for m in sent[-2:]] == [1, 3]
        np.testing.assert_array_equal(sent[-1].k, kv[2:])
        for channel in channels:
            channel.answers = [
                Attended(m.step, m.micro_batch, m.layer, m.q)
                for m in channel.sent
                if isinstance(m, Attend) and m.layer == layer and (len(m.q) or layer == 1)
            ]
        assert rpool.is_answered(ticket) and [o.shape for _, o in collected(rpool, ticket)] == [(1, 4, 8), (1, 4, 8)]
        assert not any(channel.answers for channel in channels)


def test_a_barrier_keeps_the_answers_of_steps_that_go_on(rpool: RPool, channels: list[Any]) -> None:
    rows = np.ones((1, 4, 8), np.float32)
    broken_off, goes_on = (rpool.begin(Step.of([Segment(i, 0, 4, (9,), 0)], 5 + i, i)) for i in range(2))
    for ticket in (broken_off, goes_on):
        rpool.submit(ticket, rows, rows, rows)
    answers = [Attended(m.step, m.micro_batch, m.layer, m.q) for m in channels[0].sent if isinstance(m, Attend)]
    rpool.void(broken_off)
    for channel in channels:
        channel.answers = [Pong(1)]
    channels[0].answers = [*answers, Pong(1)]
    rpool.settle()
    assert rpool.is_answered(goes_on) and [o.shape for _, o in collected(rpool, goes_on)] == [(1, 4, 8)]


def test_a_barrier_tells_who_did_not_answer_a_step_that_goes_on(rpool: RPool, channels: list[Any]) -> None:
    rows = np.ones((1, 4, 8), np.float32)
    rpool.submit(rpool.begin(Step.of([Segment(0, 1, 4, (9,), 0)])), rows, rows, rows)
    for channel in channels:
        channel.answers = [Pong(1)]
    with pytest.raises(RWorkerFailed, match="R-worker 1 did not answer") as failed:
        rpool.settle()
    assert failed.value.r_worker == 1


def test_prompts_that_attend_on_r_workers_come_before_those_that_do_not(rpool: RPool, channels: list[Any]) -> None:
    prompts = [Segment(i, 2 - i, 0, (1, 2), 9, is_remote=i != 1) for i in range(3)]
    step = Step.of([*prompts, Segment(9, 1, 4, (9,), 0)])
    ticket = rpool.begin(step)
    assert step.queries == slice(0, 5) and [(s.worker, s.tokens, s.num_queries) for s in ticket.shares] == [
        (1, slice(0, 1), 1), (0, slice(1, 3), 2), (2, slice(3, 5), 2), (1, slice(5, 7), 0)
    ]  # fmt: skip
    assert [m.num_queries.tolist() for channel in channels for m in channel.sent] == [[2], [1], [0], [2]]


def test_rows_on_the_device_are_nobodys(rpool: RPool, channels: list[Any]) -> None:
    """They are the first and the last ones; R-workers' are counted from the first of theirs."""
    decodes = [Segment(1, DEVICE, 7, (1,), 0), Segment(2, DEVICE, 3, (1,), 0), Segment(3, 2, 5, (1,), 0)]
    prompts = [
        Segment(4, 0, 2, (1, 2), 9, is_remote=True),
        Segment(5, 1, 0, (1, 2, 3), 3),
        Segment(6, DEVICE, 0, (1, 2), 2),
        Segment(7, DEVICE, 4, (1, 2), 9, is_remote=True),
    ]
    step = Step.of([*reversed(prompts), *decodes])
    assert (step.num_device_decodes, step.queries, step.stored) == (2, slice(2, 5), slice(2, 8))
    assert [s.seq_id for s in step.prompts] == [4, 5, 6, 7] and step.r_workers == {0, 1, 2}
    assert [s.seq_id for s in step.local_prompts] == [5, 6] and [s.seq_id for s in step.device_prompts] == [6, 7]
    ticket = rpool.begin(step)
    assert [(s.worker, s.tokens, s.num_queries) for s in ticket.shares] == [
        (2, slice(0, 1), 1), (0, slice(1, 3), 2), (1, slice(3, 6), 0)
    ]  # fmt: skip
