"""sparse_edit and sparse_edit_delta: change a few latents of a code and carry the change to the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..code import check_code, selected_values
from ..dispatch import (
    block_bytes,
    implementation,
    jit_over_rows,
    next_power_of_2,
    ops,
    register,
    row_chunks,
    sum_dtype,
    tl,
)
from ..threads import conducted, each, together

__all__ = ["sparse_edit", "sparse_edit_delta"]

# A bound on the edited values and deltas of one block of rows on the CPU path.
BLOCK_BYTES = 4 << 20

# What follows the directions in every op, and as `*rule, row_weight` in what is private: one of each a latent, one a row.
RULE_ARGUMENTS = ("gain", "offset", "low", "high", "gate")


def sparse_edit_delta(
    values: Tensor,
    indices: Tensor,
    latents: Tensor,
    directions: Tensor,
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    gate: Tensor,
    row_weight: Tensor,
) -> Tensor:
    """What the activations gain when a rule is applied to each of F latents.

        z[r, f]  = the value of latent latents[f] in row r's code, 0 where it is not active
        z'[r, f] = clamp(gain[f] * z + offset[f], low[f], high[f])  if z > gate[f]  else z
        delta[r] = row_weight[r] * sum over f of (z'[r, f] - z[r, f]) * directions[f]

    A gate of -inf applies a rule to every row; a gate of 0 only where the latent is active. Where z' equals z the
    change is exactly 0, infinite z included; a z of NaN is not edited (its row of activations has a NaN already). A
    latent listed twice is edited by both rules, each starting from z.

    Args:
        values: [rows, k] floating; indices: [rows, k] int32 or int64: a padded code.
        latents: [F] int32 or int64, F may be 0; directions: [F, d] floating, usually W_dec[latents].
        gain, offset, low, high, gate: [F] floating. row_weight: [rows] floating, for example a mask.

    Returns: [rows, d], float64 if `directions` is, otherwise float32.

    Gradients: values and directions; the same bits on every run. The rules and row_weight are constants.

    Cost: rows k log F comparisons and 2 rows F d FLOPs (CPU), rows k F comparisons a block of columns (Triton); reads
    F d values, writes rows d. Scratch: some MiB whatever rows is.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example (latent 7 is halved, latent 3 is set to 2 wherever it is, or is not, active):
        >>> code = torch.tensor([[4.0, 1.0]]), torch.tensor([[7, 5]]).int()
        >>> inf, pair = torch.inf, torch.tensor
        >>> sparse_edit_delta(*code, pair([7, 3]), torch.eye(2), pair([0.5, 0.0]), pair([0.0, 2.0]),
        ...     pair([-inf, -inf]), pair([inf, inf]), pair([-inf, -inf]), torch.ones(1))
        tensor([[-2.,  2.]])
    """
    return ops.sparse_edit_delta(values, indices, latents, directions, gain, offset, low, high, gate, row_weight)


def sparse_edit(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    latents: Tensor,
    directions: Tensor,
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    gate: Tensor,
    row_weight: Tensor,
) -> Tensor:
    """x + sparse_edit_delta(...), added in fp32 (fp64 if `x` or `directions` is float64) and rounded once to x's dtype.

    Elements whose delta is 0 keep their bits, -0.0 and NaN included: a rule that changes nothing (gain 1, offset 0,
    bounds that do not bind) returns x bit for bit.

    Args: x: [rows, d], float32, float64, bfloat16 or float16; the others as in sparse_edit_delta, whose cost, gradients
    and errors it shares; it reads and writes x once and holds no delta. The gradient also reaches x, unchanged.

    Example:
        >>> one, inf = torch.ones(1), torch.full((1,), torch.inf)
        >>> code = torch.tensor([[4.0]]), torch.tensor([[7]]).int()
        >>> sparse_edit(torch.tensor([[1.0, 1.0]]), *code, torch.tensor([7]), torch.tensor([[0.0, 1.0]]),
        ...     0 * one, 0 * one, -inf, inf, -inf, one)
        tensor([[ 1., -3.]])
    """
    return ops.sparse_edit(x, values, indices, latents, directions, gain, offset, low, high, gate, row_weight)


def reference(
    values: Tensor,
    indices: Tensor,
    latents: Tensor,
    directions: Tensor,
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    gate: Tensor,
    row_weight: Tensor,
) -> Tensor:
    """The meaning of sparse_edit_delta: dense, any dtype."""
    active = indices[:, :, None] == latents  # [rows, k, F]
    z = torch.where(active, values[:, :, None], 0).sum(1)
    edited = torch.where(z > gate, torch.clamp(gain * z + offset, low, high), z)
    change = torch.where((edited == z) | z.isnan(), 0, edited - z)
    return row_weight[:, None] * (change @ directions)


def _check(values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor) -> None:
    *rule, row_weight = others
    check_code(values, indices, directions.device, "directions")
    if latents.dim() != 1:
        raise ValueError(f"latents must be [F], got shape {tuple(latents.shape)}")
    if latents.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"latents must be int32 or int64, got {latents.dtype}")
    if directions.dim() != 2 or directions.shape[0] != latents.shape[0]:
        raise ValueError(
            f"directions must be [{latents.shape[0]}, d], one row a latent, got shape {tuple(directions.shape)}"
        )
    sizes = [(name, tensor, latents.shape[0]) for name, tensor in zip(RULE_ARGUMENTS, rule, strict=True)]
    sizes.append(("row_weight", row_weight, values.shape[0]))
    for name, tensor, length in sizes:
        if tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    for name, tensor in (("directions", directions), *((name, tensor) for name, tensor, _ in sizes)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("latents", latents), *((name, tensor) for name, tensor, _ in sizes)):
        if tensor.device != directions.device:
            raise ValueError(
                f"{name} must be on directions' device {directions.device}, got {tensor.device}; move one of them"
            )


def _check_x(x: Tensor, values: Tensor, directions: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] != values.shape[0] or x.shape[1] != directions.shape[1]:
        raise ValueError(f"x must be [{values.shape[0]}, {directions.shape[1]}], got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.device != directions.device:
        raise ValueError(f"x must be on directions' device {directions.device}, got {x.device}; move one of them")


# --------------------------------------------------------------------------------------------------------------- CPU


def _selected(values: Tensor, indices: Tensor, latents: Tensor, dtype: torch.dtype) -> Tensor:
    rows = torch.arange(values.shape[0], device=values.device)[:, None].expand(values.shape)
    return selected_values(values.to(dtype), indices, rows, values.shape[0], latents)


def _change(z: Tensor, rule: list[Tensor]) -> Tensor:
    """z' - z for z [rows, F]."""
    gain, offset, low, high, gate = (tensor.to(z.dtype) for tensor in rule)
    edited = torch.where(z > gate, torch.clamp(gain * z + offset, low, high), z)
    return torch.where((edited == z) | z.isnan(), 0, edited - z)


def _blocks(values: Tensor, directions: Tensor) -> list[slice]:
    return row_chunks(len(values), 8 * (values.shape[1] + sum(directions.shape)), block_bytes(values, BLOCK_BYTES))


@conducted
def _edit_cpu(
    x: Tensor | None, values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    *rule, row_weight = others
    dtype = sum_dtype(directions) if x is None else sum_dtype(directions, x)
    out = directions.new_empty(values.shape[0], directions.shape[1], dtype=dtype if x is None else x.dtype)
    wide = directions.to(dtype)

    def some(block: slice) -> None:
        change = _change(_selected(values[block], indices[block], latents, dtype), rule)
        delta = row_weight[block, None].to(dtype) * (change @ wide)
        out[block] = delta if x is None else torch.where(delta == 0, x[block], (x[block].to(dtype) + delta).to(x.dtype))

    together(each(some, _blocks(values, directions)))
    return out


def _edit_grad_values(
    grad: Tensor, values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    """The gradient to the entries of the code: row_weight * (dz'/dz - 1) * (grad . direction), 0 for padding."""
    *rule, row_weight = others
    dtype = sum_dtype(directions)
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    if values.numel() == 0 or latents.numel() == 0:
        return out
    wide = directions.to(dtype)
    wanted = latents.long().sort().values  # of equal ones the first slot is the latent's
    edits = (
        torch.searchsorted(wanted, latents.long())[:, None] == torch.arange(len(wanted), device=latents.device)
    ).to(dtype)
    gain, offset, low, high, gate = (tensor.to(dtype) for tensor in rule)
    for block in _blocks(values, directions):
        z = _selected(values[block], indices[block], latents, dtype)
        moved = gain * z + offset
        slope = torch.where((moved >= low) & (moved <= high), gain, 0) - 1
        slope = torch.where(z > gate, slope, 0) * row_weight[block, None].to(dtype)
        of_rule = slope * (grad[block].to(dtype) @ wide.T)
        # Rules on one latent add up in the order given: a product with the 0/1 matrix of who edits what.
        table = of_rule @ edits
        columns = indices[block].long()
        slots = torch.searchsorted(wanted, columns).clamp_(max=wanted.shape[0] - 1)
        mine = (wanted[slots] == columns) & (values[block] != 0)
        out[block] = torch.where(mine, table.gather(1, slots), 0).to(out.dtype)
    return out


def _edit_grad_directions(
    grad: Tensor, values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    """The gradient to the directions: (row_weight * (z' - z))^T grad, blocks of rows summed in order."""
    *rule, row_weight = others
    dtype = sum_dtype(directions)
    out = torch.zeros_like(directions, dtype=dtype, memory_format=torch.contiguous_format)
    for block in _blocks(values, directions):
        change = _change(_selected(values[block], indices[block], latents, dtype), rule)
        out += (row_weight[block, None].to(dtype) * change).T @ grad[block].to(dtype)
    return out.to(directions.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton


@jit_over_rows
def _sparse_edit_row_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    latents_ptr,
    directions_ptr,
    gain_ptr,
    offset_ptr,
    low_ptr,
    high_ptr,
    gate_ptr,
    row_weight_ptr,
    out_ptr,
    k,
    n_rules,
    d,
    stride_x_row,
    stride_x_d,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    stride_directions_rule,
    stride_directions_d,
    stride_row_weight_row,
    ADD_X: tl.constexpr,
    BLOCK_RULES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row and one block of columns: every rule finds its latent in the row's code and adds its direction."""
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    total = tl.zeros([BLOCK_RULES, BLOCK_D], tl.float32)
    for first in range(0, n_rules, BLOCK_RULES):
        rule = first + tl.arange(0, BLOCK_RULES)
        inside = rule < n_rules
        latent = tl.load(latents_ptr + rule, mask=inside, other=-1)
        z = tl.zeros([BLOCK_RULES], tl.float32)
        for start in range(0, k, BLOCK_K):
            entry = start + tl.arange(0, BLOCK_K).to(tl.int64)
            value = tl.load(values_ptr + row * stride_values_row + entry * stride_values_k, mask=entry < k, other=0.0)
            index = tl.load(indices_ptr + row * stride_indices_row + entry * stride_indices_k, mask=entry < k, other=-1)
            mine = latent[:, None] == index[None, :]  # [BLOCK_RULES, BLOCK_K]
            z += tl.sum(tl.where(mine, value.to(tl.float32)[None, :], 0.0), axis=1)
        gain = tl.load(gain_ptr + rule, mask=inside, other=1.0).to(tl.float32)
        offset = tl.load(offset_ptr + rule, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(low_ptr + rule, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(high_ptr + rule, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + rule, mask=inside, other=0.0).to(tl.float32)
        # A NaN is an error to be seen: a GPU's own minimum and maximum would take the bound instead.
        moved = tl.maximum(gain * z + offset, low, propagate_nan=tl.PropagateNan.ALL)
        moved = tl.minimum(moved, high, propagate_nan=tl.PropagateNan.ALL)
        edited = tl.where(z > gate, moved, z)
        change = tl.where(inside & (edited != z) & (z == z), edited - z, 0.0)  # [BLOCK_RULES]
        direction_ptrs = (
            directions_ptr + rule.to(tl.int64)[:, None] * stride_directions_rule + column[None, :] * stride_directions_d
        )
        direction = tl.load(direction_ptrs, mask=inside[:, None] & (column < d)[None, :], other=0.0)
        total += change[:, None] * direction.to(tl.float32)  # [BLOCK_RULES, BLOCK_D]
    weight = tl.load(row_weight_ptr + row * stride_row_weight_row).to(tl.float32)
    delta = weight * tl.sum(total, axis=0)  # [BLOCK_D]
    if ADD_X:
        x = tl.load(x_ptr + row * stride_x_row + column * stride_x_d, mask=column < d, other=0.0)
        # Through x's own dtype: an element that does not change keeps its bits.
        result = tl.where(delta == 0.0, x, (x.to(tl.float32) + delta).to(x.dtype))
    else:
        result = delta
    tl.store(out_ptr + row * d + column, result, mask=column < d)


def _edit_triton(
    x: Tensor | None, values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    *rule, row_weight = others
    (rows, k), (n_rules, d) = values.shape, directions.shape
    out = directions.new_empty(rows, d, dtype=torch.float32 if x is None else x.dtype)
    if out.numel() == 0:
        return out
    block_d = min(next_power_of_2(max(d, 16)), 512)  # 128 threads times 4 columns
    with torch.cuda.device_of(directions):
        _sparse_edit_row_kernel[(rows, -(-d // block_d))](
            out if x is None else x, values, indices, latents.contiguous(), directions,
            *(tensor.contiguous() for tensor in rule), row_weight, out, k, n_rules, d,
            *(out if x is None else x).stride(), *values.stride(), *indices.stride(), *directions.stride(),
            *row_weight.stride(), ADD_X=x is not None, BLOCK_RULES=4,
            BLOCK_K=min(next_power_of_2(max(k, 16)), 64), BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------- registration


def _sparse_edit_delta(values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor) -> Tensor:
    _check(values, indices, latents, directions, *others)
    run = _edit_triton if implementation("sparse_edit", directions) == "triton" else _edit_cpu
    return run(None, values, indices, latents, directions, *others)


def _sparse_edit_delta_fake(
    values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    _check(values, indices, latents, directions, *others)
    return directions.new_empty(values.shape[0], directions.shape[1], dtype=sum_dtype(directions))


def _sparse_edit(
    x: Tensor, values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    _check(values, indices, latents, directions, *others)
    _check_x(x, values, directions)
    kernel = implementation("sparse_edit", x) == implementation("sparse_edit", directions) == "triton"
    return (_edit_triton if kernel else _edit_cpu)(x, values, indices, latents, directions, *others)


def _sparse_edit_fake(
    x: Tensor, values: Tensor, indices: Tensor, latents: Tensor, directions: Tensor, *others: Tensor
) -> Tensor:
    _check(values, indices, latents, directions, *others)
    _check_x(x, values, directions)
    return x.new_empty(x.shape)


def _setup_delta_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _delta_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_values, need_directions = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    saved = ctx.saved_tensors
    grad_values = ops.sparse_edit_grad_values(grad, *saved) if need_values else None
    grad_directions = ops.sparse_edit_grad_directions(grad, *saved) if need_directions else None
    return grad_values, None, None, grad_directions, *([None] * 6)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_values, need_directions = (ctx.needs_input_grad[i] for i in (0, 1, 4))
    saved = ctx.saved_tensors
    grad_values = ops.sparse_edit_grad_values(grad, *saved) if need_values else None
    grad_directions = ops.sparse_edit_grad_directions(grad, *saved) if need_directions else None
    return grad if need_x else None, grad_values, None, None, grad_directions, *([None] * 6)


_EDIT_SCHEMA = (
    "Tensor values, Tensor indices, Tensor latents, Tensor directions, Tensor gain, Tensor offset, Tensor low, "
    "Tensor high, Tensor gate, Tensor row_weight) -> Tensor"
)

register(
    "sparse_edit_delta",
    "(" + _EDIT_SCHEMA,
    _sparse_edit_delta,
    fake=_sparse_edit_delta_fake,
    backward=_delta_backward,
    setup_context=_setup_delta_context,
)

register(
    "sparse_edit",
    "(Tensor x, " + _EDIT_SCHEMA,
    _sparse_edit,
    fake=_sparse_edit_fake,
    backward=_backward,
    setup_context=_setup_context,
)

register(
    "sparse_edit_grad_values",
    "(Tensor grad, " + _EDIT_SCHEMA,
    _edit_grad_values,
    fake=lambda grad, values, *rest: torch.empty_like(values, memory_format=torch.contiguous_format),
)

register(
    "sparse_edit_grad_directions",
    "(Tensor grad, " + _EDIT_SCHEMA,
    _edit_grad_directions,
    fake=lambda grad, values, indices, latents, directions, *rest: torch.empty_like(
        directions, memory_format=torch.contiguous_format
    ),
)
