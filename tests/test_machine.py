"""What the machine, a container or a job lets a process take: read at its start, told in the words of who set it."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cpu_attention import RWorker, cgroups, machine
from cpu_attention.process import main
from transport import Failure, Hello, LayerSpec

ROOT = Path(__file__).parents[1]


def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "fs")


def test_limits_of_a_group_and_those_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "job/step/memory.max": "max\n",
        "job/step/memory.high": "5000\n",
        "job/step/memory.current": "900",
        "job/step/memory.stat": "anon 500\ninactive_file 400\n",
        "job/memory.max": "7000",
        "job/memory.current": "6000",
        "job/step/cpu.max": "max 100000",
        "job/cpu.max": "250000 100000",
    }
    groups(tmp_path, monkeypatch, "0::/job/step\n", files)
    assert cgroups.memory_limits() == [cgroups.MemoryLimit(5000, 500), cgroups.MemoryLimit(7000, 6000)]
    assert cgroups.cpu_quota() == 2.5
    monkeypatch.setattr(machine, "available_cores", lambda: tuple(range(64)))
    assert machine.available_memory_bytes() == 1000 and machine.num_usable_cores() == 2
    monkeypatch.setattr(machine, "available_cores", lambda: (3,))
    assert machine.num_usable_cores() == 1


def test_limits_of_the_first_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a container its group is named as from outside, and mounted as the root."""
    files = {
        "memory/memory.limit_in_bytes": "8000",
        "memory/memory.usage_in_bytes": "3000",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n",
        "cpu/cpu.cfs_quota_us": "50000",
        "cpu/cpu.cfs_period_us": "100000",
        "cpu/docker/x/cpu.cfs_quota_us": "-1",
        "cpu/docker/x/cpu.cfs_period_us": "100000",
    }
    groups(tmp_path, monkeypatch, "11:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/\n", files)
    assert [limit.limit_bytes - limit.used_bytes for limit in cgroups.memory_limits()] == [6000]
    assert cgroups.cpu_quota() == 0.5 and machine.num_usable_cores() == 1


def test_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for own in ("", "0::/\n", "4:memory:/\n3:cpu:/\n"):
        groups(tmp_path, monkeypatch, own, {"memory/memory.limit_in_bytes": "9223372036854771712"})
        assert cgroups.memory_limits() == [] and cgroups.cpu_quota() is None
        assert machine.num_usable_cores() == len(machine.available_cores())


def test_the_address_space_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (used + (1 << 30), used + (1 << 30)))
    assert machine.available_memory_bytes() <= 1 << 30


@pytest.mark.parametrize("budget", ["900TiB", "899TiB"])
def test_an_r_worker_that_is_to_take_more_than_is_free(
    budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--bind", f"ipc://{tmp_path}/w", "--kv-cache-memory", budget]) == 2
    told = capsys.readouterr()
    assert "--kv-cache-memory" in told.err and "memory that are free" in told.err and not told.out


def test_what_others_were_promised_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as free until they take it, and their containers may have limits of their own: no refusal."""

    def process(*words: str, rss: int = 1 << 30, pid: int = -1) -> Any:
        return SimpleNamespace(pid=pid, info={"cmdline": list(words), "memory_info": SimpleNamespace(rss=rss)})

    others = [
        process("fastdecode", "rworker", "--bind", "shm:///x", "--kv-cache-memory", "6GiB"),
        process("python", "-m", "cpu_attention", "--kv-cache-memory=3GiB", rss=4 << 30),
        process("python", "-m", "cpu_attention"),
        process("tar", "--kv-cache-memory", "90GiB"),
    ]
    monkeypatch.setattr(psutil, "process_iter", lambda _: others)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10 << 30))
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10 << 30)
    assert machine.kv_promised_bytes() == 5 << 30
    machine.check_budget(4 << 30)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        machine.check_budget(6 << 30)
        machine.check_budget(None)  # half
    assert [record.getMessage().split(" of KV here and 5.0 GiB")[0] for record in caplog.records] == ["6.0 GiB"]
    with pytest.raises(ValueError, match=r"12.0 GiB for 2 R-workers is more than the 10.0 GiB"):
        machine.check_budget(6 << 30, num_beside=2)


def test_memory_that_is_not_there_is_told_to_the_s_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = RWorker(kv_cache_bytes=1 << 58)  # no processor has so many addresses
    try:
        answer = worker.handle(1, Hello((LayerSpec(4, 2, 16, 0.25),), "float32", 64))
    finally:
        worker.close()
    assert isinstance(answer, Failure) and answer.kind == "KVBudgetExceeded", answer
    assert "--kv-cache-memory" in answer.text and "Cannot allocate" in answer.text


FILES = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
from cpu_attention.machine import raise_file_limit
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (64, hard)
raise_file_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_files_may_be_as_many_as_the_system_lets() -> None:
    """Of programs, by a call: an import changes nothing."""
    subprocess.run([sys.executable, "-c", FILES], cwd=ROOT, check=True, timeout=60)


def test_a_kernel_that_refuses_is_put_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (64, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine.resource, "setrlimit", refuse)
    machine.raise_file_limit()
