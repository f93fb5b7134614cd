"""Host memory that torch does not manage: huge pages for weights, and pages that are not there before they are used.

What lies still and is read through and through belongs into huge pages.

Packed weights lie in 4 KiB pages, where the processor's prefetch stops at every one: that costs a sixth of a decode
step of 16 sequences, which mostly reads weights (22 ms; in huge pages 18.6 ms).  torch asks for huge pages only for all
of its memory at once (THP_MEM_ALLOC_ENABLE), which makes activations slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap

import psutil
import torch

logger = logging.getLogger(__name__)

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the second one does it now, for pages that are there


def use_huge_pages(address: int, num_bytes: int) -> None:
    """For whole pages between `address` and its end.  A hint: where the system has no such call, nothing happens."""
    libc = ctypes.CDLL(None)
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if length > 0 and hasattr(libc, "madvise"):
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice):
                logger.debug("madvise %d refused for %d bytes", advice, length)


def untouched_memory(num_bytes: int) -> torch.Tensor:
    """Memory that is taken page by page when it is first written, in huge pages where the kernel grants them.

    # [num_bytes] uint8.  Raises OSError if the process may not have so much.
    """
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are never huge
    with contextlib.suppress(OSError, AttributeError):  # no huge pages here: slower, not wrong
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the pages until nobody refers to them


def total_bytes(device: torch.device) -> int:
    """All there is of the device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def free_bytes(device: torch.device) -> int:
    """What is free of the device's memory; of a processor's, what can be taken without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
