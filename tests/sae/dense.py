"""SAEs for the tests, and what they compute, spelled out in dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefeat.sae import SAE, SAEConfig

CASES = [
    ("topk", "topk"),
    ("signed_topk", "topk"),
    ("raw_topk", "topk"),
    ("batch_topk", "topk"),
    ("batch_topk", "threshold"),
    ("jumprelu", "topk"),
    ("relu", "topk"),
]
NORMALIZERS = ["none", "b_pre", "standardize"]


def random_sae(
    activation: str, inference: str = "topk", normalizer: str = "b_pre", seed: int = 3, **kwargs: int
) -> SAE:
    """Every tensor different from its start value, so that a swapped or forgotten one shows."""
    shape = {"d_model": 13, "n_latents": 37, "k": 5} | kwargs
    if activation in ("relu", "jumprelu"):
        del shape["k"]
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(activation=activation, inference=inference, normalizer=normalizer, **shape)).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if normalizer == "none":
            sae.b_pre.zero_()
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
        scale = ((rows - shift).square().sum(1, keepdim=True) / (c.d_model - 1)).sqrt() + 1e-5
    pre = ((rows - shift) / scale - t["b_pre"]) @ t["W_enc"].T + t["b_enc"]

    def largest(by: Tensor, k: int) -> Tensor:
        return torch.zeros_like(by, dtype=torch.bool).scatter_(1, by.argsort(1, descending=True)[:, :k], True)

    if c.activation == "signed_topk":
        z = pre * largest(pre.abs(), c.k or 0)
    elif c.activation == "raw_topk":
        z = pre * largest(pre, c.k or 0)
    elif c.activation == "batch_topk" and training:
        z = pre.relu() * largest(pre.reshape(1, -1), (c.k or 0) * len(rows)).view_as(pre)
    elif c.activation in ("topk", "batch_topk") and c.inference == "topk":
        z = pre.relu() * largest(pre, c.k or 0)
    elif c.activation == "relu":
        z = pre.relu()
    else:
        z = pre.relu() * (pre > t["threshold"])
    return z, ((z @ t["W_dec"] + t["b_out"]) * scale + shift).view(x.shape)
