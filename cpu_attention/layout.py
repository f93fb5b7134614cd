"""How K and V lie in memory, and the arithmetic of their bytes.

A *block* holds `block_tokens` consecutive tokens of one sequence in every layer.  Inside a block K is stored
transposed, V as it comes:

    K  [num_blocks, num_kv_heads, head_dim, block_tokens]     tokens in the lanes: q·K needs no horizontal sum,
    V  [num_blocks, num_kv_heads, block_tokens, head_dim]     and p·V adds whole rows

so both inner loops of attention run over contiguous memory and vectorise without reassociating a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

STORAGE_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class LayerShape:
    num_kv_heads: int
    head_dim: int

    @property
    def token_values(self) -> int:
        """Numbers that one token keeps in this layer: a K and a V per head."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class KVLayout:
    layers: tuple[LayerShape, ...]
    dtype: str  # a key of STORAGE_DTYPES
    block_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise ValueError(f"kv dtype {self.dtype!r} is none of {', '.join(STORAGE_DTYPES)}")
        if not self.layers or self.block_tokens < 1:
            raise ValueError("a layout has at least one layer and one token per block")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return sum(layer.token_values for layer in self.layers) * STORAGE_DTYPES[self.dtype].itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

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
