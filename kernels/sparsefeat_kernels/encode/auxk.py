"""topk_encode for training: the code, and from the same product the dead latents' own largest pre-activations (AuxK)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..decode.auxk_decode import auxk_weight_gradient
from ..dispatch import block_bytes, ops, register, row_chunks, sum_dtype
from ..products import product
from ..threads import conducted, each, pieces, threads, together
from .cpu import PREACTIVATION_BYTES, select, topk_encode_cpu
from .gpu.stored import topk_stored
from .gpu.topk import takes_stored, way
from .prepared import PreparedEncoder
from .product import WEIGHT_TILE_BYTES, check_encoder, encoder_bias, preactivations
from .rounded import can_prefilter, pays_to_round
from .survivors import topk_prefiltered_cpu
from .topk import reference as topk_reference

__all__ = ["auxk_encode"]

SELECTION_BYTES = 1 << 20  # int64 keys of the rows whose dead latents are sorted together: a core's L2


def auxk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    dead: Tensor,
    k_aux: int,
    selection: str = "relu",
    *,
    prepared: PreparedEncoder | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`topk_encode`, and the k_aux largest pre-activations among the latents `dead`, from one pass over W_enc.

    For AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2), where the dead latents alone reconstruct what the code
    missed. (Multi-TopK needs no op of its own: codes are sorted, so the code of 4 k begins with that of k.)

    Args:
        x, W_enc, b_enc, b_pre, k, selection: of `topk_encode`.
        dead: int64 [n_dead], latents in ascending order, each once.
        k_aux: 1 <= k_aux <= n_dead.
        prepared: as in `topk_encode`. With at most half of the latents dead, these then get a product of their own.

    Returns:
        values, indices [rows, k] of `topk_encode`; aux_values, aux_indices [rows, k_aux], the same among `dead`
        (ReLU after the selection, whatever `selection` says), indices into all n_latents.

    Gradients: of the values as in `topk_encode`. Those of aux_values reach W_enc and b_enc and stop there: the auxiliary
    loss teaches dead latents and moves nothing else. One weight gradient serves both codes; the same bits every run.

    Cost: 2 rows n_latents d FLOPs, as for topk_encode alone. Scratch below 64 MiB, whatever rows is. A GPU's kernels
    multiply by the dead latents once more. The host does not wait.

    Raises: as `topk_encode`; ValueError or TypeError for `dead` and `k_aux`.

    Example:
        >>> x = torch.tensor([[2.0, 1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> auxk_encode(x, W_enc, torch.zeros(4), torch.zeros(2), 1, torch.tensor([1, 3]), 2)[2:]
        (tensor([[1., 0.]]), tensor([[1, 3]], dtype=torch.int32))
    """
    low = bounds = None
    if prepared is not None:
        prepared.check_current(W_enc, b_enc, b_pre)
        low, bounds = prepared.rounded or (None, None)
    a, b, c, d = ops.auxk_encode(x, W_enc, b_enc, b_pre, k, dead, k_aux, selection, low, bounds)
    return a, b, c, d


def reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, dead: Tensor, k_aux: int, selection: str = "relu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The meaning of auxk_encode: two encodes."""
    aux_values, place = topk_reference(x, W_enc[dead], b_enc[dead], b_pre, k_aux)
    return *topk_reference(x, W_enc, b_enc, b_pre, k, selection), aux_values, dead[place.long()].to(torch.int32)


def _check_dead(W_enc: Tensor, dead: Tensor, k_aux: int) -> None:
    if dead.dim() != 1 or dead.dtype != torch.int64:
        raise TypeError(
            f"dead must be int64 [n_dead], got {dead.dtype} of shape {tuple(dead.shape)}; use mask.nonzero()"
        )
    if dead.device != W_enc.device:
        raise ValueError(f"dead must be on W_enc's device {W_enc.device}, got {dead.device}; move one of them")
    if not 1 <= k_aux <= dead.shape[0] <= W_enc.shape[0]:
        raise ValueError(
            f"k_aux must be between 1 and the number of dead latents, {dead.shape[0]} (of {W_enc.shape[0]}), got {k_aux}"
        )


def _auxk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    dead: Tensor,
    k_aux: int,
    selection: str,
    low: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_encoder(x, W_enc, b_enc, b_pre, k, selection)
    _check_dead(W_enc, dead, k_aux)
    return _both_codes(x, W_enc, b_enc, b_pre, k, dead, k_aux, selection, low, bounds)


