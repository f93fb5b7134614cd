"""The life of a server's process.

bind ─► HTTP answers 503 ─► load, in a thread ─► serve ─── SIGTERM, SIGINT, SIGHUP ──► drain ─► close ─► 0
                                 │                 │                                     └─ twice: at once
                                 └─ it cannot: 2   └─ the engine died: 1
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

from fastdecode.engine.config import EngineConfig
from fastdecode.engine.opening import OpenEngine, open_engine
from fastdecode.errors import FastDecodeError
from fastdecode.holders.directory import remove_own
from fastdecode.server.activity import Activity
from fastdecode.server.app import create_app
from fastdecode.server.connection import HTTPServer, bind
from fastdecode.server.dashboard import dashboard_router
from fastdecode.server.history import History
from fastdecode.server.life import Life
from fastdecode.server.metrics import Metrics, metrics_router
from fastdecode.server.options import ServerOptions
from fastdecode.server.service import Service
from fastdecode.signals import taken_over

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LAST_PROMPTS_S = 2.0
_CLOSE_S = 15.0  # for the engine's thread and R-workers to end, once nobody waits for them


def run_server(config: EngineConfig, options: ServerOptions) -> int:
    """Exit code: 0 after SIGTERM, SIGINT or SIGHUP, 1 if the engine died.  To be called in the main thread.

    Raises ConfigError, ModelError, RWorkerError if it cannot start.
    """
    with taken_over() as numbers:
        return asyncio.run(_run(config, options, numbers))


async def _run(config: EngineConfig, options: ServerOptions, numbers: Iterable[int]) -> int:
    listener = bind(options.host, options.port)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    stop_asked, died = _on_signals(numbers), asyncio.Event()
    names = options.served_model_name
    life, activity, metrics, history = Life(config.model, names), Activity(), Metrics(names[0]), History(names[0])
    http = HTTPServer(create_app(life, options, (metrics_router(metrics), dashboard_router(history))), options)
    serving = asyncio.create_task(http.serve([listener]))
    try:
        _say(f"loading {config.model}; {url} answers 503 meanwhile")
        on_step = _each((activity.on_step, metrics.on_step, history.on_step))
        opened = await _load(lambda: open_engine(config, on_step=on_step), stop_asked)
        loop = asyncio.get_running_loop()

        def on_death(error: BaseException) -> None:
            loop.call_soon_threadsafe(died.set)

        on_finished = _each((metrics.on_finished, history.on_finished))
        service = Service(opened, max_queue=options.max_queue, on_death=on_death, on_finished=on_finished)
        service.start()
        for watcher in (activity, metrics, history):
            watcher.begin(service)
        life.begin(service)
        _say(f"listening on {url}")
        telling = asyncio.create_task(activity.tell())
        await _first(stop_asked, died)
        telling.cancel()
        await _in_time(service.drain(options.shutdown_timeout_s), options.shutdown_timeout_s + _CLOSE_S)
    finally:
        http.should_exit = True
        await serving
    health = service.health()
    if health.state == "dead":
        _say(f"error: {health.reason}")
    await _in_time(asyncio.to_thread(opened.close), _CLOSE_S)
    code = 1 if health.state == "dead" else 0
    if not service.reads_no_more(_LAST_PROMPTS_S):  # the interpreter would wait for them
        _say("error: a prompt is still being read, by a chat template that does not end perhaps; it is left")
        _leave(code)
    return code


def _each(listeners: Iterable[Callable[[T], None]]) -> Callable[[T], None]:
    told = list(listeners)

    def tell(event: T) -> None:
        for listener in told:
            listener(event)

    return tell


def _on_signals(numbers: Iterable[int]) -> asyncio.Event:
    """Set by the first; the second ends the process."""
    asked = asyncio.Event()

    def stop(number: int) -> None:
        if asked.is_set():
            _leave(128 + number)
        _say(f"{signal.Signals(number).name}: what runs may end, nothing new is taken; once more ends it at once")
        asked.set()

    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return asked


async def _load(load: Callable[[], OpenEngine], stop_asked: asyncio.Event) -> OpenEngine:
    """In a thread, so that HTTP answers; a signal meanwhile ends the process, for loading cannot be interrupted."""
    loaded: asyncio.Future[OpenEngine] = asyncio.get_running_loop().create_future()

    def run() -> None:
        try:
            result = load()
        except BaseException as error:
            # A future takes no StopIteration, and would be waited for without end.
            told = RuntimeError(f"loading ended with {error!r}") if isinstance(error, StopIteration) else error
            loaded.get_loop().call_soon_threadsafe(loaded.set_exception, told)
        else:
            loaded.get_loop().call_soon_threadsafe(loaded.set_result, result)

    threading.Thread(target=run, name="load", daemon=True).start()
    stopped = asyncio.create_task(stop_asked.wait())
    await asyncio.wait((loaded, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not loaded.done():
        _leave(0)
    stopped.cancel()
    return loaded.result()


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _in_time(ending: asyncio.Future[T] | object, seconds: float) -> None:
    """A thread that hangs is left behind, and the process with it."""
    try:
        await asyncio.wait_for(ending, seconds)  # type: ignore[arg-type]
    except TimeoutError:
        _say(f"error: the engine does not end within {seconds:g} s and is left")
        _leave(1)
    except FastDecodeError as error:
        logger.warning("while the engine was closed: %s", error)


def _leave(code: int) -> NoReturn:
    """At once: R-workers started here end when this process is no more; where their sockets are goes with it."""
    remove_own()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
