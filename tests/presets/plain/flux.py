"""The FLUX SAEs of arXiv 2505.24360, written out.

The SAE sees the image tokens y of the residual stream after a double block, in a normalised space:

    u    = clip((y P - mu) / sigma, -10, 10)              P the PCA's rotation, sigma at least 1e-3
    pre  = (u - b_post + b_pre) W_enc                     the file's b_mid is not used, nor a ReLU
    z    = the k largest of pre, whatever their sign      approx_max_k in the released code, exact here
    uhat = z W_dec + b_post,  yhat = (uhat sigma + mu) P^T
    steering: y[h0:h1, w0:w1] += strength (d_f sigma) P^T on the grid of image tokens, the first 5 of 7 steps

A `DenseSAE` has E = W_enc^T, D = W_dec, b_pre = b_post - b_pre of the file, b_out = b_post, b_lat = 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tests.presets.plain.dense import DenseSAE, decode, keep_largest, preactivations
from tests.presets.plain.sites import at_steps


@dataclass(frozen=True)
class PCA:
    P: torch.Tensor
    """[d, d], a column a component."""
    mu: torch.Tensor
    """[d], in the rotated space."""
    sigma: torch.Tensor
    """[d]."""
    clip: float = 10.0
    floor: float = 1e-3

    @property
    def scale(self) -> torch.Tensor:
        return self.sigma.double().clamp(min=self.floor)


def of_file(W_enc: torch.Tensor, W_dec: torch.Tensor, b_pre: torch.Tensor, b_post: torch.Tensor, k: int) -> DenseSAE:
    """From the file's tensors: `W_enc` [d, n], `W_dec` [n, d], the biases [d]."""
    return DenseSAE(W_enc.T, W_dec, b_post - b_pre, torch.zeros(len(W_dec)), b_post, k)


def of_moments(P: torch.Tensor, means: torch.Tensor, square_means: torch.Tensor) -> PCA:
    """From the file's `whitening_matrix`, `feature_means` and `feature_square_means`: the variance of each component is
    E[v^2] - E[v]^2."""
    return PCA(P, means, (square_means.double() - means.double() ** 2).clamp(min=0).sqrt())


def normalised(pca: PCA, y: torch.Tensor) -> torch.Tensor:
    u = (y.double() @ pca.P.double() - pca.mu.double()) / pca.scale
    return u.clamp(-pca.clip, pca.clip)


def codes(sae: DenseSAE, pca: PCA, y: torch.Tensor, selection: Literal["value", "magnitude"] = "value") -> torch.Tensor:
    """[..., d] to [..., n]. "magnitude" keeps the k largest absolute values; the released code takes "value"."""
    pre = preactivations(sae, normalised(pca, y))
    return keep_largest(pre, sae.k, None if selection == "value" else pre.abs())


def reconstruction(
    sae: DenseSAE, pca: PCA, y: torch.Tensor, selection: Literal["value", "magnitude"] = "value"
) -> torch.Tensor:
    """yhat in float64."""
    uhat = decode(sae, codes(sae, pca, y, selection))
    return (uhat * pca.scale + pca.mu.double()) @ pca.P.double().T


def direction(sae: DenseSAE, pca: PCA, latent: int, basis: Literal["model", "normalised"] = "model") -> torch.Tensor:
    """[d]: d_f back in the model's space, or with "normalised" the decoder's row as it is stored."""
    row = sae.D[latent].double()
    return (row * pca.scale) @ pca.P.double().T if basis == "model" else row


@contextmanager
def steer(
    pipe: Any,
    path: str,
    v: torch.Tensor,
    strength: float,
    grid: tuple[int, int],
    rectangle: tuple[int, int, int, int],
    steps: Collection[int] = range(5),
) -> Iterator:
    """Add `strength * v` to the image stream of a block at the tokens of `rectangle` (h0, h1, w0, w1)."""
    h0, h1, w0, w1 = rectangle

    def rule(_came_in: torch.Tensor, output: torch.Tensor, step: int) -> torch.Tensor | None:
        if step not in steps:
            return None
        y = output.double().unflatten(1, grid).clone()
        y[:, h0:h1, w0:w1] += strength * v
        return y.flatten(1, 2)

    with at_steps(pipe, path, rule, index=1):
        yield


@contextmanager
def image_stream(pipe: Any, path: str) -> Iterator[list[torch.Tensor]]:
    """Yields a list that after a call holds the image tokens [images, tokens, d] that the block gave at every step."""
    found: list[torch.Tensor] = []

    def rule(_came_in: torch.Tensor, output: torch.Tensor, step: int) -> None:
        assert step == len(found)
        found.append(output)

    with at_steps(pipe, path, rule, index=1):
        yield found
