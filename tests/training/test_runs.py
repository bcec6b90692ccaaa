"""What is said of SAEs that were trained by name."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.training import TensorRows
from sparsefeat.training.activations.rows import SideBySide
from sparsefeat.training.run.runs import fitting_batch_size, summaries, train_presets


@pytest.mark.parametrize(("dead_after", "told"), [(None, False), (128, True), (10_000, False)])
def test_the_share_of_dead_latents_is_told_only_after_rows_enough_for_one_to_die(tmp_path, dead_after, told):
    rows = SideBySide(TensorRows(torch.randn(256, 16, generator=torch.Generator().manual_seed(0))))
    settings = {"n_latents": 32, "k": 4, "steps": 4, "batch_size": 64, "log_every": 1}
    if dead_after is not None:
        settings["objective"] = {"dead_after": dead_after}
    (one,) = train_presets(rows, ["unet.mid_block"], ["topk"], tmp_path / "saes", settings=settings)
    (line,) = summaries([one])
    card = (one.folder / "README.md").read_text()
    assert "FVU in training" in card
    assert "fvu" in line
    assert ("share of dead latents" in card) is told
    assert (", dead " in line) is told
    assert ["dead" in entry for entry in one.entries] == [told and 64 * step >= 128 for step in (1, 2, 3, 4)]


def test_a_batch_is_the_preset_s_or_an_eighth_of_few_rows():
    assert fitting_batch_size(10**6, ["topk"]) == 4096
    assert fitting_batch_size(10**6, ["topk", "flux-sae"]) == 1024
    assert fitting_batch_size(400, ["topk", "flux-sae"]) == 50
    assert fitting_batch_size(3, ["topk"]) == 1
