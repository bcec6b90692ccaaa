"""The presets against the derivations in `plain/`, which were written from the papers' equations without looking at
them: on tiny pipelines, in float32, to 1e-5 of the latents' size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsefeat as sf
from sparsefeat import presets
from sparsefeat.sae import SAE, SAEConfig
from tests.families import families
from tests.presets.plain import flux, itd, saeuron, steerers, unbox
from tests.presets.plain.dense import DenseSAE, random_sae
from tests.tiny import pixels, tiny_sd, tiny_sdxl

UNBOX = "unet.mid_block.attentions.0"
UNBOX_TOO = "unet.up_blocks.0.attentions.0"
SAEURON = "unet.up_blocks.1.attentions.1"
STEPS = 3


def ours(dense: DenseSAE, hookpoint: str | None, activation: str = "topk", **config: Any) -> SAE:
    """The SAE with a derivation's weights."""
    n, d = dense.E.shape
    k = None if activation == "relu" else dense.k
    sae = SAE(SAEConfig(d, n, activation=activation, k=k, hookpoint=hookpoint, **config)).eval()
    tensors = {"W_enc": dense.E, "W_dec": dense.D, "b_pre": dense.b_pre, "b_enc": dense.b_lat, "b_out": dense.b_out}
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(sae, name).copy_(tensor)
    return sae


def latents(pipe: Any, prompt: str | list[str] = "a fox", **call: Any) -> Tensor:
    return pixels(pipe, prompt, steps=STEPS, **{"output_type": "latent", **call})


def agree(got: Tensor, wanted: Tensor, plain: Tensor) -> None:
    """Equal to 1e-5 of the latents' size, and the edit did something a hundred times as large."""
    size = plain.abs().max()
    assert (got - wanted).abs().max() <= 1e-5 * size, (got - wanted).abs().max() / size
    assert (wanted - plain).abs().max() >= 1e-3 * size


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


def scaled(dense: DenseSAE, factor: float) -> DenseSAE:
    """Directions large enough for an edit to show."""
    return DenseSAE(dense.E, dense.D * factor, dense.b_pre, dense.b_lat, dense.b_out, dense.k)


# sdxl-unbox

MASK = torch.zeros(64, 64).index_fill_(0, torch.arange(8, 40), 1.0)
TURBO = {"guidance_scale": 0.0}
GUIDED = {"guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("guidance", "cfg", "call"), [("both", "turbo", TURBO), ("both", "both", GUIDED), ("cond", "cond", GUIDED)]
)
def test_unbox_paint_adds_the_painted_map_times_the_mean_activation(sdxl, guidance, cfg, call):
    dense = random_sae(64, 32, 5, seed=1)
    sae = ours(dense, f"{UNBOX}:diff", statistics=("mean_nonzero",))
    sae.statistic("mean_nonzero")[9] = 1.7
    plain = latents(sdxl, **call)
    M = unbox.painted(MASK, (4, 4), mean=1.7, strength=10.0)
    with unbox.add_on_area(sdxl, UNBOX, dense, 9, M, cfg):
        wanted = latents(sdxl, **call)
    with sf.attach(sdxl, presets.sdxl_unbox.paint(sae, 9, MASK, 10.0, guidance=guidance)):
        agree(latents(sdxl, **call), wanted, plain)


def test_unbox_edits_of_chosen_steps_are_those_steps_also_in_the_second_call(sdxl):
    dense = random_sae(64, 32, 5, seed=1)
    sae = ours(dense, f"{UNBOX}:diff", statistics=("mean_nonzero",))
    sae.statistic("mean_nonzero")[9] = 1.7
    plain = latents(sdxl, **TURBO)
    M = unbox.painted(MASK, (4, 4), mean=1.7, strength=100.0)
    with unbox.add_on_area(sdxl, UNBOX, dense, 9, M, steps=[1]):
        wanted = latents(sdxl, **TURBO)
    with sf.attach(sdxl, presets.sdxl_unbox.paint(sae, 9, MASK, 100.0, steps=[1])):
        for _ in range(2):
            agree(latents(sdxl, **TURBO), wanted, plain)


