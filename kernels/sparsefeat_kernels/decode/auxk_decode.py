"""What AuxK decodes in a training step: the code, and beside it the code of the dead latents, with one gradient of W_dec.

The code of the dead latents is dense in them: d / 2 entries a row, among perhaps a few thousand dead latents. A matrix
product over all the dead latents then costs less than gathering a decoder row for every entry: on a CPU a tile that its
caches hold after the other, on a GPU in few launches and without a wait (`auxk_dense`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..code import check_code
from ..dispatch import implementation, ops, register, row_chunks
from ..gradient.weight_gradient import check_gradient, weight_gradient, weight_gradient_cpu
from ..products import product
from ..threads import conducted, each, pieces, threads, together
from .auxk_dense import add_dense_weight_gradient, dense_decode, dense_grad_values, dense_pays
from .sparse_decode import check_decode, grad_values_cpu, sparse_decode_cpu
from .sparse_decode import reference as decode_reference

__all__ = ["auxk_decode", "auxk_weight_gradient", "dense_in"]

# A product over n_dead latents costs as much as gathering n_dead / 8 entries a row (forward and backward together; 0.13
# and 0.88 us an entry, at d = 1280 on one core of an AMD EPYC).
DENSE = 8
# The dense code of the rows that are taken together, and the dictionary rows: what stays below 32 MiB malloc keeps.
CODE_BYTES = 16 << 20
TILE_BYTES = 4 << 20


def auxk_decode(
    values: Tensor, indices: Tensor, aux_values: Tensor, aux_indices: Tensor, dead: Tensor, W_dec: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Two reconstructions: of the code, and without bias of the code of the dead latents, as `auxk_encode` makes them.

        y[r]     = b_out + sum over j of values[r, j] * W_dec[indices[r, j]]
        guess[r] = sum over j of aux_values[r, j] * W_dec[aux_indices[r, j]]

    Args:
        values, indices: [rows, k]; aux_values, aux_indices: [rows, k_aux]; as in `sparse_decode`.
        dead: int64 [n_dead], the latents that aux_indices are from, each once. (On a GPU the row of any other may be NaN.)
        W_dec: [n_latents, d]; b_out: [d], as in `sparse_decode`.

    Returns:
        y, guess: [rows, d] in W_dec's dtype, as `sparse_decode` gives them, but that the order of guess's sum is free (the
        same on every run). On a GPU bfloat16 weights are multiplied with values taken to 2^-18 of themselves, and Inf or NaN
        in the decoder row of a dead latent may reach all rows of guess.

    Gradients: of both codes' values, W_dec and b_out, as of two `sparse_decode`; that of W_dec is made once for both.

    Cost: 2 rows (k + k_aux) d FLOPs. On a CPU, in float32 and float64, with n_dead <= 8 k_aux: 2 rows (k d + n_dead d),
    as matrix products; scratch some 40 MiB. So on a GPU, with n_dead <= 20 k_aux in bfloat16 (float16: as it was):
    scratch 48 MiB, and the dead latents' decoder rows.

    Raises: ValueError or TypeError naming the argument.

    Example:
        >>> W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> code, aux = (torch.tensor([[2.0]]), torch.tensor([[0]])), (torch.tensor([[3.0]]), torch.tensor([[1]]))
        >>> auxk_decode(*code, *aux, torch.tensor([1, 2]), W_dec, torch.ones(2))
        (tensor([[3., 1.]]), tensor([[0., 3.]]))
    """
    y, guess = ops.auxk_decode(values, indices, aux_values, aux_indices, dead, W_dec, b_out)
    return y, guess


