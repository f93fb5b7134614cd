"""The conformance suite over every backend, and what a lost peer looks like."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from transport import (
    AddressError,
    Attend,
    BadDelivery,
    Channel,
    Codec,
    Goodbye,
    Hello,
    LayerSpec,
    Listener,
    PeerLost,
    PeerTimeout,
    Ping,
    Pong,
    Welcome,
    connect,
    listen,
)
from transport.testing import CHECKS, check_close, serve_echo

ROOT = Path(__file__).parents[1]
SCHEMES = ("inproc", "shm", "ipc", "tcp")


def an_address(scheme: str, tmp_path: Path) -> str:
    if scheme == "tcp":
        return "tcp://127.0.0.1:0"
    return f"{scheme}://{tmp_path}/socket"


@pytest.fixture(params=SCHEMES)
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    with listen(an_address(request.param, tmp_path)) as listener:
        yield listener


@pytest.fixture
def echo(listener: Listener) -> Iterator[Channel]:
    thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
    thread.start()
    with connect(listener.address) as channel:
        yield channel
    with connect(listener.address) as last:
        last.send(Goodbye(), timeout_s=5)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("check", [c for c in CHECKS if c is not check_close], ids=lambda c: c.__name__)
def test_conformance(check: object, echo: Channel) -> None:
    check(echo)  # type: ignore[operator]


def test_conformance_close(listener: Listener) -> None:
    thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
    thread.start()
    check_close(connect(listener.address))
    thread.join(10)
    assert not thread.is_alive()


def test_conformance_mpi(mpirun: list[str]) -> None:
    out = subprocess.run(
        [*mpirun, "-n", "2", sys.executable, ROOT / "tests" / "mpi_conformance.py"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert f"{len(CHECKS)} checks passed" in out.stdout


def test_several_s_workers(listener: Listener) -> None:
    """Each gets its own answers."""
    thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
    thread.start()
    channels = [connect(listener.address) for _ in range(3)]
    for round_ in range(20):
        for i, channel in enumerate(channels):
            channel.send(Ping(100 * i + round_), timeout_s=5)
    for round_ in range(20):
        for i, channel in enumerate(channels):
            assert channel.recv(timeout_s=5) == Pong(100 * i + round_)
    channels[0].send(Goodbye(), timeout_s=5)
    thread.join(10)
    for channel in channels:
        channel.close()


def test_closed_listener_is_a_lost_peer(listener: Listener) -> None:
    channel = connect(listener.address)
    channel.send(Ping(1), timeout_s=5)
    listener.recv(timeout_s=5)
    listener.close()
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(PeerLost, match="R-worker at"):
            channel.recv(timeout_s=10)
    assert time.monotonic() - started < 3
    channel.close()


def test_listener_notices_who_left(listener: Listener) -> None:
    """Within a second, however much was written to it; many times, because it once was a matter of luck."""
    for _ in range(30):
        channel = connect(listener.address)
        channel.send(Ping(1), timeout_s=5)
        peer = listener.recv(timeout_s=5).peer
        assert listener.is_reachable(peer)
        channel.close()
        deadline = time.monotonic() + 1
        while listener.is_reachable(peer):
            assert time.monotonic() < deadline


def test_probing_does_not_disturb(listener: Listener) -> None:
    channel = connect(listener.address)
    channel.send(Ping(1), timeout_s=5)
    delivery = listener.recv(timeout_s=5)
    assert listener.is_reachable(delivery.peer)
    listener.send(delivery.peer, delivery.envelope.session, Pong(5), timeout_s=5)
    assert channel.recv(timeout_s=5) == Pong(5)
    channel.close()


@pytest.mark.parametrize("scheme", ["shm", "ipc", "tcp"])
def test_nobody_there(scheme: str, tmp_path: Path) -> None:
    address = "tcp://127.0.0.1:9" if scheme == "tcp" else f"{scheme}://{tmp_path}/nobody"
    with connect(address) as channel, pytest.raises(PeerTimeout, match="is it running"):
        channel.send(Ping(1), timeout_s=0.2)


@pytest.mark.parametrize(
    "address, hint",
    [
        ("rdma://x", "known: inproc://, shm://, ipc://, tcp://, mpi://"),
        ("nonsense", "known"),
        ("tcp://127.0.0.1", "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:99999", "65535"),
        ("ipc://" + "x" * 200, "100 bytes"),
        ("shm://", "100 bytes"),
        ("inproc://nobody", "start it first"),
    ],
)
def test_bad_addresses(address: str, hint: str) -> None:
    with pytest.raises(AddressError, match=hint):
        connect(address)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://10.1.2.3:0"])
def test_workers_listen_on_loopback_only(address: str) -> None:
    with pytest.raises(AddressError, match="loopback"):
        listen(address)


def test_address_in_use(listener: Listener) -> None:
    with pytest.raises(AddressError):
        listen(listener.address)


@pytest.mark.parametrize("scheme", ["shm", "ipc"])
def test_file_of_a_killed_worker_is_reused(scheme: str, tmp_path: Path) -> None:
    address = f"{scheme}://{tmp_path}/socket"
    code = f"import os, signal, transport; transport.listen({address!r}); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30)
    assert (tmp_path / "socket").exists()
    with listen(address) as listener, connect(address) as channel:
        channel.send(Ping(1), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(1)


def test_flood_harms_only_the_flooder(tmp_path: Path) -> None:
    """Thousands of messages from a peer that reads nothing: the worker lives, and answers the session's owner."""
    code = "import sys; from cpu_attention.process import main; sys.exit(main(sys.argv[1:]))"
    flags = ["--bind", f"ipc://{tmp_path}/w", "--kv-cache-memory", "1MiB", "--log-level", "error"]
    worker = subprocess.Popen([sys.executable, "-c", code, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout and worker.stdout.readline()
        hello = Hello((LayerSpec(1, 1, 8, 1.0),), "float32", 16)
        with connect(f"ipc://{tmp_path}/w") as owner, zmq.Context() as context, context.socket(zmq.DEALER) as flooder:
            owner.send(hello, timeout_s=5)
            assert isinstance(owner.recv(timeout_s=60), Welcome)
            flooder.linger, flooder.rcvhwm, flooder.sndhwm = 0, 1, 0
            flooder.connect(f"ipc://{tmp_path}/w")
            for token in range(30_000):
                flooder.send_multipart(Codec().encode(1, Ping(token)))
            for token in range(3):
                owner.send(Ping(token), timeout_s=5)
                assert owner.recv(timeout_s=5) == Pong(token)
            assert worker.poll() is None
    finally:
        worker.terminate()
        assert worker.wait(10) == 0


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_interrupt_between_frames(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a message: it is refused as a whole, the next one arrives."""
    q = np.zeros((2, 1, 4), np.float32)
    with listen(an_address(scheme, tmp_path)) as listener, connect(listener.address) as channel:
        channel.send(Ping(0), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(0)
        send, calls = zmq.Socket.send, []

        def interrupted(self: zmq.Socket, *arguments: object, **options: object) -> object:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return send(self, *arguments, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(zmq.Socket, "send", interrupted)
            with pytest.raises(KeyboardInterrupt):
                channel.send(Attend(0, 0, 0, q, q, q), timeout_s=5)
        with pytest.raises(BadDelivery):
            listener.recv(timeout_s=5)
        channel.send(Ping(1), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(1)


def test_conformance_mpi_over_tcp(mpirun: list[str]) -> None:
    """Without the shared memory that makes every receive instant on one machine."""
    flags = ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
    command = [*mpirun, *flags, "-n", "2", sys.executable, ROOT / "tests" / "mpi_conformance.py"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stdout + out.stderr
    assert f"{len(CHECKS)} checks passed" in out.stdout
