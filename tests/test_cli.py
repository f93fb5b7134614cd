"""The command line, as a user would type it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Case

from fastdecode.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]


def fastdecode(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastdecode", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([command, "--help"] for command in sorted(COMMANDS))],
)
def test_help_is_instant_and_needs_no_torch(arguments: list[str]) -> None:
    """A second of one processor at most, which is the same on a busy machine."""
    code = (
        f"import resource, sys\nfrom fastdecode.cli import main\ntry: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print({'torch', 'fastapi', 'uvicorn'} & sys.modules.keys() or 'none', used.ru_utime + used.ru_stime)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    heavy, seconds = out.stdout.splitlines()[-1].rsplit(maxsplit=1)
    assert heavy == "none" and float(seconds) < 1.0
    assert fastdecode(*arguments).stdout.splitlines() == out.stdout.splitlines()[:-1]


def ended_with(arguments: list[str]) -> object:
    """The exit code of the command in this process."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def test_no_command_shows_the_commands() -> None:
    assert "generate" in fastdecode().stdout
    wrong = fastdecode("generat")
    assert wrong.returncode == 2 and "choose from" in wrong.stderr


def test_generate_text(demo_model: Path) -> None:
    out = fastdecode(
        "generate",
        demo_model,
        "--prompt",
        "def f(x):",
        "--prompt",
        "import os\n",
        "--max-tokens",
        8,
        "--transport",
        "ipc",
        "--num-r-workers",
        2,
        "--kv-cache-dtype",
        "float16",
    )
    assert out.returncode == 0, out.stderr
    assert "def f(x):" in out.stdout and out.stdout.count("--- length, 8 tokens") == 2
    assert "tokens/s" in out.stderr and out.stderr.count("of float16 KV") == 2


def test_generate_files_and_json(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def f(x):\n\nimport os\n")
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "def f(x):"}\n{"prompt_token_ids": [1, 2]}\n{"prompt_token_ids": [9999]}\n'
    )
    text = fastdecode("generate", demo_model, "--prompts-file", tmp_path / "p.txt", "--max-tokens", 4, "--json")
    lines = [json.loads(line) for line in text.stdout.splitlines()]
    assert text.returncode == 0 and [line["prompt"] for line in lines] == ["def f(x):", "import os"]
    mixed = fastdecode("generate", demo_model, "--prompts-file", tmp_path / "p.jsonl", "--max-tokens", 4, "--json")
    lines = [json.loads(line) for line in mixed.stdout.splitlines()]
    assert mixed.returncode == 1  # one was refused, the others were served
    assert (
        lines[2]["error"]["code"] == "invalid_request"
        and lines[1]["error"] is None
        and len(lines[1]["outputs"][0]["token_ids"]) == 4
    )


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nowhere", "--prompt", "x"], "error: nowhere is no directory"),
        (["MODEL", "--prompt", "x", "--temperature", "-1"], "error: temperature must be from 0 to 100"),
        (
            ["MODEL", "--prompt", "x", "--kv-cache-memory", "much"],
            "error: kv_cache_memory: 'much' is no amount of memory",
        ),
        (["MODEL", "--prompts-file", "/nonexistent"], "error: cannot read the prompts"),
        (["MODEL"], "one of the arguments --prompt --prompts-file is required"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], text: str, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_with(["generate", *(str(demo_model) if a == "MODEL" else a for a in arguments)]) == 2
    assert text in capsys.readouterr().err


