"""All that a compiled entry is told, as one struct of addresses and sizes: threads get its address and nothing else.

Nothing in it keeps anything alive, and nothing is checked behind it: `kernel.py` fills it and holds the arrays.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int64

import numpy as np

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_DATA = 40  # where a PyArrayInterface has its data, which numpy promises: two ints, a char, two ints, two pointers


class Job(Structure):
    _fields_ = [
        # K and V to store: [num_tokens, num_kv_heads, head_dim] of the dtypes that `wire.WIRES` numbers
        ("k", c_int64),
        ("k_wire", c_int64),
        ("k_token_bytes", c_int64),  # from one token to the next
        ("k_head_bytes", c_int64),
        ("v", c_int64),
        ("v_wire", c_int64),
        ("v_token_bytes", c_int64),
        ("v_head_bytes", c_int64),
        ("num_tokens", c_int64),
        ("blocks", c_int64),  # [num_tokens] int32
        ("offsets", c_int64),  # [num_tokens] int32
        ("append_bounds", c_int64),  # [num_append_shares + 1] int64: tokens bounds[i] to bounds[i + 1] are share i
        ("num_append_shares", c_int64),
        ("append_entry", c_int64),  # address; with it token r is share r, stored by the thread that attends to row r
        # The layer's blocks.
        ("data", c_int64),  # [num_blocks, num_kv_heads, head.nbytes] uint8
        ("data_bytes", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),  # of the wire
        # The queries: [num_rows, num_q_heads, head_dim]
        ("q", c_int64),
        ("q_wire", c_int64),
        ("q_row_bytes", c_int64),
        ("q_head_bytes", c_int64),
        ("num_rows", c_int64),
        ("num_q_heads", c_int64),
        ("tables", c_int64),  # [num_rows, max_blocks] int32
        ("max_blocks", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_int64),  # [num_q_heads] float32, or 0: none
        # The work, see `work.Work`.
        ("num_pieces", c_int64),
        ("rows", c_int64),  # [num_pieces] int64
        ("begins", c_int64),  # like rows
        ("ends", c_int64),
        ("places", c_int64),
        ("jointly", c_int64),
        ("part_firsts", c_int64),  # [num_rows] int64
        ("part_counts", c_int64),  # like part_firsts
        ("bounds", c_int64),  # [num_shares + 1] int64
        ("num_shares", c_int64),
        ("joint_entry", c_int64),  # address, for pieces of several rows
        # What is written.
        ("out", c_int64),  # [num_rows, num_q_heads, head_dim]
        ("out_wire", c_int64),
        ("maxima", c_int64),  # [num_rows, num_q_heads] float32
        ("sums", c_int64),  # like maxima
        # The parts of cut rows, [num_parts, num_q_heads, stored_dim] and [num_parts, num_q_heads] float32, and how
        # many of them are done: [num_parts] int32 at a row's first part, 0 in the beginning.
        ("num_parts", c_int64),
        ("parts", c_int64),
        ("part_maxima", c_int64),
        ("part_sums", c_int64),
        ("num_done", c_int64),
    ]


JOB = np.dtype(Job)


def address(array: np.ndarray) -> int:
    """Of its first number.  numpy's own ways to it build a dictionary, and take three times as long; a layer has
    a dozen of them.
    """
    capsule = array.__array_struct__  # which has the interface, and frees it with itself
    return c_int64.from_address(_get_pointer(capsule, None) + _DATA).value
