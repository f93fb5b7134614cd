"""The engine in a thread of its own, for callers that live in an event loop.

    event loop                       the engine's thread
    ──────────────────────────       ─────────────────────────────────────────────
    submit ─► inbox ──────────────►  between two steps: add and abort what came
    Stream ◄── call_soon_threadsafe  after each step: what it brought, all at once
    abort  ─► inbox ──────────────►  nothing to do: a heartbeat to every R-worker
    reset  ─► inbox ──────────────►  between two steps, too: no KV of what has ended is found any more

Nothing but the inbox, the event loop's queue and the engine's `Standing`, which is never changed, is shared.  Prompts
are tokenised in threads beside both.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from fastdecode.api.outputs import Delta, RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.engine.opening import OpenEngine
from fastdecode.errors import FastDecodeError, RequestError, RWorkerError
from fastdecode.observe.totals import Standing
from fastdecode.server.stream import Event, Stream
from fastdecode.text.prompts import Prompt, ReadPrompt, read_prompt
from fastdecode.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["loading", "ready", "degraded", "draining", "dead"]

_HEARTBEAT_S = 0.5  # between two, while nothing runs
_ANSWER_S = 1.5  # what an R-worker with nothing to do has for its answer; health is to be true within two seconds
_TOKENIZER_THREADS = 2


@dataclass(frozen=True)
class Health:
    state: State
    lost: list[str] = field(default_factory=list)  # R-workers that do not serve, by name
    reason: str | None = None  # of a death


@dataclass(frozen=True)
class _Submission:
    stream: Stream
    prompt: ReadPrompt
    params: SamplingParams
    priority: int
    timeout_s: float | None
    deltas_wanted: bool


@dataclass(frozen=True, eq=False)
class _Reset:
    """Of the prefix cache; who asked for it waits."""

    done: Future[None] = field(default_factory=Future)

    def settle(self, error: FastDecodeError | None = None) -> None:
        if not self.done.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


class Service:
    def __init__(
        self,
        opened: OpenEngine,
        *,
        max_queue: int,
        on_death: Callable[[BaseException], None] = lambda error: None,
        on_finished: Callable[[RequestOutput], None] = lambda output: None,
    ) -> None:
        """max_queue: sequences (a request has n of them) that may wait; a request that finds so many is refused.
        Who can start in the very next step does not wait, so an idle engine takes a burst of its seats and the queue.

        on_death: called in the engine's thread when it ends by an error; on_finished: there, of every request.
        """
        self.opened = opened
        self._engine, self._max_queue = opened.engine, max_queue
        self._on_death, self._on_finished = on_death, on_finished
        self._inbox: queue.SimpleQueue[_Submission | Stream | _Reset | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tokenizers = ThreadPoolExecutor(_TOKENIZER_THREADS, "tokenizer")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._live: dict[str, _Live] = {}  # the engine's thread alone
        self._pending: list[tuple[Stream, Event]] = []  # for the event loop
        self._num_inside = 0  # sequences submitted and not over; the event loop alone
        self.num_refused = 0  # requests that found the queue full; the event loop alone writes it
        self.num_cut_short = {
            "abort": 0,
            "timeout": 0,
        }  # samples that ended before their end; the engine's thread alone
        self._death: FastDecodeError | None = None
        self._is_draining = self._is_stopping = False

    def start(self) -> None:
        """In the event loop that will call the rest."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def standing(self) -> Standing:
        return self._engine.standing

    @property
    def num_waiting(self) -> int:
        return self.standing.num_waiting

    @property
    def num_running(self) -> int:
        return self.standing.num_running

    def health(self) -> Health:
        if self._death:
            return Health("dead", self._engine.lost_workers, str(self._death))
        lost = self._engine.lost_workers
        return Health("draining" if self._is_draining else "degraded" if lost else "ready", lost)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> Stream:
        """One of `submit_all`."""
        (made,) = await self.submit_all([prompt], params, priority=priority, timeout_s=timeout_s, stream=stream)
        return made

    async def submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        places: Sequence[str] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> list[Stream]:
        """A stream for each, or none at all: each is looked at before the first is computed.

        places: what errors call the prompts.  stream: deltas are wanted.  Raises RequestError (a prompt by its place,
        or ``queue_full``, or ``draining``).
        """
        self._check_open()
        if self._num_inside + (len(prompts) - 1) * params.n >= self._engine.num_places + self._max_queue:
            self.num_refused += 1
            raise RequestError("queue_full", f"{self._max_queue} sequences wait already; try again later")
        self._num_inside += params.n * len(prompts)
        try:
            read = []
            for index, prompt in enumerate(prompts):  # one after the other: others want a thread, too
                try:
                    read.append(
                        await asyncio.get_running_loop().run_in_executor(self._tokenizers, self._read, prompt, params)
                    )
                except RequestError as error:
                    raise _placed(error, places[index] if places else None, len(prompts)) from error
            self._check_open()
        except BaseException:
            self._num_inside -= params.n * len(prompts)
            raise
        made = [Stream(each.token_ids, params.n, self._inbox.put) for each in read]
        for each, prompt_read in zip(made, read, strict=True):
            self._inbox.put(_Submission(each, prompt_read, params, priority, timeout_s, stream))
        if self._death:  # since the last look, and perhaps since the inbox was read for the last time
            raise self._death
        return made

    def _read(self, prompt: Prompt, params: SamplingParams) -> ReadPrompt:
        """In a tokenizer's thread.  Raises RequestError for what the engine would refuse, too."""
        read = read_prompt(prompt, self.opened.tokenizer, self.opened.max_model_len)
        self._engine.check(read.token_ids, params)
        return read

    async def with_tokenizer(self, action: Callable[[Tokenizer], T]) -> T:
        """`action` in one of the tokenizer's threads.  Raises what it raises, and RequestError without a tokenizer."""
        self._check_open()
        tokenizer = self.opened.tokenizer
        if tokenizer is None:
            raise RequestError("invalid_request", "this needs the tokenizer that skip_tokenizer_init left out")
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, action, tokenizer)

    async def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`; after the step at hand.  Raises RWorkerError (the engine), RequestError."""
        self._check_open()
        reset = _Reset()
        self._inbox.put(reset)
        if self._death:  # since the last look, and perhaps since the inbox was read for the last time
            raise self._death
        await asyncio.wrap_future(reset.done)

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and lets the rest end.  Whether all did; what did not is aborted."""
        self._is_draining = True
        deadline = time.monotonic() + timeout_s
        while self._num_inside and not self._death and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        is_empty = not self._num_inside
        self._is_stopping = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._tokenizers.shutdown(wait=False, cancel_futures=True)
        return is_empty

    def reads_no_more(self, timeout_s: float) -> bool:
        """After `drain`: no thread is busy with a prompt, or none is within `timeout_s`; a chat template may loop."""
        waiting = threading.Thread(target=self._tokenizers.shutdown, name="last prompts", daemon=True)
        waiting.start()
        waiting.join(timeout_s)
        return not waiting.is_alive()

    def _check_open(self) -> None:
        if self._death:
            raise self._death
        if self._is_draining:
            raise RequestError("draining", "this server is shutting down; ask another one")

    # In the engine's thread from here on.

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if self._engine.has_work:
                    self._read_inbox(0.0)
                    for output in self._engine.step():
                        self._finish(output)
                    self._expire()
                else:
                    if self._read_inbox(_HEARTBEAT_S) == 0:
                        self._engine.heartbeat(_ANSWER_S)
                self._tell()
            self._end_all(RequestError("cancelled", "the server is shutting down"))
        except BaseException as error:
            logger.exception("the engine has ended")
            self._death = _as_death(error)
            self._end_all(self._death)
            self._on_death(error)

    def _read_inbox(self, wait_s: float) -> int:
        """Whatever has come; waits for the first one."""
        num_read = 0
        while True:
            try:
                item = self._inbox.get(timeout=wait_s) if wait_s and not num_read else self._inbox.get_nowait()
            except queue.Empty:
                return num_read
            num_read += 1
            if isinstance(item, _Submission):
                self._add(item)
            elif isinstance(item, Stream):
                self._abort(item)
            elif isinstance(item, _Reset):
                self._reset(item)

    def _add(self, item: _Submission) -> None:
        request_id = item.stream.request_id = self._engine.next_request_id()
        live = _Live(item.stream, time.monotonic(), item.timeout_s)

        def on_delta(delta: Delta) -> None:
            self._pending.append((item.stream, delta))

        try:
            self._engine.add_request(
                request_id,
                item.prompt.token_ids,
                item.params,
                prompt=item.prompt.text,
                priority=item.priority,
                on_delta=on_delta if item.deltas_wanted else None,
                cache_salt=item.prompt.cache_salt,
            )
        except RequestError as error:
            self._over(item.stream, error)
            return
        self._live[request_id] = live

    def _abort(self, stream: Stream) -> None:
        if self._live.pop(stream.request_id, None):
            self._engine.abort([stream.request_id])
            self.num_cut_short["abort"] += stream.num_samples
            self._over(stream, RequestError("cancelled", "the client has gone"))

    def _reset(self, reset: _Reset) -> None:
        try:
            self._engine.reset_prefix_cache()
        except BaseException as error:
            reset.settle(_as_death(error))
            raise
        reset.settle()

    def _finish(self, output: RequestOutput) -> None:
        live = self._live.pop(output.request_id, None)
        if live:
            self._on_finished(output)
            self._over(live.stream, output)

    def _expire(self) -> None:
        now = time.monotonic()
        for request_id, live in list(self._live.items()):
            if live.timeout_s is not None and now - live.since > live.timeout_s:
                del self._live[request_id]
                self._engine.abort([request_id])
                self.num_cut_short["timeout"] += live.stream.num_samples
                self._over(live.stream, RequestError("timeout", f"not finished within {live.timeout_s:g} s"))

    def _end_all(self, error: FastDecodeError) -> None:
        while self._live:
            _, live = self._live.popitem()
            self._over(live.stream, error)
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, _Submission):
                self._over(item.stream, error)
            elif isinstance(item, _Reset):
                item.settle(error)
        self._tell()

    def _over(self, stream: Stream, event: RequestOutput | FastDecodeError) -> None:
        self._pending.append((stream, event))

    def _tell(self) -> None:
        """One hop to the event loop for all that a step brought."""
        if self._pending and self._loop:
            pending, self._pending = self._pending, []
            try:
                self._loop.call_soon_threadsafe(self._deliver, pending)
            except RuntimeError:  # the event loop has ended; nobody waits any more
                logger.debug("%d events for nobody", len(pending))

    def _deliver(self, events: list[tuple[Stream, Event]]) -> None:
        """In the event loop."""
        for stream, event in events:
            self._num_inside -= 0 if isinstance(event, Delta) else stream.num_samples
            stream.put(event)


def _as_death(error: BaseException) -> RWorkerError:
    return error if isinstance(error, RWorkerError) else RWorkerError(f"the engine failed: {error!r}")


def _placed(error: RequestError, place: str | None, num_prompts: int) -> RequestError:
    """Which of several it is, in words too; what names a field already keeps it."""
    if place is None or error.param:
        return error
    told = f"{place}: {error}" if num_prompts > 1 else str(error)
    return RequestError(error.code, told, place, numbers=error.numbers)


@dataclass(frozen=True)
class _Live:
    """A request that the engine has.  Seconds of the monotonic clock."""

    stream: Stream
    since: float
    timeout_s: float | None
