"""What the ops cost in floating-point operations, for torch.utils.flop_counter.FlopCounterMode.

The convention is torch's own: a multiply-add is 2 FLOPs and nothing else counts (no bias, no comparison, no sum). A
formula sees shapes, so that a padded code counts with its padding; the gradients count through the ops they call. The
formulas are registered with the package and torch's counter, whichever is imported last:

    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> with FlopCounterMode(display=False) as counter:
    ...     _ = topk_encode(torch.ones(3, 4), torch.ones(5, 4), torch.ones(5), torch.ones(4), k=2)
    >>> counter.get_total_flops()  # 2 * 3 rows * 5 latents * 4
    120
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Imported for their registrations: a formula is given to an op that exists.
from .decode import auxk_decode, sparse_decode, sparse_edit  # noqa: F401
from .dispatch import registered
from .encode import auxk, pursuit, threshold, topk  # noqa: F401
from .flop_formulas import register_flop_formula
from .gradient import weight_gradient  # noqa: F401


def encode_flops(x: torch.Size, W_enc: torch.Size, *_: Any, **__: Any) -> int:
    """2 rows n_latents d: one product, whatever is selected from it and however it is made."""
    return 2 * x[0] * W_enc[0] * W_enc[1]


def decode_flops(values: torch.Size, indices: torch.Size, W_dec: torch.Size, *_: Any, **__: Any) -> int:
    """2 rows k d."""
    return 2 * values[0] * values[1] * W_dec[1]


def decode_grad_values_flops(grad: torch.Size, values: torch.Size, *_: Any, **__: Any) -> int:
    """2 rows k d: a dot product an entry."""
    return 2 * values[0] * values[1] * grad[1]


def weight_gradient_flops(coefficients: torch.Size, indices: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    """2 rows k d."""
    return 2 * coefficients[0] * coefficients[1] * x[1]


def auxk_decode_flops(
    values: torch.Size,
    indices: torch.Size,
    aux_values: torch.Size,
    aux_indices: torch.Size,
    dead: torch.Size,
    W_dec: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """2 rows (k + k_aux) d, though a CPU may make a dense product of the second code."""
    return 2 * values[0] * (values[1] + aux_values[1]) * W_dec[1]


def auxk_weight_gradient_flops(
    coefficients: torch.Size,
    indices: torch.Size,
    x: torch.Size,
    aux_coefficients: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """2 rows (k + k_aux) d, as above."""
    return 2 * coefficients[0] * (coefficients[1] + aux_coefficients[1]) * x[1]


def edit_delta_flops(
    values: torch.Size, indices: torch.Size, latents: torch.Size, directions: torch.Size, *_: Any, **__: Any
) -> int:
    """2 rows F d for F edited latents."""
    return 2 * values[0] * directions[0] * directions[1]


def edit_flops(
    x: torch.Size,
    values: torch.Size,
    indices: torch.Size,
    latents: torch.Size,
    directions: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """2 rows F d for F edited latents; so are both gradients, whose first argument is the output's gradient."""
    return 2 * values[0] * directions[0] * directions[1]


def csr_grad_x_flops(
    grad_values: torch.Size, indices: torch.Size, row_offsets: torch.Size, W_enc: torch.Size, *_: Any, **__: Any
) -> int:
    """2 entries d."""
    return 2 * grad_values[0] * W_enc[1]


def csr_grad_weights_flops(
    grad_values: torch.Size, indices: torch.Size, row_offsets: torch.Size, x: torch.Size, *_: Any, **__: Any
) -> int:
    """2 entries d."""
    return 2 * grad_values[0] * x[1]


def matching_pursuit_flops(x: torch.Size, D: torch.Size, k: int, method: str, *_: Any, **__: Any) -> int:
    """k products with all atoms, and every step's own: step t = 1 .. k computes the residual from t - 1 atoms, and
    "gradient" t inner products, their t atoms' sum v, and the 2 dot products of the step's length."""
    rows, d = x
    steps = sum(2 * (t - 1) * d for t in range(1, k + 1))
    if method == "gradient":
        steps += sum(2 * t * d + 2 * t * d + 4 * d for t in range(1, k + 1))
    return rows * (k * 2 * D[0] * d + steps)


FORMULAS: dict[Callable[..., int], tuple[Any, ...]] = {
    encode_flops: (
        registered.topk_encode,
        registered.topk_encode_prefiltered,
        registered.auxk_encode,
        registered.threshold_encode,
        registered.threshold_encode_csr,
    ),
    decode_flops: (registered.sparse_decode,),
    decode_grad_values_flops: (registered.sparse_decode_grad_values, registered.auxk_decode_grad_values),
    auxk_decode_flops: (registered.auxk_decode,),
    auxk_weight_gradient_flops: (registered.auxk_weight_gradient,),
    weight_gradient_flops: (registered.weight_gradient,),
    edit_delta_flops: (registered.sparse_edit_delta,),
    edit_flops: (registered.sparse_edit, registered.sparse_edit_grad_values, registered.sparse_edit_grad_directions),
    csr_grad_x_flops: (registered.threshold_encode_csr_grad_x,),
    csr_grad_weights_flops: (registered.threshold_encode_csr_grad_weights,),
    matching_pursuit_flops: (registered.matching_pursuit,),
}
for formula, counted in FORMULAS.items():
    register_flop_formula(list(counted))(formula)
