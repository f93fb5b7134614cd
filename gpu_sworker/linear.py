"""Linear layers whose weights lie ready for the CPU's matrix kernels.

torch hands a weight to the BLAS as it is stored, and the BLAS rearranges it in every call: at decode batch sizes that
costs as much as the product itself.  oneDNN takes a weight that was rearranged once.  The two round differently, so
which one is taken follows from processor, dtype and shapes (`choose_kernel`), not from a measurement: two starts on one
machine give the same tokens.  What the rule stands on:

    fp32 GFLOP/s of [M, 1024] x [1024, 2816], 2 threads, AMD Zen 5      M = 1     16     64    256   1024
    plain (MKL)                                                            32    104    148    183    207
    onednn                                                                 63    440    460    441    468

    onednn / plain, 1 thread, Zen 5 (loaded)    M = 1       4         16         64        256
    [M, 1024] x [1024, 1024]  fp32, bf16        1.0, 1.9   2.7, 1.9   2.4, 1.5   2.4, 1.1   4.9, 1.1
    [M, 256] x [256, 256]     fp32, bf16        0.5, 1.3   0.9, 1.3   1.2, 1.3   1.8, 1.1   2.1, 1.1
    [M, 128] x [128, 128]     fp32, bf16        0.3, 1.2   0.5, 1.2   0.7, 1.2   1.2, 1.2   1.8, 1.1

    onednn / plain, fp32, 2 threads, Skylake-SP (AVX-512), [M, 1024] x [1024, 2816]
                                                M = 16: 2.1    32: 1.7    64: 1.6    128: 1.2    256: 1.2

On an EPYC with AVX2 alone the two were level, some starts finding one faster and some the other.

oneDNN makes code for each number of rows that it meets and keeps it for ever, whatever its cache's capacity: 0.5 to
2 MiB for every shape of a weight.  1,024 numbers and five shapes were 2.3 GiB, and a step may have 4,096 tokens.  So
the S-worker lets it meet 256 numbers, see `padded_rows`; all of them were 1.1 GiB.  Decoding 67 or 129 sequences of the
demonstration model takes 4 % longer so, 257 no longer.

Tried and not kept: MKL's own packing (bound to one M, no faster than plain there); q, k, v or gate, up as one
product (40 us and nothing, of a layer's 5 ms).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gpu_sworker.memory import use_huge_pages

logger = logging.getLogger(__name__)

_NUM_ROWS = 64  # of the batch that weights are packed for; others work as well
_LEAST_NUMBERS = 1 << 16  # in the weight that does most of the work; with less, small batches are slower packed
_WIDE_VECTORS = "AVX512"  # torch's word for processors where packing pays


class Choice(NamedTuple):
    kernel: str  # "plain" or "onednn"
    reason: str


class PackedLinear(nn.Module):
    """`nn.Linear` with its weight in oneDNN's own layout.  For inference."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [out_features, in_features]; bias: [out_features]"""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.empty_like(weight, device="meta")  # some models ask for its dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _NUM_ROWS)
        use_huge_pages(torch.ops.mkldnn.data_ptr(self._packed), torch.ops.mkldnn._nbytes(self._packed))
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


def padded_rows(num_rows: int) -> int:
    """The next number of rows that oneDNN is given: all up to 64, then 32 for each power of two.

    At most 3 % more rows than there are; 256 numbers up to 4,096.
    """
    step = 1 << max(0, (num_rows - 1).bit_length() - 6)
    return -(-num_rows // step) * step


def choose_kernel(cpu_capability: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Choice:
    """For weights that oneDNN can pack.  Nothing but its arguments decides.

    cpu_capability: torch's word for the vectors in use; shape: of the weight that does most of the work.
    """
    where = f"{str(dtype).removeprefix('torch.')} weights like {list(shape)}, {cpu_capability}"
    if cpu_capability != _WIDE_VECTORS:
        return Choice("plain", f"{where}: packing is known to pay with {_WIDE_VECTORS} only")
    if math.prod(shape) < _LEAST_NUMBERS:
        return Choice("plain", f"{where}: too small for packing to pay")
    return Choice("onednn", where)


def pack_linears(model: nn.Module, kernel: str = "auto") -> str:
    """Packs every linear layer of a model on the CPU in place, if that pays; returns the kernel in use, and logs it.

    kernel: ``plain``, ``onednn`` or ``auto``, see `choose_kernel`.  What cannot be packed (other devices, dtypes that
    oneDNN lacks here) stays plain.
    """
    chosen = Choice(kernel, "as asked for")
    if kernel != "plain":
        hindrance = _hindrance(model)
        if hindrance:
            chosen = Choice("plain", hindrance)
        elif kernel == "auto":
            heaviest = _heaviest(model)
            chosen = choose_kernel(torch.backends.cpu.get_cpu_capability(), heaviest.dtype, tuple(heaviest.shape))
    level = logging.WARNING if kernel == "onednn" != chosen.kernel else logging.INFO
    logger.log(level, "linear layers: %s (%s)", *chosen)
    if chosen.kernel == "onednn":
        for parent, name, child in list(_linears(model)):
            # One at a time, so that no more than one weight is there twice.  A tied one stays where it is shared.
            setattr(parent, name, PackedLinear(_weight(child), child.bias))
    return chosen.kernel


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.Linear, Conv1D):  # their own kinds alone: a subclass may compute something else
                yield parent, name, child


def _weight(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """# [out_features, in_features]"""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def _hindrance(model: nn.Module) -> str | None:
    """Why oneDNN cannot take its weights, if it cannot."""
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        return f"the model is on {device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    linear = next((child for _, _, child in _linears(model)), None)
    if linear is None:
        return "the model has none that could be packed"
    try:
        weight = _weight(linear)
        PackedLinear(weight, linear.bias)(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
    except RuntimeError as error:
        return f"oneDNN cannot pack them here: {error}"
    return None


def _heaviest(model: nn.Module) -> torch.Tensor:
    """One of the weights whose shape does most of the work; of shapes that do the same, the one that comes first."""
    work: Counter[torch.Size] = Counter()
    for _, _, child in _linears(model):
        work[_weight(child).shape] += child.weight.numel()
    shape = work.most_common(1)[0][0]
    return next(weight for _, _, child in _linears(model) if (weight := _weight(child)).shape == shape)
