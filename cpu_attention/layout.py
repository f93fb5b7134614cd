"""How K and V lie in memory, and the arithmetic of their bytes.

A *block* holds `block_tokens` consecutive tokens of one sequence in every layer.  In each layer it is one
contiguous piece of memory, KV head after KV head, so that attention streams through it:

    block   = head 0 | head 1 | ...
    head    = K scales | K numbers | V scales | V numbers
    numbers   K  [block_tokens / 16, head_dim, 16]     tokens in the lanes: q·K needs no horizontal sum
              V  [block_tokens, head_dim]              p·V adds whole rows
    scales    [2, groups, block_tokens] float16        a scale and a minimum per token and group of channels;
                                                       without minima [1, groups, block_tokens]; floats have none

Sixteen tokens share a row of K because that is one vector; a new token then touches no more memory than it must,
and the last block of a sequence is computed only as far as it is filled.

A stored integer u stands for  minimum + scale · u.  int8 is symmetric (-127..127, no minimum, one scale per token and
head), int4 goes from 0 to 15 with a scale and a minimum for every 32 channels (llama.cpp's q4_1, FlexGen's groups);
two of them share a byte: channels 2i (low half) and 2i+1 of a token in K, tokens 2i and 2i+1 of a channel in V.

Quantised K is rotated first: a few channels of K are far larger than the rest in many models (KIVI, arXiv
2402.02750), and would take the scale of all.  A Walsh-Hadamard transform of each head spreads them (QuaRot, arXiv
2404.00456); done to q as well it changes no q·K.  V has no such channels and is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

LANES = 16  # tokens that share a row of K; block_tokens and the stored head_dim are multiples
_LINE = 64  # bytes of a cache line, to which heads are aligned

NUMBER_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),  # two in each
}
KV_DTYPES: dict[str, tuple[str, str]] = {  # name -> how K and how V is stored
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "int8"),
    "k8v4": ("int8", "int4"),  # K needs the better half: an error in it moves weights, not only values
    "int4": ("int4", "int4"),
}
_INT4_GROUP = 32  # channels


@dataclass(frozen=True)
class Part:
    """The K or the V of one KV head in a block."""

    dtype: str  # a key of NUMBER_DTYPES
    stored_dim: int
    block_tokens: int
    begin: int  # byte of the head's part of the block

    @property
    def itemsize(self) -> int:
        """Bytes of what one load takes: a number, or two of four bits."""
        return NUMBER_DTYPES[self.dtype].itemsize

    @property
    def packed(self) -> int:
        """Numbers in an item."""
        return 2 if self.dtype == "int4" else 1

    @property
    def is_quantised(self) -> bool:
        return self.dtype in ("int8", "int4")

    @property
    def has_minima(self) -> bool:
        return self.dtype == "int4"

    @property
    def group(self) -> int:
        """Channels that share a scale."""
        return _INT4_GROUP if self.dtype == "int4" else self.stored_dim

    @property
    def num_groups(self) -> int:
        return -(-self.stored_dim // self.group) if self.is_quantised else 0

    @property
    def num_scales(self) -> int:
        """Of a token: scales, then minima."""
        return (1 + self.has_minima) * self.num_groups

    @property
    def scales_bytes(self) -> int:
        return self.num_scales * self.block_tokens * 2

    @property
    def numbers_bytes(self) -> int:
        return self.stored_dim * self.block_tokens * self.itemsize // self.packed

    @property
    def numbers(self) -> int:
        """Byte where they begin."""
        return self.begin + self.scales_bytes

    @property
    def end(self) -> int:
        return self.numbers + self.numbers_bytes


@dataclass(frozen=True)
class HeadFormat:
    """One KV head's part of a block."""

    dtype: str  # a key of KV_DTYPES
    head_dim: int
    block_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in KV_DTYPES:
            raise ValueError(f"kv dtype {self.dtype!r} is none of {', '.join(KV_DTYPES)}")
        if self.block_tokens < LANES or self.block_tokens % LANES:
            raise ValueError(f"block_tokens is {self.block_tokens}; it must be a multiple of {LANES}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim is {self.head_dim}; the least is 1")

    @property
    def stored_dim(self) -> int:
        """head_dim and the zeros that fill it up to whole vectors."""
        return -(-self.head_dim // LANES) * LANES

    @cached_property
    def k(self) -> Part:
        return Part(KV_DTYPES[self.dtype][0], self.stored_dim, self.block_tokens, 0)

    @cached_property
    def v(self) -> Part:
        return Part(KV_DTYPES[self.dtype][1], self.stored_dim, self.block_tokens, self.k.end)

    @property
    def nbytes(self) -> int:
        return -(-self.v.end // _LINE) * _LINE

    @property
    def rotation(self) -> int:
        """Channels of K that are rotated together: a power of two that divides the stored ones; 1: none are."""
        return self.stored_dim & -self.stored_dim if self.k.is_quantised else 1


@dataclass(frozen=True)
class LayerShape:
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class KVLayout:
    layers: tuple[LayerShape, ...]
    dtype: str  # a key of KV_DTYPES
    block_tokens: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layout has at least one layer")
        _ = self.heads  # which checks the rest

    @cached_property
    def heads(self) -> tuple[HeadFormat, ...]:
        """Per layer."""
        return tuple(HeadFormat(self.dtype, layer.head_dim, self.block_tokens) for layer in self.layers)

    @cached_property
    def block_bytes(self) -> int:
        """Of one block over all layers."""
        return sum(layer.num_kv_heads * head.nbytes for layer, head in zip(self.layers, self.heads, strict=True))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers, rounded up where a block does not divide evenly."""
        return -(-self.block_bytes // self.block_tokens)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_tokens)


@dataclass(frozen=True)
class AttentionRule:
    """What a layer's softmax is, beside its shapes."""

    scale: float
    window: int | None = None  # keys a query sees, itself included; None: all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: np.ndarray | None = None  # [num_q_heads] float32: a logit that takes weight but has no value
