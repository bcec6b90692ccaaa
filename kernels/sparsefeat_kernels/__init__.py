"""sparsefeat_kernels: sparse-autoencoder ops on plain tensors, for CPUs and (through Triton) GPUs.

Imports torch, Triton where it is installed, and nothing else. Every op is a `torch.ops.sparsefeat.*` custom op: it works
under `torch.compile` and, where training needs it, autograd.
"""

from __future__ import annotations

from .code import SparseCode
from .csr import latent_major, weight_gradient
from .dispatch import force_triton, implementation
from .feature_stats import feature_stats_
from .sparse_decode import sparse_decode
from .sparse_edit import sparse_edit, sparse_edit_delta
from .topk_encode import topk_encode

__all__ = [
    "SparseCode",
    "feature_stats_",
    "force_triton",
    "implementation",
    "latent_major",
    "sparse_decode",
    "sparse_edit",
    "sparse_edit_delta",
    "topk_encode",
    "weight_gradient",
]
