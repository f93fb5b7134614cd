"""What others on the network can do to an R-worker: be refused, be told of once, and disturb nobody."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import zmq
from conftest import Case
from zmq.utils.monitor import recv_monitor_message

from cpu_attention import LISTENING
from fastdecode import LLM, SamplingParams
from transport import (
    Admit,
    Attend,
    Channel,
    Codec,
    Failure,
    Goodbye,
    Hello,
    Keys,
    LayerSpec,
    Ping,
    Pong,
    ProtocolError,
    Refusals,
    connect,
    listen,
    make_keys,
    read_keys,
    write_keys,
)
from transport.refusals import MAX_REFUSALS

ROOT = Path(__file__).parents[1]
FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00%s" + bytes(32)  # of ZMTP 3.0


@dataclass
class Worker:
    process: subprocess.Popen[str]
    address: str
    log: Path
    key_file: Path | None

    @property
    def keys(self) -> Keys | None:
        return read_keys(self.key_file) if self.key_file else None

    def refusals(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "told once" in line]


@pytest.fixture(params=["keys", "open"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    key_file = tmp_path / "job.key" if request.param == "keys" else None
    if key_file:
        write_keys(key_file, make_keys())
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cpu_attention", "--bind", "tcp://127.0.0.1:0", "--kv-cache-memory", "64MiB",
             *(["--key-file", str(key_file)] if key_file else [])],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdout
    address = process.stdout.readline().strip().removeprefix(LISTENING)
    yield Worker(process, address, tmp_path / "log", key_file)
    process.terminate()
    assert process.wait(10) == 0
    process.stdout.close()


def raw(worker: Worker, data: bytes) -> None:
    """Bytes over TCP, until the other end hangs up or says nothing more."""
    with socket.create_connection((urlsplit(worker.address).hostname, urlsplit(worker.address).port)) as connection:
        connection.sendall(data)
        connection.settimeout(0.2)
        try:
            while connection.recv(1 << 16):
                pass
        except OSError:
            pass


def dealer(worker: Worker, frames: list[bytes], **options: object) -> None:
    """A ZeroMQ peer of one's own making, until it is refused or answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger, peer.reconnect_ivl = 0, 20
        for name, value in options.items():
            setattr(peer, name, value)
        with peer.get_monitor_socket(FAILURES) as monitor:
            poller = zmq.Poller()
            poller.register(monitor, zmq.POLLIN)
            poller.register(peer, zmq.POLLIN)
            peer.connect(worker.address)
            peer.send_multipart(frames)
            assert poller.poll(10_000)
            peer.disable_monitor()


def as_member(worker: Worker, action: Callable[[Channel], object]) -> None:
    """Somebody of the job, who holds the key and gets it wrong."""
    with connect(worker.address, worker.keys) as channel:
        action(channel)


def of_version(version: int) -> Callable[[Channel], None]:
    def speak(channel: Channel) -> None:
        header, *rest = channel._codec.encode(channel.session, Hello((LayerSpec(1, 1, 8, 1.0),), "float32", 16))
        channel._link.send_frames([header[:4] + version.to_bytes(2, "little") + header[6:], *rest], 5)
        with pytest.raises(ProtocolError, match=f"speaks protocol {version}, this side .*upgrade one"):
            channel.recv(timeout_s=10)

    return speak


def in_another_session(channel: Channel) -> None:
    """Over and over: told once all the same."""
    q = np.zeros((1, 4, 16), np.float32)
    for _ in range(3):
        channel.send(Attend(0, 0, 0, q, q, q), timeout_s=5)
        reply = channel.recv(timeout_s=10)
        assert isinstance(reply, Failure) and "does not know the session" in reply.text
        channel.send(Admit(np.array([1], np.int64), np.array([9], np.int32)), timeout_s=5)
    channel.send(Goodbye(), timeout_s=5)  # of a session that is not theirs


def wrong_key() -> dict[str, object]:
    keys = make_keys()
    return {"curve_serverkey": keys.public, "curve_publickey": keys.public, "curve_secretkey": keys.secret}


def right_server_key_only(worker: Worker) -> dict[str, object]:
    """Knows what a key's public half is, and not its secret."""
    own = make_keys()
    public = worker.keys.public if worker.keys else own.public
    return {"curve_serverkey": public, "curve_publickey": own.public, "curve_secretkey": own.secret}


