"""openai/sparse_autoencoder: the Triton functions of its kernels.py, on a GPU.

No distribution on PyPI has it (`sparse-autoencoder` there is another project): it counts only if `kernels.py` is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.peers import importable
from sparsefeat.measure.sae_case import SAECase
from sparsefeat.measure.timing import Provider

NAME = "openai/sparse_autoencoder"
PACKAGE = None


def why_absent() -> str:
    if not torch.cuda.is_available():
        return "its kernels are for GPUs only"
    reason = importable("sparse_autoencoder.kernels")
    if reason:
        return "not installed (no distribution carries it)" if reason == "not installed" else reason
    from sparse_autoencoder import kernels

    return "" if hasattr(kernels, "triton_sparse_dense_matmul") else "another project of that name is installed"


def decode(state: Any) -> Tensor:
    from sparse_autoencoder.kernels import triton_sparse_dense_matmul

    indices, values, W_dec, b = state
    return triton_sparse_dense_matmul(indices, values, W_dec) + b


def code(case: SAECase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.indices.long(), case.values.to(case.W_dec.dtype), case.W_dec, case.b


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return [Provider(NAME, decode, code)] if op == "sparse_decode" else []
