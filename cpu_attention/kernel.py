"""The functions of `reference.py`, compiled: fp32 arithmetic over any storage dtype, at the speed of memory.

Compiled at first use for a layer's shape (`vector.py`, `append.py`) and kept on disk; `warm_up` does it ahead of
time.  Nothing here checks bounds: whoever calls has checked that tables, pieces and shapes fit the store.  All of
it releases the GIL, and calls from several threads do not share anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_attention.append import make_append
from cpu_attention.layout import NUMBER_DTYPES, AttentionRule, HeadFormat
from cpu_attention.state import Pieces, State
from cpu_attention.vector import Shape, make_attend

_FLOAT32 = np.dtype(np.float32)


def append(
    k: np.ndarray,  # [num_tokens, num_kv_heads, head_dim] of any float dtype
    v: np.ndarray,  # like k
    blocks: np.ndarray,  # [num_tokens] int32, the block each token goes to
    offsets: np.ndarray,  # [num_tokens] int32, its place in the block
    data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8, written
    head: HeadFormat,
) -> None:
    """Stores K and V of new tokens, rounded or quantised to the storage dtype.

    The tokens of a block come in order, the first one into place 0, but may come again from any place on: each takes
    nothing from what was there, and leaves nothing of it behind itself that attention would read.
    """
    if len(k):
        compiled = make_append(k.dtype.name, head)
        compiled(_bytes(k, head), _bytes(v, head), blocks, offsets, data.reshape(-1))


def attend_pieces(
    q: np.ndarray,  # [num_rows, num_q_heads, head_dim] float32
    data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8
    head: HeadFormat,
    block_tables: np.ndarray,  # [num_rows, max_blocks] int32: (row, position // block_tokens) -> block
    pieces: Pieces,
    rule: AttentionRule,  # its scale and softcap; window and sinks are for whoever cuts and merges pieces
    state: State,  # written at pieces.slots
) -> None:
    """softmax(q·K)·V of each piece."""
    shape = Shape(head.dtype, head.stored_dim, head.block_tokens, q.shape[1] // data.shape[1], rule.softcap is not None)
    out = state.out
    if head.stored_dim != head.head_dim:
        out = np.empty((*out.shape[:2], head.stored_dim), np.float32)
    make_attend(shape)(
        _padded(_writeable(np.ascontiguousarray(q, _FLOAT32)), head),
        data.reshape(-1),
        block_tables,
        pieces.rows,
        pieces.begins,
        pieces.ends,
        pieces.slots,
        np.float32(rule.scale),
        np.float32(rule.softcap or 0.0),
        out,
        state.maxima,
        state.sums,
    )
    if out is not state.out:
        state.out[pieces.slots] = out[pieces.slots, :, : head.head_dim]


def warm_up(head: HeadFormat, group: int, rule: AttentionRule, wires: Sequence[str]) -> None:
    """Compiles (or loads from disk) what a layer of this shape and rule needs, before the first token.

    wires: the dtypes that K and V may come in.
    """
    data = np.zeros((1, 1, head.nbytes), np.uint8)
    zero = np.zeros(1, np.int32)
    for wire in wires:
        token = np.zeros((1, 1, head.head_dim), NUMBER_DTYPES[wire])
        append(token, token, zero, zero, data, head)
    pieces = Pieces(*np.array([[0], [0], [1], [0]]))
    q = np.zeros((1, group, head.head_dim), np.float32)
    attend_pieces(q, data, head, zero[None], pieces, rule, State.empty(1, group, head.head_dim))


def _bytes(array: np.ndarray, head: HeadFormat) -> np.ndarray:
    """Flat and writeable bytes: one compiled version then serves arrays from any source.

    Received frames are read-only, which numba takes for another type; copying these few rows costs less than a
    second compilation, and nothing beside the KV they attend to.
    """
    return _writeable(_padded(np.ascontiguousarray(array), head)).reshape(-1).view(np.uint8)


def _padded(array: np.ndarray, head: HeadFormat) -> np.ndarray:
    missing = head.stored_dim - head.head_dim
    return np.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array


def _writeable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()
