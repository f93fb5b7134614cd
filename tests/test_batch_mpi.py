"""`run-batch` under mpirun: what a job that has no recovery leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.batch_kills import choices, finish, lines_written, make_input, start

ROOT = Path(__file__).parents[1]
NUM_LINES = 80


def under_mpi(mpirun: list[str], num_ranks: int, model: Path, source: Path, out: Path, *flags: str) -> list[str]:
    return [
        *mpirun, "-n", str(num_ranks), sys.executable, "-m", "fastdecode", "run-batch", "-i", str(source),
        "-o", str(out), "--model", str(model), "--kv-cache-memory", "64MiB", "--transport", "mpi", *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("victim", [pytest.param(2, marks=pytest.mark.slow), 0])
def test_a_rank_is_killed(victim: int, mpirun: list[str], demo_model: Path, tmp_path: Path) -> None:
    """The job ends, non-zero, and the rank is named; what was done is kept, and --resume does the rest."""
    source, whole, out, log = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl", "log"))
    make_input(source, NUM_LINES)
    with log.open("w") as said:
        job = subprocess.Popen(under_mpi(mpirun, 3, demo_model, source, out), cwd=ROOT, stdout=said, stderr=said)
        deadline = time.monotonic() + 100
        while lines_written(out) < 3:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        ranks = dict(re.findall(r"^ +(\d)  [SR]-worker  \S+ +(\d+)", log.read_text(), re.MULTILINE))
        assert len(ranks) == 3
        os.kill(int(ranks[str(victim)]), signal.SIGKILL)
        assert job.wait(60) != 0
    told = log.read_text()
    assert f"rank {victim} " in told and "MPI has no recovery" in told, told
    kept = choices(out)
    assert 3 <= len(kept) < NUM_LINES and out.read_bytes().endswith(b"\n")
    again = subprocess.run(
        under_mpi(mpirun, 2, demo_model, source, out, "--resume"), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0 and f"{NUM_LINES} of {NUM_LINES} lines, 0 errors" in again.stderr, again.stderr
    finish(start(demo_model, source, whole))
    assert choices(out) == choices(whole) and choices(out) | kept == choices(out)


def test_what_the_user_can_mend(mpirun: list[str], demo_model: Path, tmp_path: Path) -> None:
    """Is told in a line, as without MPI; the other ranks end with it."""
    done = subprocess.run(
        under_mpi(mpirun, 2, demo_model, tmp_path / "nowhere", tmp_path / "out"),
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "error: cannot read the input" in done.stderr and "Traceback" not in done.stderr
