"""SAEs for the tests, and what they compute, spelled out in dense float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsefeat.sae import SAE, SAEConfig

CASES = [
    ("topk", "topk"),
    ("groupmax", "topk"),
    ("matching_pursuit", "topk"),
    ("signed_topk", "topk"),
    ("raw_topk", "topk"),
    ("batch_topk", "topk"),
    ("batch_topk", "threshold"),
    ("jumprelu", "topk"),
    ("relu", "topk"),
]
NORMALIZERS = ["none", "b_pre", "standardize", "unit_norm", "constant_norm", "pca", "affine"]


def random_sae(
    activation: str, inference: str = "topk", normalizer: str = "b_pre", seed: int = 3, **kwargs: Any
) -> SAE:
    """Every tensor different from its start value, so that a swapped or forgotten one shows."""
    shape: dict[str, Any] = {"d_model": 13, "n_latents": 37, "k": 5}
    if activation == "groupmax":
        shape["n_latents"] = 40  # 5 groups
    if normalizer in ("pca", "affine"):
        shape["clip"] = 1.5
    shape |= kwargs
    if activation in ("relu", "jumprelu"):
        del shape["k"]
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(activation=activation, inference=inference, normalizer=normalizer, **shape)).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if normalizer == "none":
            sae.b_pre.zero_()
        if normalizer == "pca":
            sae.pca_basis.copy_(torch.linalg.qr(torch.randn(sae.d_model, sae.d_model)).Q)
        if normalizer in ("pca", "affine"):
            sae.pca_mean.normal_()
            sae.pca_std.uniform_(0.5, 2.0)
        if activation == "matching_pursuit":
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        for name in sae.config.statistics:
            sae.statistic(name).normal_()
        if sae.threshold is not None:
            sae.threshold.uniform_(-0.5, 3.0).add_(0.6 if activation == "batch_topk" else 0.0)
    return sae


def dense(sae: SAE, x: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
    """Code `[rows, n_latents]` and reconstruction, in float64, with every formula spelled out."""
    c = sae.config
    t = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    rows = x.double().reshape(-1, c.d_model)
    shift, scale = torch.zeros(len(rows), 1).double(), torch.ones(len(rows), 1).double()
    if c.normalizer == "standardize":
        shift = rows.sum(1, keepdim=True) / c.d_model
        scale = ((rows - shift).square().sum(1, keepdim=True) / (c.d_model - 1)).sqrt()
    elif c.normalizer in ("unit_norm", "constant_norm"):
        scale = rows.square().sum(1, keepdim=True).sqrt() / (c.d_model**0.5 if c.normalizer == "constant_norm" else 1)
    eps = 1e-5 if c.normalizer == "standardize" else 0
    normal = (rows - shift) / (scale + eps)
    if c.normalizer == "pca":
        normal = ((rows @ t["pca_basis"] - t["pca_mean"]) / t["pca_std"]).clamp(-1.5, 1.5)
    if c.normalizer == "affine":
        normal = ((rows - t["pca_mean"]) / t["pca_std"]).clamp(-1.5, 1.5)
    if c.activation == "matching_pursuit":
        return matching(normal - t["b_pre"], t, c.k or 0, lambda out: undo(c.normalizer, out, t, shift, scale, x))
    pre = (normal - t["b_pre"]) @ t["W_enc"].T + t["b_enc"]

    def largest(by: Tensor, k: int) -> Tensor:
        return torch.zeros_like(by, dtype=torch.bool).scatter_(1, by.argsort(1, descending=True)[:, :k], True)

    if c.activation == "signed_topk":
        z = pre * largest(pre.abs(), c.k or 0)
    elif c.activation == "raw_topk":
        z = pre * largest(pre, c.k or 0)
    elif c.activation == "batch_topk" and training:
        z = pre.relu() * largest(pre.reshape(1, -1), (c.k or 0) * len(rows)).view_as(pre)
    elif c.activation == "groupmax":
        groups = pre.view(len(rows), c.k or 0, -1)
        z = (pre.relu().view_as(groups) * (groups == groups.amax(2, keepdim=True))).view_as(pre)
    elif c.activation in ("topk", "batch_topk") and c.inference == "topk":
        z = pre.relu() * largest(pre, c.k or 0)
    elif c.activation == "relu":
        z = pre.relu()
    else:
        z = pre.relu() * (pre > t["threshold"])
    out = undo(c.normalizer, z @ t["W_dec"] + t["b_out"], t, shift, scale, x)
    return z, out + (rows @ t["W_skip"].T).view(x.shape) if c.skip else out


def undo(normalizer: str, out: Tensor, t: dict[str, Tensor], shift: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    if normalizer == "pca":
        out = (out * t["pca_std"] + t["pca_mean"]) @ t["pca_basis"].T
    if normalizer == "affine":
        out = out * t["pca_std"] + t["pca_mean"]
    return (out * scale + shift).view(x.shape)


def matching(rows: Tensor, t: dict[str, Tensor], k: int, undone: Any) -> tuple[Tensor, Tensor]:
    """One row and one step at a time."""
    z = torch.zeros(len(rows), len(t["W_dec"])).double()
    for row, code in zip(rows, z, strict=True):
        for _ in range(k):
            products = t["W_dec"] @ (row - code @ t["W_dec"])
            best = products.abs().argmax()
            code[best] += products[best]
    return z, undone(z @ t["W_dec"] + t["b_out"])
