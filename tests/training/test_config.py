"""Schedules, averages, pieces of a batch, precision, what is written and what is warned of."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import SAETrainer, TensorRows, TrainConfig, fit_together, recipe
from sparsefeat.training.run.early import misfit
from sparsefeat.training.run.metrics import board_writer
from tests.training.test_trainer import CONFIG, same, small, small_rows, superposition


def trainer(**changed: object) -> SAETrainer:
    return SAETrainer(small(), small_rows(), dataclasses.replace(CONFIG, **changed))


def test_lr_falls_along_half_a_cosine_or_not_at_all():
    config = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay="cosine")
    for step in (10, 30, 55, 99):
        expected = (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert config.lr_at(step, 1024) == pytest.approx(expected, abs=1e-9)
    constant = TrainConfig(steps=100, lr=1.0, decay_steps=0)
    assert {constant.lr_at(step, 1024) for step in range(100)} == {1.0}


def test_adamw_shrinks_what_has_no_gradient():
    made = trainer(optimizer="adamw", weight_decay=0.1)
    assert isinstance(made.optimizer, torch.optim.AdamW)
    with torch.no_grad():
        made.sae.b_enc[7] = -1e6  # it never fires, and so has no gradient
    before = made.sae.W_enc[7].detach().clone()
    made.sae.train()
    made.train_step(next(made.source.stream(64, 0, 0, made.ranks))[0])
    torch.testing.assert_close(made.sae.W_enc[7].detach(), before * (1 - 0.1 * made.config.lr_at(0, 30)))


def test_the_average_of_the_weights_comes_out_and_survives_a_kill(tmp_path):
    config = dataclasses.replace(CONFIG, ema=0.8)
    one = SAETrainer(small(), small_rows(), config)
    kept = {name: p.detach().double().clone() for name, p in zip(one.learner.names, one.learner.trained, strict=True)}
    one.sae.train()
    for (batch,), _ in zip(one.source.stream(64, 0, 0, one.ranks), range(config.steps), strict=False):
        one.train_step(batch)
        for name, p in zip(one.learner.names, one.learner.trained, strict=True):
            kept[name] = 0.8 * kept[name] + 0.2 * p.detach().double()
    last = one.sae.W_enc.detach().clone()
    for name in kept:
        torch.testing.assert_close(one.averaged[name].double(), kept[name], rtol=1e-5, atol=1e-6)
    whole = one.finish()
    assert not torch.equal(whole.W_enc, last)
    first = SAETrainer(small(), small_rows(), config, tmp_path)
    first.sae.train()
    for (batch,), _ in zip(first.source.stream(64, 0, 0, first.ranks), range(9), strict=False):
        first.train_step(batch)
    first.checkpoint()
    assert same(SAETrainer(small(), small_rows(), config, tmp_path).fit(progress=False), whole)


def test_a_batch_in_pieces_has_the_mean_of_their_gradients():
    whole, pieces = trainer(), trainer(accumulate=4)
    (batch,) = next(whole.source.stream(64, 0, 0, whole.ranks))
    wanted = []
    for part in batch.rows.split(16):
        one = trainer()
        one.sae.train()
        wanted.append(one.learner.gradients(one.learner.loss(part, 0)))
    pieces.sae.train()
    measured = pieces.train_step(batch, measure=True)
    mean = [sum(gradients) / 4 for gradients in zip(*wanted, strict=True)]
    norm = torch.stack([torch.linalg.vector_norm(g) for g in mean]).norm()
    assert measured is not None
    # Projected along unit rows first, which takes a little off.
    assert 0.5 * norm < measured["grad_norm"] <= norm * (1 + 1e-5)
    for parameter, gradient in zip(pieces.learner.trained[:2], mean[:2], strict=True):
        assert parameter.grad is not None
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), dim=0)
        assert cosine > 1 - 1e-5
    assert pieces.learner.get_buffer("rows_since_fired").max() <= 64


def test_bfloat16_is_of_the_loss_alone_and_learns_nearly_as_well():
    rows = superposition(4000)[0]
    config = TrainConfig(steps=80, batch_size=256, lr=1e-2, warmup_steps=5)
    found = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        made = SAETrainer(SAE(SAEConfig(32, 96, k=3)), rows, dataclasses.replace(config, precision=precision))
        assert all(p.dtype == torch.float32 for p in made.learner.trained)
        sae = made.fit(progress=False)
        assert sae.dtype == torch.float32
        found[precision] = float((rows - sae(rows)).square().sum() / (rows - rows.mean(0)).square().sum())
    assert found["bfloat16"] < 1.1 * found["float32"] + 0.02


def test_metrics_are_written_as_lines_and_as_a_table(tmp_path):
    made = SAETrainer(small(), small_rows(), CONFIG, tmp_path)
    made.fit(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert lines == made.log
    assert [{name: float(value) for name, value in row.items()} for row in table] == made.log


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_tensorboard_that_is_not_installed_is_said():
    with pytest.raises(ValueError, match="needs TensorBoard: pip install tensorboard"):
        board_writer()


def test_tensorboard_has_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = SAETrainer(small(), small_rows(), CONFIG, tmp_path, tensorboard=True)
    made.fit(progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(made.log[0]) - {"step"}
    assert [event.step for event in events.Scalars("fvu")] == [entry["step"] for entry in made.log]


def test_several_saes_of_one_source_train_as_each_would_alone():
    source = TensorRows(small_rows())
    configs = [CONFIG, dataclasses.replace(CONFIG, steps=11, lr=3e-3)]
    alone = [
        SAETrainer(small(a), small_rows(), c).fit(progress=False)
        for a, c in zip(("topk", "signed_topk"), configs, strict=True)
    ]
    from sparsefeat.training.activations.rows import SideBySide

    shared = SideBySide(source)
    made = [SAETrainer(small(a), shared, c) for a, c in zip(("topk", "signed_topk"), configs, strict=True)]
    for sae, wanted in zip(fit_together(made, progress=False), alone, strict=True):
        assert same(sae, wanted)
    with pytest.raises(ValueError, match="the trainers differ in batch_size: give all the same"):
        fit_together([made[0], SAETrainer(small(), shared, dataclasses.replace(CONFIG, batch_size=32))])
    with pytest.raises(ValueError, match="the trainers differ in source: make all with the same"):
        fit_together([made[0], trainer()])


# Early warnings --------------------------------------------------------------------------------------------------------


def test_a_normaliser_that_does_not_fit_is_said_at_once():
    rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    assert misfit(rows, SAEConfig(32, 64, k=4)) is None
    massive = rows.clone()
    massive[:, 5] *= 40  # 98 % of the variance
    assert "channel 5 has 98% of the variance" in str(misfit(massive, SAEConfig(32, 64, k=4)))
    assert misfit(massive, SAEConfig(32, 64, k=4, normalizer="affine")) is None
    scales = rows * torch.logspace(0, 4, 500)[:, None]
    assert "-fold in norm" in str(misfit(scales, SAEConfig(32, 64, k=4, hookpoint="unet.mid_block")))
    assert misfit(scales, SAEConfig(32, 64, k=4, normalizer="unit_norm")) is None
    assert "collect 128, or take 'affine'" in str(misfit(rows[:100], SAEConfig(32, 64, k=4, normalizer="pca")))


def test_the_trainer_warns_of_the_normaliser_and_of_latents_that_do_not_fire():
    massive = small_rows().clone()
    massive[:, 5] *= 40
    with pytest.warns(UserWarning, match="channel 5 has .* take 'affine' or 'pca'"):
        SAETrainer(small(), massive, CONFIG)
    made = trainer(steps=60, objective=dataclasses.replace(CONFIG.objective, auxk=0.0))
    with torch.no_grad():
        made.sae.b_enc[:20] = -1e6
    with pytest.warns(
        UserWarning, match=r"\d+% of the latents at the SAE did not fire for 1,0\d\d rows, at step"
    ) as seen:
        made.fit(progress=False)
    assert len(seen) == 1  # once


def test_a_run_in_which_all_is_well_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(steps=60).fit(progress=False)


def test_an_sae_that_explains_less_than_the_mean_is_said():
    made = trainer(steps=60, lr=1.0, warmup_steps=0)
    with pytest.warns(UserWarning, match="explains less than the mean does, fvu"):
        made.fit(progress=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd' must be one of adam, adamw"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 is adamw's: pass optimizer='adamw'"),
        ({"decay": "step"}, "decay='step' must be one of linear, cosine"),
        ({"precision": "float16"}, "precision='float16' must be one of float32, bfloat16"),
        ({"accumulate": 0}, "accumulate=0 must be a whole number from 1 to 64"),
        ({"accumulate": 33}, "accumulate=33 leaves a piece of a batch one row, without a variance"),
        ({"batch_size": 1}, "batch_size=1 leaves a piece of a batch one row, without a variance"),
        ({"ema": 1.0}, "ema=1.0 must be between 0 and 1"),
        ({"decay_steps": 99}, "decay_steps=99 must be a whole number from 0 to 24"),
    ],
)
def test_what_users_get_wrong_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_a_folder_without_permission_is_said(tmp_path: Path):
    with pytest.raises(OSError, match=r"folder /proc/no/run cannot be made .*choose another place"):
        SAETrainer(small(), small_rows(), CONFIG, Path("/proc/no/run"))
    made = SAETrainer(small(), small_rows(), CONFIG, tmp_path / "run")
    vars(made)["folder"] = Path("/proc/no/run")  # as where a disk was taken away since
    with pytest.raises(OSError, match=r"cannot write a checkpoint into /proc/no/run .*choose another folder"):
        made.checkpoint()


def test_a_trainer_keeps_its_settings():
    made = SAETrainer(small(), small_rows(), CONFIG)
    for name in ("config", "sae", "folder", "step", "stepps"):
        with pytest.raises(
            AttributeError, match=rf"SAETrainer\.{name} is .*; make a new one with .* sae, rows, config"
        ):
            setattr(made, name, None)
    assert made.config == CONFIG


def test_a_parameter_exchanged_under_the_trainer_is_refused():
    sae = small()
    made = SAETrainer(sae, small_rows(), CONFIG)
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().clone())
    with pytest.raises(ValueError, match=r"another Parameter in the place of one .*make the trainer afterwards"):
        made.fit(progress=False)


def test_a_penalty_that_does_not_reach_its_number_of_active_latents_in_the_steps_there_are_says_so():
    rows = torch.randn(512, 16, generator=torch.Generator().manual_seed(2))

    def train(steps: int) -> SAETrainer:
        made = recipe("jumprelu", 16, n_latents=64, k=4, steps=steps, batch_size=128, lr=1e-2)
        return SAETrainer(SAE(made.sae), rows, made.train)

    with pytest.warns(
        UserWarning, match=r"has \d+\.\d latents active a row, not the 4 it was trained to: take more steps"
    ):
        train(10).fit(progress=False)
    enough = train(600)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*latents active a row.*")
        enough.fit(progress=False)
    assert enough.log[-1]["l0"] == pytest.approx(4, rel=0.2)
