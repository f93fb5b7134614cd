"""R-workers that come back, and new ones: they get sequences, and nothing of an earlier life counts."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from conftest import Case, quiet

from cpu_attention import RWorker, serve
from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError, RWorkerUnreachable
from fastdecode.holders.patience import Patience
from fastdecode.holders.processes import Processes
from fastdecode.holders.rejoin import Rejoin, RWorkerHandle
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.request import Request, Sequence
from fastdecode.scheduling.scheduler import Scheduler
from transport import Admit, Attend, ChannelClosed, Hello, LayerSpec, Listener, Message, connect, listen

GREEDY = SamplingParams(temperature=0, max_tokens=32)
HELLO = Hello((LayerSpec(4, 2, 16, 0.25),), "float32", 16)
_names = count()


class Place:
    """Where one R-worker after the other serves, as a thread."""

    def __init__(self) -> None:
        self.address = f"inproc://rejoin-{next(_names)}"
        self.num_admitted = 0
        self.before_attend: Callable[[], None] = lambda: None
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        worker = RWorker(kv_cache_bytes=1 << 24)
        handle = worker.handle

        def watched(session: int, message: Message) -> Message | None:
            if isinstance(message, Admit):
                self.num_admitted += len(message.seq_ids)
            if isinstance(message, Attend):
                self.before_attend()
            return handle(session, message)

        worker.handle = watched  # type: ignore[method-assign]
        self._listener = listen(self.address)
        self._thread = threading.Thread(target=serve, args=(self._listener, worker))
        self._thread.start()

    def close(self) -> None:
        if self._listener and self._thread:
            self._listener.close()
            self._thread.join(10)


@pytest.fixture
def places() -> Iterator[list[Place]]:
    made = [Place(), Place(), Place()]
    yield made
    for place in made:
        place.close()


@contextmanager
def served_by(case: Case, places: list[Place], **options: int) -> Iterator[LLM]:
    for place in places:
        place.open()
    addresses = [place.address for place in places]
    with LLM(case.directory, r_worker_addresses=addresses, skip_tokenizer_init=True, **options) as llm:
        yield llm


def run(llm: LLM, case: Case) -> None:
    assert [output.outputs[0].token_ids for output in quiet(llm, case.prompts, GREEDY)] == case.reference


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_that_comes_back(llama: Case, places: list[Place]) -> None:
    """Twice; and while it is away the others do its work."""
    with served_by(llama, places) as llm:
        run(llm, llama)
        for _ in range(2):
            places[1].close()
            run(llm, llama)
            assert llm._engine._rpool.alive == (0, 2)
            places[1].open()
            places[1].num_admitted = 0
            wait_for(lambda: llm._engine._rpool._rejoin.look())  # type: ignore[union-attr]
            run(llm, llama)
            assert llm._engine._rpool.alive == (0, 1, 2) and places[1].num_admitted > 0
            llm._engine._scheduler.check_integrity()


def test_one_that_comes_back_in_the_middle(llama: Case, places: list[Place]) -> None:
    with served_by(llama, places[:2], max_num_seqs=4) as llm:
        iteration = llm.stream([(prompt, GREEDY) for prompt in llama.prompts * 40])
        outputs = [next(iteration) for _ in range(3)]
        places[0].close()
        outputs += [next(iteration) for _ in range(3)]
        places[0].open()
        places[0].num_admitted = 0
        outputs += list(iteration)
        assert places[0].num_admitted > 0
        expected = llama.reference * 40
        assert len(outputs) == len(expected)
        assert all(output.outputs[0].token_ids == expected[place] for place, output in outputs)


def test_a_new_one(llama: Case, places: list[Place]) -> None:
    """Its address may be named before it is there."""
    with served_by(llama, places[:1]) as llm:
        with pytest.raises(ConfigError, match="no address"):
            llm.add_r_worker("carrier-pigeon://loft")
        places[2].open()
        llm.add_r_worker(places[2].address)
        llm.add_r_worker(f"ipc:///tmp/fastdecode-nobody-{time.time_ns()}")
        wait_for(lambda: llm._engine._rpool._rejoin.look())  # type: ignore[union-attr]
        run(llm, llama)
        assert llm._engine._rpool.alive == (0, 1) and places[2].num_admitted > 0
        places[0].close()  # the one of the beginning may go now
        run(llm, llama)
        assert llm._engine._rpool.alive == (1,)


def test_one_that_hangs(llama: Case, places: list[Place]) -> None:
    """Alive, and silent: noticed long before worker_timeout_s.  What it answers later belongs to nobody."""
    goes_on = threading.Event()
    with served_by(llama, places[:2]) as llm:
        for _ in range(2):  # answers that tell what an answer takes
            run(llm, llama)
        places[1].before_attend = lambda: goes_on.wait() and None
        started = time.monotonic()
        run(llm, llama)
        assert time.monotonic() - started < 10 and llm._engine._rpool.alive == (0,)
        places[1].before_attend = lambda: None
        goes_on.set()
        wait_for(lambda: llm._engine._rpool._rejoin.look())  # type: ignore[union-attr]
        run(llm, llama)
        assert llm._engine._rpool.alive == (0, 1)
        # And again, at the first thing that it is asked in its new life: it is known by the earlier one.
        places[1].close()
        run(llm, llama)
        goes_on.clear()
        places[1].open()
        places[1].before_attend = lambda: goes_on.wait() and None
        wait_for(lambda: llm._engine._rpool._rejoin.look())  # type: ignore[union-attr]
        started = time.monotonic()
        run(llm, llama)
        assert time.monotonic() - started < 10 and llm._engine._rpool.alive == (0,)
        goes_on.set()


def test_closing_while_one_is_looked_for(llama: Case, places: list[Place]) -> None:
    threads = threading.active_count()
    with served_by(llama, places[:2]) as llm:
        places[0].close()
        run(llm, llama)
        assert any(thread.name == "rejoin-0" for thread in threading.enumerate())
    places[1].close()
    assert threading.active_count() <= threads


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is lost again and again is not asked more often; and what joined and is not wanted is closed."""
    monkeypatch.setattr("fastdecode.holders.rejoin._FIRST_PAUSE_S", 0.05)
    place, attempts = Place(), []
    place.open()

    def again() -> RWorkerHandle:
        attempts.append(time.monotonic())
        if len(attempts) in (1, 2):
            raise RWorkerUnreachable("not yet")
        return RWorkerHandle("it", connect(place.address), again)

    rejoin, started = Rejoin(HELLO), time.monotonic()
    try:
        for times in (3, 4):
            rejoin.seek(7, again)
            wait_for(lambda times=times: len(attempts) == times and rejoin.look())  # type: ignore[misc]
            if times == 3:
                [joined] = rejoin.look()
                assert joined.worker == 7 and joined.welcome.num_blocks and rejoin.look() == [joined]
                rejoin.taken(joined)
                rejoin.taken(joined)
                assert not rejoin.look()
                joined.handle.channel.close()
                lost = time.monotonic()
        pauses = [attempts[0] - started, attempts[1] - attempts[0], attempts[2] - attempts[1], attempts[3] - lost]
        assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2, 0.4), strict=True)), pauses
    finally:
        rejoin.close()
        place.close()


