"""Products on a CPU: of matrices, by the faster of the two libraries that torch has for fp32; of chosen pairs of rows,
without gathering either side, which costs more than the products. On a GPU: with sums in fp32.

F.linear goes to MKL, which gives processors that are not Intel's its AVX2 program: 95 GFLOP/s on one core of an AMD EPYC
(Zen 5). oneDNN makes its program for the instructions that are there: 200 GFLOP/s.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .dispatch import sum_dtype

__all__ = ["pair_products", "product", "quiet_about_csr", "sums_wider", "wide_product"]


def product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias): x [rows, d], W [n, d], bias [n], any strides, one floating dtype. No gradient."""
    here = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu" and x.numel() and W.numel()
    if here and torch.backends.mkldnn.enabled and _onednn():
        if not (
            W.is_contiguous() or W.T.is_contiguous()
        ):  # with gaps between its rows oneDNN has no program but a loop
            W = W.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    with torch.autocast(x.device.type, enabled=False):  # it would make this product, unlike the other, one of bf16
        return torch.nn.functional.linear(x, W, bias)


@functools.cache
def _onednn() -> bool:
    """Whether oneDNN's program is at least as fast: with AVX-512."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.cpu.get_cpu_capability() == "AVX512"


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices of one dtype, whose sums are in fp32 (fp64) and are not rounded again."""
    dtype = sum_dtype(a)
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and sums_wider(a.dtype, a.device):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


@functools.cache
def sums_wider(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a product of this dtype there whose sums it keeps in fp32: on a GPU, from 2.8."""
    one, out = torch.ones(16, 16, dtype=dtype, device=device), torch.empty(16, 32, device=device, dtype=torch.float32)
    try:
        torch.mm(one, one, out_dtype=torch.float32, out=out[:, :16])
    except (TypeError, RuntimeError):
        return False
    return True


def pair_products(x: Tensor, W: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """x[r] . W[columns[j]] for every j from offsets[r] up to offsets[r + 1], [entries].

    x [rows, d] and W [n, d] are float32 or float64 on the CPU; offsets [rows + 1] and columns [entries] int64, in range,
    a column as often as one likes. Torch calls this a sampled product: of x W^T the entries of a CSR pattern.
    """
    if len(columns) > len(x) * len(W):  # a pattern with entries twice is none that torch takes; all pairs are fewer
        rows = torch.repeat_interleave(torch.arange(len(x)), offsets.diff())
        return (x @ W.T)[rows, columns]
    quiet_about_csr()
    zeros = x.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(offsets, columns, zeros, size=(len(x), len(W)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, x.contiguous(), W.T, beta=0.0).values()


@functools.cache
def quiet_about_csr() -> None:
    """Torch says once that its CSR tensors are in beta: not of interest to whoever encodes. (Before threads begin:
    filters of warnings are not theirs.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float32)
        )