@pytest.mark.parametrize(("cfg", "call"), [("turbo", TURBO), ("base", GUIDED)])
def test_unbox_icon_is_the_blocks_input_plus_one_latent(sdxl, cfg, call):
    dense = random_sae(64, 32, 5, seed=2)
    sae = ours(dense, f"{UNBOX}:diff", statistics=("mean_nonzero",))
    sae.statistic("mean_nonzero")[3] = 2.5
    plain = latents(sdxl, "", **call)
    with unbox.icon(sdxl, UNBOX, dense, 3, value=2.5 * 5, cfg=cfg):
        wanted = latents(sdxl, "", **call)
    with sf.attach(sdxl, presets.sdxl_unbox.icon(sae, 3)):
        agree(latents(sdxl, "", **call), wanted, plain)


def test_unbox_reconstruction_and_ablation(sdxl):
    dense = random_sae(64, 32, 5, seed=3)
    sae = ours(dense, f"{UNBOX}:diff")
    plain = latents(sdxl, **GUIDED)
    with unbox.reconstruct(sdxl, UNBOX, dense):
        wanted = latents(sdxl, **GUIDED)
    with sf.attach(sdxl, presets.sdxl_unbox.reconstruct(sae)):
        agree(latents(sdxl, **GUIDED), wanted, plain)
    with unbox.ablate(sdxl, UNBOX):
        wanted = latents(sdxl, **GUIDED)
    with sf.attach(sdxl, presets.sdxl_unbox.ablate(sae)):
        agree(latents(sdxl, **GUIDED), wanted, plain)


def test_unbox_top_features_are_those_of_a_recording(sdxl):
    dense = random_sae(64, 32, 5, seed=4)
    sae = ours(dense, f"{UNBOX}:diff")
    wanted = unbox.top_features(sdxl, UNBOX, dense, lambda: latents(sdxl, **GUIDED), cfg="base")[0]
    rec = sf.Record(sae)
    with sf.attach(sdxl, rec) as run:
        latents(sdxl, **GUIDED)
    top = run[rec].top(10)
    assert [latent.latent for latent in top] == wanted.argsort(descending=True)[:10].tolist()
    torch.testing.assert_close(
        len(run[rec].steps) * torch.tensor([latent.score for latent in top], dtype=torch.float64), wanted.sort(descending=True).values[:10],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


TRANSPORTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "spatial": ({}, {}),
    "mean": ({"maintain_spatial": False}, {"spatial": False}),
    "q95": ({"maintain_spatial": False, "statistic": "q95"}, {"spatial": False, "statistic": "q95"}),
    "max, at the target": (
        {"subtract_target_add_source": False, "statistic": "max"},
        {"add_at": "target", "statistic": "max"},
    ),
    "mean of steps, twice": (
        {"aggregate_timesteps": "mean", "multiplier": 2.0},
        {"select_at": "mean", "strength": 2.0},
    ),
    "adaptive": ({"mode": "sae_adaptive"}, {"adaptive": True}),
}


