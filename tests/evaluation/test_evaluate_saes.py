"""An evaluation of SAEs on the embedded pipeline: the loss against the definition, the ends of the scale, the command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import sparsefeat as sf
from sparsefeat.assets.embedded import SAES
from sparsefeat.cli import app
from sparsefeat.evaluation import evaluate_saes
from sparsefeat.evaluation.denoising import DenoisingLoss, denoising_loss, recovered
from sparsefeat.evaluation.evaluate_saes import Concepts, random_weights
from sparsefeat.evaluation.splice import Ablate, Splice
from sparsefeat.pipeline.noising import finished_latents
from sparsefeat.sae import SAE, SAEConfig
from tests.tiny import tiny_sd

PROMPTS = ["a fox", "an owl"]
AT = "unet.mid_block.attentions.0"


@pytest.fixture
def pipe():
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_denoising_loss_is_that_of_the_denoiser_on_noised_latents(pipe):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    found = denoising_loss(pipe, PROMPTS, latents, seed=7, num_inference_steps=3, height=64, width=64)
    pipe.scheduler.set_timesteps(3)
    assert found.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    generator = torch.Generator().manual_seed(7)
    embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        noise = torch.randn(latents.shape, generator=generator)
        noised = pipe.scheduler.add_noise(latents, noise, timestep[None])
        with torch.no_grad():
            said = pipe.unet(noised, timestep, encoder_hidden_states=embeds).sample
        assert float(found.loss[step]) == pytest.approx(float((said - noise).double().square().mean()), rel=1e-5)


def test_a_perfect_reconstruction_recovers_everything_and_the_mean_row_nothing(pipe):
    latents = torch.randn(2, 4, 16, 16)
    options = {"num_inference_steps": 4, "height": 64, "width": 64}
    untouched = denoising_loss(pipe, PROMPTS, latents, **options)
    d = pipe.unet.config.block_out_channels[-1]
    identity = SAE(SAEConfig(d, d, "raw_topk", k=d, hookpoint=AT)).eval()
    with torch.no_grad():
        identity.W_enc.copy_(torch.eye(d))
        identity.W_dec.copy_(torch.eye(d))
    whole = denoising_loss(pipe, PROMPTS, latents, during=lambda: sf.attach(pipe, Splice(identity)), **options)
    ablated = denoising_loss(
        pipe, PROMPTS, latents, during=lambda: sf.attach(pipe, Ablate(AT, torch.zeros(d))), **options
    )
    assert not torch.allclose(ablated.loss, untouched.loss, rtol=1e-6)
    torch.testing.assert_close(whole.loss, untouched.loss)
    worse = DenoisingLoss(untouched.timesteps, untouched.loss + 1)
    half = DenoisingLoss(untouched.timesteps, untouched.loss + 0.5)
    assert recovered(untouched, untouched, worse, bins=2) == [1.0, 1.0]
    assert recovered(untouched, half, worse, bins=2) == pytest.approx([0.5, 0.5])
    assert recovered(untouched, worse, worse, bins=4) == [0.0] * 4
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks


def test_what_cannot_be_measured_is_said(pipe):
    with pytest.raises(ValueError, match="the denoiser takes"):
        denoising_loss(pipe, PROMPTS, torch.randn(2, 4, 4, 4), num_inference_steps=2, height=64, width=64)
    assert not pipe.unet._forward_pre_hooks
    pipe.scheduler.register_to_config(prediction_type="other")
    with pytest.raises(ValueError, match="predicts 'other'"):
        denoising_loss(pipe, PROMPTS, torch.randn(2, 4, 16, 16), num_inference_steps=2, height=64, width=64)
    with pytest.raises(ValueError, match="have 0 words that 4 of them have and 4 lack"):
        Concepts.of_prompts(["a fox"] * 9)


def test_finished_latents_are_what_the_pipeline_draws(pipe):
    drawn = finished_latents(pipe, PROMPTS, 3, num_inference_steps=2, height=64, width=64)
    again = finished_latents(pipe, PROMPTS, 3, num_inference_steps=2, height=64, width=64)
    assert drawn.shape == (2, 4, 16, 16)
    assert torch.equal(drawn, again)


def test_random_weights_are_as_wide_as_the_trained_ones_and_are_put_back(pipe):
    before = {name: parameter.clone() for name, parameter in pipe.unet.named_parameters()}
    with random_weights(pipe, AT, 0):
        name, weight = next((n, p) for n, p in pipe.unet.named_parameters() if p.ndim == 4 and p.numel() > 5000)
        assert not torch.equal(weight, before[name])
        assert float(weight.std()) == pytest.approx(float(before[name].std()), rel=0.1)
        assert torch.equal(pipe.unet.conv_norm_out.weight, before["conv_norm_out.weight"])
    for name, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_command_measures_everything_and_the_shipped_sae_beats_its_controls(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_saes, "CONTROL_STEPS", 60)  # of the SAE of a random pipeline, which is no rival here
    prompts = [f"a {style} emoji of a {thing}" for thing in ("fox", "key", "owl", "star") for style in ("noto", "mono")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts * 2))
    at = SAES / "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    arguments = ["evaluate", "saes", "--sae", str(at), "--sae", str(SAES / "mid_block.attentions.0")]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "3", "--rows-per-image", "24"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "saes.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "saes.json").read_text())
    one = found["saes"][at.name]
    assert one["fvu"] < one["fvu_pca"]
    assert one["fvu"] < one["fvu_random"]
    assert 7 < one["l0"] <= 8
    assert sum(one["density_by_decade"]) == pytest.approx(1)
    assert len(one["recovered_mean"]) == 3
    controls = found["controls"][one["hookpoint"]]
    assert set(controls) == {"neurons", "PCA-8", "random SAE", "random pipeline", "ablation"}
    assert one["image_change"] < controls["ablation"]["image_change_mean"]
    assert one["denoising_loss"] < controls["ablation"]["denoising_loss_mean"]
    assert found["stability"] == []
