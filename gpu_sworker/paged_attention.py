"""One query each of many sequences over their K and V in a paged store, in one call, as a partial state.

    tables: (sequence, position // block_tokens) -> block of data    lengths: sequence -> tokens, with the query's

`attend_paged_plainly` is the definition: it gathers, in float32, and runs wherever torch does.  `paged_kernel` is the
same in one launch, where Triton and a device for it are there and it was right when it was tried; else there is none,
and to attend sequence by sequence is faster than to gather: K and V that lie in one piece need no copy then.

Knows no store and no sequences; nothing in a table is checked, nor what lies behind a sequence's last token looked at.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache

import torch

from gpu_sworker.partial_state import PartialState
from gpu_sworker.probe import AttentionSpec

# A torch without CUDA has no use for it, and Triton takes its time to be loaded.
if torch.version.cuda is not None or "TRITON_INTERPRET" in os.environ:
    try:
        from gpu_sworker.paged_kernel import attend_by_kernel
    except ImportError as error:  # no Triton, or one that does not fit this machine
        if (error.name or "").startswith("gpu_sworker"):
            raise
        attend_by_kernel = None  # type: ignore[assignment]
else:
    attend_by_kernel = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of numbers around 1
_MAX_HEAD_DIM, _MAX_GROUP = 256, 64  # more do not fit into a program's registers

# (q, data, tables, lengths, spec) -> state, as attend_paged_plainly has them
PagedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], PartialState]


def attend_paged_plainly(
    q: torch.Tensor,  # [num_sequences, num_q_heads, head_dim]
    data: torch.Tensor,  # [K or V, num_blocks, block_tokens, num_kv_heads, head_dim], of q's dtype
    tables: torch.Tensor,  # [num_sequences, max_blocks] int32; beyond a sequence's own blocks any that exist
    lengths: torch.Tensor,  # [num_sequences] int32
    spec: AttentionSpec,  # whose sinks are not for here
) -> PartialState:
    """Each query, its sequence's last token, over the keys it sees.

    Takes the memory of all K and V in float32, as often as the longest is long.
    """
    assert q.shape == (len(tables), spec.num_q_heads, spec.head_dim), q.shape
    assert data.shape[3:] == (spec.num_kv_heads, spec.head_dim), data.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    # [num_sequences, num_kv_heads, num_tokens, head_dim]
    keys, values = (kv[tables.long()].flatten(1, 2).transpose(1, 2).to(dtype) for kv in data)
    positions, ends = torch.arange(keys.shape[2], device=q.device), lengths.long()[:, None]
    is_seen = positions < ends  # [num_sequences, num_tokens]
    if spec.window is not None:
        is_seen &= positions >= ends - spec.window
    is_hidden = ~is_seen[:, None, :, None]
    queries = q.to(dtype).unflatten(1, (spec.num_kv_heads, -1))  # [num_sequences, num_kv_heads, group, head_dim]
    scores = spec.scale * (queries @ keys.transpose(2, 3))  # [num_sequences, num_kv_heads, group, num_tokens]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(is_hidden.transpose(2, 3), -torch.inf)
    lse = scores.logsumexp(3)
    finite = lse.clamp(min=torch.finfo(dtype).min)  # where no key is seen: exp(-inf - -inf) is to be 0
    # What lies behind a sequence is whatever memory held before; 0 · NaN would be NaN.
    o = torch.exp(scores - finite.unsqueeze(3)) @ values.masked_fill(is_hidden, 0)
    return PartialState(o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2))


def paged_kernel(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> PagedAttention | None:
    """`attend_paged_plainly` as a Triton kernel; None: there is none that is right for such heads on this device."""
    if attend_by_kernel is None or device.type != "cuda" or dtype not in _TOLERANCE:
        return None
    group, num_kv_heads = spec.num_q_heads // spec.num_kv_heads, min(spec.num_kv_heads, 2)  # more are like two
    if spec.head_dim > _MAX_HEAD_DIM or group > _MAX_GROUP:
        return None
    is_right = _is_right(device, dtype, num_kv_heads, group, spec.head_dim, spec.softcap is not None)
    return attend_by_kernel if is_right else None


@lru_cache(maxsize=256)
def _is_right(
    device: torch.device, dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int, is_capped: bool
) -> bool:
    """Whether the kernel gives what it should.

    A driver, a compiler and a card must all fit Triton, so it is tried once for each kind of heads before it is used.
    """
    generator, block_tokens = torch.Generator().manual_seed(0), 16
    lengths = torch.tensor([1, 37, 700], dtype=torch.int32)
    tables = torch.randperm(3 * 44, generator=generator).to(torch.int32).view(3, 44)
    q, data = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((3, num_kv_heads * group, head_dim), (2, tables.numel(), block_tokens, num_kv_heads, head_dim))
    )
    softcap = 3.0 if is_capped else None
    for window in (30, None):  # in one part, and in several
        spec = AttentionSpec(num_kv_heads * group, num_kv_heads, head_dim, head_dim**-0.5, window, softcap, None)
        arguments = q, data, tables.to(device), lengths.to(device), spec
        expected = attend_paged_plainly(*arguments)
        try:
            state = attend_by_kernel(*arguments)
            pairs = (state.o, expected.o), (state.lse, expected.lse)
            is_right = all(bool(((a.float() - b.float()).abs() < _TOLERANCE[dtype]).all()) for a, b in pairs)
        except Exception as error:  # of the compiler, of what it calls, of the driver: Triton has no common one
            logger.warning("no Triton kernel for %s heads of %d on %s: %s", dtype, head_dim, device, error)
            return False
        if not is_right:
            logger.warning("the Triton kernel gives other numbers for %s heads of %d on %s", dtype, head_dim, device)
            return False
    return True