HELLO = [*Codec().encode(7, Hello((LayerSpec(1, 1, 8, 1.0),), "float32", 16))]
NULL, CURVE = b"NULL" + bytes(16), b"CURVE" + bytes(15)
NO_ZEROMQ, NONSENSE = "does not speak ZeroMQ", "breaks ZeroMQ's protocol"
HAS_NONE = "with a key, .* has none|left"  # the peer sees it as soon as the worker does, and may be gone first
# what is done; what the log says of it behind a key, and without one
ATTACKS: dict[str, tuple[Callable[[Worker], object], str, str]] = {
    "http": (lambda w: raw(w, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 200), NO_ZEROMQ, NO_ZEROMQ),
    "noise": (lambda w: raw(w, os.urandom(4000)), "refused|left", "refused|left"),
    "nonsense": (
        lambda w: raw(w, GREETING % (CURVE if w.keys else NULL) + b"\x04\xc8" + bytes(200)), NONSENSE, NONSENSE,
    ),
    "gone again": (lambda w: raw(w, b"\xff"), "left", "left"),
    "no key": (lambda w: raw(w, GREETING % NULL), "came without a key", "left"),
    "ZeroMQ without a key": (lambda w: dealer(w, HELLO), "without a key|left", "without a checksum"),
    "a password": (lambda w: dealer(w, HELLO, plain_username=b"a", plain_password=b"b"), "without a key", HAS_NONE),
    "wrong key": (lambda w: dealer(w, HELLO, **wrong_key()), "its key is another one", HAS_NONE),
    "half a key": (lambda w: dealer(w, HELLO, **right_server_key_only(w)), "its key is another one", HAS_NONE),
    "protocol 1": (lambda w: as_member(w, of_version(1)), "speaks protocol 1", "speaks protocol 1"),
    "protocol 2": (lambda w: as_member(w, of_version(2)), "speaks protocol 2", "speaks protocol 2"),
    "another session": (
        lambda w: as_member(w, in_another_session), "refused Attend: .*session", "refused Attend: .*session",
    ),
}  # fmt: skip


def test_nobody_disturbs_a_session(worker: Worker, llama: Case) -> None:
    """Each attack three times while a session runs: its tokens stay right, and the log has a line for each."""
    params = SamplingParams(temperature=0, max_tokens=32)
    options = {"skip_tokenizer_init": True, "key_file": worker.key_file}
    with LLM(llama.directory, r_worker_addresses=[worker.address], **options) as llm:  # type: ignore[arg-type]
        over, wrong, num_runs = threading.Event(), [], 0

        def run() -> None:
            nonlocal num_runs
            while not over.is_set():
                outputs = llm.generate(llama.prompts, params, use_tqdm=False)
                wrong.extend(o.request_id for o, r in zip(outputs, llama.reference, strict=True)
                             if o.outputs[0].token_ids != r)  # fmt: skip
                num_runs += 1

        session = threading.Thread(target=run)
        session.start()
        try:
            for name, (attack, behind_a_key, without) in ATTACKS.items():
                seen = set(worker.refusals())
                for _ in range(3):
                    attack(worker)
                expected = behind_a_key if worker.key_file else without
                assert wait_for(partial(any_match, worker, expected)), (name, worker.log.read_text())
                new = [line for line in worker.refusals() if line not in seen]
                assert len(new) <= 4, (name, new)  # more than one only where chance chooses between causes
        finally:
            before = num_runs
            assert wait_for(lambda: num_runs > before + 1), "the session does not go on"
            over.set()
            session.join(30)
    lines = worker.refusals()
    assert not wrong and num_runs > 2
    assert len(lines) == len(set(lines))
    assert all("127.0.0.1: " in line for line in lines if "refused Attend" in line or "refused a frame" in line)


def any_match(worker: Worker, pattern: str) -> bool:
    return any(re.search(pattern, line) for line in worker.refusals())


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return condition()


