"""concept_map_: how well the output of an attention fits each concept's, into a map for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, jit, next_power_of_2, ops, register, registered, sum_dtype, tl
from ..flop_formulas import register_flop_formula
from ..products import product
from .scores import add_to_group, arguments, check_accumulator, check_device, counted_rows
from .tiles import Maps, add_to_maps, aligned, group_of, head_product, weight_argument

__all__ = ["concept_map_"]


def concept_map_(
    maps: Tensor,
    output: Tensor,
    concepts: Tensor,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
    softmax: bool = True,
) -> None:
    """Add how well the attention output at every image position fits each concept's, to maps, in place.

        S[b, i, c] = sum over h of head_weight[h] output[b, h, i] . concepts[b, h, c]
        maps[group[b], i] += softmax over c of S[b, i]       (S itself with softmax=False), for every b with group[b] >= 0

    Both are outputs of one attention before its projection, of the image's rows and of `concept_attention`.

    Args:
        maps: [groups, n, c] float32 (float64 for a float64 output); strides are free.
        output: [batch, heads, n, e]; concepts: [batch, heads, c, e]; float32, float64, bfloat16 or float16. c is at most
            256.
        head_weight: [heads] floating; default 1 each.
        group: [batch] int32 or int64, as in `attention_map_`. Default: row b adds to map b.

    Products and sums as in `attention_map_`; rows of one group are added in order. NaN in a row makes that row of the map
    NaN. No gradients.

    Cost: 2 B heads n c e FLOPs, B the rows that are counted: as many as the head-wide product [n, heads e] x [heads e, c].
    Reads output and concepts once, reads and writes the maps once. Scratch: none on a GPU, 4 n c bytes on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> maps = torch.zeros(1, 1, 2)
        >>> concept_map_(maps, torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [1.0]]]]))
        >>> maps  # softmax of (0, 1)
        tensor([[[0.2689, 0.7311]]])

    Source: Helbling et al., "ConceptAttention", ICML 2025: the output-space projection, softmax over the concepts.
    """
    _, group = arguments(output, None, group)
    ops.concept_map_(maps, output, concepts, head_weight, group, softmax)


def reference(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> Tensor:
    """The meaning of concept_map_: the new maps. Dense, any dtype."""
    weight = output.new_ones(output.shape[1]) if head_weight is None else head_weight.to(output.dtype)
    scores = torch.einsum("bhne,bhce,h->bnc", output, concepts, weight)
    added = scores.softmax(-1) if softmax else scores
    maps = maps.clone()
    for b, g in enumerate(group.tolist()):
        if 0 <= g < len(maps):
            maps[g] += added[b]
    return maps


MOST_CONCEPTS = 256


def _check(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    if output.dim() != 4 or output.shape[3] == 0:
        raise ValueError(f"output must be [batch, heads, n, e] with e > 0, got shape {tuple(output.shape)}")
    batch, heads, n, e = output.shape
    if concepts.dim() != 4 or (*concepts.shape[:2], concepts.shape[3]) != (batch, heads, e):
        raise ValueError(f"concepts must be [{batch}, {heads}, c, {e}] to match output, got {tuple(concepts.shape)}")
    if concepts.shape[2] > MOST_CONCEPTS:
        raise ValueError(f"concepts must be at most {MOST_CONCEPTS}, got {concepts.shape[2]}; split them")
    for name, tensor in (("output", output), ("concepts", concepts)):
        if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if concepts.dtype != output.dtype:
        raise TypeError(f"concepts must have output's dtype {output.dtype}, got {concepts.dtype}; cast one of them")
    check_device("concepts", concepts, output)
    check_accumulator("maps", maps, (n, concepts.shape[2]), output, head_weight, group)


# --------------------------------------------------------------------------------------------------------------- CPU


def _concept_map_cpu(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    wide = sum_dtype(output)
    for b, g in counted_rows(group, maps.shape[0]):
        # As one product over heads and width, without a copy where heads lie side by side.
        rows, columns = output[b].transpose(0, 1), concepts[b].transpose(0, 1).to(wide)
        if head_weight is not None:
            columns = columns * head_weight.to(wide)[:, None]
        scores = product(rows.flatten(1).to(wide), columns.flatten(1))
        add_to_group(maps, g, torch.softmax(scores, -1) if softmax else scores)


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _concept_map_kernel(
    maps,
    output,
    concepts,
    weight_ptr,
    group_ptr,
    batch,
    heads,
    rows,
    n_concepts,
    groups,
    WEIGHTED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows of one batch row, all heads and concepts; and of the batch rows after it that have its group."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1)
    token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    g, leads = group_of(group_ptr, first, groups, BLOCK_BATCH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for other in range(first, batch):
        b = tl.cast(other, tl.int64)
        mine = (g >= 0) & leads & (tl.load(group_ptr + b).to(tl.int64) == g)
        if mine:
            scores = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
            for h in range(0, heads):
                head = tl.cast(h, tl.int64)
                product = head_product(
                    output, concepts, b, head, head, row, rows, token, n_concepts,
                    D, ALIGN, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_D,
                )  # fmt: skip
                if WEIGHTED:
                    product *= tl.load(weight_ptr + head)
                scores += product
            if SOFTMAX:
                scores = tl.where((token < n_concepts)[None, :], scores * 1.4426950408889634, float("-inf"))
                p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
                total += p / tl.sum(p, axis=1)[:, None]
            else:
                total += scores
    if (g >= 0) & leads:
        add_to_maps(maps, g, row, rows, token, n_concepts, total)


def _concept_map_triton(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    (batch, heads, n, e), c, full = output.shape, concepts.shape[2], output.dtype == torch.float32
    align, (outputs, of_concepts) = aligned(output, concepts)
    block_tokens = next_power_of_2(max(c, 16))
    block_rows = 16 if n <= 256 or full or block_tokens > 64 else 32
    with torch.cuda.device_of(output):
        _concept_map_kernel[(-(-n // block_rows), batch)](
            Maps(maps, *maps.stride()), outputs, of_concepts, weight_argument(head_weight), group.contiguous(),
            batch, heads, n, c, maps.shape[0], WEIGHTED=head_weight is not None, SOFTMAX=softmax, ALIGN=align, D=e,
            BLOCK_BATCH=next_power_of_2(batch), BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens,
            BLOCK_D=min(next_power_of_2(max(e, 16)), 32 if full else 64), num_warps=4,
            num_stages=1 if full or e > 64 else 2,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- registration


def _concept_map(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    _check(maps, output, concepts, head_weight, group, softmax)
    if maps.numel() and output.numel():
        run = _concept_map_triton if implementation("concept_map", output) == "triton" else _concept_map_cpu
        run(maps, output, concepts, head_weight, group, softmax)


register(
    "concept_map_",
    "(Tensor(a!) maps, Tensor output, Tensor concepts, Tensor? head_weight, Tensor group, bool softmax) -> ()",
    _concept_map,
    fake=_check,
    mutates=("maps",),
)


@register_flop_formula(registered.concept_map_)
def _concept_map_flops(maps: Any, output: Any, concepts: Any, *_: Any, **__: Any) -> int:
    """Of all batch rows: what is counted is only known on the device."""
    batch, heads, n, e = output
    return 2 * batch * heads * n * concepts[2] * e
