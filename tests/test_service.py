"""The engine behind an event loop: streams add up, whoever leaves frees its KV, whoever comes too late is told."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Case

from fastdecode import LLM, SamplingParams
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.opening import open_engine
from fastdecode.errors import RequestError, RWorkerError
from fastdecode.server.service import Service
from fastdecode.server.stream import Stream, deltas_of
from transport import PeerLost, TransportError

GREEDY = SamplingParams(temperature=0, max_tokens=32)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@asynccontextmanager
async def serving(model: Path, max_queue: int = 100, **options: Any) -> AsyncIterator[Service]:
    opened = open_engine(EngineConfig.from_options({"model": model, "num_r_workers": 2, **options}))
    try:
        service = Service(opened, max_queue=max_queue)
        service.start()
        yield service
        await service.drain(10)
    finally:
        opened.close()


async def idle(service: Service) -> None:
    for _ in range(500):
        if not service._num_inside and not service._engine.has_work:
            break
        await asyncio.sleep(0.01)
    service._engine._scheduler.check_integrity()
    assert service._num_inside == 0 and service.num_running == 0 and service.num_waiting == 0


def test_equal_to_the_offline_api(llama: Case) -> None:
    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True) as service:
            streams = [
                await service.submit(prompt, GREEDY, stream=bool(index % 2))
                for index, prompt in enumerate(llama.prompts)
            ]

            async def tokens(index: int, stream: Stream) -> list[int]:
                if index % 2:
                    return [
                        token
                        async for deltas in deltas_of([stream])
                        for _, delta in deltas
                        for token in delta.token_ids
                    ]
                return (await stream.output()).outputs[0].token_ids

            got = await asyncio.gather(*(tokens(*pair) for pair in enumerate(streams)))
            assert list(got) == llama.reference
            await idle(service)
            assert service.health().state == "ready"

    asyncio.run(run())


@pytest.mark.parametrize("stop", [None, [" the", "e of"], ["a"]])
def test_streamed_text_is_the_text(stop: list[str] | None, demo_model: Path) -> None:
    """Whatever the stops; with half a character or half a stop string held back, and nothing said twice."""
    params = SamplingParams(temperature=0.9, max_tokens=60, n=3, seed=3, stop=stop, logprobs=2)

    async def run() -> None:
        async with serving(demo_model) as service:
            whole = await (await service.submit("Once upon a time", params)).output()
            stream = await service.submit("Once upon a time", params, stream=True)
            texts, tokens, logprobs, ends = [""] * 3, [[], [], []], [[], [], []], [None] * 3  # type: ignore[var-annotated]
            async for delta in (delta async for deltas in deltas_of([stream]) for _, delta in deltas):
                texts[delta.index] += delta.text
                tokens[delta.index] += delta.token_ids
                logprobs[delta.index] += delta.logprobs
                assert ends[delta.index] is None
                ends[delta.index] = delta.finish_reason
            for completion in whole.outputs:
                assert texts[completion.index] == completion.text and completion.text
                assert tokens[completion.index] == completion.token_ids
                assert logprobs[completion.index] == completion.logprobs
                assert ends[completion.index] == completion.finish_reason

    asyncio.run(run())


def test_a_reset_is_answered(llama: Case) -> None:
    """Beside what runs; by an error where there is no engine to do it, any more or because of it."""
    prompt = llama.prompts[-1]

    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True, num_r_workers=1) as service:

            async def found() -> int:
                return (await (await service.submit(prompt, GREEDY)).output()).num_cached_tokens

            assert [await found(), await found()] == [0, len(prompt) - 1]
            running = await service.submit([5, 6], LONG)
            await asyncio.wait_for(service.reset_prefix_cache(), 20)
            assert await found() == 0
            assert len((await running.output()).outputs[0].token_ids) == 400
            await idle(service)
            await service.drain(10)
            with pytest.raises(RequestError) as refused:
                await service.reset_prefix_cache()
            assert refused.value.code == "draining"

        async with serving(llama.directory, skip_tokenizer_init=True) as service:

            def fails() -> None:
                raise MemoryError

            service._engine.reset_prefix_cache = fails  # type: ignore[method-assign]
            with pytest.raises(RWorkerError, match="the engine failed: MemoryError"):
                await asyncio.wait_for(service.reset_prefix_cache(), 20)
            while service.health().state != "dead":
                await asyncio.sleep(0.01)
            with pytest.raises(RWorkerError, match="MemoryError"):
                await service.reset_prefix_cache()

    asyncio.run(run())


def test_whoever_leaves_frees_its_kv(llama: Case) -> None:
    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True, max_num_seqs=4) as service:
            streams = [await service.submit([5 + i], LONG, stream=True) for i in range(12)]
            async for _ in deltas_of(streams[:1]):
                break
            for stream in streams:
                stream.abort()
                stream.abort()
            await idle(service)
            assert (await (await service.submit([7], GREEDY)).output()).outputs[0].token_ids

    asyncio.run(run())


def test_queue_timeout_and_bad_requests(llama: Case) -> None:
    async def run() -> None:
        async with serving(llama.directory, 3, skip_tokenizer_init=True, max_num_seqs=1) as service:
            first = await service.submit([5], LONG, stream=True)
            async for _ in deltas_of([first]):
                break
            waiting = [await service.submit([6], GREEDY, timeout_s=0.05) for _ in range(3)]
            with pytest.raises(RequestError, match="3 sequences wait already") as full:
                await service.submit([7], GREEDY)
            assert full.value.code == "queue_full"
            for stream in waiting:
                with pytest.raises(RequestError, match=r"not finished within 0.05 s") as late:
                    await stream.output()
                assert late.value.code == "timeout"
            first.abort()
            with pytest.raises(RequestError, match="needs the tokenizer"):
                await service.submit("text", GREEDY)
            with pytest.raises(RequestError, match="not in the vocabulary"):
                await (await service.submit([10**6], GREEDY)).output()
            await idle(service)

    asyncio.run(run())


def test_a_burst_fills_seats_and_queue(llama: Case) -> None:
    """All at once, before any step was run."""

    async def run() -> None:
        async with serving(llama.directory, 3, skip_tokenizer_init=True, max_num_seqs=4) as service:
            for _ in range(2):
                made = await asyncio.gather(
                    *(service.submit([5 + i], GREEDY) for i in range(8)), return_exceptions=True
                )
                *taken, last = made
                assert isinstance(last, RequestError) and last.code == "queue_full"
                for stream in taken:
                    assert isinstance(stream, Stream) and (await stream.output()).outputs[0].token_ids
                await idle(service)
            assert service.num_refused == 2

    asyncio.run(run())


def test_the_queue_is_no_longer_where_kv_is_short(llama: Case) -> None:
    """Seats that no KV is left for are no places."""

    async def run() -> None:
        options = {"num_r_workers": 1, "kv_cache_memory": "256KiB", "start_policy": "eager", "max_num_seqs": 64}
        async with serving(llama.directory, 5, skip_tokenizer_init=True, **options) as service:
            streams = [await service.submit([5 + i], LONG) for i in range(4)]
            while not (service.num_running and service.num_waiting):  # before the first step all wait, and none runs
                await asyncio.sleep(0.001)
            with pytest.raises(RequestError, match="5 sequences wait already"):
                for i in range(64):
                    streams.append(await service.submit([5 + i], LONG))
            assert 0 < service.num_running < 4 and len(streams) == service.num_running + 5
            for stream in streams:
                stream.abort()
            await idle(service)

    asyncio.run(run())


def test_an_urgent_request_takes_a_seat(llama: Case) -> None:
    """All seats are taken by long ones; it comes first all the same, and they lose nothing."""

    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True, max_num_seqs=2) as service:
            alone = [(await (await service.submit([5 + i], LONG)).output()).outputs[0].token_ids for i in range(4)]
            batch = [asyncio.create_task((await service.submit([5 + i], LONG, priority=1)).output()) for i in range(4)]
            await asyncio.sleep(0.05)
            urgent = await (await service.submit(llama.prompts[3], GREEDY)).output()
            assert urgent.outputs[0].token_ids == llama.reference[3]
            assert not any(task.done() for task in batch)
            assert [output.outputs[0].token_ids for output in await asyncio.gather(*batch)] == alone

    asyncio.run(run())


def test_drain(llama: Case) -> None:
    """What runs ends; what comes is refused; what takes too long is told."""

    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True) as service:
            stream = await service.submit(llama.prompts[0], GREEDY)
            drained = asyncio.create_task(service.drain(10))
            await asyncio.sleep(0)
            assert service.health().state == "draining"
            with pytest.raises(RequestError, match="shutting down"):
                await service.submit([5], GREEDY)
            assert (await stream.output()).outputs[0].token_ids == llama.reference[0]
            assert await drained
        async with serving(llama.directory, skip_tokenizer_init=True) as service:
            stream = await service.submit([5], LONG)
            assert not await service.drain(0.01)
            with pytest.raises(RequestError, match="shutting down"):
                await stream.output()

    asyncio.run(run())


def test_a_prompt_that_is_read_for_ever_is_told_at_the_end(demo_model: Path) -> None:
    """As by a chat template that loops: the end waits for it no longer than it is to."""
    ends, reads = threading.Event(), threading.Event()

    def loop(tokenizer: Any) -> None:
        reads.set()
        ends.wait()

    async def run() -> None:
        async with serving(demo_model) as service:
            reading = asyncio.create_task(service.with_tokenizer(loop))
            await asyncio.to_thread(reads.wait)
            await service.drain(0.0)
            assert not service.reads_no_more(0.1)
            ends.set()
            await reading
            assert service.reads_no_more(60)

    asyncio.run(run())


def test_death_is_told_to_all(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it serves, and while nothing runs: the heartbeat finds it."""

    async def run(is_idle: bool) -> None:
        async with serving(llama.directory, skip_tokenizer_init=True) as service:
            stream = None if is_idle else await service.submit([5], LONG)
            await asyncio.sleep(0.05)
            rpool = service._engine._rpool

            def gone(*_: object, **__: object) -> None:
                raise PeerLost("pulled")

            for worker in (0, 1):
                monkeypatch.setattr(rpool._workers[worker].channel, "send", gone)
                if is_idle and worker == 0:
                    await asyncio.sleep(1.2)
                    assert service.health().state == "degraded" and len(service.health().lost) == 1
            if stream:
                with pytest.raises(RWorkerError, match="pulled"):
                    await stream.output()
            await asyncio.sleep(1.2)
            assert service.health().state == "dead" and "pulled" in (service.health().reason or "")
            with pytest.raises(RWorkerError, match="pulled"):
                await service.submit([5], GREEDY)

    for is_idle in (False, True):
        asyncio.run(run(is_idle))


