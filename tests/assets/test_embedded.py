"""The embedded pipelines open, are small, and obey the promises of `attach` like any other."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open

import sparsefeat as sf
from sparsefeat.assets import emojicanvas, load_pipeline, sae_folders
from sparsefeat.assets.embedded import FOLDER, JOINT, JOINT_SAES, PIPELINE, SAES
from sparsefeat.evaluation.judge import judge_images, load_judge

SAES_OF = {PIPELINE: SAES, JOINT: JOINT_SAES}


@pytest.fixture(scope="module", params=SAES_OF, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def saes(folder):
    return [sf.load_sae(one) for one in sae_folders(SAES_OF[folder])]


def images(pipe, prompt="a noto emoji of a fox", steps=3, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(7)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **options).images


def test_it_opens_without_a_word_and_leaves_the_libraries_as_loud_as_they_were(capfd, caplog):
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    load_pipeline()
    assert "".join(capfd.readouterr()) == ""
    assert not caplog.records
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before


def test_one_image_in_the_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"images is one image; give a list, \[image\]"):
        judge_images(load_judge(), Image.new("RGB", (64, 64)))


def test_every_shipped_weight_is_half_precision_safetensors():
    files = [path for path in FOLDER.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")]
    assert {path.suffix for path in files} == {".safetensors"}
    for path in files:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}, path


def test_the_shipped_grid_is_fifty_objects_in_four_styles_with_exact_masks():
    canvas = emojicanvas.load()
    assert canvas.images.shape == (4, 50, 64, 64, 4)
    assert canvas.names == emojicanvas.OBJECTS
    assert canvas.styles == emojicanvas.STYLES
    white = canvas.on_white()
    assert (white[canvas.masks() == 0] == 255).all()
    assert ((canvas.masks() > 0.5).mean((2, 3)) > 0.05).all()  # every cell shows something


def test_a_missing_pipeline_or_grid_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools/train_pipeline\.py"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tools/build_emojicanvas\.py"):
        emojicanvas.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"tools/train_judge\.py"):
        load_judge(tmp_path)


@pytest.mark.parametrize("name", emojicanvas.OBJECTS)
def test_every_word_of_a_prompt_is_one_token(pipe, name):
    for style in (*emojicanvas.STYLES, None):
        prompt = emojicanvas.prompt(name, style)
        assert len(pipe.tokenizer(prompt).input_ids) == len(prompt.split()) + 2


@pytest.mark.embedded
def test_neutral_edits_are_bit_identical(pipe, saes):
    before = images(pipe)
    for sae in saes:
        latents = range(0, sae.n_latents, 100)
        for edit in (
            sf.Steer(sae, scale=dict.fromkeys(latents, 1.0), condition="both"),
            sf.Steer(sae, add=dict.fromkeys(latents, 0.0), condition="both"),
        ):
            with sf.attach(pipe, edit):
                assert np.array_equal(images(pipe), before)
    assert np.array_equal(images(pipe), before)


@pytest.mark.embedded
def test_saes_know_their_hookpoint_and_fit_it(pipe, saes):
    assert len(saes) >= 2
    for sae in saes:
        assert sae.n_latents >= 8 * sae.d_model
        assert sae.config.k is not None
        assert sae.config.k <= sae.d_model / 8
        record = sf.Record(sae)
        with sf.attach(pipe, record) as run:
            images(pipe)
        assert len(run[record].top(5)) == 5


@pytest.mark.embedded
def test_the_pipeline_draws_what_its_prompts_say(pipe):
    """A sample of the grid; `sparsefeat evaluate emoji` measures all of it."""
    cells = [(o, s) for s in range(4) for o in range(s, 50, 16)]
    prompts = [emojicanvas.prompt(emojicanvas.OBJECTS[o], emojicanvas.STYLES[s]) for o, s in cells]
    drawn = pipe(
        prompts,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="pt",
    ).images
    said = judge_images(load_judge(), drawn)
    right = [(int(o) == a, int(s) == b) for o, s, (a, b) in zip(said.objects, said.styles, cells, strict=True)]
    assert sum(r[0] for r in right) >= 0.75 * len(cells)
    assert sum(r[1] for r in right) >= 0.75 * len(cells)


def test_the_judge_recognises_every_real_drawing():
    canvas = emojicanvas.load()
    said = judge_images(load_judge(), canvas.on_white().reshape(-1, 64, 64, 3))
    styles = torch.arange(4).repeat_interleave(50)
    objects = torch.arange(50).repeat(4)
    assert (said.styles == styles).float().mean() >= 0.97
    assert (said.objects == objects).float().mean() >= 0.97


def test_the_judges_report_says_how_far_it_can_be_trusted():
    report = json.loads((FOLDER / "judge" / "report.json").read_text())
    assert {"held_out_augmentations", "unseen_concepts", "unseen_vendor"} <= report.keys()
    assert set(report["unseen_vendor"]) == set(emojicanvas.STYLES)


def test_the_pipeline_folder_opens_with_diffusers_alone():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(PIPELINE))
    assert pipe.vae_scale_factor == 4
    assert pipe.unet.config.sample_size == 16


def test_no_config_names_the_folder_it_came_from():
    configs = list(PIPELINE.rglob("*.json"))
    assert len(configs) >= 5
    assert not [path for path in configs if "_name_or_path" in path.read_text()]
