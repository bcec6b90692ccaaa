"""`sf.check` tells an SAE at its own place from the same SAE at a wrong one, and says what the right one is."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import sparsefeat as sf
from sparsefeat.assets import block_sae_folder, load_pipeline
from sparsefeat.evaluation.check import CheckWarning, check
from sparsefeat.pipeline import Hookpoint
from sparsefeat.sae import SAE, SAEConfig
from tests.pipeline.instruments import Watch
from tests.tiny import tiny_sd

BLOCK = "unet.up_blocks.1.attentions.1"
PROMPTS = ["a fox", "a cat"]


def pca_sae(pipe, hookpoint: str, normalizer: str = "b_pre", components: int = 8) -> SAE:
    """The best SAE there is for the rows at a hookpoint of this pipeline: both signs of all principal components."""
    watch = Watch(hookpoint)
    with sf.attach(pipe, watch):
        pipe(PROMPTS, num_inference_steps=4, generator=torch.Generator().manual_seed(3))
    rows = torch.cat(watch.rows)
    if normalizer == "standardize":
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
    basis = torch.linalg.eigh(torch.cov(rows.T)).eigenvectors.T[-components:]
    sae = SAE(SAEConfig(rows.shape[1], 2 * components, k=components, normalizer=normalizer, hookpoint=hookpoint)).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([basis, -basis]))
        sae.W_enc.copy_(sae.W_dec)
        sae.b_pre.copy_(rows.mean(0))
        sae.b_out.copy_(rows.mean(0))
    return sae


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.mark.parametrize("io", ["output", "diff", "input"])
def test_an_sae_in_its_place_passes_without_a_warning(pipe, io):
    sae = pca_sae(pipe, str(Hookpoint(BLOCK, io)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckWarning)
        result = check(sae, pipe, PROMPTS)
    assert result
    assert result.quality.fvu < 0.6
    assert 100 < result.quality.rows <= 2048


@pytest.mark.parametrize(("made_for", "asked"), [("diff", "output"), ("diff", "input"), ("output", "diff")])
def test_a_wrong_tensor_of_the_block_is_noticed_and_the_right_one_named(pipe, made_for, asked):
    sae = pca_sae(pipe, str(Hookpoint(BLOCK, made_for)))
    right = str(Hookpoint(BLOCK, made_for))
    with pytest.warns(CheckWarning, match=f"of {right}: that is evidently what it was trained on"):
        result = check(sae, pipe, PROMPTS, at=Hookpoint(BLOCK, asked))
    assert not result
    assert result.alternatives[f"of {right}"] < result.quality.fvu


def test_a_wrong_normaliser_is_named():
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(100)  # every row has a large mean, which a standardising SAE never sees
    sae = pca_sae(pipe, "unet.down_blocks.0.resnets.0", "standardize", components=12)
    wrong = SAE(dataclasses.replace(sae.config, normalizer="b_pre"))
    wrong.load_state_dict(sae.state_dict())
    with pytest.warns(CheckWarning, match="with normalizer='standardize': that is evidently"):
        assert not check(wrong.eval(), pipe, PROMPTS)


def test_the_target_of_concept_steerers_training_is_named(pipe):
    sae = pca_sae(pipe, "text_encoder.encoder.layers.1")
    with torch.no_grad():
        sae.b_pre.mul_(1.0)
        sae.b_out.zero_()  # x_hat is near x - b_pre, as their SAEs learnt it
        sae.b_pre += 3
        sae.b_enc += sae.W_enc @ torch.full_like(sae.b_pre, 3.0)
    moved = SAE(sae.config)
    moved.load_state_dict({**sae.state_dict(), "b_out": -torch.full_like(sae.b_pre, 3.0)})
    with pytest.warns(CheckWarning, match="Concept Steerers' training target"):
        assert not check(moved.eval(), pipe, PROMPTS)


def test_an_sae_of_another_model_is_refused_and_all_readings_are_listed(pipe):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(32, 64, k=4, hookpoint=BLOCK)).eval()
    with torch.no_grad():
        sae.W_dec.mul_(20)
    with pytest.warns(CheckWarning, match=r"explains next to nothing there.*hookpoint, its base model"):
        result = check(sae, pipe, PROMPTS, num_inference_steps=2)
    assert set(result.alternatives) >= {f"of {BLOCK}:diff", f"of {BLOCK}:input", "with normalizer='standardize'"}


def test_a_transposed_decoder_is_named(pipe):
    sae = pca_sae(pipe, BLOCK)
    torch.manual_seed(0)
    square = SAE(SAEConfig(32, 32, k=16, hookpoint=BLOCK)).eval()
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        square.W_enc.copy_(basis)
        square.b_pre.copy_(sae.b_pre)
        square.b_out.copy_(sae.b_pre)
        square.W_dec.copy_(basis)
    good = check(square, pipe, PROMPTS, at=BLOCK)
    with torch.no_grad():
        square.W_dec.copy_(square.W_dec.T.clone())
    if good:  # half of the components, each with one sign, explain enough
        with pytest.warns(CheckWarning, match="with the decoder transposed"):
            check(square, pipe, PROMPTS)
    else:
        pytest.fail(str(good))


def test_the_embedded_sae_fits_its_pipeline():
    result = check(
        sf.load_sae(block_sae_folder()), load_pipeline(), ["a noto emoji of a fox", "a twemoji emoji of an owl"]
    )
    assert result, result


def test_what_users_get_wrong_is_said(pipe):
    sae = SAE(SAEConfig(32, 64, k=4)).eval()
    with pytest.raises(ValueError, match="pass a list with at least one prompt"):
        check(sae, pipe, "a fox", at=BLOCK)
    with pytest.raises(ValueError, match="at is missing"):
        check(sae, pipe, PROMPTS)
    with pytest.raises(TypeError, match="sae is StableDiffusionPipeline, not an SAE; open it first"):
        check(pipe, sae, PROMPTS)
    with pytest.raises(ValueError, match=rf"{BLOCK} is given as a line of hookpoints\(pipe\); name it, str\(line"):
        check(sae, pipe, PROMPTS, at=next(line for line in sf.hookpoints(pipe) if str(line.hookpoint) == BLOCK))
    with pytest.raises(ValueError, match="rows=1 must be a whole number of at least 2"):
        check(sae, pipe, PROMPTS, at=BLOCK, rows=1)


@pytest.mark.parametrize("at", [BLOCK, f"{BLOCK}:diff", f"{BLOCK}:input"])
def test_an_sae_of_another_width_is_refused_with_the_block_width(pipe, at):
    sae = SAE(SAEConfig(d_model=16, n_latents=40, k=4))
    with pytest.raises(ValueError, match=rf"the SAE is 16 wide, but {at} is 32 wide in this StableDiffusionPipeline"):
        check(sae, pipe, PROMPTS, at=at)


def test_a_difference_that_the_block_does_not_have_is_said(pipe):
    sae = SAE(SAEConfig(d_model=32, n_latents=40, k=4))
    with pytest.raises(
        ValueError, match=r"resnets.0:diff .* gives no rows of the SAE's width, 32: its widths are input "
    ):
        check(sae, pipe, PROMPTS, at="unet.up_blocks.1.resnets.0:diff")
