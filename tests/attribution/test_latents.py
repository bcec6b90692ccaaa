"""Attribution to latents: the three methods are one where the objective is linear, and ablation is an edit of `Steer`'s."""

from __future__ import annotations

import pytest
import torch

import sparsefeat as sf
from sparsefeat.attribution import LatentScores, attribute_latents
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.instrument import Instrument
from sparsefeat.sae import SAE, SAEConfig
from tests.families import families
from tests.pipeline.state import everything
from tests.tiny import tiny_sd

CALL = {"num_inference_steps": 2, "height": 48, "width": 48, "guidance_scale": 3.0}
MID = "unet.mid_block.attentions.0"


def make_sae(d, n=48, at=MID, **options):
    torch.manual_seed(2)
    return (
        SAE(SAEConfig(**{"d_model": d, "n_latents": n, "k": 5, "hookpoint": at, **options}))
        .requires_grad_(False)
        .eval()
    )


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def weighted(said, without):
    weights = torch.linspace(-1, 1, said.numel(), dtype=said.dtype).reshape(said.shape)
    return (weights * said).sum()


@pytest.mark.parametrize(
    ("at", "d", "options"),
    [
        ("unet.conv_out", 4, {"normalizer": "none"}),
        ("unet.conv_out", 4, {"normalizer": "unit_norm"}),
        ("unet.conv_out:input", 16, {}),
        ("unet.conv_act:input", 16, {"transcoder": True}),  # written where conv_out reads
    ],
)
def test_the_three_are_one_where_the_objective_is_linear(pipe, at, d, options):
    """`conv_out` is the prediction: J of it is linear in what it gives and in what it is given."""
    sae = make_sae(d, n=16, at=at, **options)
    state = everything(pipe)
    how = {"objective": weighted, "seed": 3, **CALL, "num_inference_steps": 1, "height": 32}
    gradient = attribute_latents(pipe, sae, "a fox", **how)
    integrated = attribute_latents(pipe, sae, "a fox", method="integrated", integration_steps=3, **how)
    every = gradient.latents.tolist()
    ablated = attribute_latents(pipe, sae, "a fox", method="ablation", latents=every, **how)
    assert everything(pipe) == state
    size = ablated.scores.abs().max()
    assert len(every) > 5
    assert (gradient.of(every) - ablated.of(every)).abs().max() <= 1e-4 * size
    assert (integrated.of(every) - ablated.of(every)).abs().max() <= 1e-4 * size
    assert gradient.rank_correlation(ablated) > 0.99


def test_integrated_gradients_add_up_to_what_all_latents_do(pipe):
    """Completeness: sum of scores = J(x) - J(x0), with J(x0) of a pipeline whose block lost all that the SAE explains."""
    sae = make_sae(32)
    how = {"seed": 3, **{**CALL, "num_inference_steps": 1}}
    found = attribute_latents(pipe, sae, "a fox", method="integrated", integration_steps=24, **how)

    class Heard(Instrument):
        def hookpoints(self):
            return (sf.Hookpoint("unet"),)

        def at_hookpoint(self, activations, context):
            without, said = activations.tensor
            self.distance = float((said - without).square().sum())

    def J(*instruments):
        heard = Heard()
        with attach(pipe, *instruments, heard):
            pipe("a fox", generator=torch.Generator().manual_seed(3), output_type="latent", **how_to_call)
        return heard.distance

    how_to_call = {key: value for key, value in how.items() if key != "seed"}
    everything_off = sf.Steer(sae, set=dict.fromkeys(range(48), 0.0), condition="cond")
    wanted = J() - J(everything_off)
    assert float(found.scores.sum()) == pytest.approx(wanted, rel=2e-2)
    assert abs(wanted) > 0


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("sdxl", MID),
        ("sd3", "transformer.transformer_blocks.0"),
        ("flux", "transformer.single_transformer_blocks.0"),
        ("flux", "transformer.transformer_blocks.1:diff:text"),
    ],
)
def test_ablation_is_what_steer_takes_away(name, at):
    """J along the untouched trajectory is J of a one-step call: the latents are the same noise."""
    family = families()[name]
    pipe = family.build()
    call = {"num_inference_steps": 1, "height": 32, "width": 32, "guidance_scale": 3.0}
    if name == "flux":
        call |= {"true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 16}
    width = next(i.width for i in sf.hookpoints(pipe) if i.hookpoint.path == at.partition(":")[0])
    sae = make_sae(width, at=at)
    gradient = attribute_latents(pipe, sae, "a fox", seed=1, **call)
    strongest = gradient.latents[gradient.scores.abs().argsort(descending=True)[:3]].tolist()
    found = attribute_latents(pipe, sae, "a fox", method="ablation", latents=strongest, seed=1, **call)
    root = "unet" if name == "sdxl" else "transformer"

    class Heard(Instrument):
        def hookpoints(self):
            return (sf.Hookpoint(root),)

        def at_hookpoint(self, activations, context):
            self.said |= dict(zip(context.condition, activations.tensor, strict=True))

        def begin_call(self, call):
            self.said = {}

        def end_call(self, call):
            return float((self.said["cond"] - self.said["uncond"]).square().sum())

    def J(*instruments):
        heard = Heard()
        with attach(pipe, *instruments, heard) as run:
            pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="latent", **call)
        return run[heard]

    plain = J()
    for latent in strongest:
        without = J(sf.Steer(sae, scale={latent: 0.0}, condition="cond"))
        assert float(found.of([latent])) == pytest.approx(plain - without, rel=1e-2, abs=1e-5 * plain)


def test_the_table_is_told_and_the_default_ablates_the_strongest(pipe):
    sae = make_sae(32)
    found = attribute_latents(pipe, sae, "a fox", method="ablation", steps=[0], **CALL)
    assert len(found.latents) == 20
    assert str(found).splitlines()[0] == "  latent  ablation"
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    one = LatentScores(torch.tensor([1, 2, 3]), torch.tensor([3.0, 2.0, 1.0]), "gradient")
    other = LatentScores(torch.tensor([3, 2, 1]), torch.tensor([9.0, 5.0, 1.0]), "ablation")
    assert one.rank_correlation(other) == pytest.approx(-1)


def test_wrong_inputs_are_refused_in_a_sentence(pipe):
    sae = make_sae(32)
    with pytest.raises(ValueError, match="without guidance"):
        attribute_latents(pipe, sae, "a fox", **{**CALL, "guidance_scale": 1.0})
    with pytest.raises(ValueError, match="method='guess' is not known"):
        attribute_latents(pipe, sae, "a fox", method="guess", **CALL)
    with pytest.raises(ValueError, match="choose in 0 to 47"):
        attribute_latents(pipe, sae, "a fox", method="ablation", latents=[48], **CALL)
    with pytest.raises(ValueError, match="block of the denoiser"):
        attribute_latents(pipe, sae, "a fox", at="text_encoder.encoder.layers.0", **CALL)
    with pytest.raises(ValueError, match="none of the steps"):
        attribute_latents(pipe, sae, "a fox", steps=[7], **CALL)
    with pytest.raises(TypeError, match="not an SAE"):
        attribute_latents(pipe, "folder", "a fox", **CALL)
