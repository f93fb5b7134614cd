"""Threads that share compiled work: each share once, and no wait that does not end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from ctypes import Structure, addressof, c_int64
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import carray, types

from cpu_attention.compiling import compiled
from cpu_attention.native import Entry, entry_of, fetch_add, load, pointer
from cpu_attention.team import _SHUT, Team

_usleep = types.ExternalFunction("usleep", types.int32(types.int32))
_getpid, _gettid = (types.ExternalFunction(name, types.int32()) for name in ("getpid", "gettid"))


class Count(Structure):
    _fields_ = [("counts", c_int64), ("bad_share", c_int64), ("helpers_us", c_int64)]


COUNT = np.dtype(Count)


@compiled
def _count(job, share):  # type: ignore[no-untyped-def]
    """Shares are counted; a main thread goes slowly, so that helpers come, and these sleep as long as they are told."""
    j = carray(pointer(job), 1, COUNT)[0]
    if j.helpers_us:
        _usleep(1000 if _gettid() == _getpid() else j.helpers_us)
    if share == j.bad_share:
        raise IndexError("a bad share")
    fetch_add(j.counts + 4 * share, 1)


@pytest.fixture(scope="module")
def count() -> Entry:
    return entry_of(_count)


def job_of(counts: np.ndarray, bad_share: int = -1, helpers_us: int = 0) -> Count:
    return Count(counts.ctypes.data, bad_share, helpers_us)


def counted(team: Team, count: Entry, num_shares: int = 20, bad_share: int = -1, helpers_us: int = 0) -> list[int]:
    counts = np.zeros(num_shares, np.int32)
    team.run(count, job_of(counts, bad_share, helpers_us), num_shares, counts)
    return counts.tolist()


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("attend_")]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_each_share_is_done_once(num_threads: int, count: Entry) -> None:
    team = Team(num_threads)
    for num_shares in (0, 1, 2, 3, 50) * 200:
        assert counted(team, count, num_shares) == [1] * num_shares
    assert counted(team, count, 50, helpers_us=1000) == [1] * 50
    assert len(helpers()) == num_threads - 1
    team.close()
    assert not helpers()
    if num_threads > 1:
        with pytest.raises(RuntimeError, match="have ended"):
            counted(team, count)
    assert not helpers()


def test_no_call_sees_another_ones_job(count: Entry) -> None:
    """Short jobs one upon the other: a helper that comes late for one must not do the next one's shares for it."""
    team, counts = Team(3), [np.zeros(2, np.int32) for _ in range(20_000)]
    for each in counts:
        team.run(count, job_of(each), 2, each)
    team.close()
    assert np.array_equal(counts, np.ones((20_000, 2)))


def test_several_callers(count: Entry) -> None:
    team, wrong = Team(3), []

    def call() -> None:
        for _ in range(300):
            if counted(team, count) != [1] * 20:
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    team.close()
    assert not wrong


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_is_the_callers_whoever_met_it(num_threads: int, count: Entry) -> None:
    team = Team(num_threads)
    for bad_share in range(20):
        with pytest.raises(IndexError, match="a bad share"):
            counted(team, count, 20, bad_share, helpers_us=100)
        assert counted(team, count) == [1] * 20
    team.close()


def test_helpers_end_with_their_team(count: Entry) -> None:
    team = Team(3)
    counted(team, count)
    crew = weakref.ref(team._crew)
    assert len(helpers()) == 2
    del team
    gc.collect()
    assert crew() is None and not helpers()


def test_a_wait_that_is_interrupted_is_gone_on_with(count: Entry) -> None:
    """What helpers still use is kept, and the next job begins when they are out."""
    team, counts = Team(2), np.zeros(5, np.int32)
    team.start()

    def interrupt(signum: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    began = time.monotonic()
    try:
        with pytest.raises(InterruptedError):
            team.run(count, job_of(counts, helpers_us=2_500_000), 5, counts)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 2 and counts.sum() == 4
    assert team._crew is not None and team._crew.inside is not None
    assert counted(team, count) == [1] * 20
    assert counts.sum() == 5 and time.monotonic() - began > 2
    team.close()


def test_a_helper_that_died_is_not_waited_for(count: Entry) -> None:
    """None can in Python's hands; so its place inside is taken by nobody."""
    team = Team(2)
    counted(team, count)
    crew = team._crew
    assert crew is not None
    crew.board.gate += 1
    crew.end()
    crew.board.is_closed = 0
    with pytest.raises(RuntimeError, match="died in the middle"):
        counted(team, count)
    assert load_gate(addressof(crew.board) + type(crew.board).gate.offset) == _SHUT + 1
    assert counted(team, count) == [1] * 20 and team._crew is not crew  # others have come in its place
    team.close()


@numba.njit
def load_gate(word):  # type: ignore[no-untyped-def]
    return load(word)


SCRIPT = """
import os, sys, threading
import numpy as np
from cpu_attention import AttentionRule, HeadFormat, kernel
from cpu_attention.multicore import Attention
head, attention = HeadFormat("float32", 16, 16), Attention(3)
data, q = np.zeros((4, 1, head.nbytes), np.uint8), np.ones((64, 1, 16), np.float32)
work, tables = attention.cut(np.full(64, 40, np.int32), None, 16), np.zeros((64, 3), np.int32)
def attend():
    for _ in range(200):
        assert not attention.attend(q, data, head, tables, work, AttentionRule(1.0)).any()
attend()
{then}
"""
ENDS = {
    "exit": "",
    "exit in a call": "threading.Thread(target=lambda: [attend() for _ in iter(int, 1)], daemon=True).start()",
    "raise": "raise SystemExit(0)",
    "fork": """
pid = os.fork()
attend()
attention.close()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
""",
    "fork in a call": """
other = threading.Thread(target=lambda: [attend() for _ in range(20)])
other.start()
pids = []
for _ in range(10):
    pids.append(os.fork())
    if not pids[-1]:
        attend()
        sys.exit(0)
for pid in pids:
    assert os.waitpid(pid, 0)[1] == 0
other.join()
""",
    "closed twice": "attention.close(); attention.close()",
}


@pytest.mark.parametrize("then", ENDS)
def test_processes_end(then: str) -> None:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(then=ENDS[then])],
        cwd=Path(__file__).parents[1], env=os.environ, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    told = out.stderr if then != "exit in a call" else ""  # where the other thread may say that it cannot go on
    assert out.returncode == 0 and not told, out.stderr[-2000:]