@conducted
def _both_codes(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    dead: Tensor,
    k_aux: int,
    selection: str,
    low: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    aux_values = x.new_empty(x.shape[0], k_aux, dtype=sum_dtype(x))
    aux_indices = x.new_empty(x.shape[0], k_aux, dtype=torch.int32)
    n_dead = dead.shape[0]
    selection_bytes = block_bytes(x, SELECTION_BYTES)

    def among_the_dead(a: Tensor, first_row: int) -> None:
        def some(block: slice) -> None:
            part = a[block] if a.shape[1] == n_dead else a[block].index_select(1, dead)  # [block, n_dead]
            out = slice(first_row + block.start, first_row + block.stop)
            aux_values[out], place = select(part, k_aux, 1, "relu")
            aux_indices[out] = dead[place].to(torch.int32)

        together(each(some, row_chunks(a.shape[0], 8 * n_dead, selection_bytes)))

    taken = way(x, W_enc.shape[0], k)
    kernels = taken != "torch"
    if kernels and takes_stored(x, n_dead, k_aux):
        bias = encoder_bias(W_enc, b_enc, b_pre)
        values, indices = ops.topk_encode(x, W_enc, b_enc, b_pre, k, selection, bias)
        return values, indices, *topk_stored(x, W_enc, bias, b_pre, k_aux, "relu", dead)
    rounded = can_prefilter(x) and (low is not None or pays_to_round(x, W_enc))
    if not kernels and not (rounded and 2 * n_dead <= W_enc.shape[0]):
        values, indices = topk_encode_cpu(x, W_enc, b_enc, b_pre, k, selection, among_the_dead)
        return values, indices, aux_values, aux_indices
    if kernels:
        values, indices = ops.topk_encode(x, W_enc, b_enc, b_pre, k, selection)
    else:
        values, indices = topk_prefiltered_cpu(x, W_enc, b_enc, b_pre, low, bounds, k, selection)
    # The dead latents have a product of their own.
    tile_bytes = WEIGHT_TILE_BYTES // threads()  # every thread has one
    tiles = pieces(n_dead, least=-(-4 * n_dead * x.shape[1] // tile_bytes))
    for chunk in row_chunks(x.shape[0], 4 * n_dead, PREACTIVATION_BYTES):
        part, a = x[chunk], x.new_empty(chunk.stop - chunk.start, n_dead, dtype=aux_values.dtype)
        centred = None if kernels else part.to(a.dtype) - b_pre.to(a.dtype)

        def multiply(tile: slice, a: Tensor = a, part: Tensor = part, centred: Tensor | None = centred) -> None:
            W, b = W_enc[dead[tile]], b_enc[dead[tile]]
            if centred is None:
                preactivations(part, W, b, b_pre, a[:, tile])
            else:
                a[:, tile] = product(centred, W.to(a.dtype), b.to(a.dtype))

        together(each(multiply, tiles))
        among_the_dead(a, chunk.start)
    return values, indices, aux_values, aux_indices


def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    dead: Tensor,
    k_aux: int,
    selection: str,
    low: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_encoder(x, W_enc, b_enc, b_pre, k, selection)
    _check_dead(W_enc, dead, k_aux)
    rows, dtype = x.shape[0], sum_dtype(x)
    codes = [(x.new_empty(rows, n, dtype=dtype), x.new_empty(rows, n, dtype=torch.int32)) for n in (k, k_aux)]
    return *codes[0], *codes[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_pre = inputs[:4]
    values, indices, aux_values, aux_indices = output
    ctx.mark_non_differentiable(indices, aux_indices)
    ctx.save_for_backward(x, W_enc, b_pre, values, indices, aux_values, aux_indices, inputs[5])


def _backward(ctx: Any, grad: Tensor, _: Tensor, grad_aux: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, values, indices, aux_values, aux_indices, dead = ctx.saved_tensors
    need_x, need_W, need_b_enc, need_b_pre = ctx.needs_input_grad[:4]
    g = torch.where(values != 0, grad, 0)
    grad_x = grad_W = grad_b_enc = grad_b_pre = None
    if need_x or need_b_pre:  # of the code alone
        grad_x = ops.sparse_decode(g, indices, W_enc, torch.zeros_like(b_pre))
        grad_b_pre = -grad_x.to(g.dtype).sum(0).to(b_pre.dtype) if need_b_pre else None
    if need_W or need_b_enc:
        g_aux = torch.where(aux_values != 0, grad_aux, 0)
        codes = g, indices, x, g_aux, aux_indices, None
        weight, bias = auxk_weight_gradient(*codes, dead, b_pre, W_enc.shape[0])
        grad_W = weight if need_W else None
        grad_b_enc = bias.to(x.dtype) if need_b_enc else None
    return grad_x if need_x else None, grad_W, grad_b_enc, grad_b_pre, *(None,) * 6


register(
    "auxk_encode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, SymInt k, Tensor dead, SymInt k_aux, str selection,"
    " Tensor? low, Tensor? bounds)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _auxk_encode,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
