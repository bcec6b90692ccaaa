"""Training finds what is there, stops and goes on, and says what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sparsefeat_kernels.gradient import gradient_memory, weight_gradient
from torch import Tensor

from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.store import Field, ShardReader, ShardWriter
from sparsefeat.training import Batch, Objective, SAETrainer, TensorRows, TrainConfig
from sparsefeat.training.ranks import ALONE, Ranks

CONFIG = TrainConfig(
    steps=24,
    batch_size=64,
    lr=1e-2,
    warmup_steps=4,
    objective=Objective(dead_after=200),
    checkpoint_every=10,
    log_every=5,
)


def superposition(n_rows: int, d: int = 32, n: int = 64, active: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows made of `active` of `n` random unit directions in fewer dimensions, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    chosen = torch.rand(n_rows, n, generator=generator).argsort(1)[:, :active]
    size = 0.5 + torch.rand(n_rows, active, 1, generator=generator)
    return (directions[chosen] * size).sum(1) + 0.3, directions


def small(activation: str = "topk", inference: str = "topk", normalizer: str = "b_pre") -> SAE:
    torch.manual_seed(0)
    return SAE(SAEConfig(12, 30, activation, k=3, inference=inference, normalizer=normalizer))


def small_rows() -> Tensor:
    return superposition(500, d=12, n=20)[0]


def same(first: SAE, second: SAE) -> bool:
    state = second.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


class Interrupting(TensorRows):
    """Presses Ctrl-C while batch number `at` is being fetched."""

    def __init__(self, rows: Tensor, at: int) -> None:
        super().__init__(rows)
        self.countdown = at

    def batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        for batch in super().batches(batch_size, seed=seed, epoch=epoch, skip=skip):
            if self.countdown == 0:
                os.kill(os.getpid(), signal.SIGINT)
            self.countdown -= 1
            yield batch


@pytest.mark.parametrize(("activation", "inference"), [("topk", "topk"), ("batch_topk", "threshold")])
def test_more_than_nine_tenths_of_the_directions_in_superposition_are_recovered(activation, inference):
    rows, directions = superposition(8_000)
    torch.manual_seed(0)
    sae = SAE(SAEConfig(32, 96, activation, k=3, inference=inference))
    config = TrainConfig(steps=240, batch_size=256, lr=1e-2, warmup_steps=10, objective=Objective(dead_after=10_000))
    sae = SAETrainer(sae, rows, config).fit(progress=False)
    cosine = (directions @ sae.W_dec.T).amax(1)
    assert cosine.mean() > 0.9
    assert (cosine > 0.9).float().mean() > 0.9
    held_out = rows[-1000:]
    fvu = (held_out - sae(held_out)).square().sum() / (held_out - held_out.mean(0)).square().sum()
    eigenvalues = torch.linalg.svdvals(held_out - held_out.mean(0)).square()
    assert fvu < 0.5 * eigenvalues[3:].sum() / eigenvalues.sum()  # PCA with as many components as latents a row
    if activation == "batch_topk":
        assert 2 < (sae.encode(held_out).values != 0).float().sum(1).mean() < 4


@pytest.mark.parametrize("normalizer", ["none", "b_pre", "standardize"])
@pytest.mark.parametrize(
    ("activation", "inference"), [("topk", "topk"), ("batch_topk", "threshold"), ("signed_topk", "topk")]
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, activation, inference, normalizer):
    config = dataclasses.replace(CONFIG, objective=Objective(dead_after=200, multi_topk=0.125))
    whole = SAETrainer(small(activation, inference, normalizer), small_rows(), config).fit(progress=False)
    first = SAETrainer(small(activation, inference, normalizer), Interrupting(small_rows(), at=13), config, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 13 of 24; the same lines go on from here"):
        first.fit(progress=False)
    torch.manual_seed(99)  # nothing depends on the global generator
    second = SAETrainer(SAE(first.sae.config), small_rows(), config, tmp_path)
    assert second.step == 13
    assert same(second.fit(progress=False), whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 24]
    assert [entry["step"] for entry in second.log] == steps


def test_a_run_killed_after_a_checkpoint_repeats_only_what_came_after(tmp_path):
    class Killed(Exception):
        pass

    class Killing(Interrupting):
        def batches(
            self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0, ranks: Ranks = ALONE
        ) -> Iterator[Batch]:
            for number, batch in enumerate(TensorRows.batches(self, batch_size, seed=seed, epoch=epoch, skip=skip)):
                if epoch * 7 + skip + number == 17:
                    raise Killed
                yield batch

    whole = SAETrainer(small(), small_rows(), CONFIG).fit(progress=False)
    with pytest.raises(Killed):
        SAETrainer(small(), Killing(small_rows(), at=0), CONFIG, tmp_path).fit(progress=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')  # the line it was writing
    again = SAETrainer(small(), small_rows(), CONFIG, tmp_path)
    assert again.step == 10
    assert same(again.fit(progress=False), whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        5,
        10,
        15,
        20,
        24,
    ]


def test_ctrl_c_without_a_folder_says_that_nothing_was_kept_and_restores_the_handler():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="nothing was kept, pass folder="):
        SAETrainer(small(), Interrupting(small_rows(), at=2), CONFIG).fit(progress=False)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_store_trains_like_a_tensor_and_resumes_like_one(tmp_path):
    rows = small_rows()
    with ShardWriter(tmp_path / "store", {"rows": Field(torch.float32, (12,))}, shard_rows=90) as writer:
        for part in rows.split(45):
            writer.append({"rows": part})
    reader = ShardReader(tmp_path / "store")
    whole = SAETrainer(small(), reader, CONFIG).fit(progress=False)
    start = SAETrainer(small(), rows, CONFIG).log
    assert not start
    assert whole.b_out.norm() > 0
    half = dataclasses.replace(CONFIG, checkpoint_every=9)
    trainer = SAETrainer(small(), reader, half, tmp_path / "run")
    batches = iter(trainer.source.sources[0].batches(64, seed=0))
    assert next(batches).rows.shape == (64, 12)
    for number, batch in enumerate(
        batch for epoch in range(3) for batch in trainer.source.sources[0].batches(64, seed=0, epoch=epoch)
    ):
        if number == 9:
            break
        trainer.sae.train()
        trainer.train_step(batch)
    trainer.checkpoint()
    again = SAETrainer(small(), reader, half, tmp_path / "run")
    assert again.step == 9
    assert same(again.fit(progress=False), whole)


def test_decoder_rows_stay_units_and_b_pre_where_it_started():
    trainer = SAETrainer(small(), small_rows(), CONFIG)
    scale = trainer.learner.scale.clone()
    b_pre = trainer.sae.b_pre.detach().clone()
    b_out = trainer.sae.b_out.detach().clone()
    sae = trainer.fit(progress=False)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30), rtol=1e-6, atol=1e-6)
    assert torch.equal(sae.b_pre, b_pre * scale)
    assert not torch.allclose(sae.b_out, b_out * scale)
    assert not sae.training


def test_dead_latents_are_counted_in_rows_seen():
    trainer = SAETrainer(small(), small_rows(), dataclasses.replace(CONFIG, lr=1e-9))
    learner = trainer.learner
    with torch.no_grad():
        trainer.sae.b_enc[7] = -1e6
    trainer.sae.train()
    batches = list(trainer.source.sources[0].batches(64, seed=0))
    for batch in batches[:4]:
        fired = torch.zeros(30, dtype=torch.bool)
        code = trainer.sae.encode(learner.units(batch).rows)
        fired[code.indices[code.values != 0].long()] = True
        measured = trainer.train_step(batch, measure=True)
        assert not learner.rows_since_fired[fired].any()
        assert (learner.rows_since_fired[~fired] >= 64).all()
    assert learner.rows_since_fired[7] == 256
    assert measured is not None
    assert measured["dead"] == 0  # 192 rows before the last step
    after = trainer.train_step(batches[4], measure=True)
    assert after is not None
    assert after["dead"] >= 1 / 30


def test_auxk_revives_latents_that_never_fire():
    rows, _ = superposition(4000, d=12, n=20)
    config = TrainConfig(steps=120, batch_size=128, lr=5e-3)

    def dead_at_the_end(auxk: float) -> float:
        objective = Objective(auxk=auxk, dead_after=1000)
        trainer = SAETrainer(small(), rows, dataclasses.replace(config, objective=objective))
        with torch.no_grad():
            trainer.sae.b_enc[:15] = -2  # half the dictionary starts too low to win a place
        trainer.fit(progress=False)
        return trainer.log[-1]["dead"]

    assert dead_at_the_end(1 / 32) < 0.5 * dead_at_the_end(0.0)


def test_the_batch_topk_threshold_follows_the_smallest_value_kept():
    trainer = SAETrainer(small("batch_topk", "threshold"), small_rows(), CONFIG)
    trainer.sae.train()
    expected = None
    for batch in list(trainer.source.sources[0].batches(64, seed=0))[:3]:
        values = trainer.sae.encode(trainer.learner.units(batch).rows).values
        smallest = values[values > 0].min().item()
        expected = smallest if expected is None else 0.99 * expected + 0.01 * smallest
        trainer.train_step(batch)
        assert trainer.sae.threshold is not None
        assert float(trainer.sae.threshold) == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay_steps=40)
    rates = [config.lr_at(step, 1024) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == [1.0] * 52
    assert rates[99] == pytest.approx(1 / 40)
    assert TrainConfig(steps=10).lr_at(0, 2**14) == pytest.approx(2e-4)
    assert TrainConfig(steps=10).lr_at(0, 2**16) == pytest.approx(1e-4)


def test_half_precision_rows_train_a_single_precision_sae():
    sae = SAETrainer(small(), small_rows().half(), CONFIG).fit(progress=False)
    assert sae.dtype == torch.float32


def test_whoever_calls_it_without_gradients_has_the_same_weights():
    rows, config = torch.randn(64, 6), TrainConfig(steps=3, batch_size=16)
    plain = SAETrainer(SAE(SAEConfig(6, 12, k=3)), rows, config).fit(progress=False)
    with torch.no_grad():
        same = SAETrainer(SAE(SAEConfig(6, 12, k=3)), rows, config).fit(progress=False)
    assert torch.equal(plain.W_enc, same.W_enc)


def test_progress_is_shown_and_names_the_figures(capsys):
    SAETrainer(small(), small_rows(), dataclasses.replace(CONFIG, steps=5)).fit()
    assert "5/5" in capsys.readouterr().err


def test_what_users_get_wrong_is_said(tmp_path: Path):
    rows = small_rows()
    with pytest.raises(ValueError, match="train 'batch_topk' with inference 'threshold'"):
        SAETrainer(SAE(SAEConfig(12, 30, "relu")), rows, CONFIG)
    with pytest.raises(ValueError, match="rows have width 11, the SAE's d_model is 12"):
        SAETrainer(small(), rows[:, :11], CONFIG)
    with pytest.raises(ValueError, match=r"rows is torch\.int64"):
        SAETrainer(small(), rows.long(), CONFIG)
    with pytest.raises(ValueError, match="batch_size is 64 but there are 0 rows"):
        SAETrainer(small(), rows[:0], CONFIG)
    with pytest.raises(ValueError, match="batch_size is 501 but there are 500 rows"):
        SAETrainer(small(), rows, dataclasses.replace(CONFIG, batch_size=501))
    for change, message in (
        ({"steps": 0}, "steps=0 must be"),
        ({"lr": -1.0}, "lr=-1.0 must be"),
        ({"warmup_steps": 99}, "warmup_steps=99 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)


def test_weights_that_are_not_finite_stop_the_run_and_never_reach_the_checkpoint(tmp_path: Path):
    rows = small_rows()
    config = dataclasses.replace(CONFIG, log_every=100, checkpoint_every=3)
    source = TensorRows(rows)
    trainer = SAETrainer(small(), source, config, tmp_path)
    trainer.checkpoint()
    kept = everything(tmp_path)
    source.rows = rows.index_fill(0, torch.arange(0, 500, 2), float("nan"))  # TensorRows refuses them at the start
    with pytest.raises(FloatingPointError, match="NaN or Inf after step 3: look for them in the rows"):
        trainer.fit(progress=False)
    assert everything(tmp_path) == kept


def test_a_run_goes_on_with_its_own_rows_alone_and_one_that_is_done_says_so(tmp_path: Path, capsys):
    done = SAETrainer(small(), small_rows(), CONFIG, tmp_path).fit(progress=False)
    with pytest.raises(
        ValueError, match=r"was trained on other rows \(n_rows=\d+, now 99\): use those, or another folder"
    ):
        SAETrainer(small(), small_rows()[:99], CONFIG, tmp_path)
    capsys.readouterr()
    again = SAETrainer(small(), small_rows(), CONFIG, tmp_path).fit()
    assert "has all 24 steps: nothing is trained; for other rows take another folder" in capsys.readouterr().err
    assert torch.equal(again.W_enc, done.W_enc)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_config_or_a_broken_one_is_refused(tmp_path: Path):
    SAETrainer(small(), small_rows(), CONFIG, tmp_path).fit(progress=False)
    before = everything(tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    with pytest.raises(ValueError, match=r"another config \(lr=0\.01, now 0\.5\)"):
        SAETrainer(small(), small_rows(), dataclasses.replace(CONFIG, lr=0.5), tmp_path)
    with pytest.raises(ValueError, match="activation='topk', now 'signed_topk'"):
        SAETrainer(small("signed_topk"), small_rows(), CONFIG, tmp_path)
    changed = dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, multi_topk=0.5))
    with pytest.raises(ValueError, match=r"another config \(multi_topk=0\.0, now 0\.5\)"):
        SAETrainer(small(), small_rows(), changed, tmp_path)
    assert everything(tmp_path) == before
    for name in ("state.json", ".metadata", "__0_0.distcp"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"checkpoint-000024 is .*: remove it to start anew"):
            SAETrainer(small(), small_rows(), CONFIG, tmp_path)
        (checkpoint / name).write_bytes(content)
    assert SAETrainer(small(), small_rows(), CONFIG, tmp_path).step == 24
    (checkpoint / "state.json").write_text(json.dumps({"format": "sparsefeat.checkpoint", "format_version": 2}))
    with pytest.raises(ValueError, match="is of version 2, this sparsefeat reads 1: upgrade it"):
        SAETrainer(small(), small_rows(), CONFIG, tmp_path)


def test_a_checkpoint_that_would_run_a_program_is_refused(tmp_path: Path):
    SAETrainer(small(), small_rows(), CONFIG, tmp_path / "run").fit(progress=False)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    program = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (checkpoint / ".metadata").write_bytes(program)
    with pytest.raises(ValueError, match=r"it names posix\.system"):
        SAETrainer(small(), small_rows(), CONFIG, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_is_whole(tmp_path: Path, monkeypatch):
    config = dataclasses.replace(CONFIG, checkpoint_every=10)
    whole = SAETrainer(small(), small_rows(), config).fit(progress=False)
    trainer, saved, real = SAETrainer(small(), small_rows(), config, tmp_path), [], dcp.save

    def save(state, **options):
        saved.append(1)
        if len(saved) == 2:
            real(state, **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(state, **options)

    monkeypatch.setattr(dcp, "save", save)
    with pytest.raises(OSError, match=r"cannot write a checkpoint into .*disk is full.*the one before is unharmed"):
        trainer.fit(progress=False)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-000010"]
    monkeypatch.undo()
    assert same(SAETrainer(small(), small_rows(), config, tmp_path).fit(progress=False), whole)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        NotADirectoryError, match=r"folder .*run cannot be made, .*file is a file; choose another place"
    ):
        SAETrainer(small(), small_rows(), CONFIG, tmp_path / "file" / "run")


def test_memory_for_gradients_is_given_back_when_training_is_over(monkeypatch):
    monkeypatch.setattr(gradient_memory, "SMALLEST", 1)
    taken = []
    empty = gradient_memory.empty_gradient
    monkeypatch.setattr(
        weight_gradient, "empty_gradient", lambda *a, **k: (t := empty(*a, **k), taken.append(t.shape))[0]
    )
    SAETrainer(small(), small_rows(), dataclasses.replace(CONFIG, steps=6)).fit(progress=False)
    assert taken
    assert not [block for block in gradient_memory._kept if block.free]


@pytest.mark.parametrize("scale", [0.001, 1000.0])
@pytest.mark.parametrize("normalizer", ["b_pre", "standardize", "affine"])
def test_the_scale_of_the_rows_does_not_matter(normalizer, scale):
    rows = superposition(2000, d=12, n=20)[0]
    held = rows[-400:]
    config = dataclasses.replace(CONFIG, steps=60)

    def fvu(factor: float) -> float:
        sae = SAETrainer(small(normalizer=normalizer), rows * factor, config).fit(progress=False)
        error = (held * factor - sae(held * factor)).double().square().sum()
        return float(error.detach() / (factor * (held - held.mean(0))).double().square().sum())

    assert fvu(scale) == pytest.approx(fvu(1.0), rel=0.02)
