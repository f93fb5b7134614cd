"""Hints about memory do what they say, seen from outside: page faults and the kernel's own account."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_sworker.memory import use_huge_pages

_FAULTS = """
import resource, torch
from transport import keep_freed_memory
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
lost = faults()
keep_freed_memory()
faults()
print(lost, faults())
"""


def test_freed_memory_is_used_again() -> None:
    out = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    lost, kept = map(int, out.stdout.split())
    assert kept < lost / 10, f"{lost} page faults before, {kept} after"


def test_huge_pages() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this system has no transparent huge pages")
    array = np.frombuffer(mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = 1
    use_huge_pages(array.ctypes.data, array.nbytes)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= array.ctypes.data + (8 << 20) < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            assert int(line.split()[1]) >= 8 << 10, line
            return
    pytest.fail("the array is not in the process's map")


def test_too_little_for_a_page_is_no_error() -> None:
    use_huge_pages(np.ones(16, np.uint8).ctypes.data, 16)
