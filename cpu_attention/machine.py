"""The machine this process may use: cores, NUMA nodes, memory.  The only file of this room that asks it."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import queue
import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": factor for unit, factor in _UNITS.items() if unit not in ("", "b")}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_V1_ROOT = Path("/sys/fs/cgroup/memory")
_NO_LIMIT = 1 << 60  # version 1 says "unlimited" with a number near 2^63

# Of what is free: the rest is for the model, the operating system and everybody else.
DEFAULT_KV_SHARE = 0.5


@dataclass(frozen=True)
class NumaNode:
    index: int
    cores: tuple[int, ...]
    memory_bytes: int
    available_bytes: int  # free, or in files' pages, which the kernel takes back first


def parse_bytes(text: str | int) -> int:
    """``4GiB``, ``512M``, ``1.5 GB`` or a number of bytes.  Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 4GiB, 512MB or 1073741824")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(num_bytes: float) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def zeroed_pages(num_bytes: int) -> np.ndarray:
    """Memory that is taken page by page when it is first written, near the core that writes it; in huge pages
    where the kernel grants them, so that random blocks do not miss the TLB.

    # [num_bytes] uint8
    """
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are never huge
    with contextlib.suppress(OSError, AttributeError):  # no huge pages here: slower, not wrong
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)  # which keeps the pages until nobody refers to them


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: a connection is one.  The usual 1024 are kept low for
    programs that wait with `select`, which is not done here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # more than the kernel has for one process
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def available_cores() -> tuple[int, ...]:
    """Cores this process may run on, by its affinity mask."""
    return tuple(sorted(os.sched_getaffinity(0)))


def keep_to_cores(cores: Sequence[int]) -> None:
    """This process, but for threads that it has already.  Raises ValueError."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ValueError(f"this process may use {format_cores(available_cores())} only") from error


def share_of_cores(index: int, num_workers: int, cores: Sequence[int], nodes: Sequence[NumaNode]) -> tuple[int, ...]:
    """Of `cores` those of one of several workers: on one NUMA node each, or on whole nodes if those are more.

    None if the cores do not go round.
    """
    near = [own for node in nodes if (own := sorted(set(node.cores) & set(cores)))]
    if sum(map(len, near)) != len(cores):  # a machine that does not tell
        near = [sorted(cores)]
    if num_workers < len(near):
        return tuple(core for own in near[index::num_workers] for core in own)
    own, place = near[index % len(near)], index // len(near)
    share = len(own) // len(range(index % len(near), num_workers, len(near)))
    return tuple(own[place * share :][:share])


def pin_thread(core: int) -> None:
    """The calling thread to one core.  A thread that is woken is often put beside the one that woke it, and moved
    away only milliseconds later: a whole attention call would then run on half the cores."""
    with contextlib.suppress(OSError):  # the core was taken from this process meanwhile: slower, not wrong
        os.sched_setaffinity(0, {core})  # 0: this thread alone


def pin_next(cores: queue.SimpleQueue[int]) -> None:
    """For the threads of a pool: the calling one to the next of these cores, if any is left."""
    with contextlib.suppress(queue.Empty):
        pin_thread(cores.get_nowait())


def available_memory_bytes() -> int:
    """What can still be taken without swapping: the machine's, a cgroup's, or that of the NUMA nodes whose cores
    this process may use, whichever is least."""
    available = psutil.virtual_memory().available
    cores = set(available_cores())
    near = sum(node.available_bytes for node in numa_nodes() if cores.intersection(node.cores))
    rooms = [max(0, group.limit_bytes - group.used_bytes) for group in _limited_cgroups()]
    return min([available, *rooms, *([near] if near else [])])


def default_kv_cache_bytes() -> int:
    return int(DEFAULT_KV_SHARE * available_memory_bytes())


def cgroup_memory_limit_bytes() -> int | None:
    """The tightest memory limit among this process's cgroups; None if there is none."""
    return min((group.limit_bytes for group in _limited_cgroups()), default=None)


def numa_nodes() -> tuple[NumaNode, ...]:
    nodes = []
    for path in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        memory = {
            name: int(kib) * 1024
            for name, kib in re.findall(r"^Node [0-9]+ ([^:]+):\s+([0-9]+) kB", _read(path / "meminfo"), re.MULTILINE)
        }
        available = sum(memory.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
        cores = parse_cores(_read(path / "cpulist"))
        nodes.append(NumaNode(int(path.name[4:]), cores, memory.get("MemTotal", 0), available))
    return tuple(nodes)


def cpu_name() -> str:
    name = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return name[1] if name else "unknown"


def parse_cores(text: str) -> tuple[int, ...]:
    """``0-3,8`` -> (0, 1, 2, 3, 8).  Raises ValueError."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cores.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(cores)


def format_cores(cores: Sequence[int]) -> str:
    """(0, 1, 2, 3, 8) -> ``0-3,8``"""
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(cores)), lambda pair: pair[1] - pair[0]):
        numbers = [core for _, core in run]
        parts.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return ",".join(parts)


@dataclass(frozen=True)
class _Cgroup:
    limit_bytes: int
    used_bytes: int  # without the page cache that the kernel takes back first


def _limited_cgroups() -> list[_Cgroup]:
    """This process's memory cgroup and those around it, version 2 or 1, as far as they have a limit."""
    groups = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit_file, usage_file = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = _V1_ROOT, "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        directory = root / path.lstrip("/")
        while directory.is_relative_to(root):
            limit = _read_int(directory / limit_file)
            if limit is not None and limit < _NO_LIMIT:
                statistics = _read(directory / "memory.stat")
                cache = re.search(r"^(?:total_)?inactive_file ([0-9]+)$", statistics, re.MULTILINE)
                used = (_read_int(directory / usage_file) or 0) - (int(cache[1]) if cache else 0)
                groups.append(_Cgroup(limit, max(0, used)))
            directory = directory.parent
    return groups


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None
