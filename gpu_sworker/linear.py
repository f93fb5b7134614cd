"""Linear layers whose weights lie ready for the CPU's matrix kernels.

torch hands a weight to the BLAS as it is stored, and the BLAS rearranges it in every call: at decode batch sizes that
costs as much as the product itself.  oneDNN takes a weight that was rearranged once.  Which of the two is faster
depends on processor and library, so it is measured at load, on the model's own weights:

    fp32 GFLOP/s of [M, 1024] x [1024, 2816], 2 threads, AMD Zen 5      M = 1     16     64    256   1024
    plain (MKL)                                                            32    104    148    183    207
    onednn                                                                 63    440    460    441    468

oneDNN makes code for each number of rows that it meets and keeps it for ever, whatever its cache's capacity: 0.5 to
2 MiB for every shape of a weight.  1,024 numbers and five shapes were 2.3 GiB, and a step may have 4,096 tokens.  So
the S-worker lets it meet 256 numbers, see `padded_rows`; all of them were 1.1 GiB.  Decoding 67 or 129 sequences of the
demonstration model takes 4 % longer so, 257 no longer.

Tried and not kept: MKL's own packing (bound to one M, no faster than plain there); q, k, v or gate, up as one
product (40 us and nothing, of a layer's 5 ms).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gpu_sworker.memory import use_huge_pages

logger = logging.getLogger(__name__)

_NUM_ROWS = 64  # of the batch that weights are packed and measured for; others work as well
_REPEATS = 5
_WORTHWHILE = 1.1  # times faster; less is not worth the other rounding


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


def pack_linears(model: nn.Module, kernel: str = "auto") -> str:
    """Packs every linear layer of a model on the CPU in place, if that pays; returns the kernel in use.

    kernel: ``plain``, ``onednn`` or ``auto``, the faster one.  What cannot be packed (other devices, dtypes that oneDNN
    lacks here) stays plain.
    """
    if kernel != "plain" and not (_can_pack(model) and (kernel == "onednn" or _packing_pays(model))):
        kernel = "plain"
    if kernel == "plain":
        return kernel
    for parent, name, child in list(_linears(model)):
        # One at a time, so that no more than one weight is there twice.  A tied one stays where it is shared.
        setattr(parent, name, PackedLinear(_weight(child), child.bias))
    return "onednn"


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.Linear, Conv1D):  # their own kinds alone: a subclass may compute something else
                yield parent, name, child


def _weight(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """# [out_features, in_features]"""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def _can_pack(model: nn.Module) -> bool:
    if not torch.backends.mkldnn.is_available() or any(p.device.type != "cpu" for p in model.parameters()):
        return False
    linear = next((child for _, _, child in _linears(model)), None)
    if linear is None:
        return False
    try:
        weight = _weight(linear)
        PackedLinear(weight, linear.bias)(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
    except RuntimeError as error:
        logger.debug("no packed weights: %s", error)
        return False
    return True


def _packing_pays(model: nn.Module) -> bool:
    """Measured on the shape that does most of the work."""
    work: Counter[torch.Size] = Counter()
    for _, _, child in _linears(model):
        work[_weight(child).shape] += child.weight.numel()
    shape = work.most_common(1)[0][0]
    linear = next(child for _, _, child in _linears(model) if _weight(child).shape == shape)
    packed = PackedLinear(_weight(linear), linear.bias)
    x = torch.randn(_NUM_ROWS, shape[1]).to(linear.weight.dtype)
    plain_s, packed_s = _medians([lambda: linear(x), lambda: packed(x)])
    logger.info("linear layers %s: plain %.3g ms, packed %.3g ms", tuple(shape), plain_s * 1e3, packed_s * 1e3)
    return plain_s > _WORTHWHILE * packed_s


def _medians(calls: list[Callable[[], object]]) -> list[float]:
    """Seconds of each, taken in turn, so that what disturbs one disturbs all."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_REPEATS + 1):
        for call, seconds in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in taken]
