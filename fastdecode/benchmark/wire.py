"""What the wire costs: round trips of Attend and Attended through each transport, with nobody who computes between.

python -m fastdecode.benchmark.wire ADDRESS [KEY_FILE]        the other end: answers every Attend with its own q
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from fastdecode.errors import ConfigError
from transport import (
    DTYPES,
    Attend,
    Attended,
    Channel,
    Goodbye,
    Listener,
    TransportError,
    connect,
    keep_freed_memory,
    listen,
    make_keys,
    read_keys,
    write_keys,
)

WITH_KEYS = "tcp+keys"
SCHEMES = ("inproc", "shm", "ipc", "tcp", WITH_KEYS)

_TIMEOUT_S = 30.0
_SECONDS_EACH = 0.5  # of measuring a size
_LISTENING = "listening on "


@dataclass(frozen=True)
class RoundTrip:
    """Medians of one layer's way there and back."""

    scheme: str
    num_tokens: int
    num_bytes: int  # q, k, v there and o back
    median_s: float
    p99_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.median_s


def measure_wire(
    scheme: str, tokens: Sequence[int], *, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> Iterator[RoundTrip]:
    """One after another for as many tokens each.  Raises ConfigError if the other end fails."""
    keep_freed_memory()
    with _echo(scheme) as channel:
        for num_tokens in tokens:
            q = np.ones((num_tokens, q_heads, head_dim), DTYPES[dtype])
            kv = np.ones((num_tokens, kv_heads, head_dim), DTYPES[dtype])
            attend = Attend(step=0, micro_batch=0, layer=0, q=q, k=kv, v=kv)
            taken: list[float] = []
            warm_up = 5
            while sum(taken) < _SECONDS_EACH or len(taken) < 20 + warm_up:
                began = time.perf_counter()
                channel.send(attend, timeout_s=_TIMEOUT_S)
                answer = channel.recv(timeout_s=_TIMEOUT_S)
                taken.append(time.perf_counter() - began)
            if not isinstance(answer, Attended) or len(answer.o) != num_tokens:
                raise ConfigError(f"the other end answered {type(answer).__name__}")
            measured = sorted(taken[warm_up:])
            yield RoundTrip(
                scheme,
                num_tokens,
                2 * q.nbytes + 2 * kv.nbytes,
                statistics.median(measured),
                measured[int(0.99 * len(measured))],
            )


@contextmanager
def _echo(scheme: str) -> Iterator[Channel]:
    """A channel to an echo: a thread for inproc, a process of its own otherwise."""
    keys = make_keys() if scheme == WITH_KEYS else None
    with tempfile.TemporaryDirectory(prefix="fastdecode-") as directory:
        if scheme == "inproc":
            listener = listen(f"inproc://echo-{os.getpid()}-{threading.get_ident()}")
            thread = threading.Thread(target=_serve_echo, args=(listener,), daemon=True)
            thread.start()
            address, end = listener.address, listener.close
        else:
            command = [sys.executable, "-m", __name__]
            command += ["tcp://127.0.0.1:0"] if scheme in ("tcp", WITH_KEYS) else [f"{scheme}://{directory}/echo"]
            if keys:
                write_keys(key_file := f"{directory}/key", keys)
                command.append(key_file)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            address, end = process.stdout.readline().strip().removeprefix(_LISTENING), process.kill
        try:
            with connect(address, keys) as channel:
                yield channel
                channel.send(Goodbye(), timeout_s=1.0)
        except TransportError as error:
            raise ConfigError(f"{scheme}: {error}") from error
        finally:
            end()
            if scheme == "inproc":
                thread.join(5)
            else:
                process.wait(5)
                process.stdout.close()  # type: ignore[union-attr]


def _serve_echo(listener: Listener) -> None:
    """Until a Goodbye, or until nobody has written for long."""
    while not isinstance(message := (delivery := listener.recv(timeout_s=_TIMEOUT_S)).envelope.message, Goodbye):
        if isinstance(message, Attend):
            answer = Attended(message.step, message.micro_batch, message.layer, message.q)
            listener.send(delivery.peer, delivery.envelope.session, answer, timeout_s=_TIMEOUT_S)


def main() -> None:
    keep_freed_memory()
    keys = read_keys(sys.argv[2]) if len(sys.argv) > 2 else None
    with listen(sys.argv[1], keys) as listener:
        print(_LISTENING + listener.address, flush=True)
        with suppress(TransportError):  # the other side has ended, and says why if that was not wanted
            _serve_echo(listener)


if __name__ == "__main__":
    main()
