"""sparsefeat_kernels: sparse-autoencoder ops on plain tensors, for CPUs and (through Triton) GPUs.

Imports torch, Triton where it is installed, and nothing else. Every op is a `torch.ops.sparsefeat.*` custom op: it works
under `torch.compile` and, where training needs it, autograd.
"""

from __future__ import annotations

from . import flops
from .attention.columns import attention_column_sums_
from .attention.concept import concept_attention
from .attention.concept_map import concept_map_
from .attention.map import attention_map_, attention_with_map_
from .attention.map_gradient import attention_map
from .attention.resize import resize_add_
from .attention.rows import attention_rows
from .attention.tap import attention_tap_, attention_tap_local_
from .code import SparseCode
from .decode.auxk_decode import auxk_decode, auxk_weight_gradient
from .decode.sparse_decode import sparse_decode
from .decode.sparse_edit import sparse_edit, sparse_edit_delta
from .dispatch import force_triton, implementation
from .encode.auxk import auxk_encode
from .encode.prepared import PreparedEncoder, prefilter_pays, prepare_encoder
from .encode.pursuit import matching_pursuit
from .encode.rounded import bf16_products
from .encode.threshold import threshold_encode, threshold_encode_csr
from .encode.topk import topk_encode
from .feature_stats import feature_stats_
from .gradient.csr import latent_major
from .gradient.gradient_memory import keep_gradient_memory, release_gradient_memory
from .gradient.weight_gradient import weight_gradient

__all__ = [
    "PreparedEncoder",
    "SparseCode",
    "attention_column_sums_",
    "attention_map",
    "attention_map_",
    "attention_rows",
    "attention_tap_",
    "attention_tap_local_",
    "attention_with_map_",
    "auxk_decode",
    "auxk_encode",
    "auxk_weight_gradient",
    "bf16_products",
    "concept_attention",
    "concept_map_",
    "feature_stats_",
    "flops",
    "force_triton",
    "implementation",
    "keep_gradient_memory",
    "latent_major",
    "matching_pursuit",
    "prefilter_pays",
    "prepare_encoder",
    "release_gradient_memory",
    "resize_add_",
    "sparse_decode",
    "sparse_edit",
    "sparse_edit_delta",
    "threshold_encode",
    "threshold_encode_csr",
    "topk_encode",
    "weight_gradient",
]
