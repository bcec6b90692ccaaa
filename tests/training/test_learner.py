"""Every objective, and its gradients, against its formula written out densely in float64; and the units of the rows."""

from __future__ import annotations

import math

import pytest
import torch
from sparsefeat_kernels import force_triton
from torch import Tensor

import sparsefeat as sf
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Batch, Learner, Objective, TensorRows, build_itda
from tests.kernels.pretended_gpu import back, on_gpu, place, pretended

D, N, K, ROWS = 9, 40, 3, 31
DEAD = torch.tensor([1, 4, 5, 17, 30, 33])


def learner_of(objective: Objective, activation: str = "topk", **config) -> Learner:
    torch.manual_seed(3)
    if activation not in ("relu", "jumprelu"):
        config.setdefault("k", K)
    learner = Learner(SAE(SAEConfig(D, N, activation, **config)).double().train(), objective).double()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
        if learner.thresholds is not None:
            learner.thresholds.abs_().add_(0.5)
        learner.sae.W_dec /= learner.sae.W_dec.norm(dim=1, keepdim=True)
        if config.get("normalizer") == "none":
            learner.sae.b_pre.zero_()
    return learner


def rows_of() -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2 + 1


def agree(learner: Learner, x: Tensor, expected: Tensor, at: dict[str, Tensor]) -> None:
    """The loss, and its gradients by every trained tensor, are those of `expected`, a function of the tensors in `at`."""
    loss = learner.loss(x, step=0)
    torch.testing.assert_close(loss.total, expected)
    found = dict(zip(learner.names, learner.gradients(loss), strict=True))
    wanted = dict(zip(at, torch.autograd.grad(expected, list(at.values()), allow_unused=True), strict=True))
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        reference = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(gradient, reference, msg=lambda m, name=name: f"{name}: {m}")
    assert any(gradient.abs().sum() > 0 for gradient in found.values())


def copies(learner: Learner) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in zip(learner.names, learner.trained, strict=True)
    }


def mark_dead(learner: Learner) -> None:
    learner.rows_since_fired[DEAD] = learner.objective.dead_after


def top(pre: Tensor, k: int) -> Tensor:
    """Dense codes of the k largest, rectified."""
    mask = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    return (pre * mask).relu()


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("aux", ["residual", "unbox", "saeuron", "crosscoder", "fae"])
@pytest.mark.parametrize("reconstruction", ["fvu", "mse", "l2"])
def test_auxk_in_each_convention(aux, reconstruction, dead):
    objective = Objective(reconstruction, auxk=0.25, aux=aux, k_aux=4)
    learner, x = learner_of(objective), rows_of()
    if dead:
        mark_dead(learner)
    p = copies(learner)
    E, b, D_, out = p["sae.W_enc"], p["sae.b_enc"], p["sae.W_dec"], p["sae.b_out"]
    pre = (x - learner.sae.b_pre.detach()) @ E.T + b
    x_hat = top(pre, K) @ D_ + out
    e = x - x_hat
    variance = (x - x.mean(0)).pow(2).sum()
    error = {
        "fvu": e.pow(2).sum() / variance,
        "mse": e.pow(2).mean(),
        "l2": e.norm(dim=1).mean() / math.sqrt(D),
    }[reconstruction]
    guess = torch.zeros_like(x)
    if dead:
        masked = torch.full_like(pre, -torch.inf).index_copy(1, DEAD, pre[:, DEAD])
        best = masked.topk(4)
        for row in range(ROWS):
            for value, latent in zip(best.values[row], best.indices[row], strict=True):
                guess[row] = guess[row] + value.clamp(min=0) * D_[latent]
    held = e.detach()
    spread_of_e = (held - held.mean(0)).pow(2).sum()
    loss = {
        "residual": (guess - held).pow(2).sum() / variance,
        "unbox": (guess + out - held - out.detach()).pow(2).sum() / spread_of_e,
        "saeuron": (guess + out + e).pow(2).sum() / variance,
        "crosscoder": (guess - held).pow(2).sum() / spread_of_e,
        "fae": (guess + out - x_hat.detach()).pow(2).mean(),
    }[aux]
    if not dead and aux != "unbox":
        loss = loss * 0
    agree(learner, x, error + 0.25 * loss, p)


