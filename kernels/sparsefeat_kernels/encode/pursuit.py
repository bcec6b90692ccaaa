"""matching_pursuit: sparse codes over a fixed dictionary without an encoder (ITDA, matching-pursuit SAEs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import ops, register, row_chunks
from ..threads import conducted
from .rounded import pays_to_round, round_encoder
from .survivors import rounded_group, topk_of_rounded

__all__ = ["METHODS", "matching_pursuit"]

METHODS = ("gradient", "matching")

# A bound on the residuals, reconstructions and their products of one chunk of rows; the product inside topk_encode
# holds some 26 MiB more. Where the atoms in bf16 are kept for all steps (16,384 of width 768), residuals get a quarter.
RESIDUAL_BYTES = 24 << 20
KEPT_BYTES = 26 << 20


def matching_pursuit(
    x: Tensor, D: Tensor, k: int, method: str = "gradient", nonnegative: bool = False
) -> tuple[Tensor, Tensor]:
    """k greedy steps towards x = sum of coefficients times atoms, for every row.

    A step looks at the residual r = x - z D, where z is the code so far (0 at first), and at its inner products
    c = D r with all atoms. It chooses the atom j with the largest |c_j| (nonnegative: the largest c_j), the lowest
    index where several are equal. Then
        matching:  z_j += c_j. (nonnegative: only ever increases.)
        gradient:  j joins the support S; g = c on S and 0 elsewhere; with v = g D, z += (r . v / v . v) g: a step
                   along the gradient of |r|^2 restricted to S, of the length that makes |r| smallest. nonnegative:
                   then z = max(z, 0).
    The same atom may be chosen again; its entry is then updated. A row stops where c_j is 0 (nonnegative: not
    positive), as it is where r is 0.

    Args:
        x: [rows, d], float32 or float64 (residuals of half precision would be rounding errors after a few steps); rows
            may be 0, strides are free.
        D: [n_atoms, d], dtype and device of x. Atoms should have unit norm, which is not checked: otherwise long atoms
            are preferred, and a step of "matching" is not the one that makes the residual smallest.
        k: steps, and entries of a code, 1 <= k <= n_atoms.
        method: "gradient" or "matching". nonnegative: coefficients may not be negative.

    Returns:
        values [rows, k] in x's dtype; indices [rows, k] int32: the atom chosen first comes first. No atom appears
        twice; the entry of a step that chose an atom again, or was not made, is value 0 at index 0. A row of x with NaN
        or infinity, or in which NaN arises (from an atom with NaN, from overflow), has k NaN values and the indices
        0 .. k - 1.

    Precision: inner products of the choice as in topk_encode: of two atoms nearer to each other than its rounding bound
    either may be chosen, and the codes may then go different ways. The same bits on every run.

    No gradient: a choice made k times over has no useful one. Differentiate a reconstruction of the code instead, or
    the dictionary through sparse_decode; a call whose inputs require one raises in the backward pass.

    Cost: 2 k rows n_atoms d FLOPs for the choices (in bf16, and a few in fp32, on a CPU with bf16 instructions);
    matching adds k (k - 1) rows d, gradient (3 k^2 + 5 k) rows d. D is read once a step and chunk of rows. Neither [rows, n_atoms] nor [rows, k, d] is held: scratch stays below 64 MiB
    whatever rows is.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes, devices, k or method.

    Source: Mallat and Zhang 1993 (matching pursuit); Blumensath and Davies 2008, Gradient Pursuits.

    Example:
        >>> x = torch.tensor([[3.0, 1.0]])
        >>> D = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> matching_pursuit(x, D, 2, "matching")
        (tensor([[3., 1.]]), tensor([[0, 1]], dtype=torch.int32))
    """
    return ops.matching_pursuit(x, D, k, method, nonnegative)


def reference(
    x: Tensor, D: Tensor, k: int, method: str = "gradient", nonnegative: bool = False, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The meaning of matching_pursuit, row by row, with dense codes; any dtype. A row ends where the best score is not
    above `least`: other values than 0 say what rounding there could make of it."""
    values, indices = torch.zeros(x.shape[0], k, dtype=x.dtype), torch.zeros(x.shape[0], k, dtype=torch.int32)
    for row in range(x.shape[0]):
        z = torch.zeros(D.shape[0], dtype=x.dtype)
        step_of: dict[int, int] = {}  # of every atom of the support, the step that chose it first
        broken = not bool(x[row].isfinite().all())
        for step in range(k):
            c = D @ (x[row] - z @ D)
            score = c if nonnegative else c.abs()
            broken = broken or bool(c.isnan().any())
            if broken or score.max() <= least:
                break
            j = int((score == score.max()).nonzero()[0])
            step_of.setdefault(j, step)
            if method == "matching":
                z[j] += c[j]
            else:
                g = torch.zeros_like(z)
                g[list(step_of)] = c[list(step_of)]
                v = g @ D
                z = z + (x[row] - z @ D) @ v / (v @ v) * g
                z = z.clamp(min=0) if nonnegative else z
        for j, step in step_of.items():
            values[row, step], indices[row, step] = z[j], j
        if broken or bool(z.isnan().any()):
            values[row], indices[row] = torch.nan, torch.arange(k, dtype=torch.int32)
    return values, indices


