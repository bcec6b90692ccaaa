"""Factorisations of activations as SAEs: PCA and non-negative matrix factorisation, found in one go from rows in memory.

They are dictionaries like others: `Record`, `Steer` and all that takes an SAE take them.

| method | latents | code |
|---|---|---|
| pca | the n directions of most variance around the mean, by falling variance | coordinates, of both signs, all active |
| nmf | the rows of W in A ~ U W, U >= 0, W >= 0 (CRAFT, Fel et al., CVPR 2023) | u = argmin over u >= 0 of |a - u W|^2 |

NMF wants A >= 0. Rows that are, it takes as they are. Of others, A has both signs of every dimension around the median,
[relu(x - m), relu(m - x)], and a latent's direction is the difference of its two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, whole
from sparsefeat.features.attached import check_weights
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.sae.activations import nonnegative_codes

METHODS = ("pca", "nmf")

# NMF ends when an update lowers the squared error by less than this share, or after so many updates.
ENOUGH, UPDATES = 1e-5, 200


@torch.no_grad()
def factorise(
    rows: Tensor,
    n_latents: int,
    method: str = "pca",
    *,
    hookpoint: str | None = None,
    base_model: str | None = None,
) -> SAE:
    """An SAE in evaluation mode whose latents are the factors of `rows [rows, d_model]`.

    Args:
        rows: held in memory; NMF goes through them some tens of times, PCA once.
        n_latents: how many factors, fewer than rows and no more than the dimensions (CRAFT: 20).
        method: "pca" or "nmf".
        hookpoint, base_model: what the SAE says of where it belongs.

    Raises:
        ValueError: naming the argument.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}.")
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) < 2:
        raise ValueError(
            f"rows has shape {list(getattr(rows, 'shape', []))}; give activations [rows, d_model], two at least."
        )
    finite("rows", rows)
    whole("n_latents", n_latents, 1, min(len(rows) - 1, rows.shape[1]))
    placed: dict[str, Any] = {"hookpoint": hookpoint, "base_model": base_model, "metadata": {"factorised_by": method}}
    if method == "pca":
        centre, total = rows.double().mean(0), _directions(rows.double(), n_latents)
        difference, normalizer, activation = total, "b_pre", "raw_topk"
    else:
        is_plain = bool((rows >= 0).all())
        centre = torch.zeros_like(rows[0]) if is_plain else rows.median(0).values
        positive, negative = _parts(rows.float() - centre.float(), n_latents).chunk(2, 1)
        total, difference = positive + negative, positive - negative
        normalizer, activation = "none" if is_plain else "b_pre", "nnls"
    sae = SAE(SAEConfig(rows.shape[1], n_latents, activation, k=n_latents, normalizer=normalizer, **placed))
    sae = sae.to(rows.device)
    made = {"W_enc": total, "W_dec": difference, "b_pre": centre, "b_out": centre}
    for name, tensor in made.items():
        sae.get_parameter(name).copy_(tensor)
    return sae.requires_grad_(False).eval()


def _directions(rows: Tensor, n: int) -> Tensor:
    """[n, d_model], orthonormal, by falling variance; of each sign the one that makes its largest entry positive."""
    found = torch.linalg.eigh(torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])).eigenvectors.T.flip(0)[:n]
    return found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()


def _parts(around: Tensor, n: int) -> Tensor:
    """W [n, 2 d_model] of unit rows, by alternating coordinate descent from NNDSVD (Boutsidis and Gallopoulos, 2008)."""
    data = torch.cat([around, -around], 1).relu()
    found = torch.linalg.eigh((data.T @ data).double())
    values = found.eigenvalues.flip(0)[:n].clamp_min(0).sqrt()
    right = found.eigenvectors.T.flip(0)[:n]
    left = (data.double() @ right.T / values.clamp_min(1e-12)).T
    pairs = []
    for u, v, value in zip(left, right, values, strict=True):
        sides = [(side * u).relu().float() for side in (1, -1)], [(side * v).relu().float() for side in (1, -1)]
        sizes = [float(a.norm() * b.norm()) for a, b in zip(*sides, strict=True)]
        side = int(sizes[1] > sizes[0])
        share = (float(value) * sizes[side]) ** 0.5
        pairs.append([share * part[side] / part[side].norm().clamp_min(1e-12) for part in sides])
    codes, parts = torch.stack([u for u, _ in pairs], 1), torch.stack([v for _, v in pairs])
    before = float(data.square().sum(dtype=torch.float64))
    for _ in range(UPDATES):
        codes = nonnegative_codes(parts @ parts.T, data @ parts.T, codes, sweeps=1)
        parts = nonnegative_codes(codes.T @ codes, data.T @ codes, parts.T, sweeps=1).T
        error = float((data - codes @ parts).square().sum(dtype=torch.float64))
        if error <= before and before - error <= ENOUGH * before:
            break
        before = error
    return parts / parts.norm(dim=1, keepdim=True).clamp_min(torch.finfo(parts.dtype).tiny)


@torch.no_grad()
def sobol_importance(
    sae: SAE, rows: Tensor, score: Callable[[Tensor], Tensor], designs: int = 32, *, seed: int = 0
) -> Tensor:
    """CRAFT's importance of every latent for a score, `[n_latents]`: total Sobol indices by Jansen's estimator, the mean over
    samples.

        S_i = sum over k of (y(A_k) - y(C_k,i))^2 / (2 designs Var y(A)),   C_i: A with column i of B

    A and B are points in [0, 1]^n_latents; y(m) is the score of the sample whose code is multiplied by m at every position.

    Args:
        rows: `[samples, positions, d_model]`.
        score: of `[masks, positions, d_model]`, one number each `[masks]`. It is called `designs` (n_latents + 2) times a
            sample, in batches of `designs`.
        designs: points; the published program's 32. seed: they are a scrambled Sobol sequence of it (Halton there).

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(rows, Tensor) or rows.ndim != 3 or rows.shape[2] != sae.d_model:
        raise ValueError(
            f"rows has shape {list(getattr(rows, 'shape', []))}; give [samples, positions, {sae.d_model}]."
        )
    finite("rows", rows)
    check_weights(sae)
    whole("designs", designs, 2)
    n = sae.n_latents
    points = (
        torch.quasirandom.SobolEngine(2 * n, scramble=True, seed=whole("seed", seed, 0)).draw(designs).to(rows.device)
    )
    first, second = points.split(n, 1)
    found = torch.zeros(n, dtype=torch.float64)
    for sample in rows:
        code = sae.encode(sample).dense().to(rows.device)

        def scored(masks: Tensor, code: Tensor = code, sample: Tensor = sample) -> Tensor:
            changed = (code * (masks[:, None] - 1)) @ sae.W_dec.to(code)  # what the reconstruction leaves stays
            return score(sample + changed.to(sample)).double().cpu()

        at_first = scored(first)
        variance = at_first.var()
        if not variance > 0:
            continue
        for latent in range(n):
            mixed = first.clone()
            mixed[:, latent] = second[:, latent]
            found[latent] += (at_first - scored(mixed)).square().sum() / (2 * designs * variance)
    return (found / max(len(rows), 1)).float()
