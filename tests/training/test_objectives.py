"""The loss against its formula in dense float64, and where its gradient goes."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Objective, training_loss


def example(normalizer: str = "b_pre", activation: str = "topk") -> tuple[SAE, torch.Tensor]:
    torch.manual_seed(11)
    sae = SAE(SAEConfig(9, 40, activation, k=3, normalizer=normalizer)).double()
    with torch.no_grad():
        sae.b_pre.normal_()
        sae.b_out.normal_()
    return sae, torch.randn(31, 9).double() + 2


@pytest.mark.parametrize("normalizer", ["none", "b_pre", "standardize", "pca"])
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "signed_topk"])
def test_the_loss_is_fvu_plus_auxk_plus_multi_topk(normalizer, activation):
    sae, x = example(normalizer, activation)
    with torch.no_grad():
        sae.b_pre *= normalizer != "none"
        if normalizer == "pca":
            sae.pca_basis.copy_(torch.linalg.qr(torch.randn(9, 9).double()).Q)
            sae.pca_mean.normal_()
            sae.pca_std.uniform_(0.5, 2)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[1, 4, 5, 17, 30, 33]] = True
    loss = training_loss(sae, x, dead, Objective(auxk=0.25, k_aux=4, multi_topk=0.125))

    variance = (x - x.mean(0)).square().sum()
    residual = x - sae(x)
    shift = x.mean(1, keepdim=True) if normalizer == "standardize" else 0
    scale = x.std(1, keepdim=True) if normalizer == "standardize" else 1
    turned = torch.eye(9).double()
    if normalizer == "pca":
        shift, scale, turned = sae.pca_mean, sae.pca_std, sae.pca_basis
    pre = (
        (x @ turned - shift) / (scale + (1e-5 if normalizer == "standardize" else 0)) - sae.b_pre
    ) @ sae.W_enc.T + sae.b_enc
    pre[:, ~dead] = -torch.inf
    top = pre.topk(4)
    guess = torch.zeros_like(x)
    for row in range(31):
        for value, latent in zip(top.values[row], top.indices[row], strict=True):
            guess[row] += max(value.item(), 0.0) * sae.W_dec[latent]
    guess = (guess * scale) @ turned.T
    aux = (guess - residual).square().sum() / variance
    wide = (x - sae.decode(sae.encode(x, k=12), like=x)).square().sum() / variance
    torch.testing.assert_close(loss.fvu, residual.square().sum().detach() / variance)
    torch.testing.assert_close(loss.parts["auxk"], aux.detach())
    torch.testing.assert_close(loss.parts["multi_topk"], wide.detach())
    torch.testing.assert_close(loss.total, loss.fvu + aux / 4 + wide / 8)


def test_few_dead_latents_weigh_less():
    sae, x = example()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[1, 4]] = True
    few = training_loss(sae, x, dead, Objective(k_aux=8)).parts["auxk"]
    torch.testing.assert_close(few, training_loss(sae, x, dead, Objective(k_aux=2)).parts["auxk"] / 4)


def test_auxk_reaches_the_encoder_and_decoder_of_dead_latents_and_nothing_else():
    sae, x = example()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[:20] = True
    with torch.no_grad():
        sae.b_enc[:20] = -5  # they never win a place, and few have anything to offer
    assert not (sae.encode(x).indices < 20).any()
    with torch.no_grad():
        sae.b_enc[:20] = -1
        sae.b_enc[20:] = 50
    loss = training_loss(sae, x, dead, Objective(auxk=1.0))
    plain = training_loss(sae, x, None)
    difference = loss.total - plain.total
    got = torch.autograd.grad(difference, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_pre, sae.b_out])
    for gradient in got[:3]:
        assert gradient[:20].abs().sum() > 0
        assert gradient[20:].abs().max() < 1e-12
    for gradient in got[3:]:
        assert gradient.abs().max() < 1e-12


def test_auxk_points_dead_latents_at_the_residual():
    """A step against the gradient of AuxK alone makes the dead latents explain more of what is missed."""
    sae, x = example()
    dead = torch.arange(40) < 20
    with torch.no_grad():
        sae.b_enc[20:] = 50
    before = training_loss(sae, x, dead, Objective(auxk=1.0))
    gradients = torch.autograd.grad(before.total - before.fvu, [sae.W_enc, sae.W_dec], retain_graph=True)
    with torch.no_grad():
        sae.W_enc[:20] -= 1e-3 * gradients[0][:20]
        sae.W_dec[:20] -= 1e-3 * gradients[1][:20]
    assert training_loss(sae, x, dead, Objective(auxk=1.0)).parts["auxk"] < before.parts["auxk"]


def test_no_dead_latents_and_equal_rows_give_finite_losses():
    sae, x = example()
    loss = training_loss(sae, x, torch.zeros(40, dtype=torch.bool))
    assert loss.parts["auxk"] == 0
    torch.testing.assert_close(loss.total.detach(), loss.fvu)
    same = training_loss(sae.float(), torch.ones(5, 9))
    same.total.backward()
    assert not same.total.isnan()
