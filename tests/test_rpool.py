"""The R-workers as one pool, without R-workers: who is sent what, and what it refuses to send."""

from __future__ import annotations

from typing import Any

import pytest

from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.holders.rpool import RPool
from fastdecode.scheduling.plan import Admission, MicroBatch, Segment
from transport import Admit, Message, Step


class Recorder:
    """A channel that keeps what it is to send."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message, *, timeout_s: float) -> None:
        self.sent.append(message)

    def close(self) -> None:
        pass


@pytest.fixture
def channels() -> list[Any]:
    return [Recorder() for _ in range(3)]


@pytest.fixture
def rpool(channels: list[Any]) -> RPool:
    return RPool([RWorkerHandle(f"R-worker {i}", channel) for i, channel in enumerate(channels)], 1.0)


# Two that decode on each R-worker.
ROWS = MicroBatch(0, tuple(Segment(10 * worker + i, worker, 5, (1,), 0) for worker in range(3) for i in range(2)))


def test_everybody_is_told_of_its_rows(rpool: RPool, channels: list[Any]) -> None:
    ticket = rpool.begin(1, ROWS)
    assert ticket.num_queries == 6 and [share.queries for share in ticket.shares] == [
        slice(0, 2), slice(2, 4), slice(4, 6)
    ]  # fmt: skip
    for worker, channel in enumerate(channels):
        [step] = channel.sent
        assert isinstance(step, Step) and step.seq_ids.tolist() == [10 * worker, 10 * worker + 1]


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_rows_of_a_dead_one_are_not_left_out(rpool: RPool, channels: list[Any], dead: int) -> None:
    """Nobody hears of a step with rows for it: the rows of those behind it would be taken for the wrong ones."""
    rpool.drop(dead)
    with pytest.raises(AssertionError, match=rf"R-workers \[{dead}\], which do not serve"):
        rpool.begin(1, ROWS)
    with pytest.raises(AssertionError, match="do not serve"):
        rpool.admit([Admission(5, worker, 8) for worker in range(3)])
    assert not any(channel.sent for channel in channels)
    rpool.admit([Admission(5, worker, 8) for worker in range(3) if worker != dead])
    assert [len(channel.sent) for channel in channels] == [worker != dead for worker in range(3)]
    assert all(isinstance(message, Admit) for channel in channels for message in channel.sent)
