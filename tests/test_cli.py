"""The command line: what it says when something is wrong, and that it does what it says on the embedded pipeline."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import sparsefeat
from sparsefeat.assets import block_sae_folder
from sparsefeat.cli import app
from sparsefeat.cli.commands.erase import read_concepts
from sparsefeat.cli.commands.steer import parse_pairs
from sparsefeat.cli.failures import in_options
from sparsefeat.sae import SAE, SAEConfig, load_sae

runner = CliRunner()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["features"],
        ["steer"],
        ["erase"],
        ["heatmap"],
        ["circuit"],
        ["hookpoints"],
        ["collect"],
        ["train"],
        ["evaluate"],
        ["evaluate", "saes"],
        ["sae"],
        ["sae", "info"],
        ["sae", "check"],
        ["sae", "convert"],
    ],
)
def test_every_command_explains_itself(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steer", "a fox", "--add", "twelve=3"], "LATENT=NUMBER"),
        (["steer", "a fox"], "steers nothing"),
        (["steer", "a fox", "--add", "99999=3"], "99999"),
        (["steer", "a fox", "--add", "3=1", "--window", "early"], "START:STOP"),
        (["erase", "a fox"], "--concept"),
        (["erase", "an emoji of a fox", "--concept", "zebra"], "zebra"),
        (["erase", "an emoji of a fox", "--concept", "fox", "--method", "guess"], "--method 'guess' is not known"),
        (["erase", "a fox", "--concept", "fox", "--method", "cad", "--gamma", "-1"], "--gamma is of --method saeuron"),
        (["erase", "a fox", "--concept", "fox", "--pipeline", "joint"], "--pipeline joint needs --into"),
        (
            ["erase", "a fox", "--concept", "fox", "--method", "uce", "--latents", "8"],
            "--latents is of --method exchange and saeuron",
        ),
        (
            ["erase", "a fox", "--concept", "fox", "--method", "saeuron", "--into", "owl"],
            "--into is of --method exchange",
        ),
        (
            ["erase", "an emoji of a fox", "--concept", "fox", "--into", "zebra"],
            "--into 'zebra' is none of the concepts",
        ),
        (["features", "a fox", "--pipeline", "some/model"], "--sae"),
        (["circuit", "a fox", "--sae", str(block_sae_folder())], "--sae must be given twice"),
        (["circuit", "a fox", "--steps", "2", "--step", "2"], "none of the 2 steps"),
        (["features", "a fox", "--sae", "no/such/folder-at-all"], "no/such/folder-at-all"),
        (["features", "a fox", "--at", "unet.mid_blok.attentions.0"], "mid_block"),
        (["features"], "PROMPT is missing"),
        (["features", "a fox", "--page"], "name its folder with --out 'a fox'"),
        (["features", "a fox", "--steer", "3"], "--steer is of --page"),
        (["features", "a fox", "--prompts", "p.txt"], "--prompts is given beside PROMPT"),
        (["features", "--prompts", "p.txt"], "p.txt"),
        (["features", "--page", "--steer", "3,x"], "--steer '3,x' must be numbers of latents"),
        (["features", "--page", "--steer", "512"], "--steer"),
        (["features", "--page", "--pipeline", "some/model", "--sae", "some/sae"], "--prompts is missing"),
        (["features", "--page", "--top", "3"], "--top is not of --page"),
        (["evaluate", "imagenet"], "imagenet"),
        (["sae", "info", "--subfolder", "layer8"], "--subfolder 'layer8' is given without an SAE"),
        (["features", "a fox", "--sae", "a", "--sae", "b", "--subfolder", "c"], "1 times for 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []  # no empty folder is left behind


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("an-empty-folder", "has no model_index.json; pass the folder of a diffusers pipeline"),
        ("nothere", "does not exist; pass a diffusers folder, a hub id OWNER/NAME, or joint"),
    ],
)
def test_a_pipeline_that_cannot_be_opened_is_named_with_what_it_should_be(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "an-empty-folder").mkdir()
    result = runner.invoke(app, ["hookpoints", "--pipeline", name])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: --pipeline '{name}' {said}")
    assert "stacktrace" not in result.output


def test_an_existing_output_folder_is_left_alone(tmp_path):
    kept = tmp_path / "out"
    kept.mkdir()
    (kept / "precious.txt").write_text("precious")
    for command in (["heatmap", "an emoji of a fox"], ["features", "an emoji of a fox"]):
        result = runner.invoke(app, [*command, "--out", str(kept)])
        assert result.exit_code == 2
        assert "exists already" in result.output
    assert (kept / "precious.txt").read_text() == "precious"


def test_the_version_and_short_help():
    assert runner.invoke(app, ["--version"]).output == f"sparsefeat {sparsefeat.__version__}\n"
    for command in ([], ["features"], ["sae", "info"]):
        assert "Usage" in runner.invoke(app, [*command, "-h"]).output


@pytest.mark.embedded
def test_json_is_one_document_with_the_numbers_of_the_text(tmp_path):
    line = ["features", "a noto emoji of a fox", "--steps", "2", "--top", "3"]
    told = json.loads(runner.invoke(app, [*line, "--out", str(tmp_path / "a"), "--json"]).stdout)
    text = runner.invoke(app, [*line, "--out", str(tmp_path / "b")]).stdout.splitlines()[2:]
    assert [int(row.split()[0]) for row in text] == [found["latent"] for found in told["features"]]
    assert [row.split()[1] for row in text] == [f"{found['score']:.4f}" for found in told["features"]]
    assert all(Path(found["map"]).is_file() for found in told["features"])
    assert Path(told["image"]).is_file()
    points = json.loads(runner.invoke(app, ["hookpoints", "--json"]).stdout)
    assert {"hookpoint": "unet.mid_block.attentions.0", "width": 128, "grid": [8, 8]}.items() <= next(
        point for point in points if point["hookpoint"] == "unet.mid_block.attentions.0"
    ).items()
    saes = json.loads(runner.invoke(app, ["sae", "info", "--json"]).stdout)
    assert all(load_sae(one["folder"]).n_latents == one["n_latents"] for one in saes)
    assert len(saes) > 1
    check = ["sae", "check", "a noto emoji of a fox", "--steps", "1", "--sae", str(block_sae_folder()), "--json"]
    (fits,) = json.loads(runner.invoke(app, check).stdout)
    assert fits["fits"] is True
    assert 0 < fits["fvu"] < 0.6


def test_parse_pairs():
    assert parse_pairs(["12=8", "3=-0.5"], "--add") == {12: 8.0, 3: -0.5}


TOLD = ["--subfolder", "--k", "--hookpoint", "--base-model"]


@pytest.mark.parametrize(
    ("command", "options"), [("info", TOLD), ("convert", TOLD), ("check", ["--subfolder", "--k", "--at"])]
)
def test_every_sae_command_can_say_what_load_sae_can_be_told(command, options):
    said = {name for p in typer.main.get_command(app).commands["sae"].commands[command].params for name in p.opts}
    assert set(options) <= said


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with an SAE in each of two folders."""
    folder = tmp_path_factory.mktemp("repository")
    for name, d_model in (("small", 8), ("large", 16)):
        SAE(SAEConfig(d_model=d_model, n_latents=24, k=4)).save(folder / name)
    return str(folder)


