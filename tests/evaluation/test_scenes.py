"""Heat maps as segmenters: what is eager, what is scored, and one row of the table on the embedded pipeline."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sparsefeat.assets import emojicanvas, emojiscenes, load_pipeline
from sparsefeat.assets.embedded import JOINT, PIPELINE
from sparsefeat.attention import HeatMaps
from sparsefeat.cli import app
from sparsefeat.evaluation import peer_maps, scenes
from sparsefeat.evaluation.eager_daam import EagerDAAM
from sparsefeat.evaluation.pixel_judge import load_pixel_judge
from sparsefeat.evaluation.run_scenes import of_attention
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.image_to_image import image_to_image
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

    own, oracle, _, unseen = scenes.scored(Pipe(), scenes.Method("knows", opened), pictures, None)
    assert unseen == 0
    for threshold in scenes.THRESHOLDS:
        assert own.scores(threshold) == pytest.approx(oracle.scores(threshold))
    lost, *_ = scenes.scored(Pipe(), scenes.chance(), pictures, None)
    assert lost.scores().miou < own.scores("mean").miou
    assert lost.scores().pointing < own.scores().pointing


@pytest.mark.embedded
def test_a_row_of_the_embedded_pipeline_has_every_column():
    pipe = load_pipeline()
    fit, test = scenes.real(4, emojiscenes.TRAIN, 1), scenes.real(4, emojiscenes.HELD_OUT, 2)
    own = image_to_image(pipe)[0]
    row = scenes.row(own, "embedded", scenes.heat_maps("cross", refined=1), "real", fit, test, None)
    assert row["method"] == "cross maps, refined 1 x"
    assert row["n_maps"] == 8
    assert 0 < row["miou"] <= 1
    assert row["share_of_oracle"] == pytest.approx(row["miou"] / row["oracle_miou"], abs=1e-3)
    assert row["seconds"] > 0
    assert row["peak_bytes"] >= 0
    drawn = [
        scenes.Picture(emojicanvas.prompt(name, "noto"), (emojicanvas.OBJECTS.index(name),), seed)
        for seed, name in enumerate(("fox", "pizza"))
    ]
    masks, _ = scenes.called(pipe, drawn, load_pixel_judge())
    assert [len(mask) for mask in masks] == [1, 1]
    assert all(0.05 < float(mask.mean()) < 0.9 for mask in masks)  # the judge sees what was asked for
    assert masks[0].shape[-2:] == (64, 64)
    assert len(emojicanvas.OBJECTS) == 50


@pytest.mark.embedded
def test_the_joint_pipeline_has_every_kind_of_map_late_ones_where_it_draws_and_those_of_concepts(monkeypatch):
    pipe = load_pipeline(JOINT)
    kinds = ("joint", "text_renormalised", "query_query")
    names = {
        f"{kind} maps{how}" for kind in kinds for how in ("", ", refined 1 x", " of the last quarter, refined 1 x")
    }
    late = {"joint maps of the last quarter", "joint maps of the last tenth, refined 1 x"}
    assert {method.name for method in of_attention(pipe, drawn=True)} == {*names, *late, "concept maps"}
    assert not [method.name for method in of_attention(image_to_image(pipe)[0], drawn=False) if "last" in method.name]
    monkeypatch.setattr(scenes, "N_STEPS", 1)
    (picture,) = scenes.generated(1, emojiscenes.TRAIN, 3)
    with scenes.concepts().opened(pipe, True, [picture]) as read:
        scenes.called(pipe, [picture])
        maps = read(0, picture)
    assert maps.shape[0] == 2
    assert (maps[0] - maps[1]).abs().max() > 1e-4


@pytest.mark.embedded
def test_an_interrupted_run_goes_on_from_its_rows_and_takes_none_of_another_run(tmp_path, monkeypatch):
    shutil.copytree(PIPELINE, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    pipe, pixel_judge = load_pipeline(), load_pixel_judge()
    monkeypatch.setattr("sparsefeat.assets.load_pipeline", lambda folder: pipe)
    monkeypatch.setattr("sparsefeat.evaluation.pixel_judge.load_pixel_judge", lambda: pixel_judge)
    measured, asked = [], []

    def row(pipe, name, method, split, *pictures):
        if len(measured) == ends:
            raise KeyboardInterrupt
        measured.append((split, method.name))
        numbers = dict.fromkeys(("miou", "oracle_miou", "seconds"), len(measured) / 100)
        return {"pipeline": name, "method": method.name, "split": split, **numbers}

    def refuses(*_):
        asked.append(1)
        raise RuntimeError("not of this model")

    monkeypatch.setattr(scenes, "row", row)
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
    assert len(set(measured)) == len(measured) == len(rows) == 3 + new  # none twice, and the first three are there
    scored = [line for line in rows if line["method"] != "no maps"]
    assert [line["miou"] for line in scored] == [
        (1 + measured.index((line["split"], line["method"]))) / 100 for line in scored
    ]
    assert goes_on() == (0, rows)
    assert goes_on("2")[0] == len(rows)
    config = tmp_path / "own" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    assert goes_on()[0] == len(rows)
    # What another package could not do is asked again: the next time it may be mended.
    monkeypatch.setattr(peer_maps, "installed", lambda: ([scenes.Method("theirs", refuses)], []))
    monkeypatch.setattr(scenes, "row", lambda pipe, name, method, *rest: method.opened(pipe, False, []))
    for times in (2, 4):
        assert [line["note"] for line in goes_on()[1] if "note" in line] == ["not of this model"] * 2
        assert len(asked) == times
