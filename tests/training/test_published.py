"""Every published recipe learns a dictionary that is known, and what it saves encodes the same when it is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import sparsefeat as sf
from sparsefeat.evaluation.sae_metrics import random_control
from sparsefeat.sae import SAE
from sparsefeat.training import PUBLISHED, Batch, SAETrainer, TensorRows, build_itda, recipe

D, N, K, ACTIVE = 16, 48, 3, 24
# Rates that a hundred steps need.
FAST = {"steps": 250, "batch_size": 128, "lr": 2e-2, "log_every": 250}


def max_cosines(directions: Tensor, found: Tensor) -> Tensor:
    """For every row of `directions` its largest cosine with a row of `found`: `[len(directions)]`; 1 is recovered."""
    first = torch.nn.functional.normalize(directions, dim=-1)
    return (first @ torch.nn.functional.normalize(found, dim=-1).T).amax(-1)


def superposition(n_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(ACTIVE, D, generator=generator), dim=1)
    chosen = torch.rand(n_rows, ACTIVE, generator=generator).argsort(1)[:, :K]
    size = 0.5 + torch.rand(n_rows, K, 1, generator=generator)
    return (directions[chosen] * size).sum(1) + 0.2, directions


def fvu(sae: SAE, batch: Batch) -> float:
    y = batch.rows if batch.target is None else batch.target
    if batch.timestep is not None:
        sae.at_timestep(batch.timestep)
    with torch.no_grad():
        return float((y - sae(batch.rows)).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_learns_and_is_loaded_as_it_was_saved(name, tmp_path):
    rows, directions = superposition(3000)
    options = {"sae": {"time_width": 8}} if PUBLISHED[name].sae.get("time_width") else {}
    if name == "dn-cbm":
        options["objective"] = {"sparsity": 0.05}  # as sparse as these rows are
    if name in ("relu-l1", "jumprelu-tanh"):
        options["objective"] = {"sparsity": 0.01}  # the published weights are for wide models
    made = recipe(name, D, n_latents=N, k=K, **options, **FAST)
    target = None
    if made.sae.transcoder:
        target = 10 * rows @ torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    timestep = torch.linspace(0, 999, len(rows)) if made.sae.time_width else None
    held = Batch(*(None if t is None else t[-500:] for t in (rows, target, timestep)))
    if made.sae.activation == "matching_pursuit":
        sae = build_itda(rows.split(100), N, K)
        start = sf.SAE(sae.config)  # random directions
    else:
        torch.manual_seed(0)
        trainer = SAETrainer(SAE(made.sae), TensorRows(rows, target, timestep), made.train)
        begun = copy.deepcopy(trainer.learner)
        start = begun.fold().eval()
        sae = trainer.fit(progress=False)
    if made.sae.uses_threshold:  # half of the latents were active at the start: the same directions, as sparse as now
        start = random_control(sae, held, made.train.seed)
    before, after = fvu(start, held), fvu(sae, held)
    enough = 0.95 if name == "relu-l1" else 0.8  # whose activations are shrunk by their penalty
    assert after < enough * before, f"FVU {before:.3f} -> {after:.3f}"
    if held.target is None and name not in ("archetypal", "flux-sae"):  # no directions of a hull, of whitened rows
        found, chance = max_cosines(directions, sae.W_dec).mean(), max_cosines(directions, start.W_dec).mean()
        assert found > chance + 0.3 * (1 - chance), f"cosine {chance:.3f} -> {found:.3f}"
    sae.save(tmp_path / "sae")
    again = sf.load_sae(tmp_path / "sae")
    if timestep is not None:
        again.at_timestep(held.timestep)
    code, same = sae.encode(held.rows), again.encode(held.rows)
    assert torch.equal(code.values, same.values)
    assert torch.equal(code.indices, same.indices)
    l0 = (code.values != 0).float().sum(1).mean()
    assert 0.5 * K < l0 < 2 * K or name == "dn-cbm", f"{l0:.2f} active"


@pytest.mark.parametrize("name", ["batch-topk", "matryoshka"])
def test_a_short_run_s_threshold_leaves_as_many_active_as_were_trained(name):
    rows, _ = superposition(2000)
    rows += 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))  # so that any k can be active
    made = recipe(name, D, n_latents=N, k=2 * K, **FAST)
    sae = SAETrainer(SAE(made.sae), TensorRows(rows), made.train).fit(progress=False)
    l0 = float((sae.encode(rows).values != 0).float().sum(1).mean())
    assert l0 == pytest.approx(2 * K, rel=0.05)


def test_recipes_have_the_published_constants():
    unbox = recipe("sdxl-unbox", 1280)
    assert (unbox.sae.n_latents, unbox.sae.k, unbox.train.lr, unbox.train.batch_size) == (5120, 10, 1e-4, 4096)
    assert unbox.train.lr_at(unbox.train.steps - 1, 5120) == 1e-4  # no schedule
    assert (unbox.train.objective.k_aux, unbox.train.objective.fired_above) == (256, 1e-3)
    saeuron = recipe("saeuron", 1280)
    assert (saeuron.sae.n_latents, saeuron.sae.k, saeuron.sae.inference, saeuron.train.lr) == (20480, 32, "topk", 4e-4)
    flux = recipe("flux-sae", 3072, n_latents=65536)
    assert flux.train.objective.dead_after == 1024 * 65536 // 64
    assert (flux.sae.clip, flux.train.betas, flux.train.grad_clip, flux.train.warmup_steps) == (10, (0, 0.99), 10, 50)
    assert flux.train.ema == 0.995
    assert recipe("batch-topk", 64).train.objective.threshold_decay == 0.999
    assert recipe("matryoshka", 64).train.objective.prefixes == (32, 96, 224, 480, 1024)
    with pytest.raises(ValueError, match="recipe 'sae' is not known: choose one of topk"):
        recipe("sae", 8)
