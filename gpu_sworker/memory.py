"""What torch's CPU allocator leaves to the C library's defaults, and what they cost an S-worker.

- glibc maps every large tensor anew and gives its pages back when it is freed, so each layer of a prefill faults its
  activations in page by page: a tenth of its time (4096 tokens x 2816: 2150 ms; kept: 1950 ms).
- Packed weights lie in 4 KiB pages, where the processor's prefetch stops at every one: a sixth of a decode step of 16
  sequences, which mostly reads weights (22 ms; in huge pages 18.6 ms).

Both are hints: where the system has no such call, nothing happens.
"""

from __future__ import annotations

import ctypes
import logging
import mmap

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEEP_BELOW = 1 << 30  # bytes of one tensor
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the second one does it now, for pages that are there

_libc = ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Memory that tensors of this process leave is used again instead of going back to the system."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW)
        _libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages(address: int, num_bytes: int) -> None:
    """For whole pages between `address` and its end."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if length > 0 and hasattr(_libc, "madvise"):
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            if _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice):
                logger.debug("madvise %d refused for %d bytes", advice, length)
