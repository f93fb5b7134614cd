"""Between the device and host memory: the only file that moves tensors out and in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

# numpy has no bfloat16 of its own: the bits travel as int16 and are named again on the other side.
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """C-ordered host array with the tensor's values; of the tensor's own memory if it lies on the CPU so already."""
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The other way; may share the array's memory on the CPU, so it is for reading."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)
