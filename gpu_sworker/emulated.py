"""An S-worker that computes nothing and takes the time another device would: for measuring everything around it.

R-workers, wire, pipeline and scheduler are real; tokens, q, k and v are made up.  Like a GPU it is given S-blocks ahead
of time and does one after another.  Its time is slept, so the cores it runs on stay free for R-workers, as they are
beside a GPU; but for the last microseconds, which a sleep would overrun.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from gpu_sworker.errors import UnsupportedModel, foreign_errors
from gpu_sworker.merging import merge_parts
from gpu_sworker.model import read_config
from gpu_sworker.prefill import PromptChunk
from gpu_sworker.probe import AttentionSpec
from gpu_sworker.rope import reach
from gpu_sworker.sampler import RowFault, Sampled, SamplingRows, TokenLogprob, TokenLogprobs
from gpu_sworker.sleeping import no_timer_slack
from gpu_sworker.staging import HostGathering, HostStaging
from gpu_sworker.suspension import AttentionCall
from gpu_sworker.sworker import FlatBatch, KVRoom, ModelFacts

_TOKEN_ID = 3
_POOL_TOKENS = 4096  # of made-up q, k, v; longer micro-batches repeat them
_OVERRUN_S = 60e-6  # of a sleep, where the timer has no slack; watched instead


@dataclass(frozen=True)
class Parameters:
    """Besides all of them, which are among a model's facts."""

    of_block: int  # of a layer, on average
    num_active: int  # that work for a token: of a mixture of experts the shared ones and those chosen


def describe_model(directory: str | Path, device: str) -> tuple[ModelFacts, Parameters]:
    """Facts of a model from its config.json alone, attention in every layer over all keys, and its parameters.

    Raises ModelNotFound, UnsupportedModel.
    """
    config = read_config(Path(directory))
    with foreign_errors(lambda what: UnsupportedModel(config.model_type, f"its config.json is not valid ({what})")):
        return _describe(config, device)