def reference(
    values: Tensor, indices: Tensor, aux_values: Tensor, aux_indices: Tensor, dead: Tensor, W_dec: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The meaning of auxk_decode: two dense decodes."""
    y = decode_reference(values, indices, W_dec, b_out)
    return y, decode_reference(aux_values, aux_indices, W_dec, torch.zeros_like(b_out))


def auxk_weight_gradient(
    coefficients: Tensor,
    indices: Tensor,
    x: Tensor,
    aux_coefficients: Tensor,
    aux_indices: Tensor,
    aux_x: Tensor | None,
    dead: Tensor,
    shift: Tensor,
    n_latents: int,
) -> tuple[Tensor, Tensor]:
    """The sum of two `weight_gradient`: of the code with x, and of the code of the dead latents with aux_x (None: x too).

    Args:
        coefficients, indices: [rows, k]; x: [rows, d]; shift: [d]; n_latents: as in `weight_gradient`.
        aux_coefficients, aux_indices: [rows, k_aux]; dead: as in `auxk_decode`; aux_x: [rows, d].

    Returns: weight [n_latents, d], bias [n_latents], as `weight_gradient`, but that on a GPU the parts of both codes may be
        rounded before they are added, and that there Inf, NaN and an entry of no latent of `dead` may reach all dead
        latents. The same bits on every run.

    Cost: 2 rows (k + k_aux) d FLOPs, or dense in the dead latents as `auxk_decode` is; then on a GPU scratch also for their
    sums, in fp32.

    Example:
        >>> one, row = torch.ones(1, 1), torch.tensor([[1.0, 2.0]])
        >>> code, aux, dead = torch.tensor([[0]]), torch.tensor([[2]]), torch.tensor([2])
        >>> auxk_weight_gradient(one, code, row, 2 * one, aux, None, dead, torch.zeros(2), 3)
        (tensor([[1., 2.],
                [0., 0.],
                [2., 4.]]), tensor([1., 0., 2.]))
    """
    weight, bias = ops.auxk_weight_gradient(
        coefficients, indices, x, aux_coefficients, aux_indices, aux_x, dead, shift, n_latents
    )
    return weight, bias


# --------------------------------------------------------------------------------------------------------------- CPU


def dense_in(W: Tensor, dead: Tensor, k_aux: int) -> bool:
    """Whether on a CPU a code of k_aux entries a row among the latents `dead` is best multiplied as a dense one."""
    plain = W.dtype in (torch.float32, torch.float64) and implementation("sparse_decode", W) == "torch"
    return plain and W.device.type == "cpu" and 0 < dead.shape[0] <= DENSE * k_aux


def _columns(values: Tensor, indices: Tensor, dead: Tensor, n_latents: int) -> tuple[Tensor, Tensor] | None:
    """The code as entries of the columns of `dead`: values, 0 where there is no entry, and int64 columns. None if an entry
    is of no latent of `dead`."""
    owned = (values != 0) & (indices >= 0) & (indices < n_latents)
    column_of = indices.new_full((n_latents,), -1, dtype=torch.int64)
    column_of[dead] = torch.arange(len(dead), device=dead.device)
    columns = column_of[torch.where(owned, indices, dead[0])]
    return None if bool((columns < 0).any()) else (torch.where(owned, values, 0), columns)


def _dense(values: Tensor, columns: Tensor, n_dead: int) -> Tensor:
    """Entries of the same row and column add up."""
    return values.new_zeros(len(values), n_dead).scatter_add_(1, columns, values)


def _finite(x: Tensor) -> bool:
    """A dense product also multiplies what no entry of the code touches, by 0: Inf and NaN there would spread."""
    return bool(x.sum().isfinite())


@conducted
def _decode_cpu(values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    rows, d = values.shape[0], W_dec.shape[1]
    code = _columns(values, indices, dead, len(W_dec)) if dense_in(W_dec, dead, values.shape[1]) else None
    if code is not None:
        out, n_dead = W_dec.new_zeros(rows, d), len(dead)
        for part in row_chunks(rows, n_dead * W_dec.itemsize, CODE_BYTES):
            z = _dense(code[0][part].to(W_dec.dtype), code[1][part], n_dead)

            def some(columns: slice, z: Tensor = z, part: slice = part) -> None:
                W = W_dec[:, columns]
                for tile in row_chunks(
                    n_dead, (columns.stop - columns.start) * W_dec.itemsize, TILE_BYTES // threads()
                ):
                    out[part, columns] += product(z[:, tile], W[dead[tile]].T)

            together(each(some, pieces(d)))
        if _finite(out):
            return out
    return sparse_decode_cpu(values, indices, W_dec, W_dec.new_zeros(d))


@conducted
def _grad_aux_values_cpu(grad: Tensor, values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    """The dot products of every row's gradient with all the dead latents' decoder rows; the code's are picked out."""
    code = _columns(values, indices, dead, len(W_dec)) if dense_in(W_dec, dead, values.shape[1]) else None
    if code is None:
        return grad_values_cpu(grad, values, indices, W_dec)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    for part in row_chunks(len(grad), len(dead) * grad.itemsize, CODE_BYTES):
        dots = grad.new_empty(part.stop - part.start, len(dead))

        def some(tile: slice, dots: Tensor = dots, part: slice = part) -> None:
            dots[:, tile] = product(grad[part], W_dec[dead[tile]])

        together(each(some, row_chunks(len(dead), grad.shape[1] * grad.itemsize, TILE_BYTES // threads())))
        out[part] = torch.where(code[0][part] != 0, dots.gather(1, code[1][part]), 0)
    return out


@conducted
def _auxk_weight_gradient_cpu(
    coefficients: Tensor,
    indices: Tensor,
    x: Tensor,
    aux_coefficients: Tensor,
    aux_indices: Tensor,
    aux_x: Tensor | None,
    dead: Tensor,
    shift: Tensor,
    n_latents: int,
) -> tuple[Tensor, Tensor] | None:
    """None where the sparse way is the better one, or the only one."""
    dense = dense_in(x, dead, aux_coefficients.shape[1])
    code = _columns(aux_coefficients, aux_indices, dead, n_latents) if dense else None
    if code is None:
        return None
    weight, bias = weight_gradient_cpu(coefficients, indices, x, shift, n_latents)
    aux_x, n_dead = x if aux_x is None else aux_x, len(dead)
    for part in row_chunks(len(x), n_dead * x.itemsize, CODE_BYTES):
        z = _dense(code[0][part].to(x.dtype), code[1][part], n_dead)
        centred = aux_x[part] - shift
        finite: list[bool] = []

        def some(tile: slice, z: Tensor = z, centred: Tensor = centred, finite: list[bool] = finite) -> None:
            added = product(z[:, tile].T, centred.T)
            finite.append(_finite(added))
            weight.index_add_(0, dead[tile], added)

        together(each(some, row_chunks(n_dead, x.shape[1] * x.itemsize, TILE_BYTES // threads())))
        if not all(finite):
            return None
        bias.index_add_(0, dead, z.sum(0))
    return weight, bias


# ------------------------------------------------------------------------------------------------------- registration


def _check_aux(aux_values: Tensor, aux_indices: Tensor, dead: Tensor, rows: int, beside: Tensor, name: str) -> None:
    """The code of the dead latents, of as many rows as the other, on the device of the argument `beside`. name: of aux_values."""
    check_code(aux_values, aux_indices, beside.device, "the code", name)
    if len(aux_values) != rows:
        raise ValueError(
            f"{name} and aux_indices must both be [{rows}, k_aux] as the code has {rows} rows, got shapes "
            f"{tuple(aux_values.shape)} and {tuple(aux_indices.shape)}"
        )
    if dead.dim() != 1 or dead.dtype != torch.int64:
        raise TypeError(
            f"dead must be int64 [n_dead], got {dead.dtype} of shape {tuple(dead.shape)}; use mask.nonzero()"
        )
    if dead.device != beside.device:
        raise ValueError(f"dead must be on the code's device {beside.device}, got {dead.device}; move one of them")


def _auxk_decode(
    values: Tensor, indices: Tensor, aux_values: Tensor, aux_indices: Tensor, dead: Tensor, W_dec: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor]:
    check_decode(values, indices, W_dec, b_out)
    _check_aux(aux_values, aux_indices, dead, len(values), W_dec, "aux_values")
    y = ops.sparse_decode(values, indices, W_dec, b_out)
    if dense_pays(W_dec, dead, aux_values.shape[1]):
        return y, dense_decode(aux_values, aux_indices, dead, W_dec)
    if implementation("sparse_decode", W_dec) == "torch":
        return y, _decode_cpu(aux_values, aux_indices, dead, W_dec)
    return y, ops.sparse_decode(aux_values, aux_indices, W_dec, torch.zeros_like(b_out))


def _auxk_decode_fake(
    values: Tensor, indices: Tensor, aux_values: Tensor, aux_indices: Tensor, dead: Tensor, W_dec: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor]:
    check_decode(values, indices, W_dec, b_out)
    _check_aux(aux_values, aux_indices, dead, len(values), W_dec, "aux_values")
    y, guess = (W_dec.new_empty(len(values), W_dec.shape[1]) for _ in range(2))
    return y, guess


def _grad_aux_values(grad: Tensor, values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    if dense_pays(W_dec, dead, values.shape[1]):
        return dense_grad_values(grad, values, indices, dead, W_dec)
    if implementation("sparse_decode", W_dec) == "torch":
        return _grad_aux_values_cpu(grad, values, indices, dead, W_dec)
    return ops.sparse_decode_grad_values(grad, values, indices, W_dec)


def _grad_aux_values_fake(grad: Tensor, values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _auxk_weight_gradient(
    coefficients: Tensor,
    indices: Tensor,
    x: Tensor,
    aux_coefficients: Tensor,
    aux_indices: Tensor,
    aux_x: Tensor | None,
    dead: Tensor,
    shift: Tensor,
    n_latents: int,
) -> tuple[Tensor, Tensor]:
    check_code(coefficients, indices, x.device, "x", "coefficients")
    check_gradient(x, shift, len(coefficients), n_latents)
    _check_aux(aux_coefficients, aux_indices, dead, len(coefficients), x, "aux_coefficients")
    if aux_x is not None and (aux_x.shape != x.shape or aux_x.dtype != x.dtype or aux_x.device != x.device):
        raise ValueError(f"aux_x must have x's shape {tuple(x.shape)}, dtype and device, got {tuple(aux_x.shape)}")
    if dense_pays(x, dead, aux_coefficients.shape[1]):
        weight, bias = weight_gradient(coefficients, indices, x, shift, n_latents)
        of_dead = aux_coefficients, aux_indices, x if aux_x is None else aux_x, dead, shift
        add_dense_weight_gradient(weight, bias, *of_dead)
        return weight, bias
    if implementation("weight_gradient", x) == "torch":
        found = _auxk_weight_gradient_cpu(
            coefficients, indices, x, aux_coefficients, aux_indices, aux_x, dead, shift, n_latents
        )
        if found is not None:
            return found
    codes = [(coefficients, indices), (aux_coefficients, aux_indices)]
    if aux_x is None:  # one code of k + k_aux
        both = torch.cat([c for c, _ in codes], 1), torch.cat([i for _, i in codes], 1)
        return weight_gradient(*both, x, shift, n_latents)
    # One code of twice the rows makes one gradient instead of two and their sum; padded to one width it must not be
    # larger than that gradient.
    widest = max(coefficients.shape[1], aux_coefficients.shape[1])
    if 2 * len(x) * widest <= n_latents * x.shape[1]:
        padded = [[torch.nn.functional.pad(t, (0, widest - t.shape[1])) for t in code] for code in codes]
        both = torch.cat([c for c, _ in padded]), torch.cat([i for _, i in padded])
        return weight_gradient(*both, torch.cat([x, aux_x]), shift, n_latents)
    weight, bias = weight_gradient(*codes[0], x, shift, n_latents)
    more, more_bias = weight_gradient(*codes[1], aux_x, shift, n_latents)
    return weight.add_(more), bias.add_(more_bias)


def _auxk_weight_gradient_fake(
    coefficients: Tensor,
    indices: Tensor,
    x: Tensor,
    aux_coefficients: Tensor,
    aux_indices: Tensor,
    aux_x: Tensor | None,
    dead: Tensor,
    shift: Tensor,
    n_latents: int,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(n_latents, x.shape[1]), x.new_empty(n_latents, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, grad: Tensor, grad_guess: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, aux_values, aux_indices, dead, W_dec = ctx.saved_tensors
    need_values, _, need_aux, _, _, need_W, need_b = ctx.needs_input_grad
    grad_values = ops.sparse_decode_grad_values(grad, values, indices, W_dec) if need_values else None
    grad_aux = ops.auxk_decode_grad_values(grad_guess, aux_values, aux_indices, dead, W_dec) if need_aux else None
    grad_W = None
    if need_W:
        nothing = grad.new_zeros(grad.shape[1])
        codes = values, indices, grad, aux_values, aux_indices, grad_guess
        grad_W = auxk_weight_gradient(*codes, dead, nothing, W_dec.shape[0])[0]
    return grad_values, None, grad_aux, None, None, grad_W, grad.sum(0) if need_b else None


register(
    "auxk_decode",
    "(Tensor values, Tensor indices, Tensor aux_values, Tensor aux_indices, Tensor dead, Tensor W_dec,"
    " Tensor b_out) -> (Tensor, Tensor)",
    _auxk_decode,
    fake=_auxk_decode_fake,
    backward=_backward,
    setup_context=_setup_context,
)

register(
    "auxk_decode_grad_values",
    "(Tensor grad, Tensor values, Tensor indices, Tensor dead, Tensor W_dec) -> Tensor",
    _grad_aux_values,
    fake=_grad_aux_values_fake,
)

register(
    "auxk_weight_gradient",
    "(Tensor coefficients, Tensor indices, Tensor x, Tensor aux_coefficients, Tensor aux_indices,"
    " Tensor? aux_x, Tensor dead, Tensor shift, SymInt n_latents) -> (Tensor, Tensor)",
    _auxk_weight_gradient,
    fake=_auxk_weight_gradient_fake,
)
