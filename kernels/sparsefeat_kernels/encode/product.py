"""What every encoder multiplies: the checks of its inputs, pre-activations on a CPU, the bias of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit_over_rows, row_chunks, tl
from ..products import sums_wider
from ..threads import each, pieces, threads, together

__all__ = [
    "SELECTIONS",
    "check_bias",
    "check_encoder",
    "encoder_bias",
    "preactivations",
    "product_into",
]

SELECTIONS = ("relu", "signed", "raw")
WEIGHT_TILE_BYTES = 12 << 20  # fp32 copy of a block of half-precision latents (CPU path)


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, d], got shape {tuple(x.shape)}; flatten leading dimensions first")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if W_enc.dim() != 2 or W_enc.shape[1] != x.shape[1]:
        raise ValueError(f"W_enc must be [n_latents, {x.shape[1]}] to match x, got shape {tuple(W_enc.shape)}")
    for name, tensor, length in (("b_enc", b_enc, W_enc.shape[0]), ("b_pre", b_pre, x.shape[1])):
        if tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("b_pre", b_pre)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}; cast one of them")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}; move one of them")
    if not 1 <= k <= W_enc.shape[0]:
        raise ValueError(f"k must be between 1 and n_latents = {W_enc.shape[0]}, got {k}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")


def check_bias(bias: Tensor | None, W_enc: Tensor) -> None:
    """Of what was kept for a GPU's kernels."""
    if bias is not None and (bias.shape != W_enc.shape[:1] or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; pass what prepare_encoder made of these weights")


def product_into(x: Tensor, W: Tensor, out: Tensor) -> None:
    """x W^T into `out`, whose dtype sums are held in. On a GPU half precision is multiplied as it is; elsewhere weights are
    widened a tile at a time."""
    dtype = out.dtype
    if x.dtype == dtype:
        torch.mm(x, W.T, out=out)
    elif x.is_cuda and sums_wider(x.dtype, x.device):
        torch.mm(x, W.T, out_dtype=dtype, out=out)
    else:
        wide = x.to(dtype)
        for tile in row_chunks(len(W), dtype.itemsize * W.shape[1], WEIGHT_TILE_BYTES):
            torch.mm(wide, W[tile].to(dtype).T, out=out[:, tile])


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, out: Tensor) -> None:
    """(x - b_pre) W_enc^T + b_enc into `out`, in out's dtype. On a GPU half precision is multiplied as it is, with sums in
    fp32 and b_pre in the bias, as the Triton kernels do; elsewhere weights are widened a tile at a time."""
    dtype = out.dtype
    if x.is_cuda and x.dtype != dtype and sums_wider(x.dtype, x.device):
        product_into(x, W_enc, out)
        out += b_enc.to(dtype) - torch.mm(b_pre[None], W_enc.T, out_dtype=dtype)
        return
    centred = x.to(dtype) - b_pre.to(dtype)
    same = W_enc.dtype == dtype
    bytes_of_tiles = WEIGHT_TILE_BYTES // threads()  # every thread has one
    tiles = pieces(len(W_enc), least=1 if same else -(-dtype.itemsize * W_enc.numel() // bytes_of_tiles))

    def some(tile: slice) -> None:
        torch.addmm(b_enc[tile].to(dtype), centred, W_enc[tile].to(dtype).T, out=out[:, tile])

    together(each(some, tiles))


# ------------------------------------------------------------------------------------------------------------ Triton
# Half-precision inputs are not centred, since x - b_pre rounded to half precision would lose more than the product:
# b_pre goes into the bias, b_enc - W_enc b_pre, in fp32.


@jit_over_rows
def _encoder_bias_kernel(
    W_ptr,
    b_enc_ptr,
    b_pre_ptr,
    bias_ptr,
    n_latents,
    d,
    stride_W_latent,
    stride_W_d,
    stride_b_enc_latent,
    stride_b_pre_d,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """bias = b_enc - W_enc b_pre, in fp32."""
    latent = tl.program_id(0).to(tl.int64) * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)
    total = tl.zeros([BLOCK_LATENTS, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (latent < n_latents)[:, None] & (column < d)[None, :]
        w = tl.load(W_ptr + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d, mask=inside, other=0.0)
        b = tl.load(b_pre_ptr + column * stride_b_pre_d, mask=column < d, other=0.0)
        total += w.to(tl.float32) * b.to(tl.float32)[None, :]  # [BLOCK_LATENTS, BLOCK_D]
    b_enc = tl.load(b_enc_ptr + latent * stride_b_enc_latent, mask=latent < n_latents, other=0.0).to(tl.float32)
    bias = b_enc - tl.sum(total, axis=1)
    bias = tl.where(bias == float("-inf"), -3.4028234663852886e38, bias)
    tl.store(bias_ptr + latent, bias, mask=latent < n_latents)


def encoder_bias(W_enc: Tensor, b_enc: Tensor, b_pre: Tensor) -> Tensor:
    """What is added to the product, in fp32: b_enc where rows are centred; for half precision b_enc - W_enc b_pre, the
    lowest finite value for -inf. It depends on weights alone: whoever keeps it saves a pass over W_enc a call."""
    n_latents, d = W_enc.shape
    if W_enc.dtype == torch.float32:
        return b_enc.contiguous()
    bias = W_enc.new_empty(n_latents, dtype=torch.float32)
    with torch.cuda.device_of(W_enc):
        _encoder_bias_kernel[(-(-n_latents // 16),)](
            W_enc, b_enc, b_pre, bias, n_latents, d, *W_enc.stride(), *b_enc.stride(), *b_pre.stride(),
            BLOCK_LATENTS=16, BLOCK_D=128, num_warps=4,
        )  # fmt: skip
    return bias
