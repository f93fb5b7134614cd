"""The machine this process may use: cores, NUMA nodes, memory.  The only file of this room that asks it."""

from __future__ import annotations

import contextlib
import itertools
import logging
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

from cpu_attention import cgroups

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": factor for unit, factor in _UNITS.items() if unit not in ("", "b")}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

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


def num_usable_cores() -> int:
    """Threads that can run at once: a core each, within the processor time that a container may have."""
    num_cores, quota = len(available_cores()), cgroups.cpu_quota()
    return num_cores if quota is None else max(1, min(num_cores, int(quota)))


def available_memory_bytes() -> int:
    """What can still be taken without swapping: the machine's, a cgroup's, a limit of this process (ulimit -v), or
    that of the NUMA nodes whose cores this process may use, whichever is least."""
    rooms = [psutil.virtual_memory().available]
    cores = set(available_cores())
    near = sum(node.available_bytes for node in numa_nodes() if cores.intersection(node.cores))
    rooms += [near] if near else []
    rooms += [limit.limit_bytes - limit.used_bytes for limit in cgroups.memory_limits()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        rooms.append(address_space - psutil.Process().memory_info().vms)
    return max(0, min(rooms))


def default_kv_cache_bytes() -> int:
    return int(DEFAULT_KV_SHARE * available_memory_bytes())


def cgroup_memory_limit_bytes() -> int | None:
    """The tightest memory limit among this process's cgroups; None if there is none."""
    return min((limit.limit_bytes for limit in cgroups.memory_limits()), default=None)


def check_budget(kv_cache_bytes: int | None, num_beside: int = 1) -> None:
    """At an R-worker's start: memory is taken only when sequences come, and what is too much then ends the process.

    kv_cache_bytes: None: a share of what is free; num_beside: R-workers with as much that start here now.
    Raises ValueError if it is not free; warns if it was promised to others that have not taken it yet.
    """
    free = available_memory_bytes()
    asked = default_kv_cache_bytes() if kv_cache_bytes is None else kv_cache_bytes * num_beside
    if asked > free:
        each = "" if num_beside == 1 else f" for {num_beside} R-workers"
        raise ValueError(f"{format_bytes(asked)}{each} is more than the {format_bytes(free)} of memory that are free")
    promised = kv_promised_bytes()
    # Of the machine: others may be in containers of their own, whose limits say nothing about this one's.
    if promised and asked + promised > psutil.virtual_memory().available:
        logger.warning(
            "%s of KV here and %s that other R-workers of this machine have not taken yet are more than the %s of "
            "memory that are free: give each a share, by --kv-cache-memory",
            format_bytes(asked), format_bytes(promised), format_bytes(psutil.virtual_memory().available),
        )  # fmt: skip


def kv_promised_bytes() -> int:
    """What R-workers that run on this machine were started to take (--kv-cache-memory) and have not taken yet: it
    counts as free until sequences come.  As far as this user may look."""
    promised = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        words = process.info["cmdline"] or []
        if process.pid == os.getpid() or not {"rworker", "cpu_attention"} & set(words):
            continue
        given = [word.partition("=")[2] or following for word, following in zip(words, [*words[1:], ""], strict=True)
                 if word.partition("=")[0] == "--kv-cache-memory"]  # fmt: skip
        with contextlib.suppress(ValueError):
            held = process.info["memory_info"].rss if process.info["memory_info"] else 0
            promised += max(0, parse_bytes(given[-1]) - held) if given else 0
    return promised


def numa_nodes() -> tuple[NumaNode, ...]:
    nodes = []
    for path in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        memory = {
            name: int(kib) * 1024
            for name, kib in re.findall(
                r"^Node [0-9]+ ([^:]+):\s+([0-9]+) kB", cgroups.read(path / "meminfo"), re.MULTILINE
            )
        }
        available = sum(memory.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
        cores = parse_cores(cgroups.read(path / "cpulist"))
        nodes.append(NumaNode(int(path.name[4:]), cores, memory.get("MemTotal", 0), available))
    return tuple(nodes)


def cpu_name() -> str:
    name = re.search(r"^model name\s*:\s*(.+)$", cgroups.read(Path("/proc/cpuinfo")), re.MULTILINE)
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