@pytest.mark.parametrize("num_r_workers", [1, 2])
def test_a_heartbeat_that_is_late(num_r_workers: int, llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only R-worker is waited for, since a busy machine is no loss; where another serves, it counts as lost."""
    timers: list[threading.Timer] = []
    with LLM(llama.directory, num_r_workers=num_r_workers, skip_tokenizer_init=True) as llm:
        rpool = llm._engine._rpool
        send = rpool._workers[0].channel.send

        def late(message: Any, timeout_s: float) -> None:
            def now() -> None:
                with suppress(TransportError):
                    send(message, timeout_s=timeout_s)

            timers.append(threading.Timer(0.1 if num_r_workers == 1 else 60, now))
            timers[-1].start()

        monkeypatch.setattr(rpool._workers[0].channel, "send", late)
        llm._engine.heartbeat(0.001)
        assert rpool.totals.num_lost == num_r_workers - 1
        monkeypatch.undo()
        for timer in timers:
            timer.cancel()
        (output,) = llm.generate([llama.prompts[0]], GREEDY)
        assert output.outputs[0].token_ids == llama.reference[0]


def test_aborted_samples_are_counted(llama: Case) -> None:
    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True) as service:
            stream = await service.submit(llama.prompts[0], SamplingParams(n=3, max_tokens=400, ignore_eos=True))
            stream.abort()
            await idle(service)
            assert service.num_cut_short == {"abort": 3, "timeout": 0}

    asyncio.run(run())


def test_whoever_comes_as_the_engine_dies_is_told(llama: Case) -> None:
    """Its end after the last look for it, and before the inbox had the request: nobody would read that."""

    class Late(queue.SimpleQueue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            service._death = RWorkerError("R-worker 0 is gone")

    async def run() -> None:
        nonlocal service
        async with serving(llama.directory, skip_tokenizer_init=True) as service:
            read_by_the_engine, service._inbox = service._inbox, Late()
            with pytest.raises(RWorkerError, match="R-worker 0 is gone"):
                await service.submit(llama.prompts[0], GREEDY)
            service._inbox, service._death, service._num_inside = read_by_the_engine, None, 0

    service: Any = None
    asyncio.run(run())


def test_the_only_r_worker_comes_back(llama: Case) -> None:
    """Killed, while it serves: the service says so, takes requests, lets them go, and goes on with the same tokens."""

    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True, num_r_workers=1, transport="shm") as service:
            expected = (await (await service.submit([5], LONG)).output()).outputs[0].token_ids
            stream = await service.submit([5], LONG, stream=True)
            async for _ in deltas_of([stream]):
                break
            (worker,) = [p for p in psutil.Process().children() if "cpu_attention" in p.cmdline()]
            worker.kill()
            while not service.health().lost:
                await asyncio.sleep(0.01)
            assert service.health().state == "degraded"
            unwanted, late = await service.submit([6], LONG), await service.submit([7], GREEDY)
            unwanted.abort()
            assert (await stream.output()).outputs[0].token_ids == expected
            assert (await late.output()).outputs[0].token_ids
            assert service.health().state == "ready"
            await idle(service)
            assert service.num_cut_short["abort"] == 1

    asyncio.run(run())


def test_what_was_kept_outlives_the_only_request_that_is_aborted(llama: Case) -> None:
    """Its step goes on to its end, and nothing else of it is left; the next request begins with what others left."""

    async def run() -> None:
        async with serving(llama.directory, skip_tokenizer_init=True, block_tokens=16) as service:
            prompt = max(llama.prompts, key=len)
            await (await service.submit(prompt, GREEDY)).output()
            left = await service.submit(prompt[::-1], LONG, stream=True)
            async for _ in deltas_of([left]):
                break
            left.abort()
            await idle(service)
            again = await (await service.submit(prompt, GREEDY)).output()
            assert again.num_cached_tokens == len(prompt) - 1

    asyncio.run(run())
