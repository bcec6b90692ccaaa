"""How good an SAE is on held-out rows, and the controls its figures must beat.

    FVU = sum |x - x_hat|^2 / sum |x - mean|^2,   mean per dimension over the whole evaluation set

Sums are kept in float64 and streamed, so that neither the batch size nor the number of rows changes the result. Other
programs' FVU centres every batch on its own mean, averages ratios over dimensions, or does not centre: the figures do
not compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.sae import SAE
from sparsefeat.sae.random import randomise


@dataclass(frozen=True)
class SAEQuality:
    """fvu: above. cosine: mean cos(x, x_hat). norm_ratio: mean |x_hat| / |x| (below 1: shrinkage). l0: mean number of
    non-zero latents a row. density [n_latents]: share of rows a latent fires on. dead: share of latents that never
    fired on these rows; meaningful for many more rows than latents."""

    rows: int
    fvu: float
    cosine: float
    norm_ratio: float
    l0: float
    dead: float
    density: Tensor

    def __str__(self) -> str:
        return f"FVU {self.fvu:.4f}, L0 {self.l0:.2f}, dead {self.dead:.1%} on {self.rows:,} rows"


class SAEMetrics:
    """Accumulates over batches; merging and order of batches change nothing but the last bits."""

    def __init__(self, d_model: int, n_latents: int, device: torch.device | str | None = None) -> None:
        self.rows = 0
        self._error = self._cosine = self._norm_ratio = torch.zeros((), dtype=torch.float64, device=device)
        self._fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._moments = Moments(d_model, device)

    def update(self, x: Tensor, x_hat: Tensor, code: SparseCode) -> None:
        """A batch of rows `x [rows, d_model]`, their reconstruction and code."""
        if x.shape != x_hat.shape or x.ndim != 2 or code.rows != x.shape[0]:
            raise ValueError(
                f"x {list(x.shape)}, x_hat {list(x_hat.shape)} and a code of {code.rows} rows do not belong together: "
                "pass the same rows of each"
            )
        x, x_hat = x.double(), x_hat.double()
        self.rows += x.shape[0]
        self._moments.update(x)
        self._error = self._error + (x - x_hat).square().sum()
        self._cosine = self._cosine + torch.cosine_similarity(x, x_hat, dim=-1, eps=1e-30).sum()
        self._norm_ratio = self._norm_ratio + (x_hat.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)).sum()
        self._fired.scatter_add_(0, code.indices.flatten().long(), (code.values != 0).flatten().long())

    def result(self) -> SAEQuality:
        if not self.rows:
            raise ValueError("no rows were measured: call update, or pass at least one batch")
        return SAEQuality(
            rows=self.rows,
            fvu=float(self._error / self._moments.total_variance()),
            cosine=float(self._cosine / self.rows),
            norm_ratio=float(self._norm_ratio / self.rows),
            l0=float(self._fired.sum() / self.rows),
            dead=float((self._fired == 0).double().mean()),
            density=(self._fired.double() / self.rows).float().cpu(),
        )


class Moments:
    """Streaming mean and, if asked, covariance in float64, about the first batch's mean (no cancellation)."""

    def __init__(self, d_model: int, device: torch.device | str | None = None, covariance: bool = False) -> None:
        self.rows = 0
        self.origin: Tensor | None = None
        self._sum = torch.zeros(d_model, dtype=torch.float64, device=device)
        shape = (d_model, d_model) if covariance else (d_model,)
        self._squares = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        x = x.double()
        if self.origin is None:
            self.origin = x.mean(0)
        x = x - self.origin
        self.rows += x.shape[0]
        self._sum += x.sum(0)
        self._squares += x.T @ x if self._squares.ndim == 2 else x.square().sum(0)

    def mean(self) -> Tensor:
        assert self.origin is not None
        return self.origin + self._sum / self.rows

    def total_variance(self) -> Tensor:
        """`sum |x - mean|^2` over all rows."""
        squares = self._squares.diagonal() if self._squares.ndim == 2 else self._squares
        variance = (squares - self._sum.square() / self.rows).sum()
        if not variance > 0:
            raise ValueError(f"the {self.rows} rows have no variance: FVU needs rows that differ")
        return variance

    def scatter(self) -> Tensor:
        """`sum (x - mean)(x - mean)^T`, `[d_model, d_model]`."""
        return self._squares - torch.outer(self._sum, self._sum) / self.rows


