"""Edits of codes against dense fp64, and the rows that need no encode."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline import Activations
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering.code_rule import CodeRule, can_be_active, code_delta, code_edit

D, N = 24, 96
INF = float("inf")


def make_sae(activation="topk", seed=0, **options):
    torch.manual_seed(seed)
    config = {"d_model": D, "n_latents": N, "activation": activation, "k": 6, **options}
    if activation in ("relu", "jumprelu"):
        config["k"] = None
    sae = SAE(SAEConfig(**config)).requires_grad_(False).eval()
    sae.W_enc.copy_(torch.randn(N, D) / D**0.5)
    sae.b_enc.copy_(torch.randn(N) * 0.1)
    sae.b_pre.copy_(torch.randn(D) * 0.1)
    if activation == "jumprelu":
        sae.threshold.fill_(0.2)
    return sae


def dense_code(sae, x):
    """fp64 [rows, N] and the scale of each row."""
    x, scale = x.double(), torch.ones(len(x), 1, dtype=torch.float64)
    if sae.config.normalizer == "standardize":
        scale = x.std(1, keepdim=True) + sae.config.eps
        x = (x - x.mean(1, keepdim=True)) / scale
    pre = (x - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    if sae.config.activation == "relu":
        return pre.relu(), scale
    if sae.config.activation == "jumprelu":
        return torch.where(pre > 0.2, pre, 0.0), scale
    kept = (pre.abs() if sae.config.activation == "signed_topk" else pre).topk(sae.config.k, 1).indices
    values = pre.gather(1, kept)
    values = values if sae.config.activation == "signed_topk" else values.relu()
    return torch.zeros_like(pre).scatter_(1, kept, values), scale


RULES = {
    "scale": {3: {"gain": -2.0}, 50: {"gain": 0.0}},
    "set": {3: {"gain": 0.0, "offset": 1.5}},
    "clamp": {3: {"low": 0.0, "high": 0.4}, 7: {"gain": 3.0, "low": 0.0, "high": 1.0}},
    "lift": {3: {"low": 0.5}},
    "gated": {3: {"gain": -4.0, "gate": 0.3}, 50: {"gain": 2.0, "gate": 0.1}, 51: {"gain": 0.0, "gate": 0.0}},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ["topk", "signed_topk", "batch_topk", "relu", "jumprelu"])
@pytest.mark.parametrize("normalizer", ["b_pre", "standardize"])
def test_the_change_is_that_of_the_dense_code(rule, activation, normalizer):
    sae = make_sae(activation, normalizer=normalizer)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(61, D, generator=generator) * torch.rand(61, 1, generator=generator) * 3
    weight = torch.tensor([0.0, 1.0, -1.0, 0.5])[torch.randint(0, 4, (61,), generator=generator)]
    z, scale = dense_code(sae, x)
    edited = z.clone()
    for latent, fields in RULES[rule].items():
        f = {"gain": 1.0, "offset": 0.0, "low": -INF, "high": INF, "gate": -INF, **fields}
        moved = (f["gain"] * z[:, latent] + f["offset"]).clamp(f["low"], f["high"])
        edited[:, latent] = torch.where(z[:, latent] > f["gate"], moved, z[:, latent])
    expected = weight.double()[:, None] * scale * ((edited - z) @ sae.W_dec.double())
    change = code_edit(Activations(x[None]), sae, CodeRule.build(RULES[rule]), weight)
    assert change is not None
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["scale", "clamp", "gated"])
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "relu", "jumprelu"])
@pytest.mark.parametrize("normalizer", ["b_pre", "standardize"])
def test_rows_left_out_are_exactly_rows_that_do_not_change(rule, activation, normalizer):
    sae = make_sae(activation, normalizer=normalizer)
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(4))
    built = CodeRule.build(RULES[rule])
    assert built.keeps_zero
    possible = can_be_active(x, sae, built)
    full = code_delta(sae.encode(x), x, sae, built, torch.ones(500))
    assert not full[~possible].any()
    assert 0 < int((~possible).sum()) < 500  # it does leave rows out, not all of them
    short = code_edit(Activations(x[None]), sae, built, torch.ones(500))
    # The same decision for every row; values within the rounding of a product in another shape.
    assert torch.equal((short != 0).any(1), (full != 0).any(1))
    torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-6)


def test_few_rows_are_encoded_and_none_where_none_can_change():
    sae = make_sae()
    sae.b_enc[3] = -1.5
    rule, x = CodeRule.build({3: {"gain": 0.0}}), torch.randn(400, D, generator=torch.Generator().manual_seed(5))
    encoded, encode = [], SAE.encode

    class Counting(SAE):
        def encode(self, rows, k=None):
            encoded.append(len(rows))
            return encode(self, rows, k)

    sae.__class__ = Counting
    expected = int((x @ sae.W_enc[3] - sae.b_pre @ sae.W_enc[3] > 1.5).sum())
    change = code_edit(Activations(x[None]), sae, rule, torch.ones(400))
    assert 0 < expected < 40
    assert encoded == [expected]
    assert change.shape == (400, D)
    sae.b_enc[3] = -100
    assert code_edit(Activations(x[None]), sae, rule, torch.ones(400)) is None
    assert code_edit(Activations(x[None]), sae, CodeRule.build(RULES["set"]), torch.zeros(400)) is None
    assert encoded == [expected]


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1.0, 1e4, 1e15])
def test_a_latent_at_the_edge_of_firing_is_never_left_out(magnitude):
    """Pre-activations that are 0 up to rounding: cancellation between x and the bias, at every scale."""
    sae = make_sae("relu")
    x = torch.randn(2000, D, generator=torch.Generator().manual_seed(6)) * magnitude
    # Move each row along w until its pre-activation of latent 3 is about 0.
    w = sae.W_enc[3].double()
    pre = (x.double() - sae.b_pre.double()) @ w + sae.b_enc[3].double()
    x = (x.double() - pre[:, None] * w / (w @ w)).float()
    rule = CodeRule.build({3: {"gain": 0.0}})
    fired = sae.encode(x).select([3])[:, 0] > 0
    assert can_be_active(x, sae, rule)[fired].all()
    assert can_be_active(x.flip(0), sae, rule).flip(0)[fired].all()


def test_rows_with_nan_are_not_left_out():
    sae = make_sae()
    x = torch.full((2, D), -1000.0) * sae.W_enc[3]
    x[1, 0] = float("nan")
    assert can_be_active(x, sae, CodeRule.build({3: {"gain": 0.0}})).tolist() == [False, True]


def test_a_rule_that_moves_inactive_latents_is_applied_to_every_row():
    assert not CodeRule.build(RULES["set"]).keeps_zero
    assert not CodeRule.build(RULES["lift"]).keeps_zero
    assert not CodeRule.build({3: {"offset": 2.0, "gate": -0.5}}).keeps_zero
    assert CodeRule.build({3: {"offset": 2.0, "gate": 0.0}}).keeps_zero


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batch_topk"])
def test_of_an_sae_with_thresholds_only_the_rules_latents_are_read(activation):
    options = {"inference": "threshold"} if activation == "batch_topk" else {}
    sae = make_sae(activation, **options)
    if activation == "batch_topk":
        sae.threshold.fill_(0.2)
    x, rule = torch.randn(40, D, generator=torch.Generator().manual_seed(8)), CodeRule.build(RULES["scale"])
    whole = code_delta(sae.encode(x), x, sae, rule, torch.ones(40))
    others = [i for i in range(N) if i not in RULES["scale"]]
    sae.W_enc[others], sae.W_dec[others], sae.b_enc[others] = torch.nan, torch.nan, torch.nan
    change = code_edit(Activations(x[None]), sae, rule, torch.ones(40))
    assert change.any()
    torch.testing.assert_close(change, whole, rtol=1e-5, atol=1e-6)


def test_fields_of_other_lengths_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"shapes \[\[1\], \[2\]\]; give each one entry a latent"):
        CodeRule(torch.zeros(2, dtype=torch.int64), one, two, two, two, two)
