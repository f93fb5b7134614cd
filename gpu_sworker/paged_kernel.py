"""The Triton kernel of `paged_attention.py`; only there it is imported, and only if Triton is installed.

A program takes one KV head of one sequence, all query heads of its group, and a part of the keys they see, so that K
and V are read once; a second kernel merges the parts.  This is flash-decoding (Dao, Haziza, Massa and Sizov, 2023):

    keys          window begins ........................... length      part 0, 1 .. of one sequence
    attend        │ part 0: o, lse │ part 1: o, lse │ part 2 │          tiles of a part one behind the other, rescaled
    merge         o = Σ o · exp(lse - total)                            only if some sequence has more than one part

How a sequence is cut depends on its own length alone: what comes out is the same, bit for bit, whoever is beside it.
"""

# What a kernel's parameters are, Triton finds out when it is called; the comments beside them tell readers.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_sworker.partial_state import PartialState
from gpu_sworker.probe import AttentionSpec

_PART_TOKENS = 512  # a part's o, in float32, then is some percent of its K and V even for groups of 16
_MAX_PARTS = 64  # of a sequence; parts of longer ones grow, so that what they leave behind does not
_LEAST_DOT = 16  # a side of a matrix product, at least; rows of smaller groups are filled up
_TILE_BYTES = 1 << 14  # of K, and of V; two stages of both are in shared memory
_NO_WINDOW = 1 << 30
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def attend_by_kernel(
    q: torch.Tensor, data: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, spec: AttentionSpec
) -> PartialState:
    """`paged_attention.attend_paged_plainly`, for heads and dtypes that `paged_attention.paged_kernel` admits."""
    (num_sequences, num_q_heads, head_dim), block_tokens = q.shape, data.shape[2]
    assert (num_q_heads, head_dim) == (spec.num_q_heads, spec.head_dim), q.shape
    assert data.shape == (2, data.shape[1], block_tokens, spec.num_kv_heads, head_dim) and data.dtype == q.dtype
    assert tables.dtype == lengths.dtype == torch.int32 and len(tables) == len(lengths) == num_sequences
    assert data.is_contiguous() and tables.is_contiguous() and lengths.is_contiguous()
    q = q.contiguous()
    padded_head_dim = triton.next_power_of_2(max(head_dim, _LEAST_DOT))
    tile = min(max(_TILE_BYTES // (padded_head_dim * q.element_size()), _LEAST_DOT), 128)
    # The longest sequence's length is on the device; its table, here, bounds it.
    window = min(spec.window or _NO_WINDOW, _NO_WINDOW)
    most_tokens = min(tables.shape[1] * block_tokens, window)
    num_parts = max(1, min(-(-most_tokens // _PART_TOKENS), _MAX_PARTS))
    dtype = q.dtype if num_parts == 1 else torch.float32
    o = torch.empty((num_sequences, num_q_heads, num_parts, head_dim), dtype=dtype, device=q.device)
    lse = torch.empty((num_sequences, num_q_heads, num_parts), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _attend_part[(num_sequences * spec.num_kv_heads, num_parts)](
            q,
            data[0],
            data[1],
            tables,
            lengths,
            o,
            lse,
            window,
            tables.shape[1],
            num_parts,
            spec.scale,
            spec.softcap or 1.0,
            NUM_KV_HEADS=spec.num_kv_heads,
            GROUP=num_q_heads // spec.num_kv_heads,
            PADDED_GROUP=triton.next_power_of_2(max(num_q_heads // spec.num_kv_heads, _LEAST_DOT)),
            HEAD_DIM=head_dim,
            PADDED_HEAD_DIM=padded_head_dim,
            BLOCK_TOKENS=block_tokens,
            TILE=tile,
            MULTIPLIED=_multiplied(q.dtype),
            IS_CAPPED=spec.softcap is not None,
            PART_TOKENS=_PART_TOKENS,
            MAX_PARTS=_MAX_PARTS,
            num_warps=4,
            num_stages=2,
        )
        if num_parts == 1:
            return PartialState(o.squeeze(2), lse.squeeze(2))
        merged_o = torch.empty_like(q)
        merged_lse = torch.empty((num_sequences, num_q_heads), dtype=torch.float32, device=q.device)
        _merge_parts[(num_sequences * num_q_heads,)](
            o,
            lse,
            lengths,
            merged_o,
            merged_lse,
            window,
            num_parts,
            NUM_Q_HEADS=num_q_heads,
            HEAD_DIM=head_dim,
            PADDED_HEAD_DIM=padded_head_dim,
            PADDED_PARTS=triton.next_power_of_2(num_parts),
            PART_TOKENS=_PART_TOKENS,
            MAX_PARTS=_MAX_PARTS,
            num_warps=4,
        )
    return PartialState(merged_o, merged_lse)


@triton.jit
def _tokens_of_part(num_seen, PART_TOKENS: tl.constexpr, MAX_PARTS: tl.constexpr):
    """How many keys each part of a sequence has, the last one maybe fewer: as many as make at most MAX_PARTS parts."""
    return tl.maximum(PART_TOKENS, (num_seen + MAX_PARTS - 1) // MAX_PARTS)


# Numbers that change from step to step are not to make new kernels.
@triton.jit(do_not_specialize=["window", "max_blocks", "num_parts"])
def _attend_part(
    q,  # [num_sequences, NUM_KV_HEADS, GROUP, HEAD_DIM]
    keys,  # [num_blocks, BLOCK_TOKENS, NUM_KV_HEADS, HEAD_DIM]
    values,  # like keys
    tables,  # [num_sequences, max_blocks]
    lengths,  # [num_sequences]
    o,  # [num_sequences, NUM_KV_HEADS, GROUP, num_parts, HEAD_DIM]; what is written
    lse,  # [num_sequences, NUM_KV_HEADS, GROUP, num_parts]; what is written
    window,
    max_blocks,
    num_parts,
    scale,
    softcap,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MULTIPLIED: tl.constexpr,  # dtype of a product's operands, sums are in float32
    IS_CAPPED: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One KV head of one sequence and one part of its keys: axes (sequence, KV head) and part."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # the device's exponential is of 2
    sequence = (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    part = tl.program_id(1)
    length = tl.load(lengths + sequence)
    first = tl.maximum(length - window, 0)
    part_tokens = _tokens_of_part(length - first, PART_TOKENS, MAX_PARTS)
    begin = first + part * part_tokens
    end = tl.minimum(begin + part_tokens, length)
    if (part > 0) & (begin >= length):  # the merge knows, too; the first part is written even if it is empty
        return

    rows = tl.arange(0, PADDED_GROUP)
    columns = tl.arange(0, PADDED_HEAD_DIM)
    heads = (sequence * NUM_KV_HEADS + kv_head) * GROUP + rows  # of all sequences' query heads
    is_row = rows < GROUP
    is_column = columns < HEAD_DIM
    is_number = is_row[:, None] & is_column[None, :]
    queries = tl.load(q + heads[:, None] * HEAD_DIM + columns[None, :], mask=is_number, other=0.0)
    queries = queries.to(MULTIPLIED)

    largest = tl.full([PADDED_GROUP], float("-inf"), tl.float32)  # score so far, in powers of 2
    total = tl.zeros([PADDED_GROUP], tl.float32)  # Σ 2^(score - largest)
    mean = tl.zeros([PADDED_GROUP, PADDED_HEAD_DIM], tl.float32)  # Σ 2^(score - largest) · value
    for tile in range(begin, end, TILE):
        positions = tile + tl.arange(0, TILE)
        is_seen = positions < end
        blocks = tl.load(tables + sequence * max_blocks + positions // BLOCK_TOKENS, mask=is_seen, other=0)
        slots = blocks.to(tl.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
        places = (slots[:, None] * NUM_KV_HEADS + kv_head) * HEAD_DIM + columns[None, :]
        is_stored = is_seen[:, None] & is_column[None, :]
        k = tl.load(keys + places, mask=is_stored, other=0.0).to(MULTIPLIED)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if IS_CAPPED:
            # tanh, which Triton has not; where exp overflows it is 1 all the same
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0))
        scores = tl.where(is_seen[None, :], scores * LOG2_E, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))  # finite: a tile has at least one key
        shrunk = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        v = tl.load(values + places, mask=is_stored, other=0.0).to(MULTIPLIED)
        total = total * shrunk + tl.sum(weights, 1)
        mean = mean * shrunk[:, None] + tl.dot(weights.to(MULTIPLIED), v, input_precision="ieee")
        largest = larger

    # Of an empty sequence total is 0: o is 0 then, and lse -inf.
    outputs = heads * num_parts + part
    result = mean / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(o + outputs[:, None] * HEAD_DIM + columns[None, :], result.to(o.dtype.element_ty), mask=is_number)
    tl.store(lse + outputs, (largest + tl.log2(total)) / LOG2_E, mask=is_row)


@triton.jit(do_not_specialize=["window", "num_parts"])
def _merge_parts(
    o,  # [num_sequences, NUM_Q_HEADS, num_parts, HEAD_DIM] float32
    lse,  # [num_sequences, NUM_Q_HEADS, num_parts] float32
    lengths,  # [num_sequences]
    merged_o,  # [num_sequences, NUM_Q_HEADS, HEAD_DIM]; what is written
    merged_lse,  # [num_sequences, NUM_Q_HEADS]; what is written
    window,
    num_parts,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One query head of one sequence: `partial_state.merge` over those of its parts that were written."""
    head = tl.program_id(0).to(tl.int64)  # of all sequences' query heads
    num_seen = tl.minimum(tl.load(lengths + head // NUM_Q_HEADS), window)
    part_tokens = _tokens_of_part(num_seen, PART_TOKENS, MAX_PARTS)
    parts = tl.arange(0, PADDED_PARTS)
    columns = tl.arange(0, PADDED_HEAD_DIM)
    is_column = columns < HEAD_DIM
    is_written = (parts == 0) | (parts * part_tokens < num_seen)
    sums = tl.load(lse + head * num_parts + parts, mask=is_written, other=float("-inf"))
    largest = tl.maximum(tl.max(sums, 0), -3.0e38)  # finite: where no key is seen exp(-inf - -inf) is to be 0
    weights = tl.exp(sums - largest)
    total = tl.sum(weights, 0)
    of_parts = tl.load(
        o + (head * num_parts + parts)[:, None] * HEAD_DIM + columns[None, :],
        mask=is_written[:, None] & is_column[None, :],
        other=0.0,
    )
    result = tl.sum(of_parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(merged_o + head * HEAD_DIM + columns, result.to(merged_o.dtype.element_ty), mask=is_column)
    tl.store(merged_lse + head, largest + tl.log(total))


def _multiplied(dtype: torch.dtype) -> tl.dtype:
    """Triton's interpreter, by which tests run without a device, cannot multiply bfloat16."""
    is_interpreted = not isinstance(_attend_part, triton.runtime.JITFunction)
    return tl.float32 if is_interpreted and dtype == torch.bfloat16 else _DTYPES[dtype]
