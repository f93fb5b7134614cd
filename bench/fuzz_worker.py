"""A live R-worker process under fire, over its own wire: it may answer with a Failure, and has to go on serving.

After every so many frames an S-worker's session runs over a channel of its own, and each o has to be that of an
R-worker that nobody has disturbed.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.fuzz_messages import Maker
from bench.fuzz_peers import HANG_S, Peer, make_peer
from bench.fuzz_session import KV_MIB, Untouched, equal, session
from bench.fuzz_talk import Talk
from transport import (
    Codec,
    Failure,
    Goodbye,
    Message,
    Ping,
    Pong,
    connect,
)

ROOT = Path(__file__).parents[1]
# What an R-worker may take beside its KV budget: kernels of the strange layers, messages on their way, block tables.
STAGING_MIB = 384
_MORE_FILES = 12  # pyzmq opens a context of its own for the first large answer; a peer may not have been missed yet
_BATCH = 400
_CHECK_EVERY = 50  # batches
_ASK_AGAIN_S = 10.0


class Broken(Exception):
    """What an R-worker must not do."""


class Victim:
    def __init__(self, transport: str, directory: str) -> None:
        address = "tcp://127.0.0.1:0" if transport == "tcp" else f"{transport}://{directory}/worker"
        self._log = open(f"{directory}/log", "w+", errors="replace")  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cpu_attention", "--bind", address, "--threads", "1", "--log-level", "error",
             "--kv-cache-memory", f"{KV_MIB}MiB", "--exit-with-parent"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        assert self._process.stdout
        self.address = self._process.stdout.readline().removeprefix("listening on ").strip()
        self._expected = list(session(Untouched()))
        self.check_serves()
        self._start_mib, self._start_files = self._peak_mib(), self._num_files()

    @property
    def grown_mib(self) -> float:
        """Peak memory over that of a worker with one session behind it."""
        return self._peak_mib() - self._start_mib

    def check(self) -> None:
        """Raises Broken if it died, logged an error of its own, or holds more than it should."""
        if self._process.poll() is not None:
            raise Broken(f"ended with {self._process.returncode}: {self.log()[-2000:]}")
        if "Traceback" in self.log():
            raise Broken(self.log()[-2000:])
        if self.grown_mib > KV_MIB + STAGING_MIB:
            raise Broken(f"its memory grew by {self.grown_mib:.0f} MiB")

    def check_serves(self) -> None:
        """A session like any S-worker's.  Raises Broken."""
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                with connect(self.address) as channel:
                    answers = list(session(channel))
                    channel.send(Goodbye(), timeout_s=10)
                    channel.send(Ping(1), timeout_s=10)  # what was sent before has arrived when this is answered
                    channel.recv(timeout_s=10)
            except Exception as error:
                raise Broken(f"serves no more: {type(error).__name__}: {error}; {self.log()[-2000:]}") from error
            if (
                answers
                and isinstance(answers[0], Failure)
                and answers[0].kind == "Busy"
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)  # a peer that left has not been missed yet
                continue
            break
        if len(answers) != len(self._expected) or not all(map(equal, answers, self._expected)):
            raise Broken(f"other answers than an R-worker that was left alone: {str(answers)[:500]}")

    def check_files(self) -> None:
        """Raises Broken if it keeps what its peers sent and left."""
        deadline = time.monotonic() + 10
        while self._num_files() > self._start_files + _MORE_FILES and time.monotonic() < deadline:
            self.check_serves()
        if self._num_files() > self._start_files + _MORE_FILES:
            raise Broken(f"{self._num_files()} files are open, {self._start_files} at the start")

    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            pipe.close()  # type: ignore[union-attr]

    def _peak_mib(self) -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self._process.pid}/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")

    def _num_files(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))


def attack(transport: str, num_frames: int, seed: int, first_batch: int = 0, num_strange: int = 6) -> dict[str, Any]:
    """A record of what came of it; `failure` says how to repeat it.

    num_strange: about how many sessions there are with layers that have to be compiled first.
    """
    with tempfile.TemporaryDirectory() as directory:
        victim, done, answers, batch = Victim(transport, directory), 0, Counter[str](), first_batch
        began = time.perf_counter()
        record: dict[str, Any] = {}
        try:
            for batch in itertools.count(first_batch):
                size = min(_BATCH, num_frames - done)
                strange = num_strange * _BATCH / max(num_frames, 1) / 12  # about twelve sessions begin in a batch
                _batch(victim, Maker((transport, seed, batch)), size, answers, strange)
                done += size
                victim.check()
                if batch % _CHECK_EVERY == _CHECK_EVERY - 1 or done >= num_frames:
                    victim.check_serves()
                if done >= num_frames:
                    break
            victim.check_files()
            victim.check()
        except Broken as error:
            record["failure"] = f"{error}; --seed {seed} --target {transport} --first-batch {batch}"
        finally:
            record |= {
                "frames": done, "seconds": time.perf_counter() - began, "answers": dict(answers),
                "memory_over_start_mib": round(victim.grown_mib, 1) if victim._process.poll() is None else None,
            }  # fmt: skip
            victim.close()
        return record


def _batch(victim: Victim, maker: Maker, size: int, answers: Counter[str], strange: float) -> None:
    """Two peers that come, write and go, side by side; sometimes without waiting for what they were told."""
    peers = [make_peer(victim.address) for _ in range(2)]
    talks = [Talk(maker, strange) for _ in peers]
    try:
        for _ in range(size):
            which = maker.random.randrange(2)
            frames = talks[which].next()
            if maker.random.random() < 0.05:
                peers[which].send_raw(maker, frames)
            else:
                peers[which].send(frames)
            _count(peers[which], answers)
        if maker.random.random() < 0.9:
            for peer in peers:
                _await_pong(peer, maker, answers)
    except (OSError, EOFError) as error:
        raise Broken(f"{type(error).__name__}: {error}; {victim.log()[-2000:]}") from error
    finally:
        for peer in peers:
            peer.close()


def _await_pong(peer: Peer, maker: Maker, answers: Counter[str]) -> None:
    """Asks again now and then: on a busy machine libzmq hangs up on peers with late heartbeats, and connects anew."""
    ping = Ping(maker.random.getrandbits(62) | 1 << 62)
    began, asked = time.monotonic(), float("-inf")
    while Pong(ping.token) not in _count(peer, answers):
        now = time.monotonic()
        if now > began + HANG_S:
            raise TimeoutError(f"no answer to a ping in {HANG_S:.0f} s")
        if now > asked + _ASK_AGAIN_S:
            peer.send(maker.frames(ping, session=0))
            asked = now
        peer.wait(1.0)


def _count(peer: Peer, answers: Counter[str]) -> list[Message]:
    """What was answered.  Raises Broken for an error that is the R-worker's own."""
    messages = [Codec().decode(frames).message for frames in peer.replies()]
    for message in messages:
        answers[f"Failure: {message.kind}" if isinstance(message, Failure) else type(message).__name__] += 1
        if isinstance(message, Failure) and message.kind == "InternalError":
            raise Broken(message.text)
    return messages
