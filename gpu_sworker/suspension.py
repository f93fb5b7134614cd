"""The seam: an unmodified Hugging Face model, suspended at each attention.

transformers lets a caller register an attention function and load any model with it.  Ours does not compute:
it leaves the forward pass where it stands (a greenlet switch: no thread, no lock), hands q, k and v out, and
goes on when somebody brings o.

    caller                     forward (a greenlet)
    ──────                     ────────────────────
    start ───────────────────► embedding, layer 0 up to q, k, v
          ◄── AttentionCall 0 ─┘
    resume(o) ───────────────► output projection, MLP, layer 1 up to q, k, v
          ◄── AttentionCall 1 ─┘
    …
    resume(o) ───────────────► last layer, norm, LM head
          ◄──────── result ────┘

A forward whose rows all attend where it runs need not be left: `attend` is called in place of each switch back, and
the forward runs from its start to its result.

Thread state is shared by all suspended forwards of a thread.  So a context manager that sets some
(`torch.inference_mode`) must be entered once around the loop that drives them, never inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION_NAME = "fastdecode"
# For probing alone.  Where a mask function is registered, transformers first looks at the positions for packed
# sequences, and evaluates what it sees: a wait for the device, once per kind of mask and forward.
PROBED_ATTENTION_NAME = "fastdecode-probed"

# Arguments that transformers passes along and that do not change what attention computes.
_HARMLESS_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "cumulative_seqlens_q",
    "cumulative_seqlens_k",
    "input_ids",
    "inputs_embeds",
}


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks for.  T: tokens of the micro-batch."""

    layer: int  # which attention of the forward this is, counted from 0
    q: torch.Tensor  # [T, num_q_heads, head_dim]
    k: torch.Tensor  # [T, num_kv_heads, head_dim]
    v: torch.Tensor  # [T, num_kv_heads, value_dim]
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # [num_q_heads]
    window_argument: int | None  # what the call says; the mask rule is what counts, see probe.py
    mask: torch.Tensor | None  # only while probing
    is_causal: bool  # what the call or its module says; the mask rule, if there is one, is what counts
    other_tensors: tuple[str, ...]  # names of tensor arguments this seam does not understand
    num_padding: int = 0  # rows that o may have besides: zeros, which nobody looks at

    def first(self, num_tokens: int) -> AttentionCall:
        """The same, of no more tokens than these; the others are padding."""
        num_padding = len(self.q) - num_tokens
        if not num_padding:
            return self
        return replace(
            self, q=self.q[:num_tokens], k=self.k[:num_tokens], v=self.v[:num_tokens], num_padding=num_padding
        )

    def join(self, answers: Sequence[torch.Tensor]) -> torch.Tensor:
        """o of all rows, those of the padding too, from o of some behind one another; what is all of it is not copied.

        # [T + num_padding, num_q_heads, head_dim], in C order
        """
        if self.num_padding:
            answers = [*answers, answers[0].new_zeros(self.num_padding, *answers[0].shape[1:])]
        return answers[0].contiguous() if len(answers) == 1 else torch.cat(list(answers))


@dataclass
class MaskRequest:
    """A mask the model asked transformers for, seen while probing."""

    allowed: Callable[..., torch.Tensor]  # (batch, head, query position, key position) -> may it look?
    local_size: int | None
    mask: torch.Tensor


@dataclass
class Forward:
    """One forward pass of the model, started, suspended, resumed."""

    run: Callable[[], torch.Tensor]
    positions: np.ndarray  # [T], see FlatBatch
    lengths: np.ndarray  # [T]
    attend: Callable[[AttentionCall], torch.Tensor] | None = None  # answers the calls; None: who resumes does
    mask_requests: list[MaskRequest] = field(default_factory=list)
    num_calls: int = 0
    result: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._greenlet = _ForwardGreenlet(self)

    def resume(self, o: torch.Tensor | None = None) -> AttentionCall | None:
        """Runs on to the next attention; None when the forward has ended and `result` is there.

        o: [T, num_q_heads, head_dim], the answer to the last call; None to start.
        """
        out = self._greenlet.switch(o)
        if isinstance(out, AttentionCall):
            return out
        self.result = out
        return None

    def abandon(self) -> None:
        """Unwinds a suspended forward."""
        if self._greenlet:
            self._greenlet.throw(GreenletExit)


class _ForwardGreenlet(greenlet):
    def __init__(self, forward: Forward) -> None:
        super().__init__(lambda _: forward.run())
        self.forward = forward


def current_forward() -> Forward:
    """The one whose model code calls this."""
    current = getcurrent()
    if not isinstance(current, _ForwardGreenlet) or current.parent is None:
        raise RuntimeError("a model split by FastDecode cannot be called directly; use SWorker.forward")
    return current.forward


def _suspend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_q_heads, T, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, T, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, T, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: returns o as [1, T, num_q_heads, head_dim]."""
    current, forward = getcurrent(), current_forward()
    call = AttentionCall(
        layer=forward.num_calls,
        q=query[0].transpose(0, 1),
        k=key[0].transpose(0, 1),
        v=value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        sinks=s_aux,
        window_argument=sliding_window,
        mask=attention_mask,
        is_causal=others.get("is_causal", getattr(module, "is_causal", True)) is not False,
        other_tensors=tuple(
            name
            for name, value in others.items()
            if isinstance(value, torch.Tensor) and name not in _HARMLESS_ARGUMENTS
        ),
    )
    forward.num_calls += 1
    o = forward.attend(call) if forward.attend else cast(torch.Tensor, current.parent.switch(call))
    return o[None], None


def _note_mask(*args: Any, mask_function: Callable[..., torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """transformers' mask function while probing: notes what was asked for.

    Otherwise there is none: who attends to whom is known from positions.  The tensor can be recognised in the calls.
    """
    size = int(kwargs["q_length"])
    mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=kwargs.get("device", "cpu")).tril()
    current_forward().mask_requests.append(MaskRequest(mask_function, kwargs.get("local_size"), mask))
    return mask


AttentionInterface.register(ATTENTION_NAME, _suspend)
AttentionInterface.register(PROBED_ATTENTION_NAME, _suspend)
AttentionMaskInterface.register(PROBED_ATTENTION_NAME, _note_mask)