@pytest.mark.parametrize("sizes", ["same", "different"])
@pytest.mark.parametrize("name", list(TRANSPORTS))
def test_unbox_transport_selects_and_moves_the_same_latents(sdxl, name, sizes):
    theirs, settings = TRANSPORTS[name]
    dense = {UNBOX: scaled(random_sae(64, 32, 5, seed=5), 3.0), UNBOX_TOO: scaled(random_sae(48, 32, 5, seed=6), 3.0)}
    saes = [ours(weights, f"{path}:diff") for path, weights in dense.items()]
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    masks[1, 2:, : 4 if sizes == "same" else 3] = True

    def generate(prompt: str) -> Tensor:
        return latents(sdxl, prompt, **TURBO)

    wanted = unbox.transport(sdxl, dense, generate, "a fox", "a cat 2", *masks, k_transfer=12, **theirs)
    pictured = [mask.float().repeat_interleave(16, 0).repeat_interleave(16, 1) for mask in masks]
    edit = presets.sdxl_unbox.transport(
        sdxl, saes, "a fox", "a cat 2", *pictured, k_transfer=12, seed=7, num_inference_steps=STEPS,
        **TURBO, **settings, output_type="latent",
    )  # fmt: skip
    plain = generate("a cat 2")
    added, removed = (torch.cat([edit.selected[0][i], edit.selected[1][i] + 64]) for i in (0, 1))
    assert set(added.tolist()) == set(wanted.added.tolist())
    assert set(removed.tolist()) == set(wanted.removed.tolist())
    with sf.attach(sdxl, edit):
        agree(generate("a cat 2"), wanted.latents, plain)


# SAeUron

PROMPTS = {"fox": ["a fox", "fox 2"], "cat": ["a cat", "cat 2"], "owl": ["an owl", "owl 2"]}


@pytest.fixture(scope="module")
def saeuron_case(sd):
    dense = scaled(random_sae(256, 32, 8, seed=8), 4.0)
    sae = ours(dense, SAEURON)

    def generate(prompt: str) -> Tensor:
        return latents(sd, prompt, guidance_scale=9.0)

    # Of both: statistics from the same noise, one prompt at a time.
    stats = saeuron.statistics(sd, SAEURON, dense, PROMPTS, generate)
    collected = sf.Statistics(tuple(PROMPTS), sae.n_latents)
    concepts = {prompt: concept for concept, prompts in PROMPTS.items() for prompt in prompts}
    with sf.attach(sd, sf.CollectStatistics(sae, collected, concepts)):
        for prompt in concepts:
            generate(prompt)
    return dense, sae, stats, collected, generate


@pytest.mark.parametrize("error", ["keep", "saeuron_released"])
@pytest.mark.parametrize("concept", ["fox", ["fox", "owl"]])
def test_saeuron_erases_the_same_latents_by_the_same_amounts(sd, saeuron_case, error, concept):
    dense, sae, stats, collected, generate = saeuron_case
    plain = generate("a fox")
    concepts = [concept] if isinstance(concept, str) else concept
    with saeuron.erase(sd, SAEURON, dense, stats, concepts, percentile=98.0, gamma=-2.0, error=error):
        wanted = generate("a fox")
    erase = sf.Erase.from_statistics(sae, collected, concept, percentile=98.0, gamma=-2.0, error=error)
    with sf.attach(sd, erase):
        agree(generate("a fox"), wanted, plain)


def test_saeuron_presets_are_the_papers_settings(sd, saeuron_case):
    _, sae, _, collected, _ = saeuron_case
    made = list(presets.saeuron.object_settings(sae, collected, "fox"))
    assert len(made) == 21
    assert {(p, g) for p, g, _ in made} == {
        (p, g) for p in (99.99, 99.995, 99.999) for g in (-1, -5, -10, -15, -20, -25, -30)
    }
    erase = presets.saeuron.erase_style(sd, sae, "fox", PROMPTS, num_inference_steps=2, output_type="latent")
    assert erase.condition == "both"
    assert erase.error == "keep"
    assert len(erase.selections) == 2


# Concept Steerers

SD_LAYER = "text_encoder.encoder.layers.1"


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_steerers_on_stable_diffusion(sd, scale):
    dense = random_sae(96, 32, 4, seed=9)
    site = [steerers.TextSite(SD_LAYER, "tokenizer")]
    plain = latents(sd, guidance_scale=scale)
    vector = steerers.concept_vector(sd, dense, site, "a cat", -0.5)
    with steerers.steer(sd, site, vector):
        wanted = latents(sd, guidance_scale=scale)
    steer = presets.concept_steerers.sd(ours(dense, None), "a cat", at="text_encoder.text_model.encoder.layers.1")
    with sf.attach(sd, steer):
        agree(latents(sd, guidance_scale=scale), wanted, plain)


