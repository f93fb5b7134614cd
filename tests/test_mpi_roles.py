"""Which rank of an mpirun is the S-worker, and what the others get of their hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cpu_attention import NumaNode
from fastdecode.errors import ConfigError
from fastdecode.holders.mpi_roles import Claim, Roles

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "fastdecode"]
NODES = (NumaNode(0, (0, 1, 2, 3), 1 << 30, 1 << 29), NumaNode(1, (4, 5, 6, 7), 1 << 30, 1 << 29))
ALL_CORES = tuple(range(8))


def claims(
    commands: str, asked: Sequence[int | None] | None = None, cores: Sequence[tuple[int, ...]] = (), host: str = ""
) -> list[Claim]:
    """commands, host: a letter per rank; R is started as an R-worker, S may be either."""
    host = host or "a" * len(commands)
    return [
        Claim(
            rank=rank,
            is_r_worker=command == "R",
            s_worker_rank=asked[rank] if asked else None,
            first_on_host=host.index(host[rank]),
            host=host[rank],
            pid=100 + rank,
            cores=cores[rank] if cores else ALL_CORES,
            nodes=NODES,
            memory_bytes=1 << 30,
        )
        for rank, command in enumerate(commands)
    ]


@pytest.mark.parametrize(
    "commands, asked, s_worker_rank",
    [
        ("SSS", None, 0),
        ("SSS", [2, 2, 2], 2),
        ("SRR", None, 0),
        ("RRS", None, 2),
        ("RRS", [None, None, 2], 2),
        ("SSR", [1, 1, None], 1),
        ("S", None, 0),
    ],
)
def test_the_s_worker(commands: str, asked: list[int | None] | None, s_worker_rank: int) -> None:
    roles = Roles.of(claims(commands, asked))
    assert roles.s_worker_rank == s_worker_rank
    assert roles.r_worker_ranks == tuple(rank for rank in range(len(commands)) if rank != s_worker_rank)
    assert [line.split()[1][0] for line in roles.table()][1:] == [
        "S" if rank == s_worker_rank else "R" for rank in range(len(commands))
    ]


@pytest.mark.parametrize(
    "commands, asked, text",
    [
        ("RRR", None, "no rank runs the S-worker: ranks 0-2 started as R-worker"),
        ("SRSS", None, "ranks 0,2-3 would each be the S-worker"),
        ("SSS", [3, 3, 3], "there is no rank 3; this mpirun has ranks 0-2"),
        ("SSS", [-1, -1, -1], "there is no rank -1"),
        ("SSS", [0, 1, 1], "given as 0 on rank 0, 1 on rank 1"),
        ("RS", [None, 0], "rank 0 started as R-worker; the S-worker can be rank 1"),
    ],
)
def test_roles_that_do_not_fit(commands: str, asked: list[int | None] | None, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        Roles.of(claims(commands, asked))


@pytest.mark.parametrize("s_worker_rank", [0, 1, 2])
def test_r_workers_get_a_numa_node_each(s_worker_rank: int) -> None:
    """Whoever the S-worker is: it takes none."""
    roles = Roles.of(claims("SSS", [s_worker_rank] * 3))
    assert [roles.cores(rank) for rank in roles.r_worker_ranks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert roles.r_workers_beside(s_worker_rank) == roles.r_worker_ranks


def test_hosts_do_not_share() -> None:
    roles = Roles.of(claims("RRSRR", host="abaab"))
    assert {rank: roles.cores(rank) for rank in roles.r_worker_ranks} == {
        0: (0, 1, 2, 3), 3: (4, 5, 6, 7), 1: (0, 1, 2, 3), 4: (4, 5, 6, 7)
    }  # fmt: skip
    assert roles.r_workers_beside(1) == (1, 4)


def test_who_is_bound_stays_there() -> None:
    """Each on its own cores; two on the same ones share these."""
    roles = Roles.of(claims("SRRR", cores=[(0,), (1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7)]))
    assert [roles.cores(rank) for rank in roles.r_worker_ranks] == [(1, 2, 3), (4, 5), (6, 7)]


GENERATE = ["generate", "MODEL", "--prompt", "def f(x):", "--max-tokens", "12", "--json"]


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> str:
    """What one process prints."""
    return _run([*PROGRAM, *_for(demo_model, GENERATE)]).stdout


def _for(model: Path, words: list[str]) -> list[str]:
    return [str(model) if word == "MODEL" else word for word in words]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def _roles(told: str) -> list[tuple[str, str]]:
    """(role, cores) of each rank, from the table."""
    return re.findall(r"^ +\d  ([SR])-worker  \S+ +\d+ +(\S+)", told, re.MULTILINE)


@pytest.mark.parametrize("order", [pytest.param("SRR", marks=pytest.mark.slow), "RRS"])
def test_roles_by_command(order: str, mpirun: list[str], demo_model: Path, expected: str) -> None:
    """Each R-worker has flags of its own."""
    parts = {
        "S": [["-n", "1", *PROGRAM, *_for(demo_model, GENERATE), "--transport", "mpi"]],
        "R": [
            ["-n", "1", *PROGRAM, "rworker", "--bind", "mpi://", "--threads", "1", "--kv-cache-memory", memory]
            for memory in ("64MiB", "32MiB")
        ],
    }
    first, second, third = [*parts[order[0]], *parts[order[-1]]]
    out = _run([*mpirun, *first, ":", *second, ":", *third])
    assert out.returncode == 0, out.stderr
    assert out.stdout == expected
    assert [role for role, _ in _roles(out.stderr)] == list(order)
    assert re.findall(r"([\d.]+) MiB of float32 KV = .*, 1 threads", out.stderr) == ["63.8", "31.9"]


def test_roles_by_rank_file(mpirun: list[str], demo_model: Path, expected: str, tmp_path: Path) -> None:
    """The flag comes from a file as well; the ranks run where theirs says."""
    if "--oversubscribe" not in mpirun or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("wants Open MPI and two cores")
    (tmp_path / "ranks").write_text("rank 0=localhost slot=1\nrank 1=localhost slot=0\n")
    (tmp_path / "flags.yaml").write_text("s-worker-rank: 1\ntransport: mpi\nkv-cache-memory: 64MiB\n")
    bound = [word for word in mpirun if word != "--oversubscribe"]
    where = ["-n", "2", "--map-by", f"rankfile:file={tmp_path / 'ranks'}"]
    out = _run([*bound, *where, *PROGRAM, *_for(demo_model, GENERATE), "--config", str(tmp_path / "flags.yaml")])
    assert out.returncode == 0, out.stderr
    assert out.stdout == expected
    (first, r_core), (second, s_core) = _roles(out.stderr)
    assert (first, second) == ("R", "S") and r_core.isdecimal() and s_core.isdecimal() and r_core != s_core


@pytest.mark.parametrize("end", ["return 3", "sys.exit(3)"])
def test_a_script_with_the_last_rank(end: str, mpirun: list[str], demo_model: Path, expected: str) -> None:
    """Which does not close its LLM, and holds it for ever."""
    script = (
        "import json, sys, fastdecode\n"
        "def main():\n"
        "    global llm\n"
        f"    llm = fastdecode.LLM({str(demo_model)!r}, transport='mpi')\n"
        "    params = fastdecode.SamplingParams(temperature=0, max_tokens=12)\n"
        "    (output,) = llm.generate('def f(x):', params, use_tqdm=False)\n"
        "    print(json.dumps(output.outputs[0].token_ids))\n"
        f"    {end}\n"
        "sys.exit(fastdecode.mpi_main(main, s_worker_rank=2, kv_cache_bytes=10**8))"
    )
    out = _run([*mpirun, "-n", "3", sys.executable, "-c", script])
    assert out.returncode == 3 and "error" not in out.stderr, out.stderr
    assert json.loads(out.stdout) == json.loads(expected)["outputs"][0]["token_ids"]


def test_bench(mpirun: list[str], demo_model: Path) -> None:
    """Is the S-worker's, too."""
    flags = ["--batch-size", "2", "--input-len", "8", "--output-len", "4", "--num-iters", "1", "--transport", "mpi"]
    bench = [*PROGRAM, "bench", "latency", str(demo_model), *flags]
    out = _run([*mpirun, "-n", "1", *PROGRAM, "rworker", "--bind", "mpi://", ":", "-n", "1", *bench])
    assert out.returncode == 0 and "mean latency" in out.stdout, out.stdout + out.stderr


