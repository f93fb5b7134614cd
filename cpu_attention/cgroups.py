"""What a container or a job may take of the machine, by its control groups: version 2, version 1, or both at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # version 1 says "unlimited" with a number near 2^63


@dataclass(frozen=True)
class MemoryLimit:
    limit_bytes: int
    used_bytes: int  # without the page cache that the kernel takes back first


def memory_limits() -> list[MemoryLimit]:
    """Of this process's group and those around it, as far as they have one."""
    limits = []
    for directory, version in _directories("memory"):
        if version == 2:  # from `high` on it is held up until it hardly moves
            found = [read_int(directory / "memory.max"), read_int(directory / "memory.high")]
            usage_file = "memory.current"
        else:
            found = [read_int(directory / "memory.limit_in_bytes")]
            usage_file = "memory.usage_in_bytes"
        limit = min((number for number in found if number is not None), default=_NO_LIMIT)
        if limit < _NO_LIMIT:
            statistics = read(directory / "memory.stat")
            # Of version 1 `total_` is with the groups inside, as is what is used.
            cached = re.findall(r"^(?:total_)?inactive_file ([0-9]+)$", statistics, re.MULTILINE)
            used = (read_int(directory / usage_file) or 0) - max(map(int, cached), default=0)
            limits.append(MemoryLimit(limit, max(0, used)))
    return limits


def cpu_quota() -> float | None:
    """Processors' worth of time that this process may use at most; None: of all its cores."""
    quotas = []
    for directory, version in _directories("cpu"):
        if version == 2:
            quota, _, period = read(directory / "cpu.max").strip().partition(" ")
        else:
            quota, period = (read(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):  # not `max` or -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _directories(controller: str) -> Iterator[tuple[Path, int]]:
    """(directory, version) of this process's group and those around it."""
    for line in read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, version = ROOT, 2
        elif controller in controllers.split(","):
            root, version = ROOT / controller, 1
        else:
            continue
        directory = root / path.lstrip("/")
        while directory.is_relative_to(root):
            yield directory, version
            directory = directory.parent


def read(path: Path) -> str:
    """Nothing, if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_int(path: Path) -> int | None:
    text = read(path).strip()
    return int(text) if text.isdecimal() else None
