"""Where training starts: biases at the middle of the data, unit directions random or of the data, encoder tied to decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number
from sparsefeat.sae import SAE
from sparsefeat.sae.config import FITTED
from sparsefeat.sae.random import randomise, tie

STARTS = ("random", "rows")


def geometric_median(rows: Tensor, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point `[d]` whose summed distance to the rows is least, by Weiszfeld's iteration.

    Stops when the point moves by less than `tolerance` times its distance scale. Unlike the mean, a few rows of huge
    norm (which transformers have) do not drag it along.
    """
    if rows.ndim != 2 or not rows.shape[0]:
        raise ValueError(f"rows has shape {list(rows.shape)}: pass [rows, d] with at least one row")
    number("tolerance", tolerance, 0)
    rows = finite("rows", rows).to(torch.promote_types(rows.dtype, torch.float32))
    median = rows.mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(rows - median, dim=1)
        scale = distance.mean()
        weight = distance.clamp_min(1e-6 * float(scale) + torch.finfo(rows.dtype).tiny).reciprocal()
        previous, median = median, (weight / weight.sum()) @ rows
        if torch.linalg.vector_norm(median - previous) <= tolerance * scale:
            break
    return median


# A component with less spread than this is not blown up to unit deviation (arXiv 2505.24360's code).
LEAST_DEVIATION = 1e-3
# Unit rows that agree in all entries to one part in so many point the same way: rounding of other batch sizes is less.
ALIKE = 1024


def _fit_normalizer(sae: SAE, sample: Tensor) -> None:
    """The sample's mean and deviation along each channel, or each component, in descending order of variance."""
    along = sample.double()
    if sae.pca_basis is not None:
        covariance = torch.cov(along.T, correction=0)
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)
        along = along @ basis
        sae.pca_basis.copy_(basis)
    sae.pca_mean.copy_(along.mean(0))
    sae.pca_std.copy_(along.std(0, correction=0).clamp_min(LEAST_DEVIATION))


@torch.no_grad()
def initialise(sae: SAE, sample: Tensor, seed: int = 0, *, target: Tensor | None = None, start: str = "random") -> SAE:
    """Start values from a `sample [rows, d_model]` of the activations; returns the same SAE.

    `b_out` is the sample's geometric median (of a transcoder that of the `target`, its module's output), and `b_pre` that
    of the sample unless the normaliser is "none". The encoder is tied to the decoder up to one factor: see
    `sparsefeat.sae.random`. The normalisers "pca" and "affine" are
    fitted to the sample, which should have many more rows than d_model.

    start: where directions are from. "random", or "rows": each is a row of the sample less the bias, no two alike; of a
        transcoder the decoder's are the rows' targets. Of unit directions none has a larger product with a row than the
        row's own, so no latent is dead at the start, and fewer die (docs/training.md).

    Raises:
        ValueError: with start "rows", where fewer rows than latents point different ways.
    """
    config = sae.config
    sample = finite("sample", sample).reshape(-1, config.d_model).to(sae.device, sae.dtype)
    if config.normalizer in FITTED:
        _fit_normalizer(sae, sample)
    rows = sae.normalize(sample)
    median = geometric_median(rows).to(sae.dtype)
    sae.b_pre.copy_(median if config.normalizer != "none" else torch.zeros_like(median))
    if target is not None:
        target = finite("target", target).reshape(-1, config.d_model).to(sae.device, sae.dtype)
    sae.b_out.copy_(median if target is None else geometric_median(target))
    if start == "random":
        return randomise(sae, sample, seed, target=target)
    read = rows - median
    written = read if target is None else target - sae.b_out
    chosen = _unlike(written, sae.n_latents, seed)
    return tie(sae, read[chosen], written[chosen], sample, around=median, target=target)


def _unlike(rows: Tensor, n: int, seed: int) -> Tensor:
    """The places of n of the `rows [rows, d_model]`, drawn among those that point different ways."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    places = (norm > 0).nonzero().squeeze(1)
    rounded = (rows[places] / norm[places, None] * ALIKE).round()
    _, group = torch.unique(rounded, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1 if len(group) else 0,), len(rows), device=rows.device)
    places = first.scatter_reduce(0, group, places, "amin")
    if len(places) < n:
        raise ValueError(
            f"start is 'rows' but of {len(rows)} rows {len(places)} point different ways, and there are {n} latents: collect "
            "more rows, take fewer latents, or start 'random'"
        )
    drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n]
    return places[drawn.to(places.device)]
