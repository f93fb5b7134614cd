"""The functions of `reference.py`, compiled: fp32 arithmetic over any storage dtype, at the speed of memory.

Compiled at first use for a layer's shape (`vector.py`, `append.py`) and kept on disk; `warm_up` does it ahead of
time.  What is compiled checks no bounds, and gets addresses: shapes and dtypes are checked here, and whoever calls
has checked that tables, pieces and places fit the store.  All of it releases the GIL, and calls from several threads
do not share anything.
"""

from __future__ import annotations

import numpy as np

from cpu_attention.append import make_append
from cpu_attention.job import Job, address
from cpu_attention.joint import make_joint
from cpu_attention.layout import NUMBER_DTYPES, AttentionRule, HeadFormat
from cpu_attention.state import State
from cpu_attention.team import ALONE, Team
from cpu_attention.vector import Shape, make_attend
from cpu_attention.wire import WIRES
from cpu_attention.work import NewTokens, Work, cut_work


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
    job = Job()
    uses = _describe_store(job, data, head), _describe_tokens(job, NewTokens(k, v, blocks, offsets, [slice(0, len(k))]))
    ALONE.run(make_append(head), job, 1, uses)


def attend(
    q: np.ndarray,  # [num_rows, num_q_heads, head_dim] of any float dtype
    data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8, written if tokens are new
    head: HeadFormat,
    block_tables: np.ndarray,  # [num_rows, max_blocks] int32: (row, position // block_tokens) -> block
    work: Work,  # of these rows
    rule: AttentionRule,  # its window is in `work` already
    state: State,  # [num_rows, …], written; `out` of any float dtype
    new: NewTokens | None = None,  # stored first, see there
    team: Team = ALONE,
) -> None:
    """softmax(q·K)·V of each row over its own sequence, and what is needed to merge it with others."""
    num_rows, num_q_heads, _ = q.shape
    num_kv_heads = data.shape[1]
    shape = _shape(head, num_q_heads // num_kv_heads, rule)
    assert num_q_heads == shape.group * num_kv_heads and q.shape[2] == head.head_dim
    assert state.out.shape == q.shape and state.maxima.shape == state.sums.shape == q.shape[:2]
    assert num_rows == work.num_rows == len(block_tables)
    job = Job(num_rows=num_rows, num_q_heads=num_q_heads, scale=rule.scale, softcap=rule.softcap or 0.0)
    uses: list[object] = [_describe_store(job, data, head), state]
    if new is not None:
        uses.append(_describe_tokens(job, new))
        entry = make_append(head)
        if new.shares is None:
            assert len(new.k) == num_rows
            job.append_entry = entry.address
            uses.append(entry)
        else:
            team.run(entry, job, len(new.shares), uses)

    def describe(name: str, array: np.ndarray, dtype: type) -> None:
        array = np.ascontiguousarray(array, dtype)
        setattr(job, name, address(array))
        uses.append(array)

    rows = _strided(q)
    job.q, job.q_wire, (job.q_row_bytes, job.q_head_bytes, _) = address(rows), _wire(rows), rows.strides
    uses.append(rows)
    describe("tables", block_tables, np.int32)
    job.max_blocks = block_tables.shape[1]
    if rule.sinks is not None:
        assert rule.sinks.shape == (num_q_heads,)
        describe("sinks", rule.sinks, np.float32)
    job.num_pieces, job.num_shares, job.num_parts = len(work.pieces), len(work.shares), work.num_parts
    for name, where in work.addresses.items():
        setattr(job, name, where)
    uses.append(work)
    for array, dtype in ((state.out, state.out.dtype), (state.maxima, np.float32), (state.sums, np.float32)):
        assert array.flags.c_contiguous and array.flags.writeable and array.dtype == dtype
    job.out, job.out_wire = address(state.out), _wire(state.out)
    job.maxima, job.sums = address(state.maxima), address(state.sums)
    if work.is_joint:
        joint = make_joint(shape.of_any_group)
        job.joint_entry = joint.address
        uses.append(joint)
    if work.num_parts:
        parts = State.empty(work.num_parts, num_q_heads, head.stored_dim)
        num_done = np.zeros(work.num_parts, np.int32)
        job.parts, job.part_maxima, job.part_sums = address(parts.out), address(parts.maxima), address(parts.sums)
        job.num_done = address(num_done)
        uses += [parts, num_done]
    team.run(make_attend(shape), job, len(work.shares), uses)


def warm_up(head: HeadFormat, group: int, rule: AttentionRule) -> None:
    """Compiles (or loads from disk) what a layer of this shape and rule needs, before the first token."""
    data, q = np.zeros((1, 1, head.nbytes), np.uint8), np.zeros((1, group, head.head_dim), np.float32)
    zero, token = np.zeros(1, np.int32), np.zeros((1, 1, head.head_dim), np.float32)
    work = cut_work(np.zeros(1, np.int64), np.ones(1, np.int64), 1, head.block_tokens)
    rule = AttentionRule(rule.scale, softcap=rule.softcap)
    attend(q, data, head, zero[None], work, rule, State.empty(*q.shape), NewTokens(token, token, zero, zero))
    make_joint(_shape(head, group, rule).of_any_group)


def _shape(head: HeadFormat, group: int, rule: AttentionRule) -> Shape:
    return Shape(head.dtype, head.stored_dim, head.block_tokens, group, rule.softcap is not None)


def _describe_store(job: Job, data: np.ndarray, head: HeadFormat) -> np.ndarray:
    """Returns what has to be kept, like the next one."""
    assert data.dtype == np.uint8 and data.shape[2] == head.nbytes and data.flags.c_contiguous and data.flags.writeable
    job.data, job.data_bytes, job.num_kv_heads, job.head_dim = address(data), data.nbytes, data.shape[1], head.head_dim
    return data


def _describe_tokens(job: Job, new: NewTokens) -> tuple[np.ndarray, ...]:
    k, v = _strided(new.k), _strided(new.v)
    assert k.shape == v.shape == (len(new.blocks), job.num_kv_heads, job.head_dim) and len(new.offsets) == len(k)
    blocks, offsets = (np.ascontiguousarray(column, np.int32) for column in (new.blocks, new.offsets))
    if new.shares is None:
        bounds = np.arange(len(k) + 1)
    else:
        bounds = np.array([*(share.start for share in new.shares), len(k)], np.int64)
    job.k, job.k_wire, (job.k_token_bytes, job.k_head_bytes, _) = address(k), _wire(k), k.strides
    job.v, job.v_wire, (job.v_token_bytes, job.v_head_bytes, _) = address(v), _wire(v), v.strides
    job.num_tokens, job.blocks, job.offsets = len(k), address(blocks), address(offsets)
    job.append_bounds, job.num_append_shares = address(bounds), len(bounds) - 1
    return k, v, blocks, offsets, bounds


def _strided(array: np.ndarray) -> np.ndarray:
    """As it lies, read-only or not, if the channels of a head do so one behind the other; or a copy."""
    is_plain = array.flags.aligned and (array.strides[2] == array.itemsize or array.shape[2] == 1)
    return array if is_plain else np.ascontiguousarray(array)


def _wire(array: np.ndarray) -> int:
    number = _WIRES.get(array.dtype)
    if number is None:
        raise ValueError(f"numbers of {array.dtype}; they may be {', '.join(WIRES)}")
    return number


_WIRES = {NUMBER_DTYPES[name]: number for name, number in WIRES.items()}  # a dtype's `name` is made anew at every use
