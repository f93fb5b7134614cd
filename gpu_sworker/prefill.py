"""Attention of prompts, on the S-worker's own device: compute-bound, so it stays with the weights.

A prompt may come in chunks, over several steps.  Each chunk looks at all that came before it, so the K and V of a
prompt stay here until its last chunk has passed; the R-workers get them too, chunk by chunk, and nothing comes back.

    chunk    [0, a)                       [a, b)                    [b, prompt_tokens)
    room     for the whole prompt
    keys     its own                      kept [0, a) + its own     kept [0, b) + its own; then they are released

Room is taken with the first chunk for all of the prompt, so that no prompt stops halfway because others came between.
A prompt that comes whole needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpu_sworker.device_attention import attend_tokens
from gpu_sworker.device_kv import DeviceKV, DeviceRows
from gpu_sworker.errors import DeviceKVMisused
from gpu_sworker.partial_state import finished
from gpu_sworker.probe import AttentionSpec


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
    """Prompts that are on their way in, as sequences of a store on the device."""

    def __init__(self, store: DeviceKV, layers: Sequence[AttentionSpec]) -> None:
        self.store, self._layers = store, tuple(layers)
        # Sequence -> a chunk's start -> its rows, while it passes the layers; another one may be a layer behind it.
        self._rows: dict[int, dict[int, DeviceRows]] = {}

    def __len__(self) -> int:
        """Prompts of which something is kept."""
        return len(self.store)

    def has_room(self, num_tokens: int) -> bool:
        """Whether the first chunk of a prompt of so many tokens would find room for all of it now."""
        return self.store.blocks_for(num_tokens) <= self.store.num_free_blocks

    def attend(
        self,
        chunk: PromptChunk,
        layer: int,
        q: torch.Tensor,  # [chunk.num_tokens, num_q_heads, head_dim]
        k: torch.Tensor,  # [chunk.num_tokens, num_kv_heads, head_dim]
        v: torch.Tensor,  # like k
    ) -> torch.Tensor:
        """Causal attention over the prompt so far, the chunk's own tokens included.  # like q

        Layer 0 comes first, the last one last; a chunk may come again from layer 0 on.
        Raises DeviceKVFull with a prompt's first chunk, if there is no room for all of it.
        """
        spec = self._layers[layer]
        if layer == 0:
            self._begin(chunk)
        if chunk.is_whole:
            return prompt_attention(q, k, v, spec)
        rows = self._rows[chunk.seq_id][chunk.start]
        self.store.write(layer, rows, k, v)
        state = self.store.attend(layer, rows, q)
        if layer == len(self._layers) - 1:
            del self._rows[chunk.seq_id][chunk.start]
            if chunk.end == chunk.prompt_tokens:
                self.forget([chunk.seq_id])
        return finished(state, spec.sinks)

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drops prompts that will not be finished; others than those kept are ignored."""
        for seq_id in set(seq_ids):
            self._rows.pop(seq_id, None)
            if seq_id in self.store:
                self.store.release([seq_id])

    def clear(self) -> None:
        """Nothing is on its way any more, whatever was going on."""
        self._rows.clear()
        self.store.clear()

    def _begin(self, chunk: PromptChunk) -> None:
        seq_id = chunk.seq_id
        if chunk.start == 0:
            self.forget([seq_id])
            if chunk.is_whole:
                return
            self.store.admit(seq_id, chunk.prompt_tokens, reserve=True)
        elif seq_id not in self.store or self.store.num_tokens(seq_id) < chunk.start:
            kept = self.store.num_tokens(seq_id) if seq_id in self.store else 0
            raise DeviceKVMisused(
                f"tokens {chunk.start} to {chunk.end} of the prompt of sequence {seq_id} come, of which {kept} are here"
            )
        passing = self._rows.setdefault(seq_id, {})
        if self.store.num_tokens(seq_id) > chunk.start:  # its step was broken off, and is done again
            self.store.rewind({seq_id: chunk.start})
            for start in [start for start in passing if start >= chunk.start]:
                del passing[start]
        self.store.extend({seq_id: chunk.num_tokens})
        passing[chunk.start] = self.store.rows([seq_id], [chunk.num_tokens], [chunk.num_tokens])


def prompt_attention(
    q: torch.Tensor,  # [num_queries, num_q_heads, head_dim], the last tokens of those of k
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], from the first one of the prompt on
    v: torch.Tensor,  # like k
    spec: AttentionSpec,
) -> torch.Tensor:
    """Causal attention of the last tokens of a prompt, or of all of them.  # like q"""
    is_windowed = spec.window is not None and spec.window < len(k)
    if len(q) < len(k) or is_windowed or spec.softcap is not None or spec.sinks is not None:
        return finished(attend_tokens(q, k, v, spec), spec.sinks)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        scale=spec.scale,
        enable_gqa=spec.num_q_heads != spec.num_kv_heads,
    )
    return out[0].transpose(0, 1)
