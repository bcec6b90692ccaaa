"""Encoding and decoding against the dense float64 derivation in dense.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sparsefeat_kernels import SparseCode, threshold_encode_csr

from sparsefeat.sae import SAE, SAEConfig, load_sae
from tests.sae.dense import CASES, NORMALIZERS, dense, random_sae


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("activation", "inference"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_code_and_reconstruction_are_those_of_the_dense_formula(activation, inference, normalizer, training):
    sae = random_sae(activation, inference, normalizer).train(training)
    x = 3 * torch.randn(2, 17, 13) + 1
    z, x_hat = dense(sae, x, training)
    code = sae.encode(x)
    assert code.rows == 34
    assert code.indices.dtype == torch.int32
    torch.testing.assert_close(code.dense().double(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(code, like=x), sae(x), rtol=0, atol=0)


@pytest.mark.parametrize(("activation", "inference"), [case for case in CASES if case[0] != "matching_pursuit"])
def test_gradients_are_those_of_the_dense_formula(activation, inference):
    sae = random_sae(activation, inference, "standardize").double().train()
    x = torch.randn(19, 13).double().requires_grad_()
    weight = torch.randn(19, 13).double()
    (sae(x) * weight).sum().backward()
    got = [x.grad, *(p.grad for p in sae.parameters())]

    # The dense formula again, differentiated by torch: the same selection, as constants.
    y = x.detach().requires_grad_()
    p = {name: value.detach().requires_grad_() for name, value in sae.named_parameters()}
    mask = dense(sae, y, training=True)[0] != 0
    shift = y.mean(1, keepdim=True)
    scale = y.std(1, keepdim=True)
    z = (((y - shift) / (scale + 1e-5) - p["b_pre"]) @ p["W_enc"].T + p["b_enc"]) * mask
    out = (z @ p["W_dec"] + p["b_out"]) * scale + shift
    wanted = torch.autograd.grad((out * weight).sum(), [y, *(p[name] for name, _ in sae.named_parameters())])
    for have, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-7, atol=1e-9)


def test_batch_topk_is_exact_when_one_row_takes_nearly_everything():
    sae = random_sae("batch_topk", k=2, n_latents=64).train()
    x = torch.randn(9, 13) * 0.01 + sae.b_pre.detach()
    x[4] += 50 * torch.randn(13)  # far above 4 k = 8 latents of this row are among the 18 largest
    code = sae.encode(x)
    z, _ = dense(sae, x, training=True)
    assert (code.values[4] != 0).sum() > 8
    torch.testing.assert_close(code.dense().double(), z, rtol=1e-4, atol=1e-4)


def test_batch_topk_keeps_a_nan_row_to_itself():
    sae = random_sae("batch_topk", k=3).train()
    x = torch.randn(7, 13)
    others = torch.arange(7) != 2
    x[2, 5] = float("nan")
    code = sae.encode(x)
    assert code.values[2, :3].isnan().all()
    assert not code.values[others].isnan().any()


def test_threshold_codes_are_sorted_as_wide_as_the_fullest_row_and_the_same_in_any_chunks(monkeypatch):
    sae = random_sae("jumprelu", n_latents=101)
    x = torch.randn(23, 13)
    code = sae.encode(x)
    count = (dense(sae, x)[0] != 0).sum(1)
    assert code.values.shape[1] == int(count.max())
    assert (code.values[:, :-1] >= code.values[:, 1:]).all()
    monkeypatch.setitem(threshold_encode_csr.__globals__, "PREACTIVATION_BYTES", 1)  # one row a chunk
    again = sae.encode(x)
    torch.testing.assert_close(again.values, code.values, rtol=1e-6, atol=1e-6)
    active = code.values != 0
    assert torch.equal(again.indices[active], code.indices[active])


def test_threshold_encoding_of_silent_empty_and_nan_rows():
    sae = random_sae("jumprelu")
    assert sae.threshold is not None
    sae.threshold.fill_(1e9)
    silent = sae.encode(torch.randn(4, 13))
    assert silent.values.shape == (4, 1)
    assert not silent.values.any()
    assert sae.encode(torch.empty(0, 13)).rows == 0
    x = torch.randn(3, 13)
    x[1] = float("nan")
    sae.threshold.fill_(0.5)
    values = sae.encode(x).values
    assert values[1].isnan().all()
    assert not values[[0, 2]].isnan().any()


def test_a_jumprelu_threshold_below_zero_still_has_the_relu():
    sae = random_sae("jumprelu")
    assert sae.threshold is not None
    sae.threshold.fill_(-5.0)
    assert (sae.encode(torch.randn(8, 13)).values >= 0).all()


def test_threshold_encoding_in_half_precision_is_summed_in_single():
    sae = random_sae("relu", d_model=64, n_latents=50)
    half = random_sae("relu", d_model=64, n_latents=50).bfloat16()
    x = torch.randn(6, 64).bfloat16()
    code = half.encode(x)
    assert code.values.dtype == torch.float32
    with torch.no_grad():
        for single, rounded in zip(sae.parameters(), half.parameters(), strict=True):
            single.copy_(rounded)
    torch.testing.assert_close(code.dense(), sae.encode(x.float()).dense(), rtol=1e-4, atol=1e-4)


def test_row_scale_is_the_unbiased_deviation_or_the_norm_and_none_otherwise():
    x = torch.randn(5, 13)
    deviation = ((x - x.mean(1, keepdim=True)).square().sum(1, keepdim=True) / 12).sqrt()
    norm = x.square().sum(1, keepdim=True).sqrt()
    for normalizer, expected in (("standardize", deviation), ("unit_norm", norm), ("constant_norm", norm / 13**0.5)):
        scale = random_sae("topk", normalizer=normalizer).row_scale(x)
        assert scale is not None
        torch.testing.assert_close(scale, expected)
    assert random_sae("topk").row_scale(x) is None
    assert random_sae("topk", normalizer="pca").row_scale(x) is None


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_an_edit_of_the_code_along_directions_times_row_scale_is_the_edit_in_activations(normalizer):
    sae = random_sae("topk", normalizer=normalizer)
    x = torch.randn(5, 13)
    code = sae.encode(x)
    more = SparseCode(code.values + 2, code.indices, code.n_latents)
    moved = sae.decode(more, like=x) - sae.decode(code, like=x)
    scale = sae.row_scale(x)
    along = torch.stack([sae.directions(row).sum(0) for row in code.indices])
    torch.testing.assert_close(moved, 2 * along * (1 if scale is None else scale), rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_encodes_and_decodes_to_finite_numbers_under_every_normalizer():
    for normalizer in NORMALIZERS:
        assert random_sae("topk", normalizer=normalizer)(torch.zeros(2, 13)).isfinite().all(), normalizer


def test_a_skip_adds_the_input_times_its_matrix_and_decoding_asks_for_it():
    sae = random_sae("topk", normalizer="none", skip=True, transcoder=True)
    x = torch.randn(6, 13)
    torch.testing.assert_close(sae(x).double(), dense(sae, x)[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a skip needs the activations"):
        sae.decode(sae.encode(x))


def test_a_statistic_is_kept_under_its_name_and_an_unknown_one_lists_the_known(tmp_path):
    sae = random_sae("topk", statistics=("mean_nonzero", "density"))
    again = load_sae(sae.save(tmp_path / "sae"))
    assert torch.equal(again.statistic("mean_nonzero"), sae.statistic("mean_nonzero"))
    assert not torch.equal(sae.statistic("mean_nonzero"), sae.statistic("density"))
    with pytest.raises(ValueError, match=r"no statistic 'std'.*density, mean_nonzero"):
        again.statistic("std")


def test_k_of_a_call_replaces_that_of_the_config():
    sae = random_sae("topk", k=5)
    wide = dataclasses.replace(sae.config, k=11)
    other = SAE(wide).eval()
    other.load_state_dict(sae.state_dict())
    x = torch.randn(4, 13)
    assert torch.equal(sae.encode(x, k=11).dense(), other.encode(x).dense())


def test_numbers_of_numpy_are_numbers(tmp_path):
    sae = SAE(SAEConfig(d_model=np.int64(6), n_latents=np.int32(12), k=np.int64(3))).eval()
    x = torch.randn(4, 6)
    assert sae.encode(x, k=np.int64(5)).values.shape == sae.encode(x, k=torch.tensor(5)).values.shape == (4, 5)
    assert torch.equal(load_sae(sae.save(tmp_path / "sae"), k=np.int64(3))(x), sae(x))


def test_half_precision_input_is_cast_to_the_sae():
    sae = random_sae("topk")
    x = torch.randn(4, 13).half()
    assert sae(x).dtype == torch.float32
    assert torch.equal(sae(x), sae(x.float()))


def test_directions_are_decoder_rows():
    sae = random_sae("topk")
    assert torch.equal(sae.directions([3, 0]), sae.W_dec[[3, 0]])


def test_a_new_sae_has_unit_decoder_rows_and_a_tied_encoder():
    sae = SAE(SAEConfig(13, 37, k=5))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(37))
    assert torch.equal(sae.W_enc, sae.W_dec)


def test_what_users_get_wrong_is_said():
    sae = random_sae("topk")
    with pytest.raises(ValueError, match=r"last dimension must be the SAE's d_model, 13.*movedim"):
        sae.encode(torch.randn(13, 4))
    with pytest.raises(ValueError, match="37"):
        sae.decode(SparseCode(torch.ones(2, 1), torch.zeros(2, 1).int(), 99))
    with pytest.raises(ValueError, match="choose in 0 to 36"):
        sae.directions([37])
    with pytest.raises(ValueError, match="k is 38"):
        sae.encode(torch.randn(4, 13), k=38)
    with pytest.raises(ValueError, match="leave it out"):
        random_sae("relu").encode(torch.randn(4, 13), k=3)
    standard = random_sae("topk", normalizer="standardize")
    with pytest.raises(ValueError, match="pass like=x"):
        standard.decode(standard.encode(torch.randn(4, 13)))


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_autocast_does_not_round_a_code(activation):
    torch.manual_seed(0)
    k = 4 if activation == "topk" else None
    sae = SAE(SAEConfig(d_model=16, n_latents=48, activation=activation, k=k)).eval()
    x = torch.randn(9, 16)
    plain = sae.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sae.encode(x)
    assert torch.equal(plain.dense(), cast.dense())


def test_an_encode_follows_the_weights_when_they_change():
    """The prefilter keeps a copy of the encoder: it must never answer for weights of before."""
    import copy
    import pickle

    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=16, n_latents=512, k=4)).eval()
    x = torch.randn(100, 16)
    with torch.no_grad():
        sae.encode(x)
        sae.W_enc.mul_(-1)
        together, one_by_one = sae.encode(x), torch.cat([sae.encode(row[None]).dense() for row in x])
    torch.testing.assert_close(together.dense(), one_by_one)
    for copied in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        torch.testing.assert_close(copied.encode(x).dense(), one_by_one)


@pytest.mark.parametrize("exchange", ["data", "half"])
def test_weights_whose_memory_was_exchanged_are_the_ones_that_encode(exchange):
    torch.manual_seed(0)
    sae, x = SAE(SAEConfig(64, 2048, k=8)).eval(), torch.randn(256, 64)
    sae.encode(x)
    if exchange == "data":
        sae.W_enc.data = torch.randn(2048, 64)
    else:
        sae.half().float()
    pre = (x - sae.b_pre).double() @ sae.W_enc.double().T
    assert torch.equal(sae.encode(x).dense() != 0, torch.zeros_like(pre).scatter(1, pre.topk(8).indices, 1.0) != 0)