def test_sae_info_opens_an_sae_in_a_folder_below_and_prints_what_it_is_told(repository):
    told = ["--subfolder", "large", "--hookpoint", "unet.mid_block:diff", "--base-model", "mine"]
    lines = runner.invoke(app, ["sae", "info", repository, *told]).output.splitlines()
    assert lines[:2] == ["hookpoint   unet.mid_block:diff", "base model  mine"]
    assert "24 latents x 16" in lines[4]


def test_sae_convert_opens_an_sae_in_a_folder_below(repository, tmp_path):
    result = runner.invoke(app, ["sae", "convert", repository, str(tmp_path / "out"), "--subfolder", "small"])
    assert result.exit_code == 0, result.output
    assert load_sae(tmp_path / "out").d_model == 8


def test_an_sae_whose_file_does_not_say_k_can_be_told_it():
    file = str(Path(__file__).parent / "sae" / "formats" / "fixtures" / "overcomplete" / "topk" / "sae.pt")
    assert runner.invoke(app, ["sae", "info", file]).exit_code == 2
    result = runner.invoke(app, ["sae", "info", file, "--k", "4"])
    assert result.exit_code == 0, result.output
    assert "topk, k = 4" in result.output


@pytest.mark.embedded
def test_circuit_draws_the_strongest_edges(tmp_path):
    out = tmp_path / "circuit"
    line = ["circuit", "a noto emoji of a fox", "--steps", "2", "--step", "1", "--latents", "2", "--edges", "3"]
    result = runner.invoke(app, [*line, "--out", str(out)])
    assert result.exit_code == 0, result.output
    edges = json.loads((out / "circuit.json").read_text())["edges"]
    assert 1 <= len(edges) <= 3
    printed = result.stdout.splitlines()[1 : 1 + len(edges)]
    assert [row.split()[:2] for row in printed] == [[str(e["upstream"]), str(e["downstream"])] for e in edges]
    assert (out / "circuit.svg").read_text().count("<path") == len(edges)


