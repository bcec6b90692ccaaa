"""The fp32 matrix product on a CPU, by the faster of the two libraries that torch has for it.

F.linear goes to MKL, which gives processors that are not Intel's its AVX2 program: 95 GFLOP/s on one core of an AMD EPYC
(Zen 5). oneDNN makes its program for the instructions that are there: 200 GFLOP/s.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["product"]


def product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias): x [rows, d], W [n, d], bias [n], any strides, one floating dtype, on the CPU. No gradient."""
    if x.dtype == torch.float32 and x.numel() and W.numel() and torch.backends.mkldnn.enabled and _onednn():
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    with torch.autocast("cpu", enabled=False):  # it would make this product, unlike the other, one of bf16
        return torch.nn.functional.linear(x, W, bias)


@functools.cache
def _onednn() -> bool:
    """Whether oneDNN's program is at least as fast: with AVX-512."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.cpu.get_cpu_capability() == "AVX512"
