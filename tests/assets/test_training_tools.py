"""The commands that make the embedded pipelines: what they train is what the pipelines compute, and a run can stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

from sparsefeat.assets import emojicanvas, emojiscenes, load_pipeline
from sparsefeat.assets.embedded import PIPELINE


@pytest.fixture(autouse=True)
def flash_attention():
    """Training turns the flash kernel off in its process; other tests of this one have it."""
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(before)


@pytest.fixture(scope="module")
def tokenizer():
    from embedded_models import build_tokenizer

    return build_tokenizer()


def tokens_of(tokenizer, prompts: list[str]) -> torch.Tensor:
    return tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids


def batch_of(tokenizer, latents: torch.Tensor, prompts: list[str]):
    from training_data import Batch

    return Batch(latents, tokens_of(tokenizer, prompts), torch.zeros(len(latents), 16, 16, dtype=torch.int64))


def test_every_word_of_every_caption_is_one_token_and_the_longest_scene_fits(tokenizer):
    captions = [scene.caption for scene in emojiscenes.scenes(600, n_objects=(2, 3, 4), related=0.5)]
    captions += [emojicanvas.prompt(name, style) for name in emojicanvas.OBJECTS for style in emojicanvas.STYLES]
    for caption in captions:
        words = caption.replace(",", " ,").split()
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(caption)] == words
    longest = sorted(
        range(len(emojicanvas.OBJECTS)), key=lambda i: -len(emojicanvas.words(emojicanvas.OBJECTS[i]).split())
    )
    assert len(tokenizer(emojiscenes.caption(longest[:4], 1)).input_ids) <= 32


def test_one_zero_token_in_training_is_the_pipelines_256(tokenizer):
    """The reference: the same transformer with diffusers' own attention and the prompt as the pipeline encodes it."""
    from diffusers import AutoencoderTiny
    from embedded_models import ZERO_TOKENS, JointDenoiser

    torch.manual_seed(0)
    joint = JointDenoiser(tokenizer)
    for parameter in joint.transformer.parameters():  # modulations begin at zero, and the text would not matter
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    latents, sigmas = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 900.0])
    prompts = ["a noto emoji of a fox", "a mono emoji of an owl and a star"]
    joint.train()
    seen = {}
    handle = joint.transformer.register_forward_pre_hook(
        lambda module, args: seen.update(hidden=args[1], pooled=args[2])
    )
    with torch.no_grad():
        joint.loss(batch_of(tokenizer, latents, prompts))
        handle.remove()
        trained = joint.transformer(latents, seen["hidden"], seen["pooled"], sigmas, return_dict=False)[0]
        pipe = joint.eval().pipeline(tokenizer, AutoencoderTiny.from_pretrained(PIPELINE / "vae").float())
        joint.transformer.set_attn_processor(JointAttnProcessor2_0())
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        drawn = joint.transformer(latents, text, pooled, sigmas, return_dict=False)[0]
        without = joint.transformer(latents, text[:, :-200], pooled, sigmas, return_dict=False)[0]
    assert text.shape[1] == 32 + ZERO_TOKENS
    assert torch.allclose(trained, drawn, atol=2e-5 * float(drawn.std()))
    assert not torch.allclose(without, drawn, atol=1e-3 * float(drawn.std())), "the zeros' number would not matter here"


def test_a_smaller_vocabulary_is_taken_over_word_by_word(tokenizer):
    from embedded_models import UNetDenoiser
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    denoiser = UNetDenoiser(tokenizer)
    denoiser.load(PIPELINE)
    old = CLIPTextModel.from_pretrained(str(PIPELINE / "text_encoder"), dtype=torch.float32)
    old_tokenizer = CLIPTokenizer.from_pretrained(str(PIPELINE / "tokenizer"))
    prompt = "a mono emoji of a palm tree"
    ids = old_tokenizer(prompt, return_tensors="pt").input_ids
    mine = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(old(ids).last_hidden_state, denoiser.text(mine).last_hidden_state, atol=1e-4)