def test_steerers_on_sdxl_split_one_vector_over_two_encoders(sdxl):
    dense = random_sae(128, 56, 4, seed=10)
    second = "text_encoder_2.text_model.encoder.layers.1"
    sites = [steerers.TextSite(SD_LAYER, "tokenizer"), steerers.TextSite(second, "tokenizer_2")]
    plain = latents(sdxl, **GUIDED)
    vectors = steerers.concept_vector(sdxl, dense, sites, "a cat", -0.7)
    with steerers.steer(sdxl, sites, vectors):
        wanted = latents(sdxl, **GUIDED)
    steer = sf.PromptVector(ours(dense, None), "a cat", -0.7, at=[SD_LAYER, second])
    with sf.attach(sdxl, steer):
        agree(latents(sdxl, **GUIDED), wanted, plain)
        agree(latents(sdxl, **GUIDED), wanted, plain)


def test_steerers_on_flux_only_add():
    family = families()["flux"]
    pipe = family.build()
    width = pipe.text_encoder_2.config.d_model
    dense = scaled(random_sae(64, width, 4, seed=11), 5.0)
    site = [steerers.TextSite("text_encoder_2.encoder.block.1", "tokenizer_2")]

    def generate() -> Tensor:
        return torch.as_tensor(family.call(pipe, ["a fox"], guidance=False))

    plain = generate()
    preset = presets.concept_steerers.flux(ours(dense, None), "a cat", -0.35)
    assert preset.at == (sf.Hookpoint("text_encoder_2.encoder.block.22"),)
    steer = sf.PromptVector(ours(dense, None), "a cat", -0.35, at=site[0].layer, condition="cond")
    with sf.attach(pipe, steer):
        got = generate()
    length = len(steer.vector(site[0].layer))
    with steerers.steer(pipe, site, steerers.concept_vector(pipe, dense, site, "a cat", -0.35, length), signs=(1.0,)):
        wanted = generate()
    agree(got, wanted, plain)


# ItD

ERASE, REMAIN = ["a fox", "fox 7 fox", "the fox"], ["a cat", "cat 2", "x y z"]


@pytest.fixture(scope="module")
def itd_case():
    dense = random_sae(512, 32, 8, seed=12)
    return dense, ours(dense, SD_LAYER)


@pytest.mark.parametrize("reduce", ["mean", "max_token"])
def test_itd_selects_gates_and_deactivates(sd, itd_case, reduce):
    dense, sae = itd_case
    F = itd.select(sd, SD_LAYER, dense, ERASE, REMAIN, M=24)
    assert 3 < len(F) < 72
    tau = itd.tau(sd, SD_LAYER, dense, F, ERASE, reduce=reduce)
    erase = presets.itd.erase(sd, sae, "celebrity", ERASE, REMAIN, top_m=24, gate_reduce=reduce)
    assert erase.latents.tolist() == F
    assert erase.tau == pytest.approx(tau, rel=1e-5)
    prompts = ["a fox", "c c"]
    call = {"negative_prompt": ["fox", "fox"], "guidance_scale": 7.5}
    plain = latents(sd, prompts, **call)
    with itd.deactivate(sd, SD_LAYER, dense, F, prompts, tau=tau, gate_reduce=reduce) as was_edited:
        wanted = latents(sd, prompts, **call)
    with sf.attach(sd, erase):
        got = latents(sd, prompts, **call)
    assert was_edited[0]
    agree(got, wanted, plain)
    if not was_edited[1]:
        assert torch.equal(got[1], plain[1])


