"""Attention of whole prompts, on the S-worker's own device: compute-bound, so it stays with the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_sworker.probe import AttentionSpec

_SCORES_AT_ONCE = 1 << 24  # numbers of a [heads, rows, keys] slab in the general path


def prompt_attention(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_dim]
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor,  # like k
    spec: AttentionSpec,
) -> torch.Tensor:
    """Causal attention of one prompt from its first token on.  # [num_tokens, num_q_heads, head_dim]"""
    windowed = spec.window is not None and spec.window < len(q)
    if spec.softcap is None and spec.sinks is None and not windowed:
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=spec.scale,
            enable_gqa=spec.num_q_heads != spec.num_kv_heads,
        )
        return out[0].transpose(0, 1)
    return general_prompt_attention(q, k, v, spec)


def general_prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """The same for every rule (window, soft-cap, sinks), a slab of queries at a time; also the reference."""
    num_tokens, num_q_heads, _ = q.shape
    group = num_q_heads // spec.num_kv_heads
    # In fp32 whatever the model's dtype: scores in half precision lose what the exponential needs, or overflow.
    keys = k.float().repeat_interleave(group, dim=1).permute(1, 2, 0)  # [Hq, D, num_tokens]
    values = v.float().repeat_interleave(group, dim=1).transpose(0, 1)  # [Hq, num_tokens, D]
    positions = torch.arange(num_tokens, device=q.device)
    rows = max(1, _SCORES_AT_ONCE // (num_q_heads * num_tokens))
    out = torch.empty_like(q)
    for begin in range(0, num_tokens, rows):
        slab = slice(begin, min(begin + rows, num_tokens))
        scores = (q[slab].float().transpose(0, 1) @ keys) * spec.scale  # [Hq, rows, num_tokens]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = positions[slab, None] - positions[None, :]
        hidden = distance < 0
        if spec.window is not None:
            hidden |= distance >= spec.window
        scores.masked_fill_(hidden, -torch.inf)
        if spec.sinks is not None:
            sinks = torch.tensor(spec.sinks, device=q.device)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=2)
        weights = scores.softmax(dim=2)[:, :, :num_tokens]
        out[slab] = (weights @ values).transpose(0, 1)
    return out
