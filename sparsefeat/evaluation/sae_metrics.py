"""How good an SAE is on held-out rows, and the controls its figures must beat.

    FVU = sum |x - x_hat|^2 / sum |x - mean|^2,   mean per dimension over the whole evaluation set

Sums are kept in float64 and streamed, so that neither the batch size nor the number of rows changes the result. Other
programs' FVU centres every batch on its own mean, averages ratios over dimensions, or does not centre: the figures do
not compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.sae import SAE
from sparsefeat.sae.config import PURSUITS
from sparsefeat.sae.random import randomise
from sparsefeat.training import Batch

DENSE = 0.1  # a latent that fires on a larger share of the rows is dense
DECADES = 7  # of the histogram of densities, the last up to 1


@dataclass(frozen=True)
class SAEQuality:
    """fvu: above. cosine: mean cos(x, x_hat). norm_ratio: mean |x_hat| / |x| (below 1: shrinkage). l0: mean number of
    non-zero latents a row. density [n_latents]: share of rows a latent fires on. dead: share of latents that never
    fired on these rows; meaningful for many more rows than latents. dense: share of latents that fire on more than a
    tenth of them."""

    rows: int
    fvu: float
    cosine: float
    norm_ratio: float
    l0: float
    dead: float
    dense: float
    density: Tensor

    def histogram(self) -> list[float]:
        """Shares of the latents, by density: 0 first, then by decade from 1e-7 up; the last is from 0.1 to 1."""
        place = torch.where(self.density > 0, (self.density.log10().floor() + DECADES).clamp(0, DECADES - 1) + 1, 0)
        counts = torch.bincount(place.long(), minlength=DECADES + 1)
        return (counts.double() / len(self.density)).tolist()

    def __str__(self) -> str:
        return f"FVU {self.fvu:.4f}, L0 {self.l0:.2f}, dead {self.dead:.1%} on {self.rows:,} rows"


class SAEMetrics:
    """Accumulates over batches; merging and order of batches change nothing but the last bits."""

    def __init__(self, d_model: int, n_latents: int, device: torch.device | str | None = None) -> None:
        self.rows: int = 0
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
            dense=float((self._fired > DENSE * self.rows).double().mean()),
            density=(self._fired.double() / self.rows).float().cpu(),
        )


class Moments:
    """Streaming mean and, if asked, covariance in float64, about the first batch's mean (no cancellation)."""

    def __init__(self, d_model: int, device: torch.device | str | None = None, covariance: bool = False) -> None:
        self.rows: int = 0
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
def measure_sae(sae: SAE, rows: Tensor | Batch | Iterable[Tensor | Batch], batch_size: int = 8192) -> SAEQuality:
    """Quality on `rows`: a tensor `[..., d_model]`, or batches of rows such as a store gives. A transcoder is measured
    against its target, and an SAE that depends on the timestep at each row's: pass a `Batch` with these."""
    metrics = SAEMetrics(sae.d_model, sae.n_latents, sae.device)
    training = sae.training
    sae.eval()  # batch_topk encodes as it will be used
    try:
        for batch in _parts(rows, batch_size):
            x = batch.rows.reshape(-1, batch.rows.shape[-1]).to(sae.device)
            if sae.config.normalizer == "timestep":
                if batch.timestep is None:
                    raise ValueError(
                        "the SAE depends on the timestep, which rows do not say: pass Batch(rows, timestep=...)"
                    )
                sae.at_timestep(batch.timestep)
            if sae.config.transcoder and batch.target is None:
                raise ValueError("a transcoder is measured against its module's output: pass Batch(rows, target)")
            y = x if batch.target is None else batch.target.reshape(x.shape).to(x.device)
            code = sae.encode(x)
            metrics.update(y, sae.decode(code, like=x), code)
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
def random_control(sae: SAE, rows: Tensor | Batch, seed: int = 0) -> SAE:
    """An untrained SAE of the same config, with random directions and the trained one's output bias.

    Its encoder is scaled to reconstruct `rows` as well as it can: a random SAE need not be worse than it is. Where the
    trained one compares with thresholds, it selects as many latents a row as that has on average.
    """
    batch = rows if isinstance(rows, Batch) else Batch(rows.reshape(-1, sae.d_model))
    config = sae.config
    if config.uses_threshold:
        k = min(config.n_latents, max(1, round(measure_sae(sae, batch).l0)))
        config = dataclasses.replace(config, activation="topk", k=k, inference="topk")
    control = SAE(config).to(sae.device, sae.dtype).eval()
    state, wanted = sae.state_dict(), control.state_dict()
    learned = ("W_enc", "b_enc", "W_dec", "threshold")
    control.load_state_dict({name: wanted[name] if name in learned else state[name] for name in wanted})
    if config.normalizer != "none":
        control.b_pre.copy_(sae.b_out)
    if config.activation in PURSUITS:
        directions = torch.randn(
            control.W_dec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        control.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        return control
    if batch.timestep is not None:
        control.at_timestep(batch.timestep)
    return randomise(control, batch.rows, seed, target=batch.target)


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


def _parts(rows: Tensor | Batch | Iterable[Tensor | Batch], batch_size: int) -> Iterator[Batch]:
    if isinstance(rows, Batch):
        for part in torch.arange(len(rows.rows)).split(batch_size):
            yield Batch(*(None if tensor is None else tensor[part] for tensor in rows))
    elif isinstance(rows, Tensor):
        yield from map(Batch, _batches(rows, batch_size))
    else:
        yield from (batch if isinstance(batch, Batch) else Batch(batch) for batch in rows)