@pytest.mark.parametrize(
    "error",
    [
        subprocess.TimeoutExpired("an R-worker", 10),
        OSError(12, "no memory for a process"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no address"),
        RuntimeError("nobody thought of this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_it_is_looked_for_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is started, and when it is spoken to; and what was opened in vain is closed."""
    monkeypatch.setattr("fastdecode.holders.rejoin._FIRST_PAUSE_S", 0.01)
    place, attempts, channels = Place(), count(), []
    place.open()

    def fails(*_: object, **__: object) -> None:
        raise error

    def again() -> RWorkerHandle:
        attempt = next(attempts)
        if attempt == 0:
            raise error
        channels.append(connect(place.address))
        if attempt == 1:
            monkeypatch.setattr(channels[0], "send", fails)
        return RWorkerHandle("it", channels[-1], again)

    rejoin = Rejoin(HELLO)
    try:
        rejoin.seek(3, again)
        [joined] = rejoin.look(30.0)
        assert joined.worker == 3 and next(attempts) == 3
        with pytest.raises(ChannelClosed):
            channels[0].recv(timeout_s=1)
        joined.handle.channel.close()
    finally:
        rejoin.close()
        place.close()


def test_one_that_takes_long_to_give_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not started again beside itself; the next look may find it gone.  At the end it is not waited for."""

    class Slow:
        pid, stdin, stdout = 4711, None, None

        def kill(self) -> None:
            pass

        def terminate(self) -> None:
            pass

        def poll(self) -> None:
            pass

        def wait(self, timeout: float) -> int:
            raise subprocess.TimeoutExpired("it", timeout)

    processes = Processes(transport="ipc", num_workers=1, num_threads=1, kv_cache_bytes=1 << 20)
    processes._running[0] = Slow()  # type: ignore[assignment]
    monkeypatch.setattr(processes, "_spawn", lambda index: pytest.fail("two of them would not fit"))
    with pytest.raises(RWorkerUnreachable, match="process 4711.* still gives its memory back"):
        processes._again(0)
    processes.close()


def test_patience() -> None:
    patience = Patience(60.0)
    assert patience.seconds == 60
    for _ in range(20):
        patience.took(0.002)
    assert patience.seconds == 1.5
    patience.took(0.5)
    assert patience.seconds == 5
    for _ in range(3000):
        patience.took(0.002)
    assert patience.seconds == 1.5
    patience.took(7)
    assert patience.seconds == 60


@pytest.mark.parametrize("start_policy", ["steady", "eager"])
@pytest.mark.parametrize("max_kv_load", [None, 512])
def test_the_scheduler_gains(start_policy: str, max_kv_load: int | None) -> None:
    """A worker lost, back with less memory, and a new one under a number that leaves a gap."""
    config = SchedulerConfig(
        max_num_seqs=64, max_num_batched_tokens=256, num_lanes=1, block_tokens=16, capacity_blocks=(32, 32),
        start_policy=start_policy, max_kv_load=max_kv_load,
    )  # fmt: skip
    scheduler = Scheduler(config)
    for index in range(60):
        request = Request(str(index), (1,) * 20, SamplingParams(max_tokens=40), 40, frozenset(), frozenset())
        scheduler.add(Sequence(index, request, 0, 0))
    seen: set[int] = set()

    def step() -> None:
        made = scheduler.schedule()
        assert made
        seen.update(admission.r_worker for admission in made.admissions)
        due = np.full(len(made.sampled), 5)
        scheduler.remove(scheduler.commit(made, due))
        scheduler.check_integrity()

    for _ in range(5):
        step()
    scheduler.lose(1)
    scheduler.gain(1, 8)
    scheduler.gain(3, 16)
    seen.clear()
    while scheduler.has_work:
        step()
    assert seen == {0, 1, 3} and len(scheduler.kv_tokens) == 4