def test_matryoshka_is_the_mean_over_dictionaries_that_begin_with_each_other():
    learner, x = learner_of(Objective(prefixes=(5, 18, N), auxk=0)), rows_of()
    p = copies(learner)
    z = top((x - learner.sae.b_pre.detach()) @ p["sae.W_enc"].T + p["sae.b_enc"], K)
    errors = [(x - z[:, :m] @ p["sae.W_dec"][:m] - p["sae.b_out"]).pow(2).sum() for m in (5, 18, N)]
    agree(learner, x, sum(errors) / 3 / (x - x.mean(0)).pow(2).sum(), p)


def test_hierarchical_topk_is_the_mean_over_codes_of_fewer_latents():
    learner, x = learner_of(Objective(levels=(1, 2, K), auxk=0)), rows_of()
    p = copies(learner)
    pre = (x - learner.sae.b_pre.detach()) @ p["sae.W_enc"].T + p["sae.b_enc"]
    errors = [(x - top(pre, j) @ p["sae.W_dec"] - p["sae.b_out"]).pow(2).sum() for j in (1, 2, K)]
    agree(learner, x, sum(errors) / 3 / (x - x.mean(0)).pow(2).sum(), p)


def test_batch_topk_with_free_decoder_rows_selects_by_activation_times_norm():
    learner, x = learner_of(Objective("mse", auxk=0, decoder="free"), "batch_topk"), rows_of()
    from sparsefeat.training.learning.dictionaries import remake

    remake(learner.dictionary, learner.sae)
    torch.testing.assert_close(learner.sae.W_dec.norm(dim=1), torch.ones(N).double())
    p = copies(learner)
    E, b, D_ = (p[f"dictionary.{name}"] for name in ("W_enc", "b_enc", "W_dec"))
    pre = ((x - learner.sae.b_pre.detach()) @ E.T + b).relu()
    scaled = (pre * D_.norm(dim=1)).detach()
    kept = scaled >= scaled.flatten().topk(K * ROWS).values[-1]
    assert kept.sum() == K * ROWS
    x_hat = (pre * kept) @ D_ + p["sae.b_out"]
    agree(learner, x, (x - x_hat).pow(2).mean(), p)


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_l1_is_of_activations_times_the_norms_of_their_rows(decoder):
    learner, x = learner_of(Objective("mse", sparsity=0.2, decoder=decoder), "relu"), rows_of()
    if learner.dictionary is not None:
        from sparsefeat.training.learning.dictionaries import remake

        remake(learner.dictionary, learner.sae)
    p = copies(learner)
    E, b, D_ = (p.get(f"dictionary.{name}", p.get(f"sae.{name}")) for name in ("W_enc", "b_enc", "W_dec"))
    z = ((x - learner.sae.b_pre.detach()) @ E.T + b).relu()
    norms = D_.norm(dim=1) if decoder == "free" else 1
    expected = (x - z @ D_ - p["sae.b_out"]).pow(2).mean() + 0.2 * (z * norms).sum(1).mean()
    agree(learner, x, expected, p)


@pytest.mark.parametrize("penalty", ["l0", "tanh", "l1"])
def test_jumprelu_and_its_straight_through_gradients(penalty):
    """The gradients by hand: dL/dz_i = (dL/dx_hat) D_i + dpenalty/dz_i; by the threshold, what the rectangle lets through."""
    band, weight, pre_act = 0.7, 0.3, 0.05
    objective = Objective("mse", sparsity=weight, penalty=penalty, bandwidth=band, pre_act=pre_act)
    learner, x = learner_of(objective, "jumprelu"), rows_of()
    sae, t = learner.sae, learner.thresholds.detach()
    with torch.no_grad():
        pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
        on = ((pre > t) & (pre > 0)).double()
        z = pre * on
        e = z @ sae.W_dec + sae.b_out - x
        penalties = {"l0": on.sum(), "tanh": torch.tanh(4 * z).sum(), "l1": z.sum()}[penalty] / ROWS
        below = (t - pre).clamp(min=0)
        total = e.pow(2).mean() + weight * penalties + pre_act * below.sum() / ROWS
        by_z = 2 * e @ sae.W_dec.T / (ROWS * D)
        by_z += weight / ROWS * {"l0": 0 * z, "tanh": 4 / torch.cosh(4 * z) ** 2, "l1": torch.ones_like(z)}[penalty]
        by_pre = by_z * on - pre_act / ROWS * (below > 0)
        rectangle = ((pre - t).abs() < band / 2).double()
        by_t = (by_z * rectangle * (-t / band)).sum(0) + pre_act / ROWS * (below > 0).sum(0)
        if penalty == "l0":
            by_t += weight / ROWS * (rectangle * (-1 / band)).sum(0)
        wanted = {
            "sae.W_enc": by_pre.T @ (x - sae.b_pre),
            "sae.b_enc": by_pre.sum(0),
            "sae.W_dec": 2 * z.T @ e / (ROWS * D),
            "sae.b_out": 2 * e.sum(0) / (ROWS * D),
            "thresholds": by_t,
        }
        assert 0 < rectangle.sum() < rectangle.numel()
        assert 0 < on.sum() < on.numel()
    loss = learner.loss(x, step=0)
    torch.testing.assert_close(loss.total.detach(), total)
    for name, gradient in zip(learner.names, learner.gradients(loss), strict=True):
        torch.testing.assert_close(gradient, wanted[name], msg=lambda m, name=name: f"{name}: {m}")