def test_features_prints_top_latents_and_writes_their_maps(tmp_path):
    out = tmp_path / "features"
    result = runner.invoke(app, ["features", "a noto emoji of a fox", "--steps", "2", "--top", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / "image.png").is_file()
    assert len(list(out.glob("*-latent-*.png"))) >= 3
    assert "latent, mean activation (over positions and steps)" in result.output


@pytest.mark.embedded
def test_steer_changes_the_image_and_a_scale_of_one_does_not(tmp_path):
    for edit, changed in ((["--scale", "5=1"], False), (["--add", "5=6", "--condition", "both"], True)):
        out = tmp_path / str(changed)
        result = runner.invoke(app, ["steer", "a noto emoji of a fox", *edit, "--steps", "3", "--out", str(out)])
        assert result.exit_code == 0, result.output
        before, after = (Image.open(out / name).tobytes() for name in ("before.png", "after.png"))
        assert (before != after) == changed


@pytest.mark.embedded
@pytest.mark.parametrize("method", [None, "cad", "uce", "sld"])
def test_erase_on_the_embedded_pipeline_draws_saves_and_uses_the_saved_erasure(method, tmp_path):
    how = [] if method is None else ["--method", method]
    base = ["erase", "a noto emoji of a fox", "--steps", "2"]
    kept = str(tmp_path / "kept")
    first = [*base, "--concept", "fox", *how, "--save", kept, "--out", str(tmp_path / "first")]
    for arguments in (first, [*base, "--fitted", kept, "--out", str(tmp_path / "second")]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
    before, after, again = (
        (tmp_path / name).read_bytes() for name in ("first/before.png", "first/after.png", "second/after.png")
    )
    assert before != after
    assert after == again
    kinds = {None: "Exchange", "cad": "WeightMask", "uce": "UCE", "sld": "ScoreEdit"}
    assert json.loads((tmp_path / "kept" / "instrument.json").read_text())["kind"].endswith(kinds[method])


def test_concepts_are_read_as_utf_8_with_a_mark_or_without(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "c.json").write_text('{"Bär": ["ein Bär"], "Uhu": ["ein Uhu"]}', encoding=encoding)
        assert read_concepts("Bär", tmp_path / "c.json")["Bär"] == ["ein Bär"]


@pytest.mark.embedded
def test_erase_fits_saves_and_uses_the_saved_erasure(tmp_path):
    concepts = tmp_path / "concepts.json"
    concepts.write_text(json.dumps({"fox": ["an emoji of a fox"], "owl": ["an emoji of an owl"]}))
    base = ["erase", "a noto emoji of a fox", "--steps", "2"]
    fitted = runner.invoke(
        app,
        [
            *base,
            "--sae",
            str(first_sae()),
            "--concept",
            "fox",
            "--concepts",
            str(concepts),
            "--save",
            str(tmp_path / "fit"),
            "--out",
            str(tmp_path / "a"),
        ],
    )
    assert fitted.exit_code == 0, fitted.output
    again = runner.invoke(app, [*base, "--fitted", str(tmp_path / "fit"), "--out", str(tmp_path / "b")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "a" / "after.png").read_bytes() == (tmp_path / "b" / "after.png").read_bytes()


@pytest.mark.embedded
def test_features_of_a_file_of_prompts_are_a_table(tmp_path):
    prompts = ["a noto emoji of a fox", "a mono emoji of an owl"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--sae", str(first_sae()), "--steps", "1", "--top", "3"]
    result = runner.invoke(app, ["features", *options, "--out", str(tmp_path / "table")])
    assert result.exit_code == 0, result.output
    with (tmp_path / "table" / "features.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["prompt"] for line in lines] == [prompt for prompt in prompts for _ in range(3)]
    assert all(Path(line["image"]).is_file() for line in lines)
    alone = runner.invoke(
        app, ["features", prompts[1], *options[2:], "--json", "--out", str(tmp_path / "alone")], catch_exceptions=False
    )
    found = json.loads(alone.stdout)["features"]
    assert [(int(line["latent"]), float(line["score"])) for line in lines[3:]] == [
        (one["latent"], pytest.approx(one["score"])) for one in found
    ]


@pytest.mark.embedded
def test_heatmap_writes_one_map_a_word_and_refuses_a_word_that_is_not_there(tmp_path):
    base = ["heatmap", "a noto emoji of a fox", "--steps", "2"]
    result = runner.invoke(app, [*base, "--word", "fox", "--out", str(tmp_path / "maps")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "maps" / "fox.png").is_file()
    result = runner.invoke(app, [*base, "--word", "rocket", "--out", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "rocket" in result.output


@pytest.mark.embedded
def test_heatmap_of_several_prompts_has_a_folder_for_each(tmp_path):
    prompts = ["a noto emoji of a fox", "a mono emoji of an owl", "a noto emoji of a fox"]
    words = ["--word", "fox", "--word", "owl"]
    result = runner.invoke(app, ["heatmap", *prompts, *words, "--steps", "1", "--out", str(tmp_path / "maps")])
    assert result.exit_code == 0, result.output
    folders = [tmp_path / "maps" / f"a-{name}" for name in ("noto-emoji-of-a-fox", "mono-emoji-of-an-owl")]
    folders.append(folders[0].with_name("a-noto-emoji-of-a-fox-2"))
    for folder, word in zip(folders, ("fox", "owl", "fox"), strict=True):
        assert {path.name for path in folder.iterdir()} == {"image.png", "words.png", f"{word}.png"}
    assert [Path(line).parent for line in result.output.splitlines()[::3]] == folders
    refused = runner.invoke(app, ["heatmap", *prompts, "--word", "owl", "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert "no --word is in PROMPT 'a noto emoji of a fox'; name a word of each prompt" in refused.output


@pytest.mark.embedded
def test_heatmap_makes_sheets_over_steps_and_layers_and_a_film_of_each_word(tmp_path):
    base = ["heatmap", "a noto emoji of a fox", "--steps", "3", "--word", "fox", "--refine", "1"]
    result = runner.invoke(app, [*base, "--by", "steps", "--out", str(tmp_path / "steps")])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "steps").iterdir()}
    assert names == {"image.png", "words.png", "steps.png", "fox.png", "fox.gif"}
    assert {Path(line).name for line in result.output.splitlines()} == names
    with Image.open(tmp_path / "steps" / "fox.gif") as film:
        assert film.n_frames == 3
    result = runner.invoke(app, [*base, "--by", "layers", "--out", str(tmp_path / "layers")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "layers" / "layers.png").is_file()
    result = runner.invoke(app, [*base, "--film", "mp4", "--out", str(tmp_path / "mp4")])
    assert result.exit_code == 2
    assert "add --by steps" in result.output


@pytest.mark.embedded
def test_heatmap_marks_named_words_apart(tmp_path):
    base = ["heatmap", "a noto emoji of a fox and a rocket", "--steps", "4", "--shares", "--refine", "1"]
    both = [*base, "--word", "fox", "--word", "rocket"]
    result = runner.invoke(app, [*both, "--out", str(tmp_path / "maps")])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"image.png", "words.png", "fox.png", "rocket.png"}
    plain = [one for one in both if one != "--shares"]
    assert runner.invoke(app, [*plain, "--out", str(tmp_path / "plain")]).exit_code == 0
    assert (tmp_path / "plain" / "fox.png").read_bytes() != (tmp_path / "maps" / "fox.png").read_bytes()
    refused = runner.invoke(app, [*base, "--out", str(tmp_path / "unnamed")])
    assert refused.exit_code == 2
    assert "--shares marks words apart that you name; add --word for each" in refused.output


def first_sae():
    from sparsefeat.assets import sae_folders

    return sae_folders()[0]


@pytest.mark.embedded
def test_hookpoints_lists_the_blocks_with_width_stream_and_grid():
    lines = runner.invoke(app, ["hookpoints"]).output.splitlines()
    line = next(line for line in lines if line.startswith("unet.mid_block.attentions.0 "))
    assert line.split()[1:] == ["128", "image", "8", "x", "8"]  # two levels: the latent of 16 x 16 is halved once
    assert not any(".attn2" in line for line in lines)
    more = runner.invoke(app, ["hookpoints", "--all"]).output.splitlines()
    assert any(".attn2" in line for line in more)


@pytest.mark.embedded
def test_sae_check_takes_the_folder_of_each_sae():
    folder = block_sae_folder()
    command = ["sae", "check", "a noto emoji of a fox", "--sae", str(folder.parent), "--subfolder", folder.name]
    result = runner.invoke(app, [*command, "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert "The SAE fits." in result.output


@pytest.mark.embedded
def test_sae_check_passes_an_sae_in_its_place_and_fails_one_elsewhere():
    command = ["sae", "check", "a noto emoji of a fox", "a twemoji emoji of an owl", "--sae", str(block_sae_folder())]
    # The embedded pipeline stands for any: its SAEs are named here as a user's would be.
    fits = runner.invoke(app, command)
    assert fits.exit_code == 0, fits.output
    assert "The SAE fits." in fits.output
    elsewhere = runner.invoke(app, [*command, "--at", "unet.mid_block.attentions.0"])
    assert elsewhere.exit_code == 1
    assert "unexplained" in elsewhere.output


def test_the_presets_that_are_known_without_torch_are_those_of_the_library():
    from sparsefeat.cli.commands.train import PRESETS
    from sparsefeat.training import PUBLISHED

    assert set(PRESETS) == set(PUBLISHED)


def test_a_sentence_that_begins_with_an_argument_names_the_option():
    options = {"batch_size": "--batch-size", "k": "--k"}
    said = in_options("batch_size is 4096 but there are 2560 rows: make it smaller", options)
    assert said == "--batch-size is 4096 but there are 2560 rows: make it smaller"
    said = in_options("no module 'x'; the nearest is y (sparsefeat.hookpoints(pipe) lists all)", options)
    assert said.endswith("(`sparsefeat hookpoints` lists all)")
    said = in_options("k is 99 but batch_size is 24: choose k no larger than batch_size", options)
    assert said == "--k is 99 but --batch-size is 24: choose k no larger than --batch-size"
    assert in_options("height=3 is ignored without width=; give", {"width": "--width"}).endswith(
        "without --width; give"
    )
    unchanged = (
        "config.json: k is 99 but batch_size is 24",
        "the k is 3",
        "k isolates",
        "no folder 'batch_size', a/batch_size",
    )
    for sentence in unchanged:
        assert in_options(sentence, options) == sentence


@pytest.mark.embedded
def test_the_embedded_transformer_is_called_joint_and_brings_its_own_saes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["features", "a noto emoji of a fox", "--pipeline", "joint", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert "transformer_blocks" in result.output
    (tmp_path / "joint").mkdir()  # a folder of that name is ./joint
    result = runner.invoke(app, ["features", "a noto emoji of a fox", "--pipeline", "./joint", "--sae", "x/y"])
    assert result.exit_code == 2
    assert "'./joint' has no model_index.json" in result.output
