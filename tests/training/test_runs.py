"""What is said of SAEs that were trained by name."""

from __future__ import annotations

import json

import pytest
import torch

from sparsefeat.inputs import Inputs
from sparsefeat.training import Drawing, PipelineRows, TensorRows
from sparsefeat.training.activations.rows import SideBySide
from sparsefeat.training.ranks import ALONE
from sparsefeat.training.run.runs import fitting_batch_size, summaries, train_presets
from tests.tiny import tiny_sd


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


def test_a_folder_is_not_gone_on_with_on_other_rows(tmp_path):
    pipe, out = tiny_sd(), tmp_path / "saes"
    settings = {"n_latents": 32, "k": 4, "steps": 2, "batch_size": 16}

    def train(at="unet.mid_block", prompts=("a fox", "a cat"), window=2, **call):
        call = {"num_inference_steps": 2, "guidance_scale": 3.0, **call}
        source = PipelineRows(Drawing(pipe, Inputs(prompts), 2, 0, call), [at], window)
        (one,) = train_presets(source, [at], ["topk"], out, settings=settings)
        return one

    train()
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changed, said in (
        ({"guidance_scale": 5.0}, r"call .*3\.0.*, not .*5\.0"),
        ({"prompts": ("a fox", "a dog")}, "inputs"),
        ({"window": 4}, "window 2, not 4"),
    ):
        with pytest.raises(ValueError, match=f"was trained on other rows at unet.mid_block .{said}.*or another folder"):
            train(**changed)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    train("unet.up_blocks.1.attentions.1", window=4)  # another hookpoint's SAE is a run of its own
    assert set(json.loads((out / "train.json").read_text())["rows"]) == {
        "unet.mid_block",
        "unet.up_blocks.1.attentions.1",
    }
    train()


def test_rows_of_a_condition_that_no_call_has_are_refused_as_they_are_collected():
    drawing = Drawing(tiny_sd(), Inputs(("a fox",)), 1, 0, {"num_inference_steps": 1, "guidance_scale": 1.0})
    rows = PipelineRows(drawing, ["unet.mid_block"], 1, condition="uncond")
    with (
        pytest.warns(UserWarning, match="no row was 'uncond'"),
        pytest.raises(ValueError, match="turn guidance on, or keep the"),
    ):
        rows.sample(0, 1, 0, ALONE)