@pytest.mark.parametrize("worker", ["keys"], indirect=True)
@pytest.mark.parametrize("who", [wrong_key, right_server_key_only])
def test_only_the_whole_key_opens(who: Callable[..., dict[str, object]], worker: Worker) -> None:
    """Not even the public half of the right one; and what was written at the door is not read later."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        for name, value in (who(worker) if who is right_server_key_only else who()).items():
            setattr(peer, name, value)
        with peer.get_monitor_socket(FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            peer.connect(worker.address)
            peer.send_multipart(HELLO)
            assert monitor.poll(10_000)
            event = recv_monitor_message(monitor)["event"]
            assert event == (
                zmq.EVENT_HANDSHAKE_FAILED_AUTH
                if who is right_server_key_only
                else zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            )
            assert not peer.poll(300)
            peer.disable_monitor()
    assert wait_for(partial(any_match, worker, "its key is another one"))
    assert "session opened" not in worker.log.read_text()


@pytest.mark.parametrize("worker", ["keys"], indirect=True)
def test_two_thousand_attempts(worker: Worker) -> None:
    """A peer with a wrong key that never gives up: neither memory nor log grow with it, and the door stays open."""
    me = psutil.Process(worker.process.pid)

    def attempt(times: int) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.linger, peer.reconnect_ivl = 0, 1
            for name, value in wrong_key().items():
                setattr(peer, name, value)
            with peer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL) as monitor:
                peer.connect(worker.address)
                for _ in range(times):
                    assert monitor.poll(5000)
                    monitor.recv_multipart()
                peer.disable_monitor()

    attempt(300)
    rss, num_fds = me.memory_info().rss, me.num_fds()
    attempt(2000)
    with connect(worker.address, worker.keys) as good:
        good.send(Ping(1), timeout_s=5)
        assert good.recv(timeout_s=5) == Pong(1)
    grown = me.memory_info().rss - rss
    assert grown < 2 << 20, grown
    assert wait_for(lambda: me.num_fds() <= num_fds)
    # The other key, and the end that was too soon to say which; each with an address, and where it had gone already.
    assert 1 <= len(worker.refusals()) <= 4 and worker.log.stat().st_size < 2000


def test_silence_is_sent_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever connects and says nothing, or no more than a greeting, holds a file descriptor for a while only."""
    monkeypatch.setattr("transport.zeromq.HANDSHAKE_TIMEOUT_MS", 300)
    keys = make_keys()
    with listen("tcp://127.0.0.1:0", keys) as listener:
        place = urlsplit(listener.address)
        for greeting in (b"", GREETING % (b"CURVE" + bytes(15))):
            with socket.create_connection((place.hostname, place.port)) as silent:
                silent.sendall(greeting)
                silent.settimeout(10)
                while silent.recv(1000):  # up to its end, and not to our timeout
                    pass
        with connect(listener.address, keys) as good:
            good.send(Ping(1), timeout_s=5)
            assert listener.recv(timeout_s=5).envelope.message == Ping(1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["127.0.0.1: left, or was sent away for its silence, before it had said who it is (told once)"]


def test_refusals_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals(logging.getLogger("test"))
    for i in range(1000):
        refusals.tell(f"no. {i}\nforged: line {'x' * 10_000}", f"10.0.0.{i % 3}")
    assert len(caplog.records) == MAX_REFUSALS + 1 and "further ones are not" in caplog.text
    assert all("\n" not in record.getMessage() and len(record.getMessage()) < 400 for record in caplog.records)
    assert len(refusals._told) == MAX_REFUSALS + 1


@pytest.mark.parametrize("keys", [None, make_keys()], ids=["open", "with a key"])
def test_an_event_that_is_not_understood_shuts_nobody_out(
    keys: Keys | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever comes after it is still let in."""

    def fails(*_: object) -> None:
        raise ValueError("no such event")

    monkeypatch.setattr("transport.doorkeeper.Doorkeeper._note", fails)
    listener = listen("tcp://127.0.0.1:0", keys)
    try:
        for token in range(2):
            with connect(listener.address, keys) as channel:
                channel.send(Ping(token), timeout_s=20)
                delivery = listener.recv(timeout_s=20)
                assert delivery.envelope.message == Ping(token)
                listener.send(delivery.peer, delivery.envelope.session, Pong(token), timeout_s=20)
                assert channel.recv(timeout_s=20) == Pong(token)
    finally:
        listener.close()
    assert "was not understood" in caplog.text
