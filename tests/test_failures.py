"""The harm done on purpose: workers killed, stopped, lying or slow; nothing hangs, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Case, crowding

from bench.near_ties import assert_same_tokens
from cpu_attention import LISTENING, RWorker, serve
from fastdecode import LLM, SamplingParams
from fastdecode.errors import RWorkerFailed, RWorkerLost, RWorkerTimeout
from transport import Admit, Attend, Attended, PeerLost, Release, connect, listen

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=32)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition: object, timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        threading.Event().wait(0.02)
    return bool(condition())  # type: ignore[operator]


@pytest.mark.parametrize(
    "harm, transport",
    [
        (signal.SIGKILL, "tcp"), (signal.SIGSTOP, "shm"),
        pytest.param(signal.SIGKILL, "shm", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "ipc", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "ipc", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "tcp", marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_worker_lost_in_the_middle(
    transport: str, harm: signal.Signals, llama: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two workers one: noticed within 5 s of an idle machine, no token changes, and a new process takes its place.

    Then both: a typed error that names one.  And close() still ends everything.
    """
    before = set(children())
    prompts, params = [[5 + i] * 20 for i in range(8)], SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    with LLM(llama.directory, transport=transport, num_r_workers=2, skip_tokenizer_init=True) as llm:
        victims = children()[-2:]
        expected = llm.generate(prompts, params, use_tqdm=False)

        def strike_soon(victim: psutil.Process) -> list[float]:
            moment: list[float] = []

            def strike() -> None:
                moment.append(time.monotonic())  # before: the loss may be noticed before this thread runs again
                victim.send_signal(harm)

            threading.Timer(0.3, strike).start()
            return moment

        moment = strike_soon(victims[0])
        while f"process {victims[0].pid}," in llm._engine._rpool.names[0]:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert_same_tokens(llama.directory, prompts, params, outputs, expected)
            assert not moment or time.monotonic() - moment[0] < 120
        [lost] = [record for record in caplog.records if record.name == "fastdecode.engine.recovery"]
        assert f"process {victims[0].pid}," in lost.message
        assert lost.created - moment[0] - (time.time() - time.monotonic()) < 5 * crowding()
        assert not psutil.pid_exists(victims[0].pid)  # its memory is needed
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert_same_tokens(llama.directory, prompts, params, outputs, expected)
        assert all(llm._engine._scheduler._credits.capacity_tokens)
        victims = children()[-2:]
        for victim in victims:
            strike_soon(victim)
        while any(f"process {victim.pid}," in name for victim in victims for name in llm._engine._rpool.names):
            outputs = llm.generate(prompts, params, use_tqdm=False)  # with none left it waits for one that comes back
            assert_same_tokens(llama.directory, prompts, params, outputs, expected)
        for victim in victims if harm == signal.SIGSTOP else ():
            with suppress(psutil.NoSuchProcess):  # killed already, to start another
                victim.send_signal(signal.SIGCONT)
    assert set(children()) <= before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_worker_that_dies(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = RWorker.handle

    def die(self: RWorker, session: int, message: object) -> object:
        if isinstance(message, Attend) and message.step == 5:
            raise SystemExit  # ends the thread like nothing else can
        return handle(self, session, message)  # type: ignore[arg-type]

    monkeypatch.setattr(RWorker, "handle", die)
    with (
        LLM(llama.directory, skip_tokenizer_init=True) as llm,
        pytest.raises(RWorkerLost, match="R-worker 0 \\(a thread\\)"),
    ):
        llm.generate([[5]], LONG, use_tqdm=False)


def test_slow_worker_times_out_by_name(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = RWorker.handle

    def dawdle(self: RWorker, session: int, message: object) -> object:
        if isinstance(message, Attend) and message.step == 3:
            threading.Event().wait(1.5)
        return handle(self, session, message)  # type: ignore[arg-type]

    monkeypatch.setattr(RWorker, "handle", dawdle)
    with (
        LLM(llama.directory, skip_tokenizer_init=True, worker_timeout_s=0.3) as llm,
        pytest.raises(RWorkerTimeout, match="R-worker 0 .*no answer .* within 0.3 s"),
    ):
        llm.generate([[5]], LONG, use_tqdm=False)


def test_failing_worker_says_why(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no memory for this")

    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        monkeypatch.setattr("cpu_attention.kernel.attend", broken)
        with pytest.raises(RWorkerFailed, match="R-worker 0 .*no memory for this"):
            llm.generate([[5]], LONG, use_tqdm=False)


@pytest.mark.parametrize(
    "lie",
    [
        lambda a: Attended(a.step + 1, a.micro_batch, a.layer, a.q),
        lambda a: Attended(a.step, a.micro_batch, a.layer, a.q[:0]),
        lambda a: Attended(a.step, a.micro_batch, a.layer + 1, a.q),
    ],
)
@pytest.mark.parametrize("is_stubborn", [False, True])
def test_lying_worker_is_caught(is_stubborn: bool, lie: object, llama: Case) -> None:
    """An answer to another question, or of another size, never reaches the model; who lies again and again is left."""
    worker = RWorker(kv_cache_bytes=1 << 24)
    handle = worker.handle

    def handle_and_lie(session: int, message: object) -> object:
        reply = handle(session, message)  # type: ignore[arg-type]
        is_lie = isinstance(message, Attend) and (message.step == 4 or (is_stubborn and message.step > 4))
        return lie(message) if is_lie else reply  # type: ignore[operator]

    worker.handle = handle_and_lie  # type: ignore[method-assign,assignment]
    listener = listen("inproc://liar")
    thread = threading.Thread(target=serve, args=(listener, worker))
    thread.start()
    try:
        with LLM(llama.directory, skip_tokenizer_init=True, r_worker_addresses=["inproc://liar"]) as llm:
            if is_stubborn:
                with pytest.raises(RWorkerFailed, match="something else than it was asked"):
                    llm.generate(llama.prompts, GREEDY, use_tqdm=False)
            else:
                outputs = llm.generate(llama.prompts, GREEDY, use_tqdm=False)
                assert [output.outputs[0].token_ids for output in outputs] == llama.reference
                assert llm._engine._rpool.totals.num_lost == 1
    finally:
        listener.close()
        thread.join(10)


def assert_at_rest(llm: LLM, r_workers: list[RWorker]) -> None:
    """Nothing runs or waits, no credit is held, and R-workers have what is kept for others to begin with alone."""
    llm._engine._rpool.settle()  # they have heard everything that was sent
    for index, worker in enumerate(r_workers):
        if worker._session:
            worker._session.store.check_integrity()
            assert worker._session.store.seq_ids == llm._engine._scheduler.kept(index)
    llm._engine._scheduler.check_integrity()
    assert not llm._engine.has_work and not llm._engine._scheduler.num_running
    assert len(llm._engine._sworker._prompt_kv) == 0


@pytest.fixture
def r_workers(monkeypatch: pytest.MonkeyPatch) -> list[RWorker]:
    """Those that are started as threads from now on."""
    workers: list[RWorker] = []

    class Noted(RWorker):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]
            workers.append(self)

    monkeypatch.setattr("fastdecode.holders.launch.RWorker", Noted)
    return workers


def test_interrupted_generate_leaves_a_working_engine(
    llama: Case, r_workers: list[RWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a layer: KV comes back, and the next call gives the right tokens."""
    params = SamplingParams(temperature=0, max_tokens=32)
    with LLM(llama.directory, skip_tokenizer_init=True, num_r_workers=2) as llm:
        attend_prompt, calls = llm._engine._sworker.attend_prompt, []

        def interrupt(*arguments: object) -> object:
            calls.append(1)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return attend_prompt(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(llm._engine._sworker, "attend_prompt", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(llama.prompts, params, use_tqdm=False)
        outputs = llm.generate(llama.prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == llama.reference
        assert_at_rest(llm, r_workers)


TIGHT = {
    "kv_cache_memory": 768 * 240, "block_tokens": 16, "kv_policy": "greedy", "start_policy": "eager",
    "max_num_batched_tokens": 48,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, TIGHT], ids=["ample", "preempting"])
@pytest.mark.parametrize(
    "where", ["after an admit", "after a release", "after an attend", "after a receive", "before a commit"]
)
def test_interrupts_in_the_narrow_places(
    where: str, options: dict[str, Any], llama: Case, r_workers: list[RWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between telling a worker and noting it: the next generate is right all the same."""
    params = SamplingParams(temperature=0, max_tokens=32)
    with LLM(
        llama.directory,
        skip_tokenizer_init=True,
        num_r_workers=2,
        micro_batches=2,
        enable_prefix_caching=where != "after a release",  # what is kept is not released
        **options,
    ) as llm:
        engine, channel = llm._engine, llm._engine._rpool._workers[0].channel
        kind = {"after an admit": Admit, "after a release": Release, "after an attend": Attend}.get(where)
        target, name = {
            "after a receive": (channel, "recv"), "before a commit": (engine._scheduler, "commit"),
        }.get(where, (channel, "send"))  # fmt: skip
        original = getattr(target, name)
        seen: list[object] = []

        def interrupt(*arguments: object, **keywords: object) -> object:
            result = original(*arguments, **keywords)
            if kind is None or isinstance(arguments[0], kind):
                seen.append(result)
                if len(seen) == {Admit: 2 if options else 1, Release: 1}.get(kind, 5):
                    raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(target, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(llama.prompts, params, use_tqdm=False)
        outputs = llm.generate(llama.prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == llama.reference
        assert_at_rest(llm, r_workers)


def test_worker_lost_while_sequences_are_released(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is delivered; then the loss is told, as itself."""
    with LLM(llama.directory, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        channel = llm._engine._rpool._workers[0].channel
        send = channel.send

        def lose(message: object, **options: float) -> None:
            if isinstance(message, Release):
                raise PeerLost("pulled")
            send(message, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(channel, "send", lose)
        iteration = llm.generate_iter([[5], [6]], [SamplingParams(max_tokens=m, ignore_eos=True) for m in (2, 9)])
        assert len(next(iteration).outputs[0].token_ids) == 2
        with pytest.raises(RWorkerLost, match="R-worker 0"):
            next(iteration)


@pytest.mark.parametrize("transport", ["inproc", "shm", "ipc", "tcp"])
def test_close_leaves_nothing(transport: str, llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, thread, socket, file or file descriptor, after ten lives."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def life() -> None:
        with LLM(llama.directory, transport=transport, num_r_workers=2, skip_tokenizer_init=True) as llm:
            llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)

    life()
    me = psutil.Process()
    before, native_threads = (len(children()), threading.active_count(), me.num_fds()), me.num_threads()
    for _ in range(3 if transport != "inproc" else 10):
        life()
    after = len(children()), threading.active_count(), me.num_fds()
    assert all(a <= b for a, b in zip(after, before, strict=True)), (before, after)
    assert me.num_threads() - native_threads < 3  # libraries keep a few of their own, but none per life
    assert list(tmp_path.iterdir()) == []


def test_workers_follow_a_killed_parent(llama: Case, tmp_path: Path) -> None:
    code = (
        "import os, sys, fastdecode, psutil\n"
        f"llm = fastdecode.LLM({str(llama.directory)!r}, transport='ipc', num_r_workers=2, skip_tokenizer_init=True)\n"
        "print(*[c.pid for c in psutil.Process().children()], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in out.stdout.split()]
    assert len(pids) == 2 and out.returncode == -signal.SIGKILL
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.fixture
def lone_worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdecode", "rworker", "--bind", f"ipc://{tmp_path}/w", "--kv-cache-memory", "64MiB"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    yield process, process.stdout.readline().strip().removeprefix(LISTENING)
    process.kill()
    process.wait()


def test_nobody_comes_back(lone_worker: tuple[subprocess.Popen[str], str], llama: Case) -> None:
    """The only R-worker is killed: it is waited for, and then named."""
    process, address = lone_worker
    with LLM(llama.directory, r_worker_addresses=[address], skip_tokenizer_init=True) as llm:
        llm._engine._rpool.timeout_s = 2.0
        threading.Timer(0.3, process.kill).start()
        began = time.monotonic()
        with pytest.raises(RWorkerLost, match="is gone"):
            for _ in range(1000):
                llm.generate([[5]], LONG, use_tqdm=False)
        assert 2 < time.monotonic() - began < 10 * crowding()


def test_worker_started_by_hand_outlives_its_s_workers(
    lone_worker: tuple[subprocess.Popen[str], str], llama: Case
) -> None:
    """One that says goodbye, one that is killed in session, one that sends garbage; then a good one again."""
    process, address = lone_worker
    params = SamplingParams(temperature=0, max_tokens=32)

    def run() -> list[list[int]]:
        with LLM(llama.directory, r_worker_addresses=[address], skip_tokenizer_init=True) as llm:
            return [o.outputs[0].token_ids for o in llm.generate(llama.prompts, params, use_tqdm=False)]

    assert run() == llama.reference
    code = (
        f"import os, fastdecode; fastdecode.LLM({str(llama.directory)!r}, r_worker_addresses=[{address!r}], "
        "skip_tokenizer_init=True); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    with connect(address) as channel:
        for _ in range(50):
            channel._link.send_frames([os.urandom(100), b"x"], 5)
    assert run() == llama.reference
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 0


def test_second_s_worker_is_told_to_wait(lone_worker: tuple[subprocess.Popen[str], str], llama: Case) -> None:
    _, address = lone_worker
    with LLM(llama.directory, r_worker_addresses=[address], skip_tokenizer_init=True) as llm:
        with pytest.raises(RWorkerFailed, match="in session with another S-worker"):
            LLM(llama.directory, r_worker_addresses=[address], skip_tokenizer_init=True)
        assert llm.generate([[5]], SamplingParams(max_tokens=2), use_tqdm=False)[0].error is None


def test_worker_process_that_cannot_start(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(Exception, match="R-worker 0 .* ended at its start with exit code 1"):
        LLM(llama.directory, transport="ipc", skip_tokenizer_init=True)
