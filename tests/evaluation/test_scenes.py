"""Heat maps as segmenters: what is eager, what is scored, and one row of the table on the embedded pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sparsefeat.assets import emojicanvas, emojiscenes, load_pipeline
from sparsefeat.assets.embedded import JOINT, JOINT_SAES, PIPELINE
from sparsefeat.attention import HeatMaps
from sparsefeat.cli import app
from sparsefeat.evaluation import peer_maps, scenes
from sparsefeat.evaluation.eager_daam import EagerDAAM
from sparsefeat.evaluation.pixel_judge import load_pixel_judge
from sparsefeat.evaluation.run_scenes import of_attention
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.image_to_image import image_to_image
from sparsefeat.sae import load_sae
from tests.tiny import pixels, tiny_sd


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_eager_daam_has_the_maps_of_the_exact_kernels_and_draws_the_same(guidance):
    pipe = tiny_sd()
    call = {"guidance_scale": guidance, "height": 64, "width": 96, "num_images_per_prompt": 2}
    maps = HeatMaps(daam_exact=True)
    with attach(pipe, maps) as run:
        drawn = pixels(pipe, "a fox and a cat", **call)
    processors = pipe.unet.attn_processors
    with EagerDAAM(guidance > 1).attached(pipe) as daam:
        again = pixels(pipe, "a fox and a cat", **call)
    np.testing.assert_allclose(again, drawn, atol=1e-4)
    assert pipe.unet.attn_processors == processors
    for image in range(2):
        torch.testing.assert_close(daam.maps(image), run[maps].tensor(image), rtol=1e-4, atol=1e-5)
        for word in ("fox", "cat"):
            found = daam.word(image, pipe.tokenizer, "a fox and a cat", word)
            torch.testing.assert_close(found, run[maps].word(word, image).values, rtol=1e-4, atol=1e-5)


def test_pictures_are_the_same_for_the_same_seed_and_no_held_out_pair_is_chosen_on():
    again = [scenes.real(6, emojiscenes.HELD_OUT, 3) for _ in range(2)]
    assert [one.prompt for one in again[0]] == [one.prompt for one in again[1]]
    assert all(emojiscenes.held_out_pair(*one.objects) for one in again[0])
    assert not any(emojiscenes.held_out_pair(*one.objects) for one in scenes.generated(6, emojiscenes.TRAIN, 3))
    drawn = scenes.generated(60, emojiscenes.HELD_OUT, 3)
    assert all(emojiscenes.held_out_pair(*one.objects) for one in drawn)
    assert len({one.seed for one in drawn}) == 60
    assert all(word in one.prompt for one in (*again[0], *drawn) for word in one.words)


def test_a_method_that_knows_the_mask_is_the_oracle_and_nothing_is_worse_than_chance():
    """Maps that are the exact masks on a grid score what the oracle scores."""
    pictures = scenes.real(4, emojiscenes.HELD_OUT, 5)
    by_prompt = {picture.prompt: picture for picture in pictures}

    class Pipe:
        def __call__(self, prompts, **call):
            assert call["strength"] * call["num_inference_steps"] == 1  # one pass
            assert all(isinstance(image, Image.Image) for image in call["image"])
            assert [by_prompt[prompt].image for prompt in prompts] == call["image"]
            return type("Output", (), {"images": torch.zeros(len(prompts), 1)})

    def opened(pipe, guidance, chunk):
        import contextlib

        def read(image, picture):
            return torch.nn.functional.interpolate(picture.masks[None], size=(8, 8), mode="area")[0]

        return contextlib.nullcontext(read)

    knows, lost = scenes.counted(Pipe(), [scenes.Method("knows", opened), scenes.chance()], pictures, None)
    assert knows.unseen == 0
    for threshold in scenes.THRESHOLDS:
        assert knows.own.scores(threshold) == pytest.approx(knows.oracle.scores(threshold))
    assert lost.own.scores().miou < knows.own.scores("mean").miou
    assert lost.own.scores().pointing < knows.own.scores().pointing


@pytest.mark.embedded
def test_a_row_of_the_embedded_pipeline_has_every_column():
    pipe = load_pipeline()
    fit, test = scenes.real(4, emojiscenes.TRAIN, 1), scenes.real(4, emojiscenes.HELD_OUT, 2)
    own = image_to_image(pipe)[0]
    methods = [scenes.heat_maps("cross", refined=1, shares=True), scenes.heat_maps("cross")]
    assert [method.name for method in methods] == ["cross maps, shares, refined 1 x", "cross maps"]
    row, plain = scenes.scores(own, methods, fit, test, None)
    (by_itself,) = scenes.scores(own, methods[1:], fit, test, None)
    assert plain == by_itself  # whatever else is read in the same calls
    assert row != plain
    row |= scenes.cost(own, methods[0], test, False)
    assert row["n_maps"] == 8
    assert 0 < row["miou"] <= 1
    assert row["share_of_oracle"] == pytest.approx(row["miou"] / row["oracle_miou"], abs=1e-3)
    assert row["seconds"] > 0
    assert row["peak_bytes"] >= 0
    drawn = [
        scenes.Picture(emojicanvas.prompt(name, "noto"), (emojicanvas.OBJECTS.index(name),), seed)
        for seed, name in enumerate(("fox", "pizza"))
    ]
    masks = scenes.called(pipe, drawn, load_pixel_judge())
    assert [len(mask) for mask in masks] == [1, 1]
    assert all(0.05 < float(mask.mean()) < 0.9 for mask in masks)  # the judge sees what was asked for
    assert masks[0].shape[-2:] == (64, 64)
    assert len(emojicanvas.OBJECTS) == 50


@pytest.mark.embedded
def test_the_joint_pipeline_has_every_kind_of_map_late_ones_where_it_draws_and_those_of_concepts(monkeypatch):
    pipe = load_pipeline(JOINT)
    kinds = ("joint", "text_renormalised", "query_query")
    names = {f"{kind} maps{how}" for kind in kinds for how in ("", ", refined 1 x")}
    names |= {"concept maps", "text_renormalised maps, from text to image"}
    late = {", refined 1 x", "", ", shares", ", shares, refined 1 x"}
    late = {f"joint maps of the last quarter{how}" for how in late} | {"joint maps of the last tenth, refined 1 x"}
    assert {method.name for method in of_attention(pipe, drawn=True)} == names | late
    of_one = {method.name for method in of_attention(image_to_image(pipe)[0], drawn=False)}
    assert of_one == names | {"joint maps, shares", "joint maps, shares, refined 1 x"}
    monkeypatch.setattr(scenes, "N_STEPS", 1)
    (picture,) = scenes.generated(1, emojiscenes.TRAIN, 3)
    with scenes.concepts().opened(pipe, True, [picture]) as read:
        scenes.called(pipe, [picture])
        maps = read(0, picture)
    assert maps.shape[0] == 2
    assert (maps[0] - maps[1]).abs().max() > 1e-4


@pytest.mark.embedded
def test_latents_are_chosen_by_words_maps_and_mark_each_of_two_objects():
    pipe = load_pipeline(JOINT)
    own, sae = image_to_image(pipe)[0], load_sae(JOINT_SAES / "transformer_blocks.3")
    fox, rocket = map(emojicanvas.OBJECTS.index, ("fox", "rocket"))
    shown = [replace(one, masks=None) for one in scenes.real_drawings() if one.objects[0] in (fox, rocket)]
    chosen = scenes.latents_of_objects(own, sae, shown, 16)
    assert set(chosen) == {fox, rocket}
    for of in chosen.values():
        assert 1 < len(of) <= 16
        assert all(0 < weight <= 1 for weight in of.values())
    placed = emojiscenes.Placed(fox, 30, 2, 2), emojiscenes.Placed(rocket, 30, 32, 32)
    scene = emojiscenes.Scene(0, placed)
    drawn = emojiscenes.draw(scene)
    picture = scenes.Picture(
        scene.caption, scene.objects, 1, Image.fromarray(drawn.image), torch.from_numpy(drawn.masks)
    )
    with scenes.latents("latents", sae, chosen).opened(own, False, [picture]) as read:
        (masks,) = scenes.called(own, [picture])
        maps = read(0, picture)
    inside = torch.nn.functional.interpolate(masks[None], size=maps.shape[-2:], mode="area")[0]
    of_each = (maps[:, None] * inside).sum((-1, -2)) / inside.sum((-1, -2))  # [object, of whose mask]
    assert of_each[0, 0] > 2 * of_each[0, 1]
    assert of_each[1, 1] > 2 * of_each[1, 0]
    assert (of_each.diagonal() > 2 * maps.mean((-1, -2))).all()


@pytest.mark.embedded
def test_an_interrupted_run_goes_on_from_its_rows_and_takes_none_of_another_run(tmp_path, monkeypatch):
    shutil.copytree(PIPELINE, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    pipe, pixel_judge = load_pipeline(), load_pixel_judge()
    monkeypatch.setattr("sparsefeat.assets.load_pipeline", lambda folder: pipe)
    monkeypatch.setattr("sparsefeat.evaluation.pixel_judge.load_pixel_judge", lambda: pixel_judge)
    measured, asked = [], []

    def part(what, name):
        if len(measured) == ends:
            raise KeyboardInterrupt
        measured.append((what, name))
        return len(measured) / 100

    def scores(pipe, methods, *pictures):
        number = part("scores", methods[0].name)
        return [{"miou": number, "oracle_miou": number} for _ in methods]

    def cost(pipe, method, *pictures):
        return {"seconds": part("cost", method.name)}

    def refuses(*_):
        asked.append(1)
        raise RuntimeError("not of this model")

    monkeypatch.setattr(scenes, "scores", scores)
    monkeypatch.setattr(scenes, "cost", cost)
    monkeypatch.setattr(peer_maps, "installed", lambda: ([], []))
    line = ["evaluate", "scenes", "--pipeline", "own", "--out", "out.json", "--work", "work"]
    ends = 3
    stopped = CliRunner().invoke(app, [*line, "--images", "1"])
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == (
        "interrupted; finished rows are in work, and the same command goes on from them"
    )
    assert len(measured) == 3
    assert not (tmp_path / "out.json").exists()

    def goes_on(images="1"):
        before = len(measured)
        ran = CliRunner().invoke(app, [*line, "--images", images])
        assert ran.exit_code == 0, ran.output
        return len(measured) - before, json.loads((tmp_path / "out.json").read_text())["rows"]

    ends = None
    new, rows = goes_on()
    assert measured[:3] == [("cost", "no maps"), ("scores", "chance"), ("cost", "chance")]
    # Every cost once, and the scores of all that is measured together and of what is measured alone, of both splits.
    assert sum(what == "cost" for what, _ in measured) == len(rows)
    assert [name for what, name in measured if what == "scores"] == ["chance", "DAAM, eager"] * 2
    costs = [(1 + index) / 100 for index, (what, _) in enumerate(measured) if what == "cost"]
    assert [line["seconds"] for line in rows] == costs
    assert [line["method"] for line in rows] == [name for what, name in measured if what == "cost"]
    assert [line["method"] for line in rows if "miou" not in line] == ["no maps"] * 2
    everything = 3 + new
    assert goes_on() == (0, rows)
    assert goes_on("2")[0] == everything
    config = tmp_path / "own" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    assert goes_on()[0] == everything
    # What another package could not do is asked again: the next time it may be mended.
    monkeypatch.setattr(peer_maps, "installed", lambda: ([scenes.Method("theirs", refuses, alone=True)], []))
    monkeypatch.setattr(scenes, "scores", lambda pipe, methods, *rest: methods[0].opened(pipe, False, []))
    for times in (2, 4):
        assert [line["note"] for line in goes_on()[1] if "note" in line] == ["not of this model"] * 2
        assert len(asked) == times