def test_errors_of_a_process_are_one_line(demo_model: Path) -> None:
    """Here one that MPI has begun in."""
    out = fastdecode("generate", demo_model, "--prompt", "x", "--transport", "mpi")
    assert out.returncode == 2 and "error: transport 'mpi' wants one rank" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--bind", "tcp://0.0.0.0:1"], "name the one address"),
        (["--bind", "tcp://10.1.2.3:1"], "loopback"),
        (["--bind", "tcp://127.0.0.1:0", "--key-file", "/nonexistent"], "there is no /nonexistent"),
        (["--bind", "ipc:///tmp/x", "--insecure-network"], "for tcp:// alone"),
        (["--bind", "bogus"], "known: inproc://"),
        (["--bind", "ipc:///tmp/x", "--kv-cache-memory", "3 potatoes"], "no amount of memory"),
        (["--bind", "ipc:///tmp/x", "--threads", "0"], "no number above 0"),
        ([], "--bind"),
    ],
)
def test_rworker_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_with(["rworker", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_doctor() -> None:
    out = fastdecode("doctor", "--json")
    facts = json.loads(out.stdout)
    assert out.returncode == 0 and facts["versions"]["numba"] != "not installed"
    assert "GB/s" in facts["memory"]["read, 1 thread"] and "mpirun" in facts["MPI"]
    assert "default KV budget" in fastdecode("doctor", "--skip-bandwidth").stdout


def test_mpirun(mpirun: list[str], demo_model: Path) -> None:
    """The same text as without MPI, and the table of roles."""
    arguments = ["generate", str(demo_model), "--prompt", "def f(x):", "--max-tokens", "12", "--json"]
    out = subprocess.run(
        [
            *mpirun,
            "-n",
            "3",
            sys.executable,
            "-m",
            "fastdecode",
            *arguments,
            "--transport",
            "mpi",
            "--kv-cache-memory",
            "64MiB",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout == fastdecode(*arguments).stdout
    roles = [
        line.split()[1]
        for line in out.stderr.splitlines()
        if line.strip()[:1].isdigit() and "worker" in line.split()[1]
    ]
    assert roles == ["S-worker", "R-worker", "R-worker"]


@pytest.mark.parametrize(
    "code, text",
    [
        ("raise RuntimeError('rank 0 fell over')", "rank 0 fell over"),
        ("import os; os.kill(os.getpid(), 9)", "rank 0"),
        ("return 3", ""),
    ],
)
def test_mpirun_with_a_failing_rank_0(code: str, text: str, mpirun: list[str]) -> None:
    script = (
        f"import sys, fastdecode\ndef main():\n    {code}\nsys.exit(fastdecode.mpi_main(main, kv_cache_bytes=10**6))"
    )
    out = subprocess.run(
        [*mpirun, "-n", "3", sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.returncode != 0 and text in out.stdout + out.stderr


@pytest.mark.parametrize("harm", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP], ids=str)
def test_mpirun_with_a_lost_r_worker(harm: signal.Signals, mpirun: list[str], llama: Case, tmp_path: Path) -> None:
    """MPI has no recovery: the job ends, non-zero, names the rank, and does not hang."""
    script = (
        "import os, pathlib, sys, threading, time, fastdecode\n"
        "from mpi4py import MPI\n"
        f"begun = pathlib.Path({str(tmp_path / 'begun')!r})\n"
        "def strike():\n"
        "    while not begun.exists():\n"
        "        time.sleep(0.01)\n"
        f"    os.kill(os.getpid(), {int(harm)})\n"
        "if MPI.COMM_WORLD.Get_rank() == 2:\n"
        "    threading.Thread(target=strike, daemon=True).start()\n"
        "def main():\n"
        f"    with fastdecode.LLM({str(llama.directory)!r}, transport='mpi', skip_tokenizer_init=True,\n"
        "                        worker_timeout_s=3) as llm:\n"
        "        while True:\n"
        "            llm.generate([[5] * 9] * 4, fastdecode.SamplingParams(max_tokens=300), use_tqdm=False)\n"
        "            begun.touch()\n"
        "sys.exit(fastdecode.mpi_main(main, kv_cache_bytes=10**8))"
    )
    out = subprocess.run(
        [*mpirun, "-n", "3", sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    struck = (tmp_path / "begun").stat().st_mtime
    assert out.returncode != 0 and time.time() - struck < 60
    assert "rank 2" in out.stdout + out.stderr
    assert harm == signal.SIGKILL or "RWorkerTimeout: R-worker 1 (mpi://2): no answer from rank 2" in out.stderr


def test_without_mpi4py(demo_model: Path) -> None:
    """An install without MPI works; who asks for it is told what to install."""
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from fastdecode.cli import main\n"
        f"sys.exit(main(['generate', {str(demo_model)!r}, '--prompt', 'x', '--max-tokens', '2', *sys.argv[1:]]))"
    )
    plain, mpi = (
        subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
        for flags in ([], ["--transport", "mpi"])
    )
    assert plain.returncode == 0 and "2 new tokens" in plain.stderr
    assert mpi.returncode == 2 and "pip install 'fastdecode[mpi]'" in mpi.stderr and "Traceback" not in mpi.stderr
