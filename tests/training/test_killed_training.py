"""Training that is killed outright, at any moment, ends with the weights of a run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsefeat.inputs import Inputs
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.store import ShardReader
from sparsefeat.training import Drawing, Objective, PipelineRows, SAETrainer, TrainConfig, fit_together
from tests import killing
from tests.tiny import tiny_sd
from tests.training.test_ranks import D, store

PLACES = ("unet.up_blocks.1.attentions.1", "unet.mid_block.attentions.0")


def from_a_store(folder: Path) -> None:
    config = TrainConfig(
        steps=400,
        batch_size=64,
        lr=1e-2,
        checkpoint_every=10,
        log_every=7,
        ema=0.9,
        objective=Objective(dead_after=500),
    )
    rows = ShardReader(folder.parent / "rows")
    torch.manual_seed(torch.initial_seed() % 1000)  # nothing depends on the global generator
    SAETrainer(SAE(SAEConfig(D, 40, k=3)), rows, config, folder).fit(progress=False).save(
        folder / "sae", overwrite=True
    )


def two_from_a_pipeline(folder: Path) -> None:
    """Two SAEs, one forward; their checkpoints fall at different steps."""
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
    drawn = Drawing(tiny_sd(), Inputs(("a fox", "a cat", "an owl")), 2, call=call)
    source = PipelineRows(drawn, PLACES, window=4, rows_per_image=40)
    trainers = [
        SAETrainer(
            SAE(SAEConfig(width, 60, k=3)),
            source,
            TrainConfig(steps=40, batch_size=32, lr=1e-2, checkpoint_every=every, log_every=5),
            folder / str(place),
            place=place,
        )
        for place, (width, every) in enumerate(((32, 4), (32, 6)))
    ]
    for sae, trainer in zip(fit_together(trainers, progress=False), trainers, strict=True):
        assert trainer.folder is not None
        sae.save(trainer.folder / "sae", overwrite=True)


def weights(folder: Path) -> dict[str, bytes]:
    """The SAEs, and the losses without how fast they came."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("sae/*")}
    for path in folder.rglob("metrics.csv"):
        lines = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = "\n".join(lines).encode()
    return found


@pytest.mark.parametrize(("work", "times"), [(from_a_store, 20), (two_from_a_pipeline, 10)])
def test_training_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_run(tmp_path, work, times):
    store(tmp_path / "rows")
    seconds = killing.run(work, tmp_path / "whole")
    assert killing.killed(times, seconds * 0.15, work, tmp_path / "killed") > times // 2
    whole = weights(tmp_path / "whole")
    assert len(whole) >= 3
    assert weights(tmp_path / "killed") == whole
    left = [path.name for path in (tmp_path / "killed").rglob("*checkpoint-*")]
    assert not [name for name in left if name.endswith(".unfinished")]
