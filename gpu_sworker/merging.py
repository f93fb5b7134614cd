"""o of rows whose keys lie in parts on several R-workers, from what each has to say of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gpu_sworker.partial_state import PartialState, finished, merge_rows
from gpu_sworker.probe import AttentionSpec
from gpu_sworker.staging import Staging


def merge_parts(
    staging: Staging, spec: AttentionSpec, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> torch.Tensor:
    """On the device, in float32.  # [num_rows, num_q_heads, head_dim]

    parts: which of the rows (rising), their o [n, num_q_heads, head_dim] over a part of the keys, without sinks, and
    lse [n, num_q_heads] float32 there.  Every row is in some part.
    """
    states = [(rows, PartialState(staging.to_device(o), staging.to_device(lse))) for rows, o, lse in parts]
    return finished(merge_rows(states), spec.sinks)
