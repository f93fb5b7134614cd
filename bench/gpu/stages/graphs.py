"""What capture would give: T(B) of a forward whose K and V are on the device, eager and as one CUDA graph.

    S-worker    `SWorker.forward` over the paged store, as the engine has it run, without scheduler and sampler
    by hand     the same layers as plain torch calls over the same store, static shapes, launched one by one
    captured    those calls as one CUDA graph

A measurement of what is to be gained: nothing of this is in the engine.  The forward by hand must give the S-worker's
logits.  Without CUDA that alone is tried.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import torch
import torch.nn.functional as F

from bench.gpu import stack
from bench.gpu.report import Report, arguments
from bench.gpu.timing import Captured, call_seconds
from gpu_sworker import AttentionCall, DeviceKV, DeviceRows, SWorker
from gpu_sworker.device_kv import token_bytes
from gpu_sworker.paged_attention import attend_by_kernel, attend_paged_plainly

_MODEL = "8b"
_BATCHES, _TINY_BATCHES = (1, 256, 16, 64), (1, 3)
_CONTEXT, _TINY_CONTEXT = 1024, 70
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # ‖logits - S-worker's‖ / ‖S-worker's‖
_POINT_SECONDS = 4.0


def main(args: argparse.Namespace) -> None:
    with Report("graphs", args) as report:
        sworker = stack.load(_MODEL, args.work, args.dry)
        worst = 0.0
        with sworker.inference():
            for batch in _TINY_BATCHES if report.is_dry else _BATCHES:
                if report.has_time(f"B = {batch}", 0 if report.is_dry else _POINT_SECONDS):
                    with report.surviving(f"B = {batch}"):
                        error = _measure(report, sworker, batch)
                        worst = max(worst, error) if error == error else float("inf")
        report.hold(
            "logits of the forward by hand: relative error", worst, "", at_most=_TOLERANCE[sworker.dtype],
            is_of_speed=False,
        )  # fmt: skip
        if report.is_dry:
            report.hold("captured over eager", None, "", note="not measured: no CUDA")


def _measure(report: Report, sworker: SWorker, batch: int) -> float:
    """Relative error of the logits."""
    context = _TINY_CONTEXT if report.is_dry else _CONTEXT
    store, rows = _filled_store(sworker, batch, context)
    tokens, specs = stack.decode_batch(batch, position=context), sworker.facts.layers

    def answer(call: AttentionCall) -> torch.Tensor:
        store.write(call.layer, rows, call.k, call.v)
        return store.attend(call.layer, rows, call.q).o

    def by_sworker() -> torch.Tensor:
        return stack.run_forward(sworker, tokens, answer)

    by_hand = _Decode(sworker, store, rows, torch.from_numpy(tokens.token_ids), torch.from_numpy(tokens.positions))
    expected, got = by_sworker().double(), by_hand().double()
    error = float((got - expected).norm() / expected.norm())
    point = {"model": _MODEL, "layers": len(specs), "batch": batch, "context": context, "logits_error": error}
    if report.is_dry:
        report.add(**point, captured="not measured: no CUDA")
        return error
    eager, hand = call_seconds(by_sworker, sworker.device), call_seconds(by_hand, sworker.device)
    captured = Captured(by_hand)
    captured.replay()
    replayed = float((captured.result.double() - expected).norm() / expected.norm())
    seconds = call_seconds(captured.replay, sworker.device)
    report.add(
        **point, replayed_error=replayed, sworker_ms=1e3 * eager, by_hand_ms=1e3 * hand, captured_ms=1e3 * seconds,
        sworker_over_captured=eager / seconds,
    )  # fmt: skip
    report.hold(
        f"S-worker eager, B = {batch}, context {context}, {len(specs)} layers", 1e3 * eager, "ms", roof=1e3 * seconds,
        note=f"captured it would be {eager / seconds:.2f} times as fast",
    )  # fmt: skip
    return max(error, replayed)


def _filled_store(sworker: SWorker, batch: int, context: int) -> tuple[DeviceKV, DeviceRows]:
    """Random K and V of `context` tokens for each sequence, and the rows of their next token."""
    block_tokens, specs = 64, sworker.facts.layers
    blocks = batch * -(-(context + 1) // block_tokens)
    budget = blocks * block_tokens * token_bytes(specs, sworker.dtype)
    store = DeviceKV(specs, dtype=sworker.dtype, device=sworker.device, budget_bytes=budget, block_tokens=block_tokens)
    ids = list(range(batch))
    for seq_id in ids:
        store.admit(seq_id, context + 1)
        store.extend({seq_id: context})
    for data in store._data:
        for half in data:
            half.normal_()
    store.extend(dict.fromkeys(ids, 1))
    return store, store.rows(ids, [1] * batch, [1] * batch)


class _Decode:
    """A step of a Llama, a token of each sequence; what it reads and writes lies where it lay before."""

    def __init__(
        self, sworker: SWorker, store: DeviceKV, rows: DeviceRows, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """token_ids, positions: [num_sequences] int64"""
        model, device = sworker._model, sworker.device
        self._specs, self._data, self._rows = sworker.facts.layers, store._data, rows
        self._token_ids, self._positions = token_ids.to(device), positions.to(device)
        slots = rows.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop)
        self._slots = slots.to(device)
        self._embedding, self._layers, self._norm = model.model.embed_tokens, model.model.layers, model.model.norm
        self._head, self._frequencies = model.lm_head, model.model.rotary_emb.inv_freq.float()
        self._attend = attend_by_kernel or attend_paged_plainly

    def __call__(self) -> torch.Tensor:
        """# [num_sequences, vocab]"""
        x = self._embedding.weight[self._token_ids]
        angles = self._positions[:, None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = (turn[:, None].to(x.dtype) for turn in (angles.cos(), angles.sin()))
        for layer, spec, data in zip(self._layers, self._specs, self._data, strict=True):
            attention, mlp, h = layer.self_attn, layer.mlp, _normed(x, layer.input_layernorm)
            q, k, v = (
                projection(h).unflatten(1, (-1, spec.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys, values = data.flatten(1, 2)
            keys.index_copy_(0, self._slots, _turned(k, cos, sin))
            values.index_copy_(0, self._slots, v)
            o = self._attend(_turned(q, cos, sin), data, self._rows.tables, self._rows.lengths, spec).o
            x = x + attention.o_proj(o.flatten(1))
            h = _normed(x, layer.post_attention_layernorm)
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        logits: torch.Tensor = self._head(_normed(x, self._norm))
        return logits


def _normed(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """Root mean square, in float32 as transformers has it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    scaled: torch.Tensor = norm.weight * wide.to(x.dtype)
    return scaled


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By its position.  x: [num_sequences, num_heads, head_dim]; cos, sin: [num_sequences, 1, head_dim]"""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


if __name__ == "__main__":
    main(arguments(__doc__))
