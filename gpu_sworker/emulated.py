"""An S-worker that computes nothing and takes the time another device would: for measuring everything around it.

R-workers, wire, pipeline and scheduler are real; tokens, q, k and v are made up.  Its time is slept, so the cores it
runs on stay free for R-workers, as they are beside a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gpu_sworker import staging
from gpu_sworker.attention import AttentionCall
from gpu_sworker.prefill import PromptChunk
from gpu_sworker.sampler import Sampled, SamplingRows
from gpu_sworker.sworker import FlatBatch, ModelFacts

_TOKEN_ID = 3
_POOL_TOKENS = 4096  # of made-up q, k, v; longer micro-batches repeat them


class EmulatedSWorker:
    """What `SWorker` offers, with a clock in place of a model."""

    def __init__(self, facts: ModelFacts, block_seconds: Callable[[int], float]) -> None:
        """block_seconds: of one block for a micro-batch of so many tokens, T(B)."""
        self.facts, self._block_seconds = facts, block_seconds
        generator = torch.Generator().manual_seed(0)
        self._pools: dict[tuple[int, int], torch.Tensor] = {}
        for spec in facts.layers:
            for heads in (spec.num_q_heads, spec.num_kv_heads):
                shape = (_POOL_TOKENS, heads, spec.head_dim)
                self._pools.setdefault((heads, spec.head_dim), torch.randn(shape, generator=generator))

    @contextmanager
    def inference(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def forward(self, batch: FlatBatch) -> Generator[AttentionCall, torch.Tensor, torch.Tensor]:
        num_tokens = len(batch.token_ids)
        for layer, spec in enumerate(self.facts.layers):
            time.sleep(self._block_seconds(num_tokens))
            q = self._rows(spec.num_q_heads, spec.head_dim, num_tokens)
            kv = self._rows(spec.num_kv_heads, spec.head_dim, num_tokens)
            yield AttentionCall(layer, q, kv, kv, spec.scale, spec.softcap, None, spec.window, None, True, ())
        return torch.zeros(len(batch.logits_rows), 1)

    def attend_prompt(self, call: AttentionCall, chunk: PromptChunk) -> torch.Tensor:
        return call.q[chunk.rows]

    def forget_prompts(self, seq_ids: Iterable[int]) -> None:
        pass

    def to_host(self, tensor: torch.Tensor) -> np.ndarray:
        return staging.to_host(tensor)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return staging.to_device(array, torch.device("cpu"))

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Sampled:
        return Sampled(np.full(len(logits), _TOKEN_ID), [[] for _ in range(len(logits))])

    def _rows(self, heads: int, head_dim: int, count: int) -> torch.Tensor:
        pool = self._pools[heads, head_dim]
        return pool[:count] if count <= _POOL_TOKENS else pool[torch.arange(count) % _POOL_TOKENS]
