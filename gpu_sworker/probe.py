"""What a model's attention is, asked from the model: two tiny forwards, every call looked at.

Not a list of architectures but the calls themselves decide what is supported.  A window is taken from the rule
by which transformers would build its mask, because that is what its own attention obeys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_sworker.errors import NOT_THROUGH_INTERFACE
from gpu_sworker.suspension import AttentionCall, Forward, MaskRequest

NUM_PROBE_TOKENS = 4
# Two sequences of the same two tokens, behind one another in one batch.
FLAT_TOKEN_IDS, FLAT_POSITIONS, FLAT_LOGITS_ROWS = (1, 2, 1, 2), (0, 1, 0, 1), (1, 3)
_FAR = 1 << 20  # a position beyond any window that matters


class NotSplittable(Exception):
    """The reason why this model's attention cannot be done elsewhere."""


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, constant for the life of the model."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # keys a query sees, itself included
    softcap: float | None
    sinks: tuple[float, ...] | None  # one logit per query head


def probe(forward: Forward, num_layers: int) -> tuple[AttentionSpec, ...]:
    """Runs `forward` (of a model set to PROBED_ATTENTION_NAME, over NUM_PROBE_TOKENS tokens) and describes each layer.

    Raises NotSplittable.
    """
    specs: list[AttentionSpec] = []
    call = forward.resume()
    while call is not None:
        specs.append(_describe(call, forward.mask_requests))
        call = forward.resume(torch.zeros_like(call.q))
    if len(specs) != num_layers:
        raise NotSplittable(
            f"{len(specs)} of its {num_layers} layers ask for attention; the others keep a state of another kind"
            if specs
            else NOT_THROUGH_INTERFACE
        )
    return tuple(specs)


def check_flat(forward: Forward, specs: tuple[AttentionSpec, ...]) -> None:
    """Whether tokens of different sequences can share a batch: two sequences of the same two tokens must be equal.

    `forward` runs over FLAT_TOKEN_IDS at FLAT_POSITIONS, wanting the logits of FLAT_LOGITS_ROWS.  What finds its
    positions in the batch itself, or mixes tokens outside of attention, differs here.  Raises NotSplittable.
    """
    generator = torch.Generator().manual_seed(0)
    call = forward.resume()
    while call is not None:
        for name, rows in (("queries", call.q), ("keys", call.k), ("values", call.v)):
            _require_equal_halves(rows, f"the {name} of layer {call.layer}")
        spec = specs[call.layer]
        half = torch.randn(2, spec.num_q_heads, spec.head_dim, generator=generator).to(call.q)
        call = forward.resume(torch.cat([half, half]))
    assert forward.result is not None
    if len(forward.result) != len(FLAT_LOGITS_ROWS):
        raise NotSplittable(f"it gives logits of shape {tuple(forward.result.shape)} where two rows were asked for")
    _require_equal_halves(forward.result, "its logits")


def _require_equal_halves(rows: torch.Tensor, what: str) -> None:
    first, second = rows.float().chunk(2)
    tolerance = 1e-3 if rows.dtype == torch.float32 else 3e-2  # of the largest value
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise NotSplittable(f"{what} depend on a token's place in the batch, not on its position alone")


def _describe(call: AttentionCall, requests: list[MaskRequest]) -> AttentionSpec:
    (_, num_q_heads, head_dim), (_, num_kv_heads, _) = call.q.shape, call.k.shape
    if call.k.shape != call.v.shape or call.k.shape[2] != head_dim:
        raise NotSplittable(
            f"layer {call.layer} has keys of {call.k.shape[2]} and values of {call.v.shape[2]} numbers per head "
            "(multi-head latent attention); the KV layout wants them equal"
        )
    if call.q.shape[0] != NUM_PROBE_TOKENS or num_q_heads % num_kv_heads:
        raise NotSplittable(f"layer {call.layer} has odd shapes: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}")
    if call.other_tensors:
        raise NotSplittable(
            f"layer {call.layer} adds {', '.join(call.other_tensors)} to its attention (a position bias or the like)"
        )
    return AttentionSpec(
        num_q_heads,
        num_kv_heads,
        head_dim,
        call.scale,
        _window(call, requests),
        call.softcap,
        None if call.sinks is None else tuple(call.sinks.detach().float().reshape(-1).tolist()),
    )


def _window(call: AttentionCall, requests: list[MaskRequest]) -> int | None:
    """The window that the mask rule of this call means; raises NotSplittable if it is no causal window."""
    if call.mask is None:
        if not call.is_causal:
            raise NotSplittable(f"layer {call.layer} attends in both directions")
        return call.window_argument  # the model builds no mask: its attention function is told the window
    rule = next((request for request in requests if request.mask is call.mask), None)
    if rule is None:
        raise NotSplittable(f"layer {call.layer} makes an attention mask of its own")
    for window in (None, call.window_argument, rule.local_size):
        if _obeys(rule, window, probes=(call.window_argument, rule.local_size, _FAR)):
            return window
    raise NotSplittable(f"layer {call.layer} masks by a rule that is neither causal nor a causal sliding window")


def _obeys(rule: MaskRequest, window: int | None, probes: tuple[int | None, ...]) -> bool:
    """Whether `rule` lets position q see exactly keys q-window+1..q, tried around every edge it could have."""
    for edge in filter(None, probes):
        for q in (0, 1, edge - 1, edge, edge + 1, 2 * edge + 3):
            for k in {0, q // 2, q - edge - 1, q - edge, q - edge + 1, q - 1, q, q + 1}:
                if k < 0:
                    continue
                expected = k <= q and (window is None or q - k < window)
                zero, query, key = torch.tensor(0), torch.tensor(q), torch.tensor(k)
                try:
                    allowed = bool(rule.allowed(zero, zero, query, key))
                except Exception as error:  # a rule that looks positions up in a table of the tokens it was given
                    raise NotSplittable("its attention mask depends on the tokens themselves") from error
                if allowed != expected:
                    return False
    return True