def test_itd_leaves_a_prompt_below_the_threshold_bit_for_bit_and_edits_all_without_one(sd, itd_case):
    dense, sae = itd_case
    nudity = presets.itd.erase(sd, sae, "nudity", ERASE, REMAIN, top_m=24)
    assert nudity.tau is None
    plain = latents(sd, "c c")
    with itd.deactivate(sd, SD_LAYER, dense, nudity.latents.tolist(), ["c c"], tau=None):
        wanted = latents(sd, "c c")
    with sf.attach(sd, nudity):
        agree(latents(sd, "c c"), wanted, plain)
    shut = sf.InterpretThenDeactivate(sae, nudity.latents, tau=1e9)
    with sf.attach(sd, shut):
        assert torch.equal(latents(sd, "c c"), plain)


def test_itd_asked_for_the_released_strength_of_styles_uses_it_for_the_threshold_alone(sd, itd_case):
    dense, sae = itd_case
    F = itd.select(sd, SD_LAYER, dense, ERASE, REMAIN, M=24)
    erase = presets.itd.erase(sd, sae, "style", ERASE, REMAIN, top_m=24, gate_strength=-6.0)
    assert erase.strength == -8.0
    assert erase.tau == pytest.approx(itd.tau(sd, SD_LAYER, dense, F, ERASE, strength=-6.0), rel=1e-5)


def test_itd_is_the_same_after_saving_and_loading(sd, itd_case, tmp_path):
    erase = presets.itd.erase(sd, itd_case[1], "celebrity", ERASE, REMAIN, top_m=24)
    with sf.attach(sd, erase):
        wanted = latents(sd)
    erase.save(tmp_path / "itd")
    again = sf.load_instrument(tmp_path / "itd")
    assert (again.tau, again.strength, again.gate_reduce) == (erase.tau, erase.strength, erase.gate_reduce)
    with sf.attach(sd, again):
        assert torch.equal(latents(sd), wanted)


@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_itd_gates_every_prompt_of_a_batch_by_itself(sd, itd_case, images_per_prompt):
    _, sae = itd_case
    erase = presets.itd.erase(sd, sae, "celebrity", ERASE, REMAIN, top_m=24)
    prompts = ["a fox", "c c", "fox 7 fox 7 7"]
    rows = {}
    for together in (True, False):
        text = sf.Hookpoint("text_encoder.encoder.layers.2")
        got = []
        for group in [prompts] if together else [[p] for p in prompts]:
            with sf.attach(sd, erase, watch := _Watch(text)):
                latents(sd, group, num_images_per_prompt=images_per_prompt, guidance_scale=1.0)
            got.append(watch.tensor)
        rows[together] = torch.cat(got)
    torch.testing.assert_close(rows[True], rows[False], rtol=1e-5, atol=1e-6)


class _Watch(sf.Instrument):
    def __init__(self, at: sf.Hookpoint):
        self.at = at

    def hookpoints(self) -> tuple[sf.Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Any, context: Any) -> None:
        self.tensor = activations.tensor.clone()


# FLUX


@pytest.fixture(scope="module")
def flux_case():
    family = families()["flux"]
    pipe = family.build()
    path = "transformer.transformer_blocks.0"
    width = next(block.width for block in family.blocks if block.path == path)
    torch.manual_seed(13)
    pca = flux.PCA(
        torch.linalg.qr(torch.randn(width, width)).Q, torch.randn(width) * 0.1, torch.rand(width) + 0.5, clip=1.0
    )
    dense = random_sae(8 * width, width, 6, seed=14, tied=False)
    sae = ours(dense, path, "raw_topk", normalizer="pca", clip=1.0)
    with torch.no_grad():
        sae.pca_basis.copy_(pca.P)
        sae.pca_mean.copy_(pca.mu)
        sae.pca_std.copy_(pca.sigma)
    return family, pipe, path, pca, dense, sae