def _check(x: Tensor, D: Tensor, k: int, method: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, d], got shape {tuple(x.shape)}; flatten leading dimensions first")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}; convert it with .float()")
    if D.dim() != 2 or D.shape[1] != x.shape[1]:
        raise ValueError(f"D must be [n_atoms, {x.shape[1]}] to match x, got shape {tuple(D.shape)}")
    if D.dtype != x.dtype:
        raise TypeError(f"D must have x's dtype {x.dtype}, got {D.dtype}; cast one of them")
    if D.device != x.device:
        raise ValueError(f"D must be on x's device {x.device}, got {D.device}; move one of them")
    if not 1 <= k <= D.shape[0]:
        raise ValueError(f"k must be between 1 and n_atoms = {D.shape[0]}, got {k}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


# --------------------------------------------------------------------------------------------------- both paths
# Made of the package's ops: a step's choice is topk_encode with k = 1, reconstructions are sparse_decode, the inner
# products with the support are its gradient. Each runs on the path of its inputs. The residual is computed afresh from
# the code every step: k of n_atoms products more, and rounding errors do not add up.


def _best_atom(x: Tensor, D: Tensor, k: int, nonnegative: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Of residuals [rows, d], the inner product with each row's best atom, and that atom, both [rows, 1]. Where
    topk_encode rounds its weights for a bf16 product, they are rounded once for all steps."""
    selection = "raw" if nonnegative else "signed"
    no_bias, origin = D.new_zeros(D.shape[0]), D.new_zeros(D.shape[1])
    group = rounded_group(D.shape[0], 1)
    if group is not None and D.is_contiguous() and pays_to_round(x, D):
        encoder = round_encoder(D, no_bias, k * len(x), KEPT_BYTES)
        return lambda residual: topk_of_rounded(residual, encoder, no_bias, origin, 1, selection, group)
    return lambda residual: ops.topk_encode(residual, D, no_bias, origin, 1, selection)


def _pursue(
    x: Tensor,
    D: Tensor,
    k: int,
    method: str,
    nonnegative: bool,
    best_atom: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """values and atoms [rows, k] of one chunk of rows; unused entries have value 0 and atom -1."""
    origin = D.new_zeros(D.shape[1])
    z = x.new_zeros(x.shape[0], k)
    atoms = torch.full((x.shape[0], k), -1, dtype=torch.int32, device=x.device)
    for step in range(k):
        so_far = slice(0, step + 1)
        residual = x - ops.sparse_decode(z[:, :step], atoms[:, :step], D, origin) if step else x
        best, atom = best_atom(residual)
        goes_on = best > 0 if nonnegative else best != 0  # [rows, 1]
        again = (atoms[:, :step] == atom).any(dim=1, keepdim=True)
        atoms[:, step : step + 1] = torch.where(goes_on & ~again, atom, -1)
        if method == "matching":
            z[:, so_far] += torch.where(goes_on & (atoms[:, so_far] == atom), best, 0)
        else:
            support = (atoms[:, so_far] >= 0).to(x.dtype)
            g = ops.sparse_decode_grad_values(residual, support, atoms[:, so_far], D)
            # The step does not depend on the length of g: with its largest entry 1, squares neither over- nor underflow.
            largest = g.abs().amax(dim=1, keepdim=True)
            g = g / torch.where(largest == 0, 1, largest)
            v = ops.sparse_decode(g, atoms[:, so_far], D, origin)  # [rows, d]
            length = v.square().sum(dim=1, keepdim=True)
            scale = (residual * v).sum(dim=1, keepdim=True) / torch.where(length == 0, 1, length)
            z[:, so_far] += torch.where(goes_on, scale * g, 0)
            if nonnegative:
                z.clamp_(min=0)
        z = torch.where(best.isnan(), best, z)
    return z, atoms


@conducted
def _matching_pursuit(x: Tensor, D: Tensor, k: int, method: str, nonnegative: bool) -> tuple[Tensor, Tensor]:
    _check(x, D, k, method)
    values = x.new_empty(x.shape[0], k)
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    share = RESIDUAL_BYTES // 4 if pays_to_round(x, D) else RESIDUAL_BYTES
    best_atom = _best_atom(x, D, k, nonnegative)
    for rows in row_chunks(x.shape[0], 4 * max(x.shape[1], k) * x.dtype.itemsize, share):
        z, atoms = _pursue(x[rows], D, k, method, nonnegative, best_atom)
        broken = ~x[rows].isfinite().all(dim=1, keepdim=True) | z.isnan().any(dim=1, keepdim=True)
        values[rows] = torch.where(broken, torch.nan, z)
        order = torch.arange(k, dtype=torch.int32, device=x.device)
        indices[rows] = torch.where(broken, order, atoms.clamp(min=0))
    return values, indices


# ------------------------------------------------------------------------------------------------------- registration


def _matching_pursuit_fake(x: Tensor, D: Tensor, k: int, method: str, nonnegative: bool) -> tuple[Tensor, Tensor]:
    _check(x, D, k, method)
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


register(
    "matching_pursuit",
    "(Tensor x, Tensor D, SymInt k, str method, bool nonnegative) -> (Tensor, Tensor)",
    _matching_pursuit,
    fake=_matching_pursuit_fake,
)