def test_jumprelu_trained_to_a_number_of_active_latents():
    objective = Objective("mse", sparsity=0.3, penalty="l0", bandwidth=0.7, l0_target=2.5)
    learner, x = learner_of(objective, "jumprelu"), rows_of()
    free = Learner(learner.sae, Objective("mse", sparsity=1e-9, penalty="l0", bandwidth=0.7)).double()
    linear = Learner(learner.sae, Objective("mse", sparsity=1.0, penalty="l0", bandwidth=0.7)).double()
    with torch.no_grad():
        free.thresholds.copy_(learner.thresholds)
        linear.thresholds.copy_(learner.thresholds)
    l0 = float(linear.loss(x, 0).parts["penalty"])
    loss = learner.loss(x, 0)
    expected = float(free.loss(x, 0).total.detach()) + 0.3 * (l0 / 2.5 - 1) ** 2
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)
    by_error, by_both = (one.gradients(one.loss(x, 0))[-1] for one in (free, linear))
    wanted = by_error + 0.3 * 2 * (l0 / 2.5 - 1) / 2.5 * (by_both - by_error)
    torch.testing.assert_close(learner.gradients(loss)[-1], wanted, rtol=1e-6, atol=1e-9)


def test_gated_trains_the_gate_by_what_it_reconstructs_alone_and_is_a_jumprelu_sae(tmp_path):
    learner, x = learner_of(Objective("mse", sparsity=0.2, gated=True), "jumprelu"), rows_of()
    p = copies(learner)
    E, D_, out = p["sae.W_enc"], p["sae.W_dec"], p["sae.b_out"]
    shared = (x - learner.sae.b_pre.detach()) @ E.T
    gate = shared + p["gate_bias"]
    z = (gate > 0) * (shared * p["log_factor"].exp() + p["sae.b_enc"]).relu()
    alone = gate.relu() @ D_.detach() + out.detach()
    expected = (x - z @ D_ - out).pow(2).mean() + 0.2 * gate.relu().sum(1).mean() + (x - alone).pow(2).mean()
    agree(learner, x, expected, p)
    folded = learner.fold().eval()
    torch.testing.assert_close(folded.encode(x).dense(), z.detach())
    folded.save(tmp_path / "sae")
    torch.testing.assert_close(sf.load_sae(tmp_path / "sae").encode(x).dense(), z.detach())


def test_archetypes_are_convex_in_the_centres_and_relaxed_within_delta():
    learner, x = learner_of(Objective("mse", auxk=0, decoder="archetypal", archetypes=11, delta=0.2)), rows_of()
    from sparsefeat.training.learning.dictionaries import remake

    with torch.no_grad():
        learner.dictionary.centres.normal_()
        learner.dictionary.settle()
    W, R = learner.dictionary.mixture.detach(), learner.dictionary.relaxed.detach()
    assert (W >= 0).all()
    torch.testing.assert_close(W.sum(1), torch.ones(N).double(), atol=1e-6, rtol=0)
    assert R.norm(dim=1).max() <= 0.2 + 1e-12
    remake(learner.dictionary, learner.sae)
    p = copies(learner)
    assert "sae.b_out" not in p
    assert "sae.W_dec" not in p
    D_ = p["dictionary.log_factor"].exp() * (
        p["dictionary.mixture"] @ learner.dictionary.centres + p["dictionary.relaxed"]
    )
    z = top((x - learner.sae.b_pre.detach()) @ p["sae.W_enc"].T + p["sae.b_enc"], K)
    agree(learner, x, (x - z @ D_ - learner.sae.b_out.detach()).pow(2).mean(), p)