def test_flux_codes_and_reconstructions_of_the_image_stream(flux_case):
    family, pipe, path, pca, dense, sae = flux_case
    with flux.image_stream(pipe, path) as found:
        family.call(pipe, ["a fox"], guidance=False)
    x = found[0][0]
    got, wanted = sae.encode(x).dense(), flux.codes(dense, pca, x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted < 0).any(1).sum() + (wanted != 0).any(1).sum() > 0
    torch.testing.assert_close(sae(x).double(), flux.reconstruction(dense, pca, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.directions([5])[0].double(), flux.direction(dense, pca, 5), rtol=1e-5, atol=1e-6)


def test_flux_steering_of_a_rectangle_in_the_first_steps(flux_case):
    family, pipe, path, pca, dense, sae = flux_case
    grid = next(block.wide for block in family.blocks if block.path == path)

    def generate() -> Tensor:
        return torch.as_tensor(family.call(pipe, ["a fox"], guidance=False, size="wide", steps=3))

    plain = generate()
    v = flux.direction(dense, pca, 5)
    with flux.steer(pipe, path, v, 30.0, grid, (1, 3, 0, 2), steps=(0, 1)):
        wanted = generate()
    steer = presets.flux_sae.steer(sae, 5, 30.0, (1, 0, 3, 2), steps=(0, 1))
    with sf.attach(pipe, steer):
        agree(generate(), wanted, plain)


def test_flux_defaults_are_the_papers():
    sae = ours(random_sae(16, 8, 2), None, "raw_topk")
    steer = presets.flux_sae.steer(sae, 3, 1.0)
    assert str(steer.at) == "transformer.transformer_blocks.18"
    assert steer.at.stream == "image"
    assert steer.window.indices == frozenset({0, 1, 2, 3, 4})


# What users get wrong


def test_wrong_names_and_rectangles_are_said(sdxl, tmp_path):
    sae = ours(random_sae(64, 32, 5), f"{UNBOX}:diff")
    with pytest.raises(ValueError, match=r"block='up.9.9' is not one of down.2.1, mid.0"):
        presets.sdxl_unbox.load(tmp_path, "up.9.9")
    with pytest.raises(ValueError, match="no statistic 'mean_nonzero'"):
        presets.sdxl_unbox.paint(sae, 3, MASK)
    with pytest.raises(ValueError, match="guidance='turbo' is not known"):
        presets.sdxl_unbox.add(sae, 3, 1.0, guidance="turbo")
    with pytest.raises(ValueError, match=r'kind=.*"object" or "style"'):
        presets.saeuron.load(tmp_path, "colour")
    with pytest.raises(ValueError, match="kind='car' is not known"):
        presets.itd.erase(sdxl, sae, "car", ["a fox"])
    with pytest.raises(ValueError, match=r"erase='a fox' must be a list"):
        sf.InterpretThenDeactivate.fit(sdxl, sae, "a fox")
    with pytest.raises(ValueError, match=r"is empty: choose 0 <= top < bottom"):
        presets.flux_sae.steer(sae, 3, 1.0, (2, 0, 2, 4))
    with pytest.raises(ValueError, match="saes must be a list"):
        presets.sdxl_unbox.transport(sdxl, sae, "a fox", "a cat", MASK, MASK)
    with pytest.raises(ValueError, match="source_mask is 0 everywhere"):
        presets.sdxl_unbox.transport(sdxl, [sae], "a fox", "a cat", 0 * MASK, MASK, k_transfer=4, num_inference_steps=1)
    with pytest.raises(ValueError, match="not in a text encoder"), sf.attach(sdxl, sf.PromptVector(sae, "a", -1.0)):
        pass
    wrong = sf.PromptVector(sae, "a cat", -1.0, at=[SD_LAYER, "text_encoder_2.text_model.encoder.layers.1"])
    with sf.attach(sdxl, wrong), pytest.raises(ValueError, match=r"the SAE is 32 wide, but 32 \+ 24 come from"):
        latents(sdxl)
