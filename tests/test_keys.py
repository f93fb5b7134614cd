"""The job's key: its file, and what becomes of workers that do not share it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Case

from cpu_attention import LISTENING
from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError, RWorkerFailed
from transport import (
    Goodbye,
    Keys,
    PeerRefused,
    Ping,
    Pong,
    connect,
    listen,
    make_keys,
    read_keys,
    write_keys,
)
from transport.errors import KeyFileError
from transport.testing import serve_echo

ROOT = Path(__file__).parents[1]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    write_keys(tmp_path / "job.key", make_keys())
    return tmp_path / "job.key"


def test_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    keys = make_keys()
    umask = os.umask(0)
    try:
        write_keys(tmp_path / "k", keys)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert read_keys(tmp_path / "k") == keys and read_keys(str(tmp_path / "k")) == keys
    assert keys.secret.decode() not in repr(keys) and make_keys() != keys


def test_a_key_in_use_is_not_overwritten(key_file: Path) -> None:
    before = key_file.read_bytes()
    with pytest.raises(KeyFileError, match="exists already"):
        write_keys(key_file, make_keys())
    assert key_file.read_bytes() == before


def test_no_half_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transport.keys.open", full, raising=False)
    with pytest.raises(KeyFileError, match="No space left"):
        write_keys(tmp_path / "k", make_keys())
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_reach_is_refused(mode: int, key_file: Path) -> None:
    key_file.chmod(mode)
    with pytest.raises(KeyFileError, match=f"mode is {mode:04o}.*chmod 600 {key_file}"):
        read_keys(key_file)


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: b"",
        lambda text: text[:-20],
        lambda text: text + b"more\n",
        lambda text: os.urandom(150),
        lambda text: text.replace(b"FastDecode key 1", b"FastDecode key 2"),
        lambda text: text.replace(b"secret ", b"public "),
        lambda text: text.splitlines(keepends=True)[0] + b"".join(reversed(text.splitlines(keepends=True)[1:])),
        lambda text: text.replace(text.split()[-1], make_keys().secret),  # of another pair
        lambda text: text.replace(text.split()[-1], b"\x00" * 40),
        lambda text: text * 100,
    ],
)
def test_a_damaged_file_is_refused(harm: Callable[[bytes], bytes], key_file: Path) -> None:
    key_file.write_bytes(harm(key_file.read_bytes()))
    with pytest.raises(KeyFileError, match="no key file, or a damaged one"):
        read_keys(key_file)


def test_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, text in ((tmp_path / "none", "keygen"), (tmp_path, "is no file"), (tmp_path / "pipe", "is no file")):
        with pytest.raises(KeyFileError, match=text):
            read_keys(path)
    with pytest.raises(KeyFileError, match="cannot write"):
        write_keys(tmp_path / "nowhere" / "k", make_keys())


def test_without_libsodium(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmq.has", lambda capability: False)
    for action in (make_keys, lambda: read_keys(key_file)):
        with pytest.raises(KeyFileError, match="built without libsodium"):
            action()


def test_keygen(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdecode", "keygen"]
    first, again, named = (
        subprocess.run(
            [*command, *path], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        for path in ([], [], ["other.key"])
    )
    assert first.returncode == 0 and "--key-file fastdecode.key" in first.stdout
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert named.returncode == 0 and read_keys(tmp_path / "other.key") != read_keys(tmp_path / "fastdecode.key")
    assert read_keys(tmp_path / "fastdecode.key").secret.decode() not in first.stdout


@pytest.mark.parametrize("has_key", [True, False], ids=["keyed port", "open port"])
@pytest.mark.parametrize("ours", ["none", "another", "the right one"])
def test_who_holds_what(has_key: bool, ours: str) -> None:
    """The same key, or the same lack of one; everything else is told at once, and again, and disturbs nobody."""
    keys = make_keys()
    held: dict[str, Keys | None] = {"none": None, "another": make_keys(), "the right one": keys}
    fits = held[ours] == (keys if has_key else None)
    with listen("tcp://127.0.0.1:0", keys if has_key else None) as listener:
        thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
        thread.start()
        with connect(listener.address, held[ours]) as channel:
            if fits:
                channel.send(Ping(1), timeout_s=5)
                assert channel.recv(timeout_s=5) == Pong(1)
            else:
                text = {
                    (True, "none"): ".*wants a key: give the key file",
                    (True, "another"): "(refused this side's|hangs up, .* another) key.*: give both ends the same",
                }.get((has_key, ours), "(has no key: start it with --key-file|hangs up, .* another key or none)")
                began = time.monotonic()
                for _ in range(2):
                    with pytest.raises(PeerRefused, match=f"R-worker at {listener.address} {text}"):
                        channel.send(Ping(1), timeout_s=30)
                    assert channel.is_readable()
                with pytest.raises(PeerRefused):
                    channel.recv(timeout_s=30)
                assert time.monotonic() - began < 8  # within a second or so where there are cores for both
        with connect(listener.address, keys if has_key else None) as good:
            good.send(Ping(2), timeout_s=5)
            assert good.recv(timeout_s=5) == Pong(2)
            good.send(Goodbye(), timeout_s=5)
        thread.join(10)


def test_ports_come_and_go_cleanly() -> None:
    """No thread and no file descriptor outlives its port, and two ports of one process keep their keys apart."""
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        keys = make_keys(), make_keys()
        with listen("tcp://127.0.0.1:0", keys[0]) as one, listen("tcp://127.0.0.1:0", keys[1]) as two:
            for listener, own in ((one, keys[0]), (two, keys[1])):
                with connect(listener.address, own) as channel:
                    channel.send(Ping(1), timeout_s=5)
                    assert listener.recv(timeout_s=5).envelope.message == Ping(1)
            with connect(one.address, keys[1]) as channel, pytest.raises(PeerRefused):
                channel.send(Ping(1), timeout_s=10)
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.fixture
def keyed_worker(key_file: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cpu_attention", "--bind", "tcp://127.0.0.1:0", "--key-file", key_file,
         "--kv-cache-memory", "64MiB"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout
    yield process.stdout.readline().strip().removeprefix(LISTENING)
    process.terminate()
    assert process.wait(10) == 0
    process.stdout.close()


def test_llm_with_a_key(keyed_worker: str, key_file: Path, llama: Case, tmp_path: Path) -> None:
    """The right tokens with it; without it, or with another, an error that says so and comes soon."""
    write_keys(other := tmp_path / "other.key", make_keys())
    params = SamplingParams(temperature=0, max_tokens=32)
    for wrong, text in ((None, "wants a key"), (other, "give both ends the same key file")):
        began = time.monotonic()
        with pytest.raises(RWorkerFailed, match=f"R-worker 0 .*{text}"):
            LLM(llama.directory, r_worker_addresses=[keyed_worker], skip_tokenizer_init=True, key_file=wrong)
        assert time.monotonic() - began < 20  # and not the 60 of worker_timeout_s
    with LLM(llama.directory, r_worker_addresses=[keyed_worker], skip_tokenizer_init=True, key_file=key_file) as llm:
        outputs = llm.generate(llama.prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == llama.reference


def test_llm_starts_workers_with_a_key(key_file: Path, llama: Case) -> None:
    options = {"transport": "tcp", "num_r_workers": 2, "skip_tokenizer_init": True}
    with LLM(llama.directory, key_file=key_file, **options) as llm:
        outputs = llm.generate(llama.prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
        address = llm._engine._rpool._workers[0].channel.peer.rpartition(" ")[2]
        with connect(address) as stranger, pytest.raises(PeerRefused, match="wants a key"):
            stranger.send(Ping(1), timeout_s=10)
    assert [output.outputs[0].token_ids for output in outputs] == llama.reference
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="key_file: others may read"):
        LLM(llama.directory, key_file=key_file, **options)
