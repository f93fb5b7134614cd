"""The S-worker: the S-Part of a model on one device, a micro-batch at a time.

All tokens of a micro-batch travel flat, [1, T]; decode tokens and prompts mix freely, because nothing in the
S-Part looks from one token to another.  It holds no request, and no KV but that of prompts still on their way in,
within a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from gpu_sworker.checkpoint import stored_tensors
from gpu_sworker.device_kv import DeviceKV, token_bytes
from gpu_sworker.errors import UnsupportedModel, foreign_errors
from gpu_sworker.linear import pack_linears, padded_rows
from gpu_sworker.memory import free_bytes
from gpu_sworker.merging import merge_parts
from gpu_sworker.model import choose_device, choose_dtype, eos_token_ids, load, read_config
from gpu_sworker.prefill import PromptChunk, PromptKV
from gpu_sworker.probe import (
    FLAT_LOGITS_ROWS,
    FLAT_POSITIONS,
    FLAT_TOKEN_IDS,
    NUM_PROBE_TOKENS,
    AttentionSpec,
    NotSplittable,
    check_flat,
    probe,
)
from gpu_sworker.rope import make_rope_per_sequence, reach
from gpu_sworker.sampler import Sampled, SamplingRows, TokenLogprobs, sample, score
from gpu_sworker.sleeping import no_timer_slack
from gpu_sworker.staging import Gathering, Transfer, make_staging, on_device
from gpu_sworker.suspension import ATTENTION_NAME, PROBED_ATTENTION_NAME, AttentionCall, Forward

PROMPT_KV_SHARE = 0.125  # of the free memory of the device, for K and V of prompts on their way in
_MOST_PROMPT_KV = 64  # of the longest prompts: no more are on their way in at a time


@dataclass(frozen=True)
class FlatBatch:
    """The tokens of one micro-batch.  T tokens, of which some rows are sampled, or score the token after them."""

    token_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64, of each token in its own sequence
    logits_rows: np.ndarray  # [num_samples] int64, rows whose logits are wanted, in any order
    # [T] int64, of each token's sequence when the token is first computed (see rope.py); None: the token is its last.
    lengths: np.ndarray | None = None

    @property
    def known_lengths(self) -> np.ndarray:
        return self.positions + 1 if self.lengths is None else self.lengths

    def padded(self) -> FlatBatch:
        """With tokens and samples that nobody wants, for kernels that are to meet few sizes."""
        more_tokens, more_samples = (padded_rows(len(a)) - len(a) for a in (self.token_ids, self.logits_rows))
        return FlatBatch(
            np.pad(self.token_ids, (0, more_tokens)),
            np.pad(self.positions, (0, more_tokens)),
            np.pad(self.logits_rows, (0, more_samples)),
            np.pad(self.known_lengths, (0, more_tokens)),
        )


@dataclass(frozen=True)
class ModelFacts:
    """What the rest of the house needs to know of a model."""

    model_type: str
    layers: tuple[AttentionSpec, ...]
    vocab_size: int
    max_positions: int | None
    positions_reason: str  # why no more
    restart_tokens: int | None  # a sequence that grows to so many tokens is to be computed anew from its first one
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str
    device: str
    linear_kernel: str  # that of `linear.py` in use
    positions_by_length: bool = False  # KV of a prompt's first tokens is another one in a longer prompt


@dataclass(frozen=True)
class KVRoom:
    """Blocks of K and V on the S-worker's device.  A prompt that comes in chunks takes all of its own with the first
    one and gives them back with the last one; so whoever schedules can count them, too."""

    num_blocks: int
    num_free_blocks: int
    block_tokens: int


class SWorker:
    def __init__(
        self,
        model_directory: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        linear_kernel: str = "auto",
        prompt_kv_bytes: int | None = None,
        block_tokens: int = 64,
    ) -> None:
        """Loads and vets a Hugging Face directory.  Raises ModelNotFound, UnsupportedModel, DeviceKVFull.

        linear_kernel: see `pack_linears`; prompt_kv_bytes: most K and V of prompts on their way in, in blocks of
        `block_tokens`; None: a share of what is free on the device once the model is there.
        """
        directory = Path(model_directory)
        self.device = choose_device(device)
        self.is_asynchronous = self.device.type != "cpu"  # a forward only launches work, and returns before it is done
        self._staging = make_staging(self.device)
        config = read_config(directory)
        tensors = stored_tensors(directory)
        self.dtype = choose_dtype(dtype, config, self.device, tensors)
        self._model = load(directory, config, self.dtype, self.device, tensors)
        self.generation_config = self._model.generation_config
        with foreign_errors(lambda what: UnsupportedModel(config.model_type, f"its config.json is not valid ({what})")):
            text_config = config.get_text_config(decoder=True)
            num_layers, vocab_size = int(text_config.num_hidden_layers), int(text_config.vocab_size)
            positions = reach(config)
            eos = eos_token_ids(self.generation_config, config, text_config)
        num_parameters = sum(p.numel() for p in self._model.parameters())
        with self.inference():
            linear_kernel = pack_linears(self._model, linear_kernel)
        make_rope_per_sequence(self._model)
        layers = self._probe(config.model_type, num_layers)
        self.facts = ModelFacts(
            model_type=config.model_type,
            layers=layers,
            vocab_size=vocab_size,
            max_positions=positions.longest,
            positions_reason=positions.reason,
            restart_tokens=positions.restart_tokens,
            eos_token_ids=eos,
            num_parameters=num_parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            linear_kernel=linear_kernel,
            positions_by_length=positions.is_by_length,
        )
        budget = prompt_kv_bytes
        if budget is None:
            most_useful = _MOST_PROMPT_KV * (positions.longest or 1 << 30) * token_bytes(layers, self.dtype)
            budget = min(int(PROMPT_KV_SHARE * free_bytes(self.device)), most_useful)
        store = DeviceKV(layers, dtype=self.dtype, device=self.device, budget_bytes=budget, block_tokens=block_tokens)
        self._prompt_kv = PromptKV(store, layers)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Enter once, around everything that drives forwards: it is thread state, see suspension.py."""
        if self.is_asynchronous:
            no_timer_slack()
        with self._at_device(), torch.inference_mode():
            yield

    def forward(self, batch: FlatBatch) -> Generator[AttentionCall, torch.Tensor, torch.Tensor]:
        """Yields at every attention, wants o [T, num_q_heads, head_dim], returns logits [num_samples, vocab].

        o may bring the rows of the call's padding, as that of `gather` does; otherwise it is copied to get them.
        """
        forward, num_tokens = self._start(self._padded(batch)), len(batch.token_ids)
        try:
            self._staging.begin()
            call = forward.resume()
            while call is not None:
                o = yield call.first(num_tokens)
                self._staging.begin()
                call = forward.resume(_for_all_rows(o, call))
                del o  # its memory may be a transport's, and is wanted back
        finally:
            forward.abandon()
        assert forward.result is not None
        return forward.result[: len(batch.logits_rows)]

    def forward_through(self, batch: FlatBatch, attend: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor:
        """What `forward` returns, without its pauses: `attend` is called where that yields, and may raise."""
        forward, num_tokens = self._start(self._padded(batch)), len(batch.token_ids)
        forward.attend = lambda call: _for_all_rows(attend(call.first(num_tokens)).to(self.dtype), call)
        forward.resume()
        assert forward.result is not None
        return forward.result[: len(batch.logits_rows)]

    def attend_prompt(self, call: AttentionCall, chunk: PromptChunk) -> torch.Tensor:
        """Attention of a prompt's next tokens among the rows of `call`.  # [num_tokens, num_q_heads, head_dim]"""
        rows = chunk.rows
        return self._prompt_kv.attend(chunk, call.layer, call.q[rows], call.k[rows], call.v[rows])

    def device_kv(self, budget_bytes: int, block_tokens: int) -> DeviceKV:
        """A store of K and V on the device, of sequences that stay there.  Raises DeviceKVFull."""
        return DeviceKV(
            self.facts.layers,
            dtype=self.dtype,
            device=self.device,
            budget_bytes=budget_bytes,
            block_tokens=block_tokens,
        )

    def prompt_kv_room(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens can begin to come in chunks; otherwise R-workers are to attend for it,
        for as long as it comes.  One that comes whole needs no room."""
        return self._prompt_kv.has_room(num_tokens)

    @property
    def prompt_kv(self) -> KVRoom:
        """What can be kept of prompts that come in chunks."""
        store = self._prompt_kv.store
        return KVRoom(store.num_blocks, store.num_free_blocks, store.block_tokens)

    def forget_prompts(self, seq_ids: Iterable[int]) -> None:
        """Drops what is kept of prompts whose other chunks will not come."""
        self._prompt_kv.forget(seq_ids)

    def forget_all_prompts(self) -> None:
        """Likewise, of all there are."""
        self._prompt_kv.clear()

    def stage(self, call: AttentionCall, queries: slice, tokens: slice) -> Transfer:
        """Rows of q, and rows of k and v, of the call just yielded begin their way to the host."""
        return self._staging.to_host((call.q[queries], call.k[tokens], call.v[tokens]))

    def gather(self, call: AttentionCall) -> Gathering:
        """Where o of the call just staged is put together."""
        num_tokens, *others = call.q.shape
        return self._staging.gather((num_tokens + call.num_padding, *others), self.dtype)

    def merge(self, layer: int, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> torch.Tensor:
        """o of rows whose keys lie in parts, from which of the rows a part has, their o there, and its lse.

        # [num_rows, num_q_heads, head_dim]
        """
        return merge_parts(self._staging, self.facts.layers[layer], parts).to(self.dtype)

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Sampled:
        """The next token of each row.  logits: [num_samples, vocab]"""
        return sample(logits, rows)

    def score(self, logits: torch.Tensor, token_ids: np.ndarray, num_logprobs: np.ndarray) -> list[TokenLogprobs]:
        """How likely a given token was in each row, and which ones most.

        logits: [n, vocab]; token_ids: [n] int64; num_logprobs: [n], of each row's most likely ones.
        """
        return score(logits, on_device(token_ids, logits.device), num_logprobs)

    def _at_device(self) -> AbstractContextManager[object]:
        """What is made without a word of where is made there: other libraries' kernels, events, pinned memory."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _padded(self, batch: FlatBatch) -> FlatBatch:
        return batch.padded() if self.facts.linear_kernel == "onednn" else batch

    def _probe(self, model_type: str, num_layers: int) -> tuple[AttentionSpec, ...]:
        ids = np.zeros(NUM_PROBE_TOKENS, np.int64)
        alone = FlatBatch(ids, np.arange(NUM_PROBE_TOKENS), np.array([NUM_PROBE_TOKENS - 1]))
        flat = FlatBatch(np.array(FLAT_TOKEN_IDS), np.array(FLAT_POSITIONS), np.array(FLAT_LOGITS_ROWS))
        # The model's own code, fed as no model of its kind likes it.
        with foreign_errors(lambda what: UnsupportedModel(model_type, f"its forward pass fails: {what}")):
            try:
                with self.inference():
                    self._model.set_attn_implementation(PROBED_ATTENTION_NAME)
                    layers = probe(self._start(alone), num_layers)
                    self._model.set_attn_implementation(ATTENTION_NAME)
                    check_flat(self._start(flat), layers)
            except NotSplittable as reason:
                raise UnsupportedModel(model_type, str(reason)) from reason
        return layers

    def _start(self, batch: FlatBatch) -> Forward:
        token_ids = on_device(batch.token_ids, self.device)[None]
        positions = on_device(batch.positions, self.device)[None]
        logits_rows = on_device(batch.logits_rows, self.device)

        def run() -> torch.Tensor:
            output = self._model(
                input_ids=token_ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=logits_rows,
            )
            return output.logits[0]

        return Forward(run, batch.positions, batch.known_lengths)


def _for_all_rows(o: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """With the rows of the padding, which may be there already."""
    num_more = len(call.q) - len(o)
    return pad(o, (0, 0, 0, 0, 0, num_more)) if num_more else o