@pytest.mark.embedded
@pytest.mark.parametrize("family", ["unet", "joint"])
def test_training_stops_goes_on_and_leaves_a_pipeline_that_draws(family, tmp_path, monkeypatch, capsys):
    import train_pipeline
    import training_data

    monkeypatch.setattr(training_data, "N_SCENES", 24)
    command = ["train_pipeline.py", family, "--folder", str(tmp_path), "--vae", str(PIPELINE / "vae"), "--batch", "4"]
    steps, minutes = [], 0.0
    for _ in range(2):  # from where the first run ended: a busy machine makes it longer than it was told
        monkeypatch.setattr(sys, "argv", [*command, "--minutes", f"{minutes + 0.02}"])
        train_pipeline.main()
        progress = json.loads(Path(tmp_path / f"{family}.json").read_text())
        steps.append(progress["steps"])
        minutes = progress["minutes"]
    assert 0 < steps[0] < steps[1]
    assert f"resumed {family}.pt at step {steps[0]}" in capsys.readouterr().out
    pipe = load_pipeline(tmp_path / family)
    image = pipe("a noto emoji of a fox and an owl", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all()


@pytest.mark.parametrize("family", ["unet", "joint"])
def test_every_place_in_a_batch_learns_all_noise_levels(family, tokenizer, monkeypatch):
    """Single drawings stand first in each batch: levels in the batch's order would leave them half of the schedule."""
    from embedded_models import FAMILIES

    torch.manual_seed(0)
    denoiser = FAMILIES[family](tokenizer)
    seen: list[torch.Tensor] = []

    def no_denoising(noisy, *arguments, **_):
        seen.append(arguments[0] if family == "unet" else arguments[2])
        middle = torch.zeros(8, 128, 16, 16)
        denoiser.regions.seen.append(middle if family == "unet" else (None, middle.flatten(2).mT))
        return (torch.zeros_like(noisy),)

    monkeypatch.setattr(denoiser.unet if family == "unet" else denoiser.transformer, "forward", no_denoising)
    batch = batch_of(tokenizer, torch.zeros(8, 4, 16, 16), ["", *["a noto emoji of a fox"] * 7])
    with torch.no_grad():
        for _ in range(100):
            denoiser.loss(batch)
    levels = torch.stack(seen).float()  # [batch, place]
    assert (levels.amin(0) < 250).all(), levels.amin(0)
    assert (levels.amax(0) > 850).all(), levels.amax(0)
    assert (levels.sort(1).values.diff(dim=1) > 0).all(), "levels of one batch are spread out"


def test_regions_say_what_is_drawn_where(monkeypatch):
    """Outside an object's region there is little of its drawing, and in scenes it lies within the object's square."""
    import training_data

    monkeypatch.setattr(training_data, "N_SCENES", 40)
    regions = training_data.build_regions()
    canvas = emojicanvas.load().on_white()
    n_styles, n_objects = canvas.shape[:2]
    for style in range(n_styles):
        for index in range(0, n_objects, 7):
            region = regions["singles"][style, index, 0]
            assert set(region.unique().tolist()) == {style * n_objects + index, training_data.NOTHING}
            empty = (region == training_data.NOTHING).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
            ink = 255 - canvas[style, index].astype(float).min(-1)
            lines = emojicanvas.STYLES[style] == "mono"  # thin ones cover less than half of a cell
            assert ink[empty].sum() < (0.45 if lines else 0.15) * ink.sum(), (style, index)
    for region, scene in zip(regions["scenes"], emojiscenes.scenes(40), strict=True):
        for part in scene.placed:
            cells = (region == scene.style * n_objects + part.object).nonzero() * 4 + 2
            assert len(cells) >= (1 if emojicanvas.STYLES[scene.style] == "mono" else 5), scene
            assert (cells >= torch.tensor([part.top, part.left]) - 2).all(), scene
            assert (cells <= torch.tensor([part.top, part.left]) + part.size + 2).all(), scene