@pytest.mark.parametrize(
    "ranks, text",
    [
        ([("2", "S"), ("1", "R")], "ranks 0-1 would each be the S-worker"),
        ([("2", "R")], "no rank runs the S-worker: ranks 0-1"),
        ([("3", "S3")], "there is no rank 3; this mpirun has ranks 0-2"),
    ],
    ids=["two", "none", "out of range"],
)
def test_roles_that_do_not_fit_end_all_ranks(
    ranks: list[tuple[str, str]], text: str, mpirun: list[str], demo_model: Path
) -> None:
    """Told once, and not as a trace."""
    generate = [*_for(demo_model, GENERATE), "--transport", "mpi"]
    commands = {"S": generate, "S3": [*generate, "--s-worker-rank", "3"], "R": ["rworker", "--bind", "mpi://"]}
    parts = [["-n", number, *PROGRAM, *commands[command], ":"] for number, command in ranks]
    out = _run([*mpirun, *[word for part in parts for word in part][:-1]])
    assert out.returncode == 2, out.stderr
    assert out.stderr.count("error: ") == 1 and text in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["rworker", "--bind", "mpi://3"], "mpirun says which rank this is"),
        (["rworker", "--bind", "mpi://", "--insecure-network"], "--insecure-network is not for --bind mpi://"),
        (["rworker", "--bind", "mpi://", "--cores", "4000"], "--cores: this process may use"),
        (["rworker", "--bind", "mpi://"], "no mpirun, mpiexec or srun has started this process"),
        ([*GENERATE, "--s-worker-rank", "0"], "--s-worker-rank is for --transport mpi"),
    ],
)
def test_flags_that_do_not_fit(arguments: list[str], text: str, demo_model: Path) -> None:
    out = _run([*PROGRAM, *_for(demo_model, arguments)])
    assert out.returncode == 2 and text in out.stderr and "Traceback" not in out.stderr
