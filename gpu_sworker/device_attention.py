r"""Attention of a sequence's last tokens over keys that lie together on the S-worker's device, as a partial state.

Queries see keys up to themselves, in a window as far as there is one.  No [queries, keys] mask is made anywhere:
what is seen is cut into parts which a fused kernel knows, all keys or the square below a diagonal, and merged.

    keys       0 ......... start ... end          keys    0 . a-w+1 .. b-w ...... a .... b
    query        all of these │ \                 slab      │    \ │ all of these │ \        a slab of queries a..b,
    start..end                │   \ causal        a..b      │      \│              │   \      at most a window long,
                              │     \                       flipped │              │     \    where none sees key 0
                                                            this is causal, too

Scores that are soft-capped, and what has no fused kernel that tells its log-sum-exp, take the plain way: matrix
products in float32, a slab of queries at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from gpu_sworker.partial_state import PartialState, merge
from gpu_sworker.probe import AttentionSpec

logger = logging.getLogger(__name__)

_SCORES_AT_ONCE = 1 << 24  # numbers of a [heads, rows, keys] slab in the plain way
_SLAB = 256  # queries of a window's slab, at most
_LEAST_WINDOW = 64  # below it slabs are too small for a kernel call each

_SMALL = 1 << 16  # scores of a head, up to which a processor masks them: two calls and a merge would take longer

# (q, k, v, scale, is_causal, mask) -> (o, lse [.., .., num_queries] float32); q, k, v and o are
# [num_kv_heads, group, num_tokens, head_dim], a mask [num_queries, num_keys], added to scores (on processors alone)
_Fused = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def attend_tokens(
    q: torch.Tensor,  # [num_queries, num_q_heads, head_dim], the last tokens of those of k, at least one
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor,  # like k
    spec: AttentionSpec,  # whose sinks are not for here
) -> PartialState:
    """Softmax attention of each query over the keys it sees.

    k may begin anywhere at or before the first key that any query sees.
    """
    num_queries, num_tokens = len(q), len(k)
    start = num_tokens - num_queries  # the first query's place among the keys
    window = spec.window if spec.window is not None and spec.window < num_tokens else None
    kernel = None if spec.softcap is not None else fused_kernel(q.device, q.dtype, spec)
    if kernel is None or (window is not None and window < _LEAST_WINDOW):
        return _attend_in_slabs(q, k, v, spec)
    if window is None:
        return _attend_causally(q, k, v, spec, kernel)
    states = []
    if start < window:  # queries that see all keys before them
        end = min(window, num_tokens)
        states.append(_attend_causally(q[: end - start], k[:end], v[:end], spec, kernel))
    size = min(_SLAB, window)
    for begin in range(max(start, window), num_tokens, size):
        end = min(begin + size, num_tokens)
        states.append(_attend_in_window(q[begin - start : end - start], k[:end], v[:end], window, spec, kernel))
    return _behind_one_another(states)


def attend_tokens_plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> PartialState:
    """The definition of `attend_tokens`: query by query and head by head, in float64, rounded once at the end."""
    group = spec.num_q_heads // spec.num_kv_heads
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for row in range(len(q)):
        end = len(k) - len(q) + row + 1
        begin = 0 if spec.window is None else max(0, end - spec.window)
        for head in range(spec.num_q_heads):
            keys, values = (kv[begin:end, head // group].double() for kv in (k, v))
            scores = spec.scale * (keys @ q[row, head].double())
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            o[row, head] = (scores.softmax(0) @ values).to(o.dtype)
            lse[row, head] = scores.logsumexp(0)
    return PartialState(o, lse)


def _attend_causally(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, kernel: _Fused
) -> PartialState:
    """Every query sees all keys up to its own."""
    start = len(k) - len(q)
    if len(q) == 1:
        return _call(kernel, q, k, v, spec, is_causal=False)
    if not start:
        return _call(kernel, q, k, v, spec, is_causal=True)
    if q.device.type == "cpu" and len(q) * len(k) <= _SMALL:
        return _attend_with_mask(q, k, v, spec, kernel)
    return _attend_in_two(q, k, v, spec, kernel)


def _attend_with_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, kernel: _Fused
) -> PartialState:
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = torch.full((len(q), len(k)), -torch.inf, dtype=dtype).triu_(len(k) - len(q) + 1)
    return _call(kernel, q, k, v, spec, is_causal=False, mask=mask)


def _attend_in_two(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, kernel: _Fused
) -> PartialState:
    """Keys before the queries' own, of which there are some, and their own."""
    start = len(k) - len(q)
    before = _call(kernel, q, k[:start], v[:start], spec, is_causal=False)
    return merge([before, _call(kernel, q, k[start:], v[start:], spec, is_causal=True)])


def _attend_in_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, spec: AttentionSpec, kernel: _Fused
) -> PartialState:
    """A slab of at most `window` queries, none of which sees the first key."""
    first, num_tokens = len(k) - window, len(k)  # of the keys that all of them see, as far as they are not behind them
    seen_by_all = _attend_causally(q, k[first:], v[first:], spec, kernel)
    num_older = len(q) - 1  # the first query sees so many keys before those, the next one fewer by one
    if not num_older:
        return seen_by_all
    older = slice(num_tokens - window - num_older, num_tokens - window)
    flipped = _call(kernel, q[:-1].flip(0), k[older].flip(0), v[older].flip(0), spec, is_causal=True)
    left = PartialState(flipped.o.flip(0), flipped.lse.flip(0))
    return _behind_one_another([merge([left, seen_by_all[:-1]]), seen_by_all[-1:]])


