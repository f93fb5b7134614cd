"""T(B) of named GPUs, and their memory, for an S-worker that is emulated.  Pure.

From the FastDecode paper's figure 1: TFLOPS of the S-Part over the batch, fp16, digitised.  A block of P weights takes
T(B) = 2·P·B / TFLOPS(B): at small batches the weights' way out of memory, at large ones the arithmetic.

Memory from NVIDIA's data sheets: A10 24 GB at 600 GB/s, V100 (SXM2) 32 GB at 900 GB/s, H100 (SXM5) 80 GB at 3,350 GB/s.
Decode attention is taken to read KV at 0.7 of that rate, and to take 10 us of a layer before it does.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from fastdecode.modelling.perf_model import PerfModel

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_S_PART_TFLOPS = {
    "a10": (0.4, 0.9, 1.7, 3.5, 6.9, 13.7, 28.0, 54.4, 66.3, 90.0, 92.6),
    "v100": (0.6, 1.1, 2.3, 4.5, 8.8, 18.4, 36.2, 49.5, 69.4, 78.2, 84.3),
    "h100": (1.1, 2.2, 4.3, 8.5, 16.9, 30.9, 60.8, 115.7, 206.1, 309.4, 262.0),
}
DEVICES = tuple(_S_PART_TFLOPS)


class DeviceMemory(NamedTuple):
    num_bytes: int
    bytes_per_s: float  # that decode attention reads

    def attention_seconds(self, kv_bytes: float) -> float:
        """Of one layer, over so many bytes of its KV."""
        return _LAUNCH_S + kv_bytes / self.bytes_per_s


_LAUNCH_S, _READ_SHARE = 10e-6, 0.7
MEMORY = {
    "a10": DeviceMemory(24 * 10**9, _READ_SHARE * 600e9),
    "v100": DeviceMemory(32 * 10**9, _READ_SHARE * 900e9),
    "h100": DeviceMemory(80 * 10**9, _READ_SHARE * 3350e9),
}


def gpu_model(device: str, block_parameters: int, num_layers: int) -> PerfModel:
    """T(B) of one of DEVICES for blocks of so many weights; R of such a model means nothing.

    Where a figure says that a batch takes longer than its halves, it is taken to be cut.
    """
    tflops = itertools.accumulate(_S_PART_TFLOPS[device], max)
    seconds = [2 * block_parameters * batch / (rate * 1e12) for batch, rate in zip(_BATCHES, tflops, strict=True)]
    return PerfModel.measured(_BATCHES, seconds, kv_token_seconds=1.0, num_layers=num_layers)
