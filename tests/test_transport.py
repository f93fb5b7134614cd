"""The conformance suite over every backend, and what a lost peer looks like."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transport import AddressError, Channel, Goodbye, Listener, PeerLost, PeerTimeout, Ping, Pong, connect, listen
from transport.testing import CHECKS, check_close, serve_echo

ROOT = Path(__file__).parents[1]
SCHEMES = ("inproc", "ipc", "tcp")


def an_address(scheme: str, tmp_path: Path) -> str:
    return {"inproc": f"inproc://{tmp_path}", "ipc": f"ipc://{tmp_path}/socket", "tcp": "tcp://127.0.0.1:0"}[scheme]


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
    channel = connect(listener.address)
    channel.send(Ping(1), timeout_s=5)
    peer = listener.recv(timeout_s=5).peer
    assert listener.is_reachable(peer)
    channel.close()
    deadline = time.monotonic() + 5
    while listener.is_reachable(peer) and time.monotonic() < deadline:
        pass
    assert not listener.is_reachable(peer)


def test_probing_does_not_disturb(listener: Listener) -> None:
    channel = connect(listener.address)
    channel.send(Ping(1), timeout_s=5)
    delivery = listener.recv(timeout_s=5)
    assert listener.is_reachable(delivery.peer)
    listener.send(delivery.peer, delivery.envelope.session, Pong(5), timeout_s=5)
    assert channel.recv(timeout_s=5) == Pong(5)
    channel.close()


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_nobody_there(scheme: str, tmp_path: Path) -> None:
    address = {"ipc": f"ipc://{tmp_path}/nobody", "tcp": "tcp://127.0.0.1:9"}[scheme]
    with connect(address) as channel, pytest.raises(PeerTimeout, match="is it running"):
        channel.send(Ping(1), timeout_s=0.2)


@pytest.mark.parametrize(
    "address, hint",
    [
        ("shm://x", "known: inproc://, ipc://, tcp://, mpi://"),
        ("nonsense", "known"),
        ("tcp://127.0.0.1", "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:99999", "65535"),
        ("ipc://" + "x" * 200, "100 bytes"),
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


def test_ipc_file_of_a_killed_worker_is_reused(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/socket"
    code = f"import os, signal, transport; transport.listen({address!r}); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30)
    assert (tmp_path / "socket").exists()
    with listen(address) as listener, connect(address) as channel:
        channel.send(Ping(1), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(1)