def _call(
    kernel: _Fused,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    is_causal: bool,
    mask: torch.Tensor | None = None,
) -> PartialState:
    """Query heads of a group see the same keys and values, which are not repeated for them."""
    group = spec.num_q_heads // spec.num_kv_heads
    if group == 1:
        out, lse = kernel(*(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), spec.scale, is_causal, mask)
        return PartialState(out[0].transpose(0, 1), lse[0].transpose(0, 1))
    queries = q.unflatten(1, (spec.num_kv_heads, group)).permute(1, 2, 0, 3)
    keys, values = (t.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for t in (k, v))
    out, lse = kernel(queries, keys, values, spec.scale, is_causal, mask)
    return PartialState(out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2))


def _attend_in_slabs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> PartialState:
    """The plain way, for every rule.

    In float32 whatever the model's dtype: scores in half precision lose what the exponential needs, or overflow.
    """
    num_queries, num_q_heads, head_dim = q.shape
    start, group = len(k) - num_queries, num_q_heads // spec.num_kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(dtype).unflatten(1, (spec.num_kv_heads, group)).permute(1, 2, 0, 3)  # [Hkv, group, num_queries, D]
    window = min(spec.window or len(k), len(k))
    if spec.window is None:
        k, v = k.to(dtype), v.to(dtype)  # once, not for every slab
        rows = _SCORES_AT_ONCE // (num_q_heads * len(k))
    else:
        rows = min(max(window, _LEAST_WINDOW), _SCORES_AT_ONCE // (num_q_heads * 2 * window))
    rows = max(1, rows)
    o, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=dtype, device=q.device)
    for begin in range(start, len(k), rows):
        end = min(begin + rows, len(k))
        first_key = max(0, begin + 1 - window)
        keys, values = (t[first_key:end].to(dtype).transpose(0, 1) for t in (k, v))  # [Hkv, num_keys, D]
        slab = queries[:, :, begin - start : end - start].reshape(spec.num_kv_heads, -1, head_dim)
        scores = (slab @ keys.transpose(1, 2)).mul_(spec.scale).unflatten(1, (group, end - begin))
        if spec.softcap is not None:
            scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        positions = torch.arange(first_key, end, device=q.device)
        distance = positions[begin - first_key :, None] - positions[None, :]
        scores.masked_fill_((distance < 0) | (distance >= window), -torch.inf)
        sums = scores.logsumexp(3)  # [Hkv, group, rows]
        weights = scores.sub_(sums.unsqueeze(3)).exp_()
        out = (weights.flatten(1, 2) @ values).unflatten(1, (group, end - begin))
        o[begin - start : end - start] = out.permute(2, 0, 1, 3).flatten(1, 2)
        lse[begin - start : end - start] = sums.permute(2, 0, 1).flatten(1, 2)
    return PartialState(o, lse)


def _behind_one_another(states: list[PartialState]) -> PartialState:
    if len(states) == 1:
        return states[0]
    return PartialState(torch.cat([state.o for state in states]), torch.cat([state.lse for state in states]))


def fused_kernel(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> _Fused | None:
    """One that gives the log-sum-exp beside o; None: there is none that is right for such heads on this device."""
    return _tried_kernel(device, dtype, spec.num_kv_heads, spec.num_q_heads // spec.num_kv_heads, spec.head_dim)


@lru_cache(maxsize=256)
def _tried_kernel(
    device: torch.device, dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int
) -> _Fused | None:
    """torch offers the log-sum-exp under names that it does not promise, so each is tried once before it is used."""
    spec = AttentionSpec(num_kv_heads * group, num_kv_heads, head_dim, head_dim**-0.5, None, None, None)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(9, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (spec.num_q_heads, num_kv_heads, num_kv_heads)
    )
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    expected = _attend_in_slabs(q[3:], k, v, spec)
    for kernel in _KERNELS.get(device.type, ()):
        ways = (_attend_in_two, _attend_with_mask) if device.type == "cpu" else (_attend_in_two,)
        try:
            states = [way(q[3:], k, v, spec, kernel) for way in ways]
        except (RuntimeError, AttributeError, TypeError) as error:
            logger.debug("no %s for %s heads of %d on %s: %s", kernel.__name__, dtype, head_dim, device, error)
            continue
        is_right = all(
            a.shape == b.shape and bool(((a.float() - b.float()).abs() < tolerance).all())
            for state in states
            for a, b in ((state.o, expected.o), (state.lse, expected.lse))
        )
        if is_right:
            return kernel
        logger.warning("%s gives other numbers for %s heads of %d on %s", kernel.__name__, dtype, head_dim, device)
    logger.info("prompts of %s heads of %d attend by matrix products on %s: no fused kernel", dtype, head_dim, device)
    return None


def _flash_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _flash_on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, mask: None
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] % 8 or q.shape[3] > 256:
        raise TypeError("FlashAttention takes half precision, and heads of a multiple of 8 up to 256")
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    return out, lse


def _efficient_on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, mask: None
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.shape[3] * q.element_size() % 16:
        raise TypeError("it takes heads of a multiple of 16 bytes")
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, is_causal, scale=scale
    )
    return out, lse[:, :, : q.shape[2]]  # it is filled up to a multiple of 32


_KERNELS: dict[str, tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], ...]] = {
    "cpu": (_flash_on_cpu,),
    "cuda": (_flash_on_cuda, _efficient_on_cuda),
}
