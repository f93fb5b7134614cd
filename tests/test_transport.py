"""The conformance suite over every backend, and what a lost peer looks like."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq

from transport import (
    AddressError,
    Attend,
    Channel,
    Codec,
    Goodbye,
    Hello,
    Keys,
    LayerSpec,
    Listener,
    PeerLost,
    PeerTimeout,
    Ping,
    Pong,
    Welcome,
    connect,
    listen,
    make_keys,
)
from transport.hosts import check_bind
from transport.testing import CHECKS, check_close, serve_echo

ROOT = Path(__file__).parents[1]
KEYS = make_keys()
SCHEMES = ("inproc", "shm", "ipc", "tcp", "tcp+keys")
keys_of: dict[str, Keys] = {}  # by the listener's address


def a_listener(scheme: str, tmp_path: Path) -> Listener:
    if not scheme.startswith("tcp"):
        return listen(f"{scheme}://{tmp_path}/socket")
    listener = listen("tcp://127.0.0.1:0", KEYS if scheme == "tcp+keys" else None)
    keys_of.pop(listener.address, None)
    if scheme == "tcp+keys":
        keys_of[listener.address] = KEYS
    return listener


def reach(listener: Listener) -> Channel:
    return connect(listener.address, keys_of.get(listener.address))


@pytest.fixture(params=SCHEMES)
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    with a_listener(request.param, tmp_path) as listener:
        yield listener


@pytest.fixture
def echo(listener: Listener) -> Iterator[Channel]:
    thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
    thread.start()
    with reach(listener) as channel:
        yield channel
    with reach(listener) as last:
        last.send(Goodbye(), timeout_s=5)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("check", [c for c in CHECKS if c is not check_close], ids=lambda c: c.__name__)
def test_conformance(check: object, echo: Channel) -> None:
    check(echo)  # type: ignore[operator]


def test_conformance_close(listener: Listener) -> None:
    thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
    thread.start()
    check_close(reach(listener))
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
    channels = [reach(listener) for _ in range(3)]
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
    channel = reach(listener)
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
        channel = reach(listener)
        channel.send(Ping(1), timeout_s=5)
        peer = listener.recv(timeout_s=5).peer
        assert listener.is_reachable(peer)
        channel.close()
        deadline = time.monotonic() + 1
        while listener.is_reachable(peer):
            assert time.monotonic() < deadline


def test_probing_does_not_disturb(listener: Listener) -> None:
    channel = reach(listener)
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


WILDCARDS = ("tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://[::ffff:0.0.0.0]:0")
NAMES = ("tcp://eth0:0", "tcp://example.org:0", "tcp://0:0", "tcp://127.1:0")


@pytest.mark.parametrize("address", [*WILDCARDS, *NAMES])
@pytest.mark.parametrize("options", [{}, {"keys": KEYS}, {"insecure_network": True}], ids=["bare", "keys", "insecure"])
def test_workers_listen_on_one_address(address: str, options: dict[str, Any]) -> None:
    """Whatever protects them, not on all networks of a machine, nor on what a name stands for today."""
    with pytest.raises(AddressError, match="name the one address of the network"):
        listen(address, **options)


@pytest.mark.parametrize("address", ["tcp://10.1.2.3:0", "tcp://[fd00::1]:0", "tcp://8.8.8.8:5555"])
def test_beyond_the_machine_only_with_a_key_or_a_word(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AddressError, match="is not loopback.*keygen.*--key-file.*--insecure-network"):
        listen(address)
    check_bind(address, has_keys=True, insecure_network=False)
    assert not caplog.records
    check_bind(address, has_keys=False, insecure_network=True)
    assert "can read and change the KV" in caplog.text and address in caplog.text


def test_a_real_network(own_address: str, caplog: pytest.LogCaptureFixture) -> None:
    with listen(f"tcp://{own_address}:0", KEYS) as listener, connect(listener.address, KEYS) as channel:
        assert own_address in listener.address
        channel.send(Ping(1), timeout_s=5)
        delivery = listener.recv(timeout_s=5)
        assert delivery.envelope.message == Ping(1) and delivery.origin == own_address
    assert not caplog.records


@pytest.fixture
def own_address() -> str:
    """Of this machine on some network."""
    addresses = [a.address for all_of in psutil.net_if_addrs().values() for a in all_of if a.family == socket.AF_INET]
    beyond = [address for address in addresses if not address.startswith("127.")]
    if not beyond:
        pytest.skip("this machine is on no network")
    return beyond[0]


@pytest.mark.parametrize(
    "address, options, text",
    [
        ("ipc:///tmp/w", {"keys": KEYS}, "for tcp:// alone"),
        ("shm:///tmp/w", {"insecure_network": True}, "for tcp:// alone"),
        ("tcp://127.0.0.1:0", {"insecure_network": True}, "leave insecure_network out"),
        ("tcp://10.1.2.3:0", {"insecure_network": True, "keys": KEYS}, "leave insecure_network out"),
    ],
)
def test_no_option_does_nothing(address: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(AddressError, match=text):
        listen(address, **options)
    if "insecure_network" not in options:
        with pytest.raises(AddressError, match=text):
            connect(address, **options)


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


@pytest.mark.parametrize("scheme", ["ipc", "tcp", "tcp+keys"])
def test_interrupt_between_frames(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a message: it is passed over as a whole, the next one arrives."""
    q = np.zeros((2, 1, 4), np.float32)
    with a_listener(scheme, tmp_path) as listener, reach(listener) as channel:
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
        channel.send(Ping(1), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(1)


def test_conformance_mpi_over_tcp(mpirun: list[str]) -> None:
    """Without the shared memory that makes every receive instant on one machine."""
    flags = ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
    command = [*mpirun, *flags, "-n", "2", sys.executable, ROOT / "tests" / "mpi_conformance.py"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stdout + out.stderr
    assert f"{len(CHECKS)} checks passed" in out.stdout