def test_a_skip_transcoder_reconstructs_its_target_from_the_rows():
    learner, x = learner_of(Objective("mse", auxk=0), transcoder=True, skip=True), rows_of()
    y = torch.randn(ROWS, D).double() * 3
    p = copies(learner)
    z = top((x - learner.sae.b_pre.detach()) @ p["sae.W_enc"].T + p["sae.b_enc"], K)
    expected = (y - z @ p["sae.W_dec"] - p["sae.b_out"] - x @ p["sae.W_skip"].T).pow(2).mean()
    agree(learner, Batch(x, y), expected, p)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_temporal_sae_sees_rows_moved_by_their_timestep(activation):
    objective = Objective("mse", auxk=0 if activation == "topk" else None, sparsity=0.1 * (activation == "relu"))
    learner, x = learner_of(objective, activation, normalizer="timestep", time_width=6), rows_of()
    timestep = torch.linspace(0, 999, ROWS).double()
    p = copies(learner)
    angle = timestep.float()[:, None] * torch.tensor([1.0, 1e-2, 1e-4])  # 10000^(-i / 2)
    inner = torch.cat([angle.sin(), angle.cos()], 1).double()
    for layer in ("time_in", "time_out"):
        inner = torch.nn.functional.silu(inner @ p[f"sae.{layer}_weight"].T + p[f"sae.{layer}_bias"])
    moved = inner @ p["sae.modulation_weight"].T + p["sae.modulation_bias"]
    pre = (x * (1 + moved[:, :D]) + moved[:, D:] - learner.sae.b_pre.detach()) @ p["sae.W_enc"].T + p["sae.b_enc"]
    z = top(pre, K) if activation == "topk" else pre.relu()
    expected = (x - z @ p["sae.W_dec"] - p["sae.b_out"]).pow(2).mean() + objective.sparsity * z.sum(1).mean()
    loss = learner.loss(Batch(x, None, timestep), step=0)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-6)  # the embedding is in single precision
    wanted = torch.autograd.grad(expected, list(p.values()))
    for name, gradient, reference in zip(learner.names, learner.gradients(loss), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_taken_in_parts_give_the_same_loss_and_gradients(monkeypatch):
    objective = Objective("mse", sparsity=0.2, penalty="tanh", bandwidth=0.7, pre_act=0.1, prefixes=(7, N))
    learner, x = learner_of(objective, "jumprelu"), rows_of()
    whole = learner.loss(x, step=0)
    gradients = learner.gradients(whole)
    monkeypatch.setattr("sparsefeat.training.objective.penalised.PRE_BYTES", 7 * N * 8)
    parts = learner.loss(x, step=0)
    torch.testing.assert_close(parts.total, whole.total)
    assert torch.equal(parts.counts, whole.counts)
    for one, other in zip(learner.gradients(parts), gradients, strict=True):
        torch.testing.assert_close(one, other)


FOLDED = [
    ("topk", "b_pre", Objective()),
    ("topk", "none", Objective()),
    ("topk", "standardize", Objective()),
    ("topk", "unit_norm", Objective()),
    ("topk", "pca", Objective()),
    ("topk", "affine", Objective()),
    ("topk", "timestep", Objective()),
    ("batch_topk", "b_pre", Objective()),
    ("batch_topk", "b_pre", Objective(decoder="free")),
    ("topk", "b_pre", Objective(decoder="archetypal", archetypes=20)),
    ("relu", "b_pre", Objective(sparsity=0.01)),
    ("jumprelu", "b_pre", Objective(sparsity=0.01, penalty="l0")),
    ("jumprelu", "b_pre", Objective(sparsity=0.01, gated=True)),
]


@pytest.mark.parametrize(("activation", "normalizer", "objective"), FOLDED)
def test_the_folded_sae_does_to_raw_rows_what_the_learner_did_to_scaled_ones(
    activation, normalizer, objective, tmp_path
):
    options = {"time_width": 6} if normalizer == "timestep" else {}
    if activation == "batch_topk":
        options["inference"] = "threshold"
    k = {} if activation in ("relu", "jumprelu") else {"k": K}
    sae = SAE(SAEConfig(D, N, activation, normalizer=normalizer, **k, **options)).double()
    learner = Learner(sae, objective).double()
    x = 0.01 * rows_of() + 0.05
    batch = Batch(x, None, torch.linspace(0, 999, ROWS).double() if options.get("time_width") else None)
    learner.begin(batch, seed=2)
    with torch.no_grad():
        for parameter in learner.trained:
            parameter.add_(0.1 * torch.randn(parameter.shape).double())
    sae.train()
    for step in range(3):
        loss = learner.loss(batch, step)
        learner.settle(loss, step)
    sae.eval()

    def at_the_rows_timesteps(one: SAE) -> SAE:
        return one if batch.timestep is None else one.at_timestep(batch.timestep)

    units = learner.units(batch).rows
    if learner.log_factor is None:  # a gate is in the SAE once it is folded
        expected = at_the_rows_timesteps(sae)(units) * learner.scale
    else:
        gate = (units - sae.b_pre) @ sae.W_enc.T
        z = (gate + learner.gate_bias > 0) * (gate * learner.log_factor.exp() + sae.b_enc).relu()
        expected = (z @ sae.W_dec + sae.b_out) * learner.scale
    folded = learner.fold()
    torch.testing.assert_close(at_the_rows_timesteps(folded)(x), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(at_the_rows_timesteps(learner.fold())(x), expected, rtol=1e-6, atol=1e-9)
    if objective.decoder == "unit":
        torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(N).double())
    folded.save(tmp_path / "sae")
    again = sf.load_sae(tmp_path / "sae")
    code, same = at_the_rows_timesteps(folded).encode(x), at_the_rows_timesteps(again).encode(x)
    assert torch.equal(code.values, same.values)
    assert torch.equal(code.indices, same.indices)
    assert (code.values != 0).any()


def test_a_transcoder_between_different_units_folds_both_scales():
    learner = Learner(SAE(SAEConfig(D, N, k=K, transcoder=True, skip=True)).double(), Objective()).double()
    x, y = 0.01 * rows_of(), 100 * torch.randn(ROWS, D).double() + 7
    learner.begin(Batch(x, y), seed=1)
    with torch.no_grad():
        learner.sae.W_skip.normal_()
    learner.sae.eval()
    units = learner.units(Batch(x, y))
    expected = learner.sae(units.rows) * learner.target_scale
    torch.testing.assert_close(learner.fold()(x), expected)


def test_who_fired_in_each_convention():
    from sparsefeat_kernels import SparseCode

    from sparsefeat.training.learning.learner import fired

    code = SparseCode(torch.tensor([[2.0, 0.5, 0.0], [-3.0, 0.1, 0.0]]), torch.tensor([[1, 2, 3], [2, 4, 5]]).int(), 7)
    assert fired(code, 0.0)[0].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert fired(code, 0.3)[0].tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert fired(code, 1.0)[0].tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert fired(code, None)[0].tolist() == [0, 1, 2, 1, 1, 1, 0]
    assert int(fired(code, None)[1]) == 4


def test_batch_topk_s_threshold_starts_when_it_is_told_to():
    learner, x = learner_of(Objective(threshold_after=2, threshold_decay=0.5), "batch_topk"), rows_of()
    for step in range(4):
        learner.sae.train()
        loss = learner.loss(x * (1 + step), step)
        smallest = float(loss.code.values.detach()[loss.code.values > 0].min())
        before = float(learner.sae.threshold)
        learner.settle(loss, step)
        expected = {0: before, 1: before, 2: smallest, 3: 0.5 * before + 0.5 * smallest}[step]
        assert float(learner.sae.threshold) == pytest.approx(expected)


def test_the_penalty_grows_while_more_latents_than_wanted_are_active():
    learner, x = learner_of(Objective(sparsity=0.1, l0_target=2.0), "relu"), rows_of()
    l0 = learner.settle(learner.loss(x, 0), 0)
    assert float(l0) > 4
    assert float(learner.log_weight) == pytest.approx(0.03)
    learner.objective = Objective(sparsity=0.1, l0_target=float(l0) * 2)
    learner.settle(learner.loss(x, 1), 1)
    assert float(learner.log_weight) == pytest.approx(0.03 - 0.03 * 0.5, abs=1e-3)


def test_itda_s_atoms_are_rows_that_the_dictionary_did_not_reconstruct(tmp_path):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(6, 12, generator=generator), dim=1)
    rows = directions[torch.arange(600) % 6] * (0.5 + torch.rand(600, 1, generator=generator))
    rows[5] = 0
    sae = build_itda(rows.split(100), n_latents=50, k=2, threshold=0.01)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.n_latents))
    assert sae.n_latents == 6
    assert (sae.W_dec @ directions.T).amax(1).min() > 1 - 1e-5
    torch.testing.assert_close(sae(rows), rows, atol=1e-4, rtol=1e-4)
    sae.save(tmp_path / "sae")
    assert torch.equal(sf.load_sae(tmp_path / "sae").encode(rows).values, sae.encode(rows).values)
    assert build_itda(rows.split(100), n_latents=4, k=2).n_latents == 4
    with pytest.raises(ValueError, match="k is 7 but there are 6 rows that differ"):
        build_itda([rows], n_latents=50, k=7)