@torch.no_grad()
def measure_sae(sae: SAE, rows: Tensor | Iterable[Tensor], batch_size: int = 8192) -> SAEQuality:
    """Quality on `rows`: a tensor `[..., d_model]`, or batches of rows such as a store gives."""
    if sae.config.normalizer == "timestep":
        raise ValueError(
            "the SAE depends on the timestep, which rows do not say: record it with attach, which knows the step"
        )
    metrics = SAEMetrics(sae.d_model, sae.n_latents, sae.device)
    training = sae.training
    sae.eval()  # batch_topk encodes as it will be used
    try:
        for batch in _batches(rows, batch_size):
            x = batch.reshape(-1, batch.shape[-1]).to(sae.device)
            code = sae.encode(x)
            metrics.update(x, sae.decode(code, like=x), code)
    finally:
        sae.train(training)
    return metrics.result()


@torch.no_grad()
def pca_fvu(
    rows: Tensor | Iterable[Tensor], k: int, fit_rows: Tensor | Iterable[Tensor] | None = None, batch_size: int = 8192
) -> float:
    """FVU of the best rank-k affine reconstruction (PCA with k components), the dense control of an SAE with L0 = k.

    Fitted on `fit_rows`, or on `rows` themselves, which flatters PCA. Holds `[d_model, d_model]` twice.
    """
    evaluated = _second_moments(rows, batch_size)
    fitted = evaluated if fit_rows is None else _second_moments(fit_rows, batch_size)
    scatter = evaluated.scatter()
    d_model = scatter.shape[0]
    if not 1 <= k <= d_model:
        raise ValueError(f"k is {k}: choose from 1 to d_model, {d_model}")
    directions = torch.linalg.eigh(fitted.scatter()).eigenvectors[:, -k:]
    total = evaluated.total_variance()
    # Error of x - m_fit outside the directions: that of x - m_eval, plus the part of the means' distance outside.
    kept = (directions.T @ scatter @ directions).diagonal().sum()
    shift = evaluated.mean() - fitted.mean()
    outside = shift.square().sum() - (directions.T @ shift).square().sum()
    return float((total - kept + evaluated.rows * outside) / total)


@torch.no_grad()
def random_control(sae: SAE, rows: Tensor, seed: int = 0) -> SAE:
    """An untrained SAE of the same config, with random directions and the trained one's output bias.

    Its encoder is scaled to reconstruct `rows` as well as it can: a random SAE need not be worse than it is.
    """
    control = SAE(sae.config).to(sae.device, sae.dtype).eval()
    control.b_out.copy_(sae.b_out)
    if sae.config.normalizer != "none":
        control.b_pre.copy_(sae.b_out)
    return randomise(control, rows, seed)


def max_cosines(directions: Tensor, found: Tensor) -> Tensor:
    """For every row of `directions` its largest cosine with a row of `found`: `[len(directions)]`; 1 is recovered."""
    first = torch.nn.functional.normalize(directions, dim=-1)
    return (first @ torch.nn.functional.normalize(found, dim=-1).T).amax(-1)


def _second_moments(rows: Tensor | Iterable[Tensor], batch_size: int) -> Moments:
    moments: Moments | None = None
    for batch in _batches(rows, batch_size):
        batch = batch.reshape(-1, batch.shape[-1])
        moments = moments or Moments(batch.shape[-1], batch.device, covariance=True)
        moments.update(batch)
    if moments is None:
        raise ValueError("rows is empty: pass at least one batch")
    return moments


def _batches(rows: Tensor | Iterable[Tensor], batch_size: int) -> Iterable[Tensor]:
    if not isinstance(rows, Tensor):
        return rows
    return rows.reshape(-1, rows.shape[-1]).split(batch_size) if rows.numel() else ()
