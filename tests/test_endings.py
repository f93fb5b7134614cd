"""Whatever was begun ends, however the program ends, and forked children hold nothing of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdecode.ending import Ending, open_endings
from fastdecode.holders.directory import SocketDirectory, remove_leftovers
from transport.mpi_start import find_launcher, is_deaf_without_pmix

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "kinds, transports",
    [
        (["garbage in a cycle", "sys.exit in the middle", "SIGKILL"], ["inproc", "ipc", "shm"]),
        pytest.param(["garbage in a thread", "script ends", "SIGTERM"], ["shm", "tcp"], marks=pytest.mark.slow),
        pytest.param(["mpirun: close", "mpirun: SIGKILL of a rank"], ["shm"], marks=pytest.mark.slow),
    ],
    ids=["some", "others", "jobs"],
)
def test_nothing_is_left_however_it_ends(kinds: list[str], transports: list[str]) -> None:
    """While a child that was forked from the process lives on, after it has tried to use the LLM and to close it."""
    command = [sys.executable, "bench/endings.py", "--kinds", *kinds, "--each", "1", "--transports", *transports]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stdout + out.stderr[-2000:]
    assert out.stdout.count("left: 0") == len(kinds)


def test_an_end_that_is_interrupted_is_gone_on_with() -> None:
    """What an owner has begun is closed from then on, and ended once."""

    class Owner:
        pass

    owner, ended = Owner(), []

    def end() -> None:
        ended.append(len(ended))
        if len(ended) == 1:
            raise KeyboardInterrupt

    ending = Ending(owner, end)
    assert not ending.is_closed and ending in open_endings()
    with pytest.raises(KeyboardInterrupt):
        ending.close()
    assert ending.is_closed
    ending.close()
    ending.close()
    del owner
    assert ended == [0, 1] and ending.is_closed and ending not in open_endings()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary directory of the test; its own would be too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr("tempfile.tempdir", name)
        yield Path(name)


def _crash() -> Path:
    """A directory as a killed process leaves it."""
    directory = SocketDirectory()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(directory.path / "0"))
    directory.let_go()
    return directory.path


def test_what_a_killed_run_left_is_gone_at_the_next_start(place: Path) -> None:
    lives, left = SocketDirectory(), _crash()
    assert left.is_dir()
    directory = SocketDirectory()
    assert set(place.iterdir()) == {lives.path, directory.path}
    lives.close()
    lives.close()
    directory.close()
    assert list(place.iterdir()) == []


def test_what_is_not_ours_stays(place: Path) -> None:
    """A directory of the user's that looks alike, one with files in it, a link, a file."""
    kept = [place / name for name in ("fastdecode-models", "fastdecode-r-mine", "fastdecode-r-12345678")]
    for path in kept:
        path.mkdir()
        (path / "weights").write_text("w")
    (place / "fastdecode-r-abcdefgh").symlink_to(kept[0])
    (place / "fastdecode-r-aaaaaaaa").write_text("")
    before = sorted(path for path in place.rglob("*"))
    remove_leftovers()
    assert sorted(path for path in place.rglob("*")) == before


def test_a_forked_child_removes_and_locks_nothing(place: Path) -> None:
    directory = SocketDirectory()
    ready, tell = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if not child:
        directory.close()
        os.write(tell, b"1")
        os.close(end)
        os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    assert directory.path.is_dir()
    remove_leftovers()
    assert directory.path.is_dir(), "its lock is held by this process"
    directory.let_go()
    remove_leftovers()
    assert not directory.path.exists(), "and by this one alone"
    for descriptor in (end, wait, ready, tell):
        os.close(descriptor)
    assert os.waitpid(child, 0)[1] == 0


LATE_CHILD = """
import os, signal, subprocess, sys, time
os.register_at_fork(after_in_child=lambda: time.sleep(1))  # a busy machine
from transport import Ping, Pong, connect
command = [sys.executable, "-m", "cpu_attention", "--kv-cache-memory", "1MiB", "--bind", sys.argv[1]]
worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
channel = connect(worker.stdout.readline().split()[-1])
channel.send(Ping(7), timeout_s=20)
assert channel.recv(timeout_s=20) == Pong(7)
worker.send_signal(signal.SIGSTOP)
channel.send(Ping(8), timeout_s=20)  # what is never read makes the end of a connection a reset
time.sleep(0.5)
if not (child := os.fork()):
    held = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    os._exit(sum(link.startswith("socket:") for link in held))
worker.kill()
worker.wait()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "ipc://{place}/w", "shm://{place}/w"])
def test_a_forked_child_that_comes_late_holds_nothing(address: str, place: Path) -> None:
    """Its parent's R-worker has ended meanwhile, and where the connection led can be told no more."""
    command = [sys.executable, "-c", LATE_CHILD, address.format(place=place)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert out.stdout == "0\n", out.stdout + out.stderr


@pytest.mark.parametrize(
    "environment, told",
    [
        ({}, "no mpirun, mpiexec or srun has started this process"),
        ({"OMPI_MCA_btl": "self", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, "no mpirun"),  # settings; an sbatch script
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, "MPICH, Intel MPI or their kin has started 3 processes, and mpi4py was"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2 processes"),
    ],
    ids=["alone", "only settings", "another MPI's", "srun"],
)
def test_mpi_is_not_started_where_it_cannot_serve(environment: dict[str, str], told: str) -> None:
    code = (
        "import sys, transport\n"
        "try: transport.import_mpi()\n"
        "except transport.AddressError as error: print(error, 'mpi4py.MPI' in sys.modules)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM_"))}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=100
    )
    assert told in out.stdout and out.stdout.endswith("False\n"), out.stdout + out.stderr


@pytest.mark.parametrize(
    "environment, launcher",
    [
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3", "PMIX_RANK": "0"}, ("Open MPI's mpirun", 3, True)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "1"}, ("srun", 2, True)),
        ({"SLURM_STEP_ID": "0", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}, ("Open MPI's mpirun", None, True)),
        ({"PMIX_RANK": "0"}, ("a launcher that speaks PMIx", None, True)),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}, ("MVAPICH's mpirun", 2, False)),
    ],
)
def test_launchers_are_known_by_what_they_set(environment: dict[str, str], launcher: tuple[object, ...]) -> None:
    assert find_launcher(environment) == launcher


@pytest.mark.parametrize(
    "version, is_deaf",
    [("Open MPI v5.0.11, package", True), ("Open MPI v4.1.6", False), ("MPICH Version: 4.2", False), ("", False)],
)
def test_which_mpi_wants_pmix(version: str, is_deaf: bool) -> None:
    assert is_deaf_without_pmix(version) == is_deaf