def test_what_users_get_wrong_is_said():
    for objective, config, message in (
        (Objective(), SAEConfig(D, N, "relu"), "has no sparsity of its own to train: pass sparsity"),
        (Objective(sparsity=0.1), SAEConfig(D, N, k=K), "sparsity=0.1 needs activation 'relu' or 'jumprelu'"),
        (Objective(sparsity=0.1, penalty="l0"), SAEConfig(D, N, "relu"), "penalty='l0' needs activation 'jumprelu'"),
        (Objective(), SAEConfig(D, N, "matching_pursuit", k=K), "not trained by gradients: build_itda"),
        (Objective(prefixes=(3, 9)), SAEConfig(D, N, k=K), "prefixes ends with 9: the last must be n_latents, 40"),
        (Objective(levels=(1, K)), SAEConfig(D, N, "batch_topk", k=K), "levels=.* needs activation 'topk'"),
        (Objective(), SAEConfig(D, N, k=K, transcoder=True, normalizer="unit_norm"), "train a transcoder with 'b_pre'"),
    ):
        with pytest.raises(ValueError, match=message):
            Learner(SAE(config), objective)
    for change, message in (
        ({"aux": "none"}, "aux is 'none': choose one of residual"),
        ({"prefixes": (4, 2)}, r"prefixes is \(4, 2\): pass whole numbers of at least 1 in ascending order"),
        ({"l0_target": 4.0}, "l0_target is given without a penalty"),
        ({"prefixes": (2,), "levels": (2,)}, "nest the latents or the activations"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(**change)
    learner = Learner(SAE(SAEConfig(D, N, k=K, transcoder=True)), Objective())
    with pytest.raises(ValueError, match="no target: a transcoder has one"):
        learner.units(torch.zeros(2, D))
    with pytest.raises(ValueError, match="a target: a transcoder has one, and the SAE is none"):
        Learner(SAE(SAEConfig(D, N, k=K)), Objective()).units(Batch(torch.zeros(2, D), torch.zeros(2, D)))
    timed = Learner(SAE(SAEConfig(D, N, k=K, normalizer="timestep", time_width=4)), Objective())
    with pytest.raises(ValueError, match="depends on the timestep and the rows have none"):
        timed.units(torch.zeros(2, D))
    with pytest.raises(ValueError, match="timestep has shape"):
        TensorRows(torch.zeros(4, D), timestep=torch.zeros(3))
    with pytest.raises(ValueError, match="target has shape"):
        TensorRows(torch.zeros(4, D), torch.zeros(4, D + 1))


def test_the_loss_of_a_step_waits_for_the_device_once_and_settling_never(monkeypatch):
    """To learn how many latents are dead. A number that is copied from the host would be waited for as well."""
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    learner = Learner(SAE(SAEConfig(16, 96, k=4)), Objective(auxk=1 / 32))
    learner.begin(x)
    learner.get_buffer("rows_since_fired")[:40] = 10**9
    place(learner)
    with force_triton(False), pretended() as waits:
        loss = learner.loss(on_gpu(x), 0)
        learner.settle(loss, 0)
    assert waits == ["aten.nonzero"]
    assert float(back(loss.parts["auxk"])) > 0
