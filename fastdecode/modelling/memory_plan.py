"""What of a model fits where, from its config.json alone: weights on the S-worker's device, KV there and on R-workers.

    device    [weights][KV of some sequences][left for activations]      R-workers   [KV of the others]

The case that this runtime is for: weights that fit a device, and KV that does not.  Arithmetic, no model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_attention import KV_DTYPES, KVLayout, LayerShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_SHARE = 0.9  # of a GPU's memory that may be taken, as vLLM has it
_KV_SHARE = 0.8  # of what weights leave of that, for KV; activations and logits need the rest


@dataclass(frozen=True)
class ModelSize:
    model_type: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    num_parameters: int
    num_active: int  # of them those that work for a token: of a mixture of experts the chosen ones


@dataclass(frozen=True)
class KVPlan:
    """Of sequences of one length, with KV of one storage type on R-workers."""

    kv_dtype: str
    token_bytes: int  # of all layers, on R-workers
    device_token_bytes: int  # in the model's dtype
    wanted: int  # sequences
    on_device: int  # of them
    on_r_workers: int  # of the others
    missing: int  # that fit nowhere
    r_worker_bytes: int  # that those need that are not on the device

    @property
    def fits(self) -> bool:
        return not self.missing


def plan(
    model: ModelSize,
    *,
    dtype: str,
    device_bytes: int,
    r_worker_bytes: int,
    sequences: int,
    tokens: int,
    block_tokens: int = 64,
    kv_dtypes: tuple[str, ...] | None = None,
) -> list[KVPlan]:
    """device_bytes, r_worker_bytes: memory of the device, and of all R-workers together; tokens: of each sequence at
    its end.  One plan for each storage type of KV on R-workers.

    Raises ValueError if the weights do not fit.
    """
    weights = model.num_parameters * DTYPE_BYTES[dtype]
    if weights > device_bytes:
        raise ValueError(f"{weights} bytes of weights on a device of {device_bytes}")
    plans, room = [], kv_room(device_bytes, weights)
    here = _layout(model, dtype, block_tokens)
    each = here.num_blocks(tokens) * here.block_bytes
    on_device = min(sequences, room // each)
    for kv_dtype in kv_dtypes or tuple(KV_DTYPES):
        there = _layout(model, kv_dtype, block_tokens)
        of_one = there.num_blocks(tokens) * there.block_bytes
        others = sequences - on_device
        on_r_workers = min(others, r_worker_bytes // of_one)
        plans.append(
            KVPlan(
                kv_dtype, there.token_bytes, here.token_bytes, sequences, on_device, on_r_workers,
                others - on_r_workers, others * of_one,
            )
        )  # fmt: skip
    return plans


def kv_room(device_bytes: int, taken: int, share: float = GPU_SHARE) -> int:
    """Bytes for KV on a device of which so many are taken, by weights and by others; share: of it that may be."""
    return max(0, int(_KV_SHARE * (share * device_bytes - taken)))


def _layout(model: ModelSize, dtype: str, block_tokens: int) -> KVLayout:
    return KVLayout((LayerShape(model.num_kv_heads, model.head_dim),) * model.num_layers, dtype, block_tokens)