def _describe(config: PretrainedConfig, device: str) -> tuple[ModelFacts, Parameters]:
    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, None, None, None)
    num_parameters = sum(p.numel() for p in model.parameters())
    ends = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()}
    positions = reach(config)
    facts = ModelFacts(
        model_type=config.model_type,
        layers=(spec,) * layers,
        vocab_size=text.vocab_size,
        max_positions=positions.longest,
        positions_reason=positions.reason,
        restart_tokens=positions.restart_tokens,
        eos_token_ids=(),
        num_parameters=num_parameters,
        dtype="float16",
        device=device,
        linear_kernel="none",
        positions_by_length=positions.is_by_length,
    )
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = of_experts - round(of_experts * _share_of_experts(text))
    return facts, Parameters((num_parameters - sum(p.numel() for p in ends)) // layers, num_parameters - idle)


def _share_of_experts(text: PretrainedConfig) -> float:
    """That work for a token."""
    chosen = getattr(text, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((count for name in names if (count := getattr(text, name, None))), None)
    return chosen / number if chosen and number else 1.0


class EmulatedSWorker:
    """What `SWorker` offers, with a clock in place of a model."""

    def __init__(self, facts: ModelFacts, block_seconds: Callable[[int], float]) -> None:
        """block_seconds: of one block for a micro-batch of so many tokens, T(B)."""
        self.facts, self.block_seconds = facts, block_seconds
        self.is_asynchronous = True
        self._staging = HostStaging()
        self._block_ns = (0, 0)  # the S-block launched last
        self.generation_config = None
        generator = torch.Generator().manual_seed(0)
        self._pools: dict[tuple[int, int], torch.Tensor] = {}
        for spec in facts.layers:
            for heads in (spec.num_q_heads, spec.num_kv_heads):
                shape = (_POOL_TOKENS, heads, spec.head_dim)
                self._pools.setdefault((heads, spec.head_dim), torch.randn(shape, generator=generator))

    @contextmanager
    def inference(self) -> Iterator[None]:
        no_timer_slack()
        with torch.inference_mode():
            yield

    def forward(self, batch: FlatBatch) -> Generator[AttentionCall, torch.Tensor, torch.Tensor]:
        yield from self._calls(len(batch.token_ids))
        return torch.zeros(len(batch.logits_rows), 1)

    def forward_through(self, batch: FlatBatch, attend: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor:
        for call in self._calls(len(batch.token_ids)):
            attend(call)
        return torch.zeros(len(batch.logits_rows), 1)

    def _calls(self, num_tokens: int) -> Iterator[AttentionCall]:
        for layer, spec in enumerate(self.facts.layers):
            self.spend(self.block_seconds(num_tokens))
            q = self._rows(spec.num_q_heads, spec.head_dim, num_tokens)
            kv = self._rows(spec.num_kv_heads, spec.head_dim, num_tokens)
            yield AttentionCall(layer, q, kv, kv, spec.scale, spec.softcap, None, spec.window, None, True, ())

    def attend_prompt(self, call: AttentionCall, chunk: PromptChunk) -> torch.Tensor:
        return call.q[chunk.rows]

    def spend(self, seconds: float) -> None:
        """The device has other work, behind all that it has already."""
        begin_ns = max(time.monotonic_ns(), self._block_ns[1])
        self._block_ns = begin_ns, begin_ns + round(seconds * 1e9)

    def prompt_kv_room(self, num_tokens: int) -> bool:
        return True

    @property
    def prompt_kv(self) -> KVRoom:
        """Without end: nothing is kept."""
        return KVRoom(num_blocks=1 << 30, num_free_blocks=1 << 30, block_tokens=64)

    def forget_prompts(self, seq_ids: Iterable[int]) -> None:
        pass

    def forget_all_prompts(self) -> None:
        pass

    def stage(self, call: AttentionCall, queries: slice, tokens: slice) -> EmulatedTransfer:
        tensors = call.q[queries], call.k[tokens], call.v[tokens]
        return EmulatedTransfer(self._staging.to_host(tensors).arrays, self._block_ns)

    def gather(self, call: AttentionCall) -> HostGathering:
        return self._staging.gather(tuple(call.q.shape), call.q.dtype)

    def merge(self, layer: int, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> torch.Tensor:
        return merge_parts(self._staging, self.facts.layers[layer], parts)

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Sampled:
        """When the device is through: where nothing goes to R-workers, nobody has waited for it before."""
        EmulatedTransfer([], self._block_ns).wait()
        token_ids = np.full(len(logits), _TOKEN_ID)
        asked = rows.num_logprobs.tolist()
        logprobs: list[TokenLogprobs] = [self._even_odds(_TOKEN_ID, count) if count >= 0 else () for count in asked]
        return Sampled(token_ids, logprobs, np.full(len(logits), RowFault.NONE))

    def score(self, logits: torch.Tensor, token_ids: np.ndarray, num_logprobs: np.ndarray) -> list[TokenLogprobs]:
        return [self._even_odds(*pair) for pair in zip(token_ids.tolist(), num_logprobs.tolist(), strict=True)]

    def _even_odds(self, token_id: int, num_logprobs: int) -> list[TokenLogprob]:
        """As if every token were as likely as the others."""
        size = self.facts.vocab_size
        likeliest = [TokenLogprob(other, -math.log(size), other + 1) for other in range(min(num_logprobs, size))]
        return [TokenLogprob(token_id, -math.log(size), 1), *likeliest]

    def _rows(self, heads: int, head_dim: int, count: int) -> torch.Tensor:
        pool = self._pools[heads, head_dim]
        return pool[:count] if count <= _POOL_TOKENS else pool[torch.arange(count) % _POOL_TOKENS]


@dataclass(frozen=True)
class EmulatedTransfer:
    """Arrays that are there when their S-block would have ended."""

    arrays: list[np.ndarray]
    block_ns: tuple[int, int]

    def is_done(self) -> bool:
        return time.monotonic_ns() >= self.block_ns[1]

    def wait(self) -> list[np.ndarray]:
        time.sleep(max(0.0, (self.block_ns[1] - time.monotonic_ns()) / 1e9 - _OVERRUN_S))
        while not self.is_done():
            pass
        return self.arrays
