"""Attention of prompts, on the S-worker's own device: compute-bound, so it stays with the weights.

A prompt may come in chunks, over several steps.  Each chunk looks at all that came before it, so the K and V of a
prompt stay here until its last chunk has passed; the R-workers get them too, chunk by chunk, and nothing comes back.

    chunk    [0, a)          [a, b)                    [b, prompt_tokens)
    keys     its own         kept [0, a) + its own     kept [0, b) + its own; then they are dropped
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from gpu_sworker.probe import AttentionSpec

_SCORES_AT_ONCE = 1 << 24  # numbers of a [heads, rows, keys] slab in the general path


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive tokens of a prompt among the rows of a micro-batch."""

    seq_id: int
    first_row: int
    num_tokens: int
    start: int  # position of the first one
    prompt_tokens: int  # of the whole prompt

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_whole(self) -> bool:
        return self.num_tokens == self.prompt_tokens


class PromptKV:
    """K and V of prompts that are on their way in: per sequence and layer, on the device, in the model's dtype."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def __len__(self) -> int:
        """Prompts of which something is kept."""
        return len(self._kept)

    def extend(
        self,
        chunk: PromptChunk,
        layer: int,
        k: torch.Tensor,  # [chunk.num_tokens, num_kv_heads, head_dim]
        v: torch.Tensor,  # like k
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the prompt so far, # [chunk.end, num_kv_heads, head_dim] each."""
        if chunk.is_whole:
            return k, v
        layers = self._kept.setdefault(chunk.seq_id, {})
        if chunk.start == 0:
            layers[layer] = (
                k.new_empty(chunk.prompt_tokens, *k.shape[1:]),
                v.new_empty(chunk.prompt_tokens, *v.shape[1:]),
            )
        keys, values = layers[layer]
        keys[chunk.start : chunk.end], values[chunk.start : chunk.end] = k, v
        if chunk.end == chunk.prompt_tokens:
            del layers[layer]
            if not layers:
                del self._kept[chunk.seq_id]
        return keys[: chunk.end], values[: chunk.end]

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drops prompts that will not be finished; others than those kept are ignored."""
        for seq_id in seq_ids:
            self._kept.pop(seq_id, None)


def prompt_attention(
    q: torch.Tensor,  # [num_queries, num_q_heads, head_dim], the last tokens of those of k
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], from the first one of the prompt on
    v: torch.Tensor,  # like k
    spec: AttentionSpec,
) -> torch.Tensor:
    """Causal attention of the last tokens of a prompt, or of all of them.  # [num_queries, num_q_heads, head_dim]"""
    windowed = spec.window is not None and spec.window < len(k)
    if spec.softcap is not None or spec.sinks is not None or windowed:
        return general_prompt_attention(q, k, v, spec)
    whole = len(q) == len(k)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=None if whole else causal_lower_right(len(q), len(k)),
        is_causal=whole,
        scale=spec.scale,
        enable_gqa=spec.num_q_heads != spec.num_kv_heads,
    )
    return out[0].transpose(0, 1)


def general_prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """The same for every rule (window, soft-cap, sinks), a slab of queries at a time; also the reference."""
    num_queries, num_q_heads, _ = q.shape
    start = len(k) - num_queries  # position of the first query
    first_key = max(0, start + 1 - spec.window) if spec.window is not None else 0  # that any of them sees
    k, v = k[first_key:], v[first_key:]
    group = num_q_heads // spec.num_kv_heads
    # In fp32 whatever the model's dtype: scores in half precision lose what the exponential needs, or overflow.
    keys = k.float().repeat_interleave(group, dim=1).permute(1, 2, 0)  # [Hq, D, num_keys]
    values = v.float().repeat_interleave(group, dim=1).transpose(0, 1)  # [Hq, num_keys, D]
    query_positions = torch.arange(start, start + num_queries, device=q.device)
    key_positions = torch.arange(first_key, start + num_queries, device=q.device)
    rows = max(1, _SCORES_AT_ONCE // (num_q_heads * len(k)))
    out = torch.empty_like(q)
    for begin in range(0, num_queries, rows):
        slab = slice(begin, min(begin + rows, num_queries))
        scores = (q[slab].float().transpose(0, 1) @ keys) * spec.scale  # [Hq, rows, num_keys]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = query_positions[slab, None] - key_positions[None, :]
        hidden = distance < 0
        if spec.window is not None:
            hidden |= distance >= spec.window
        scores.masked_fill_(hidden, -torch.inf)
        if spec.sinks is not None:
            sinks = torch.tensor(spec.sinks, device=q.device)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=2)
        weights = scores.softmax(dim=2)[:, :, : len(k)]
        out[slab] = (weights @ values).transpose(0, 1)
    return out
