"""What a user gets wrong, over the shell and over Python: each is one sentence that names the option or the argument and
what to give, with one exit code, and nothing is lost. A row each; add yours."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sparsefeat as sf
from sparsefeat.assets import load_pipeline
from sparsefeat.cli import app
from sparsefeat.cli.commands.features import SETTINGS as OF_PAGES
from sparsefeat.cli.commands.sae.convert import FORMATS
from sparsefeat.erasure.saeuron import select
from sparsefeat.features import Statistics, collect_statistics, search
from sparsefeat.measure import figures, speed_table
from sparsefeat.report.latents import pages
from sparsefeat.sae.convert import writable
from tests.tiny import tiny_sd

NAN = float("nan")

# Arguments of the library as its sentences write them.
OF_PYTHON = re.compile(
    r"\b(n_latents|num_inference_steps|guidance_scale|local_files_only|steps|folder|concept|condition|subfolder|force|add"
    r"|scale|set|at|k|mask|word|sae|pipe|device)="
)

# The shell ------------------------------------------------------------------------------------------------------------

# (command, what is said). Found before torch is loaded.
AT_ONCE = [
    ("features", "PROMPT is missing; say what to draw, or add --page"),
    ("features a b", "unexpected extra argument"),
    ("features a --nonsense 3", "No such option: --nonsense"),
    ("nothing", "No such command 'nothing'"),
    ("evaluate card --section colours", "'colours' is not one of 'erasers'"),
    ("features a --top 0", "'--top': Input should be greater than or equal to 1"),
    ("features a --steps 0", "'--steps': Input should be greater than or equal to 1"),
    ("features a --steps many", "'--steps': Input should be a valid integer"),
    ("features a --steps 1001", "--steps 1001 is more than the 1000 of this pipeline's scheduler; take fewer"),
    ("features a --seed -1", "'--seed': Input should be greater than or equal to 0"),
    ("features a --seed 99999999999999999999", "'--seed': Input should be less than or equal to"),
    ("features a --guidance nan", "'--guidance': nan is not a finite number"),
    ("steer a --add 3=1 --guidance=-inf", "'--guidance': -inf is not a finite number"),
    ("features a --device gpu", "--device 'gpu' is not one to run on; choose cpu, cuda"),
    ("steer a --add 3=1 --device meta", "--device 'meta' is not one to run on; choose cpu, cuda"),
    ("heatmap a --device ''", "--device '' is not one to run on; choose cpu, cuda"),
    ("features a --at ''", "--at '' is no hookpoint; write path"),
    ("features a --at 'unet mid'", "--at 'unet mid' is no hookpoint; write path"),
    ("erase a --concept fox --at unet.mid_block:sideways", "--at 'unet.mid_block:sideways' is no hookpoint; write"),
    ("sae info --hookpoint ''", "--hookpoint '' is no hookpoint; write path"),
    ("features a --pipeline nothere", "--pipeline 'nothere' does not exist; pass a diffusers folder"),
    ("hookpoints --pipeline ''", "--pipeline '' does not exist; pass a diffusers folder"),
    ("heatmap a --pipeline empty", "--pipeline 'empty' has no model_index.json; pass the folder of"),
    ("steer a --add 3=1 --pipeline file", "--pipeline 'file' has no model_index.json; pass the folder of"),
    ("features a --pipeline some/model", "its SAE must be named: add --sae"),
    ("features a --sae nothere", "--sae 'nothere' does not exist; pass a folder, or a hub id"),
    ("sae check a --sae ''", "--sae '' does not exist; pass a folder, or a hub id"),
    ("features a --subfolder x", "--subfolder 'x' is given without an SAE; name the folder"),
    ("features a --sae a/b --subfolder c --subfolder d", "--subfolder is given 2 times for 1 --sae; give it once for"),
    ("features a --out full", "--out full exists already; choose another folder"),
    ("steer a --add 3=1 --out file", "--out file exists already; choose another folder"),
    ("heatmap a --out file/deeper", "--out file/deeper cannot be made, file is a file; choose another place"),
    ("features a --out ''", "'--out': it is empty; name a folder or file"),
    ("steer a", "this steers nothing; give at least one latent, as in --add 12=8.0"),
    ("steer a --add twelve=3", "--add 'twelve=3' must be LATENT=NUMBER, as in --add 12=8.0"),
    ("steer a --set 3", "--set '3' must be LATENT=NUMBER, as in --set 12=8.0"),
    ("steer a --scale 3=nan", "--scale '3=nan' must give a finite number, as in --scale 12=8.0"),
    ("steer a --scale 3=1e39", "--scale '3=1e39' must give a finite number, as in --scale 12=8.0"),
    ("steer a --add=-1=3", "--add '-1=3' must name a latent, counted from 0"),
    ("steer a --scale 391=2 --scale 391=3", "--scale names latent 391 twice; give it once"),
    ("steer a --scale 391=2 --set 391=3", "latent 391 is in --scale and in --set; give it one of them"),
    ("steer a --add 3=1 --window early", "--window 'early' must be START:STOP, as in --window 0:0.5"),
    ("steer a --add 3=1 --window 1:0", "--window '1:0' must have 0 <= START < STOP <= 1"),
    ("steer a --add 3=1 --window nan:1", "--window 'nan:1' must have 0 <= START < STOP <= 1"),
    ("steer a --add 3=1 --window 0.1:0.2 --steps 2", "--window '0.1:0.2' holds none of the 2 steps; widen it"),
    ("steer a --add 3=1 --condition maybe", "'--condition': Value error, 'maybe' is not one of 'cond'"),
    ("steer a --add 3=1 --sae a/b --sae c/d", "--sae was given more than once; steer edits the latents of one SAE"),
    ("erase a", "name what to erase with --concept, or an erasure fitted before with --fitted"),
    (
        "erase a --concept fox --fitted full",
        "with --concept, or an erasure fitted before with --fitted; one of the two",
    ),
    (
        "erase a --concept zebra",
        "--concept 'zebra' is none of the embedded pipeline's objects and styles; choose one of",
    ),
    ("erase a --concept fox --into zebra", "--into 'zebra' is none of the concepts; choose one of dog face"),
    ("erase a --concept fox --into fox", "--into 'fox' is --concept itself; choose one of dog face"),
    ("erase a --concept fox --concepts two.json --into owl", "--into 'owl' is none of the concepts; choose one of cat"),
    ("erase a --concept fox --concepts empty", "--concepts empty cannot be read (Is a directory); give a JSON file"),
    ("features a --pipeline Joint", "does not exist; pass a diffusers folder, a hub id OWNER/NAME, or joint"),
    ("features a --pipeline joint/", "does not exist; pass a diffusers folder, a hub id OWNER/NAME, or joint"),
    ("features a --pipeline joint --subfolder x", "--subfolder 'x' is given without an SAE; name the folder"),
    ("erase a --concept fox --method cad --latents 3", "--latents is of --method exchange and saeuron, not of cad"),
    ("erase a --concept fox --method cad --at unet.mid_block", "--at is of --method exchange and saeuron, not of cad"),
    ("erase a --concept fox --method esd", "--method 'esd' is not known; choose one of exchange"),
    ("features --page a", "--page is of all latents and takes no PROMPT; name its folder with --out 'a'"),
    ("features --page --top 3", "--top is not of --page, which shows all latents; leave it out"),
    ("features --page --steer ''", "--steer '' must be numbers of latents, as in --steer 12,40"),
    ("features --page --out full", "--out full exists already; choose another folder"),
    ("features --page --out file/x", "--out file/x cannot be made, file is a file; choose another place"),
    ("sae verify sdxl-unbox/mid.0 a --weights nothere", "--weights 'nothere' does not exist; name its folder or file"),
    ("features --page --steer=-1", "--steer '-1' must be numbers of latents, as in --steer 12,40"),
    ("erase a --concept fox --latents 0", "'--latents': Input should be greater than or equal to 1"),
    ("erase a --concept fox --gamma nan", "'--gamma': nan is not a finite number"),
    ("erase a --concept fox --gamma 1e300", "'--gamma': 1e+300 is not a finite number of 32 bits"),
    ("erase a --concept fox --concepts nothere.json", "--concepts nothere.json cannot be read"),
    ("erase a --concept fox --concepts broken.json", "--concepts broken.json cannot be used (Unterminated string"),
    ("erase a --concept fox --concepts twice.json", "--concepts twice.json cannot be used ('fox' stands there twice)"),
    ("erase a --concept fox --concepts list.json", "--concepts list.json must map each concept to a list of"),
    ("erase a --concept fox --concepts numbers.json", "--concepts numbers.json must map each concept to a list of"),
    ("erase a --concept fox --concepts blank.json", "--concepts blank.json must map each concept to a list of"),
    ("erase a --concept fox --concepts one.json", "--concepts one.json must name 'fox' and at least one other concept"),
    ("erase a --concept owl --concepts two.json", "--concepts two.json must name 'owl' and at least one other concept"),
    ("erase a --fitted nothere", "--fitted nothere holds no fitted erasure; give the folder that --save wrote"),
    ("erase a --fitted full", "--fitted full holds no fitted erasure; give the folder that --save wrote"),
    ("erase a --fitted full --gamma 2", "--gamma changes nothing of an erasure that was fitted before; leave it"),
    ("erase a --fitted full --latents 3", "--latents changes nothing of an erasure that was fitted before; leave it"),
    ("erase a --fitted full --save new", "--save changes nothing of an erasure that was fitted before; leave it"),
    ("erase a --concept fox --save full", "--save full exists already; choose another folder"),
    ("erase a --concept fox --save erased/fit", "--save erased/fit and --out erased are one within the other; choose"),
    ("erase a --concept fox --save ''", "'--save': it is empty; name a folder or file"),
    ("heatmap ''", "PROMPT is empty; give one with the words to map"),
    ("heatmap 'a fox' --word rocket", "--word 'rocket' is not in PROMPT 'a fox'; name a word of it"),
    ("heatmap 'a fox' --word ''", "--word '' is not in PROMPT 'a fox'; name a word of it"),
    ("collect", "--at is missing; name at least one hookpoint, as `sparsefeat hookpoints` lists them"),
    ("collect --at 'unet mid'", "--at 'unet mid' is no hookpoint; write path"),
    ("collect --at unet.mid_block --at unet.mid_block", "--at names a hookpoint twice; give each once"),
    ("collect --at a --prompts nothere.txt", "'nothere.txt' does not exist: name a file of prompts"),
    ("collect --at a --prompts ''", "'' does not exist: name a file of prompts"),
    ("collect --at a --prompts blank.txt", "blank.txt has no prompt in it: write at least one"),
    ("collect --at a --prompts broken.json", "broken.json is none of .txt, .csv"),
    ("collect --at a --prompts table.csv", "--column must be one of table.csv, which has none of prompt, caption"),
    ("collect --at a --prompts table.csv --column x", "--column 'x' must be one of table.csv, which has no 'x' but id"),
    (
        "collect --at a --prompts lines.txt --column x",
        "--column 'x' cannot be of lines.txt, which has lines of text: leave",
    ),
    (
        "collect --at a --prompts lines.txt --split x",
        "--split 'x' is of a data set and lines.txt is a file: leave it out",
    ),
    ("collect --at a --images nothere", "'nothere' is no folder: name one with images in it"),
    ("collect --at a --images empty", "empty has no image in it: put some there"),
    ("collect --at a --images empty --prompts lines.txt", "--images and --prompts are both given; their captions"),
    ("collect --at a --limit 0", "'--limit': Input should be greater than or equal to 1"),
    ("collect --at a --batch 0", "'--batch': Input should be greater than or equal to 1"),
    ("collect --at a --condition image", "'--condition': Value error, 'image' is not one of 'cond'"),
    ("collect --at a --dtype int8", "'--dtype': Value error, 'int8' is not one of 'float16'"),
    ("collect --at a --out file", "--out file is a file; name a folder"),
    ("train", "--at is missing; name at least one hookpoint"),
    ("train --preset nope", "--preset 'nope' is not known; choose one of topk"),
    (
        "train --at a --preset itda --ema 0.9",
        "--ema is of training by gradients, and itda is built of the rows in one pass",
    ),
    ("train --at a --preset itda --normalizer pca", "--normalizer is of training by gradients"),
    ("train --preset topk --preset topk", "--preset names one twice; give each once"),
    (
        "train --activations nothere",
        "--activations 'nothere' is no folder; name the one that `sparsefeat collect` wrote",
    ),
    ("train --activations ''", "--activations '' is no folder; name the one"),
    (
        "train --activations empty --prompts lines.txt",
        "--prompts is of drawing, and --activations were drawn before; give",
    ),
    ("train --activations empty --pipeline some/model", "--pipeline is of drawing, and --activations were drawn"),
    ("train --activations empty --out full", "--out full exists already; choose another folder"),
    ("train --activations empty --out file", "--out file exists already; choose another folder"),
    ("train --at a --prompts nothere.txt", "'nothere.txt' does not exist: name a file of prompts"),
    ("train --at a --train-steps 0", "'--train-steps': Input should be greater than or equal to 1"),
    ("train --at a --lr nan", "'--lr': Input should be greater than or equal to 0"),
    ("train --at a --ema inf", "'--ema': inf is not a finite number"),
    ("train --at a --optimizer sgd", "'--optimizer': Value error, 'sgd' is not one of 'adam'"),
    ("train --at a --normalizer x", "'--normalizer': Value error, 'x' is not one of 'none'"),
    (
        "train --activations empty --height 64",
        "--height is of drawing, and --activations were drawn before; give one of them",
    ),
    (
        "train --activations empty --rows-per-image 3",
        "--rows-per-image is of drawing, and --activations were drawn before; give one of them",
    ),
    ("train --activations empty --window 64", "--window is of drawing, and --activations were drawn before"),
    ("train --at a --k 100 --latents 10", "--k 100 is more than --latents 10; take fewer"),
    ("train --at a --warmup-steps 50 --train-steps 10", "--warmup-steps 50 is more than --train-steps 10; take fewer"),
    ("train --at a --decay-steps 50 --train-steps 10", "--decay-steps 50 is more than --train-steps 10; take fewer"),
    ("train --at a --accumulate 9 --batch-size 8", "--accumulate 9 is more than --batch-size 8; take fewer"),
    ("train --at a --lr 0", "--lr 0 trains nothing; give a number above 0"),
    ("train --at a --ema 2", "--ema 2.0 must be between 0 and 1, such as 0.995"),
    ("train --at a --weight-decay 1", "--weight-decay 1.0 is of adamw; add --optimizer adamw, or leave it out"),
    ("train --at a --lr 1 --lr 2", "'--lr': it is given more than once; give it once"),
    ("train --at a --width 20", "'--width': 20 is no multiple of 8"),
    ("collect --at a --height 13", "'--height': 13 is no multiple of 8"),
    ("collect --at a --column x", "--column 'x' is of --prompts, which is not given; leave it out"),
    ("collect --at a --images empty --split x", "--split 'x' is of --prompts, which is not given; leave it out"),
    (
        "collect --at a --steps-per-image 9 --steps 2",
        "--steps-per-image 9 is more than the 2 steps there are; leave it",
    ),
    ("evaluate scenes --pipeline nothere", "--pipeline 'nothere' does not exist; pass a diffusers folder"),
    ("evaluate scenes --pipeline empty", "--pipeline 'empty' has no model_index.json; pass the folder of"),
    ("evaluate scenes --out file/x", "--out file/x cannot be made, file is a file; choose another place"),
    ("erase a --concept fox --concept owl", "'--concept': it is given more than once; give it once"),
    ("features a --steps 2 --steps 3", "'--steps': it is given more than once; give it once"),
    ("train --at a --window 0", "'--window': Input should be greater than or equal to 1"),
    ("evaluate imagenet", "No such command 'imagenet'"),
    ("evaluate overhead --work x", "No such option: --work"),
    ("evaluate saes --out empty", "--out empty is a folder; name a file"),
    ("evaluate saes --prompts nothere.txt", "nothere.txt"),
    ("evaluate saes --prompts lines.txt --limit 2", "have 0 words that 4 of them have and 4 lack: give more prompts"),
    ("evaluate saes --at a..b", "--at 'a..b' is no hookpoint"),
    ("evaluate saes --rows-per-image 0", "'--rows-per-image': Input should be greater than or equal to 1"),
    ("evaluate emoji --work file", "--work file is a file; name a folder"),
    ("evaluate overhead --out empty", "--out empty is a folder; name a file"),
    ("bench --only topk", "--only 'topk' is no op; choose one of topk_encode"),
    ("bench --device tpu", "--device 'tpu' cannot be measured; choose cpu"),
    ("bench --seconds inf", "'--seconds': inf is not a finite number"),
    ("bench --seconds nan", "'--seconds': Input should be greater than or equal to 0"),
    ("demo --out full", "--out full exists already; choose another folder"),
    ("features a --out " + "x" * 300, "too long for a file's name; choose a shorter one"),
    ("train --at a --out " + "x" * 300, "too long for a file's name; choose a shorter one"),
    ("demo --out ''", "'--out': it is empty; name a folder or file"),
    ("sae info nothere", "SAE 'nothere' does not exist; pass a folder, or a hub id"),
    ("sae info --k 0", "'--k': Input should be greater than or equal to 1"),
    ("sae check", "Missing argument 'prompts'"),
    ("sae convert nothere out", "SOURCE 'nothere' does not exist; pass a folder, or a hub id"),
    ("sae convert empty full", "TARGET full exists already; choose another folder"),
    ("sae convert empty out --format swish", "--format 'swish' cannot be written; choose one of sparsefeat"),
]

# What only the SAE, the pipeline or the machine can tell.
LATER = [
    ("steer a --add 99999=3", "--add names latent 99999; this SAE has latents 0 to 511"),
    ("erase a --concept fox --latents 100000", "--latents 100000 must be a whole number from 1 to 1,024"),
    ("features a --at unet.mid_blok.attentions.0", "has no module 'unet.mid_blok.attentions.0'; the nearest are unet.mid_block"),
    ("features a --sae empty", "empty holds no SAE"),
    ("steer a --pipeline joint --add 99999=1", "--add names latent 99999; this SAE has latents 0 to 1023"),
    ("features --page --prompts blank.txt", "blank.txt has no prompt in it: write at least one"),
    ("train --activations empty", "--activations empty has no activations; name the folder that `sparsefeat collect` wrote"),
    ("train --at unet.mid_blok --limit 2", "has no module 'unet.mid_blok'; the nearest are unet.mid_block"),
    ("train --at unet.mid_block --condition uncond --guidance 1 --limit 1 --steps 1 --window 1 --latents 9 --k 2", "turn guidance on, or keep"),
    ("collect --at unet.mid_block --height 64 --limit 1", "--height 64 is ignored by StableDiffusionPipeline without --width; give both"),
    ("train --at unet.mid_block --width 64 --limit 1", "--width 64 is ignored by StableDiffusionPipeline without --height; give both"),
    ("features a --at unet --steps 1", "Record needs activations of width 64, but unet is 4 wide: its SAE was made for"),
    ("steer a --add 391=1e30 --steps 1", "the image came out as NaN, numbers beyond all bounds; take smaller ones"),
    ("features a --guidance 1e38 --steps 2", "the image came out as NaN, numbers beyond all bounds; take smaller ones"),
    ("collect --at unet.mid_blok --prompts lines.txt", "has no module 'unet.mid_blok'; the nearest are unet.mid_block"),
    ("demo --out full --force", "--out full exists and holds no earlier report, so it is left alone; choose another folder"),
    pytest.param(
        "train --at unet.mid_block.attentions.0 --device cuda",
        "--device cuda cannot be used: torch finds none on this machine; choose cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one on this machine"),
    ),
    pytest.param(
        "features a --device cuda",
        "--device cuda cannot be used: torch finds none on this machine; choose cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one on this machine"),
    ),
]  # fmt: skip


def furnish(folder: Path) -> None:
    """What the commands find: an empty folder, one with something precious, and files of concepts."""
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis").write_text("years of work")
    (folder / "file").write_text("a file")
    fox, owl = ["a fox"], ["an owl"]
    of_concepts = {"list": [1], "numbers": {"fox": [1], "owl": owl}, "blank": {"fox": [" "], "owl": owl},
                   "one": {"fox": fox}, "two": {"fox": fox, "cat": ["a cat"]}}  # fmt: skip
    for name, content in of_concepts.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name, content in (("blank.txt", "\n"), ("lines.txt", "a fox\n"), ("table.csv", "id,who\n1,a\n")):
        (folder / name).write_text(content)
    (folder / "twice.json").write_text('{"fox": ["a fox"], "fox": ["the fox"], "owl": ["an owl"]}')
    (folder / "broken.json").write_text('{"fox')


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def plain(output: str) -> str:
    """Typer's box as one line."""
    return " ".join(line.strip("│╭╮╰╯─ ") for line in output.splitlines()).strip()


@pytest.fixture
def furnished(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(("line", "said"), [*AT_ONCE, *LATER])
def test_the_shell_refuses_it_in_one_sentence_with_exit_code_2_and_loses_nothing(line, said, furnished):
    before = everything(furnished)
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 2, result.output
    assert said in plain(result.output)
    assert "Traceback" not in result.output
    if result.output.startswith("error: "):
        assert len(result.output.splitlines()) == 1
        assert not OF_PYTHON.search(result.output)  # whoever reads the shell is told options
    assert everything(furnished) == before


@pytest.mark.embedded
@pytest.mark.parametrize(("edit", "changes"), [("--add 391=0", False), ("--scale 391=1", False), ("--add 391=9", True)])
def test_an_edit_that_changed_nothing_says_so(edit, changes, furnished):
    result = CliRunner().invoke(app, shlex.split(f"steer 'a fox' {edit} --steps 1"))
    assert result.exit_code == 0, result.output
    assert ("the edit changed nothing of this image" in plain(result.output)) is not changes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("features a --sae some/model", "'some/model' is no local folder and could not be fetched from the hub"),
        ("hookpoints --pipeline some/model", "--pipeline 'some/model' could not be fetched from the hub"),
        ("train --at unet.mid_block --out /proc/x", "--out /proc/x cannot be made ("),
        ("steer a --add 3=1 --out /proc/x", "--out /proc/x cannot be made ("),
        ("features --page --out /proc/x", "--out /proc/x cannot be made ("),
        ("features a --out /proc/features", "--out /proc/features cannot be made ("),
        ("collect --at unet.mid_block --out /proc/x", "--out /proc/x cannot be made ("),
        ("demo --out /proc/demo", "--out /proc/demo cannot be made ("),
        ("evaluate overhead --out /proc/x/y.json", "--out /proc/x/y.json cannot be made ("),
        ("erase a --concept fox --save /proc/fit", "--save /proc/fit cannot be made ("),
        ("sae convert empty /proc/sae", "TARGET /proc/sae cannot be made ("),
    ],
)
def test_what_the_machine_cannot_do_is_one_sentence_with_exit_code_1(line, said, furnished):
    before = everything(furnished)
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 1, result.output
    assert result.output.startswith(f"error: {said}")
    assert len(result.output.splitlines()) == 1
    assert not OF_PYTHON.search(result.output)
    assert everything(furnished) == before


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "collect --at vae.decoder --limit 1 --steps 1",
            "the call completed without reaching vae.decoder (the VAE decodes",
        ),
        (
            "collect --at unet.mid_block --height 99999992 --width 99999992 --limit 1 --steps 1",
            "there is not memory enough",
        ),
    ],
)
def test_what_only_a_call_can_tell_is_one_sentence_with_exit_code_1(line, said, furnished):
    before = everything(furnished)
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 1, result.output
    assert result.output.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in result.output
    assert everything(furnished) == before


def test_a_mistake_is_told_before_torch_or_diffusers_are_loaded(tmp_path):
    furnish(tmp_path)
    code = (
        "import json, shlex, sys; from typer.testing import CliRunner; from sparsefeat.cli import app\n"
        "for line in json.load(sys.stdin):\n"
        "    result = CliRunner().invoke(app, shlex.split(line))\n"
        "    loaded = {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    assert result.exit_code == 2 and not loaded, (line, result.output, loaded)\n"
    )
    lines = json.dumps([line for line, _ in AT_ONCE])
    run = subprocess.run([sys.executable, "-c", code], input=lines, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_lists_that_are_known_without_torch_are_those_of_the_library():
    assert writable() == FORMATS
    assert OF_PAGES == pages.SETTINGS
    assert set(figures.FOUND) == set(speed_table.OPS)


# Python ---------------------------------------------------------------------------------------------------------------

D, N = 32, 40
PROMPTS = {"fox": ["a fox"], "cat": ["a cat"]}


@pytest.fixture(scope="module")
def x(tmp_path_factory):
    """A pipeline, an SAE of its U-Net and one of its text encoder, an erasure, and folders that hold them."""
    pipe, folder = tiny_sd(), tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = {"d_model": D, "n_latents": N, "k": 4}
    sae = sf.SAE(sf.SAEConfig(**config, hookpoint="unet.up_blocks.1.attentions.1")).eval()
    text = sf.SAE(sf.SAEConfig(**config, hookpoint="text_encoder.encoder.layers.0")).eval()
    wide = sf.SAE(sf.SAEConfig(d_model=48, n_latents=N, k=4, hookpoint="unet.up_blocks.1.attentions.1")).eval()
    statistics = Statistics(["fox", "cat"], N)
    for i in range(2):
        statistics.add(sae.encode(torch.randn(20, D)), torch.full((20,), i), 1.0)
    erase = sf.Erase.from_statistics(sae, statistics, "fox", n_latents=2)
    sae.save(folder / "sae")
    erase.save(folder / "erase")
    (folder / "full").mkdir()
    (folder / "full" / "thesis").write_text("years of work")
    return SimpleNamespace(pipe=pipe, sae=sae, text=text, wide=wide, erase=erase, statistics=statistics, folder=folder)


def run(x, *instruments, prompt="a fox", **call):
    with sf.attach(x.pipe, *instruments) as session:
        x.pipe(prompt, **{"num_inference_steps": 2, **call})
    return session[instruments[0]]


def fit(x, target="fox", prompts=PROMPTS, pipe=None, sae=None, **options):
    options = {"n_latents": 3, "num_inference_steps": 1, **options}
    return sf.Erase.fit(pipe or x.pipe, sae or x.sae, target, prompts, **options)


def itd(x, erase=("a fox",), remain=(), **options):
    return sf.InterpretThenDeactivate.fit(x.pipe, x.text, erase, remain, **{"top_m": 4, **options})


def spoilt(sae):
    """The SAE, in memory, with one weight that is NaN."""
    sae = copy.deepcopy(sae)
    sae.W_dec.data[3, 4] = NAN
    return sae


def trained(x):
    """An SAE in memory that somebody has trained."""
    sae = sf.SAE(x.sae.config)
    sae.b_pre.data[:] = 0.5
    return sae


def trainer(sae):
    return sf.SAETrainer(sae, torch.randn(9, D), sf.TrainConfig(steps=2, batch_size=4)).fit(progress=False)


def steer(x, **options):
    return sf.Steer(x.sae, **{"add": {1: 1.0}, **options})


def session(x, calls=1):
    with sf.attach(x.pipe, sf.Record(x.sae)) as session:
        for _ in range(calls):
            x.pipe("a fox", num_inference_steps=1)
    return session


def own_loop(x, *prompts, **call):
    with sf.attach(x.pipe, sf.Record(x.sae)) as session, session.call(*prompts, **call):
        pass


def recording(x):
    return run(x, sf.Record(x.sae))


def maps(x):
    return run(x, sf.HeatMaps())


# (what is done, what is said)
PYTHON = {
    "attach(None)": (lambda x: sf.attach(None, sf.Record(x.sae)), "pipe is NoneType, not a pipeline; open one"),
    "attach('pipe')": (lambda x: sf.attach("pipe", sf.Record(x.sae)), "pipe is str, not a pipeline; open one"),
    "attach(the class)": (lambda x: sf.attach(type(x.pipe), sf.Record(x.sae)), "pipe is the class StableDiffusion.*; open"),
    "attach(unet)": (lambda x: sf.attach(x.pipe.unet, sf.Record(x.sae)), "pipe is UNet2D.*; attach to the pipeline"),
    "attach nothing": (lambda x: sf.attach(x.pipe), "was given no instrument; give at least one"),
    "attach None to it": (lambda x: sf.attach(x.pipe, None), r"instruments\[0\] is NoneType, not an Instrument; attach takes"),
    "attach a negative prompt": (
        lambda x: sf.attach(x.pipe, sf.negative_prompt("fox")), r"instruments\[0\] is dict, not an Instrument; give it to the call, pipe\(prompt, \*\*it\)"
    ),
    "attach an SAE": (lambda x: sf.attach(x.pipe, x.sae), r"instruments\[0\] is SAE, not an Instrument; attach takes"),
    "attach a list": (lambda x: sf.attach(x.pipe, [sf.Record(x.sae)]), r"instruments\[0\] is list, not an Instrument"),
    "attach of another width": (lambda x: sf.attach(x.pipe, sf.Record(x.wide)), "needs activations of width 48, but"),
    "hookpoints(None)": (lambda x: sf.hookpoints(None), "pipe is NoneType, not a pipeline; open one"),
    "Record(None)": (lambda x: sf.Record(None), "sae is NoneType, not an SAE; open it first"),
    "Record of a name": (lambda x: sf.Record("my-sae"), r"sae is 'my-sae', not an SAE; open it first, .*load_sae\('my-sae'\)"),
    "Record of a pipeline": (lambda x: sf.Record(x.pipe), "sae is StableDiffusionPipeline, not an SAE; open it first"),
    "Record at ''": (lambda x: sf.Record(x.sae, ""), "'' is no hookpoint; name one"),
    "Record at 3": (lambda x: sf.Record(x.sae, 3), "3 is no hookpoint; name one"),
    "Record at nothing": (
        lambda x: sf.attach(x.pipe, sf.Record(x.sae, "unet.mid_blok")), "no module 'unet.mid_blok'; the nearest are unet.mid_block"
    ),
    "top(0)": (lambda x: recording(x).top(0), "n=0 must be a whole number of at least 1"),
    "map(4000)": (lambda x: recording(x).map(4000), "latent=4000 is out of range; this SAE has 40 latents"),
    "map of image 7": (lambda x: recording(x).map(1, image=7), r"image=7 was not recorded; there are \[0\]"),
    "Steer nothing": (lambda x: sf.Steer(x.sae), "edits nothing; give at least one latent"),
    "Steer add list": (lambda x: steer(x, add=[1]), r"add=\[1\] must map latents to amounts, as in"),
    "Steer add name": (lambda x: steer(x, add={"a": 1.0}), "'a' cannot be looked up: this SAE has no names, set sae.names"),
    "Steer add 4000": (lambda x: steer(x, add={4000: 1.0}), "add= names latent 4000; this SAE has latents 0 to 39"),
    "Steer add text": (lambda x: steer(x, add={1: "x"}), r"add\[1\]='x' must be a finite number"),
    "Steer scale NaN": (lambda x: steer(x, scale={1: NAN}), r"scale\[1\]=nan must be a finite number"),
    "Steer set and scale": (lambda x: steer(x, set={1: 1}, scale={1: 2}), "latent 1 is in set= and also in scale=.*; give it one"),
    "Steer clamp backwards": (lambda x: steer(x, clamp={1: (2, 1)}), r"clamp\[1\]=\(2, 1\) must be \(low, high\) with low <= high"),
    "Steer misspelt": (lambda x: steer(x, scal={1: 2}), "unexpected keyword argument 'scal'"),
    "Steer condition": (lambda x: steer(x, condition="maybe"), "condition='maybe' is not known; use one of 'cond'"),
    "Steer steps (1, 0)": (lambda x: steer(x, steps=(1, 0)), r"steps=\(1, 0\) must be \(start, stop\) with"),
    "Steer steps 3": (lambda x: steer(x, steps=3), "steps=3 must be a list of step indices"),
    "Steer steps []": (lambda x: steer(x, steps=[]), r"steps=\[\] must be a list of step indices"),
    "Steer mask name": (lambda x: steer(x, mask="mask.png"), "mask is str 'mask.png', which is no map; give a tensor"),
    "Steer mask path": (lambda x: steer(x, mask=Path("m.png")), "mask is PosixPath .*, which is no map; give a tensor"),
    "Steer mask in colours": (lambda x: steer(x, mask=Image.new("RGB", (8, 8))), "mask is a PIL image of mode 'RGB'; give one in grey"),
    "Steer mask HxWx3": (lambda x: steer(x, mask=np.zeros((8, 8, 3))), r"mask has shape \[8, 8, 3\], an image in colours; give one number"),
    "Steer mask uint8": (lambda x: steer(x, mask=np.full((8, 8), 255, np.uint8)), "mask is uint8 with values up to 255; divide it by 255"),
    "Steer mask int64": (lambda x: steer(x, mask=torch.full((8, 8), 255)), "mask is int64 with values up to 255; divide it by 255"),
    "Steer beyond 32 bits": (lambda x: steer(x, add={1: 1e39}), r"add\[1\]=1e\+39 is infinite in 32 bits, .*; give a smaller number"),
    "Erase.fit beyond 32 bits": (lambda x: fit(x, gamma=-1e39), r"gamma=-1e\+39 is infinite in 32 bits, .*; give a smaller number"),
    "SAE.encode complex": (lambda x: x.sae.encode(torch.ones(2, D, dtype=torch.complex64)), "x has dtype torch.complex64: pass real numbers"),
    "Steer mask 1-d": (lambda x: steer(x, mask=torch.ones(4)), r"mask has shape \[4\]; give \[height, width\]"),
    "Steer mask NaN": (lambda x: steer(x, mask=torch.full((4, 4), NAN)), "mask holds NaN or infinity.*; give finite numbers"),
    "Steer mask of 3 images": (lambda x: run(x, steer(x, mask=torch.ones(3, 4, 4))), r"mask has shape \[3, 4, 4\], maps for 3 images; this call makes 1"),
    "Steer mask gives None": (lambda x: run(x, steer(x, mask=lambda context: None)), "that mask= returned is NoneType None, which is no map; give"),
    "Steer mask of maps not attached": (lambda x: run(x, steer(x, mask=sf.HeatMaps().mask("fox"))), "HeatMaps that are not attached; attach them"),
    "word missing": (lambda x: maps(x).word("rocket"), "word='rocket' is not in the prompt 'a fox'; its words are: a, fox"),
    "word ''": (lambda x: maps(x).word(""), "word='' is no word; name a word of the prompt"),
    "word 3": (lambda x: maps(x).word(3), "word=3 is no word; name a word of the prompt"),
    "word of image 3": (lambda x: maps(x).word("fox", image=3), "image=3 is out of range; the call made 1"),
    "layers nothere": (lambda x: run(x, sf.HeatMaps(layers="nope")), r"layers=\('nope',\) match no cross-attention module; there are"),
    "layers 3": (lambda x: sf.HeatMaps(layers=3), "layers=3 must be a module path or a list of them"),
    "fit prompts list": (lambda x: fit(x, prompts=["a fox", "a cat"]), r"prompts=\['a fox', 'a cat'\] must map concepts to their prompts"),
    "fit prompts None": (lambda x: fit(x, prompts=None), "prompts=None must map concepts to their prompts"),
    "fit prompts {}": (lambda x: fit(x, prompts={}), "prompts={} must map concepts to their prompts"),
    "fit prompts text": (lambda x: fit(x, prompts={"fox": "a", "cat": "b"}), r"prompts\['fox'\]='a' must be a list of one or more prompts"),
    "fit prompts []": (lambda x: fit(x, prompts={"fox": [], "cat": ["b"]}), r"prompts\['fox'\]=\[\] must be a list of one or more prompts"),
    "fit prompts numbers": (lambda x: fit(x, prompts={"fox": [3], "cat": ["b"]}), r"prompts\['fox'\]=\[3\] must be a list of one or more"),
    "fit one concept": (lambda x: fit(x, prompts={"fox": ["a"]}), r"target='fox' must be a key of prompts=\['fox'\], which need at least one other"),
    "fit target not there": (lambda x: fit(x, "owl"), "target='owl' must be a key of prompts="),
    "fit target None": (lambda x: fit(x, None), "target=None must be a key of prompts="),
    "fit target []": (lambda x: fit(x, []), r"target=\[\] must be a key of prompts="),
    "fit pipe": (lambda x: fit(x, pipe="pipe"), "pipe is str, not a pipeline; open one"),
    "fit sae": (lambda x: fit(x, sae="sae"), "sae is 'sae', not an SAE; open it first"),
    "fit batch_size 0": (lambda x: fit(x, batch_size=0), "batch_size=0 must be a whole number of at least 1"),
    "fit batch_size 1.5": (lambda x: fit(x, batch_size=1.5), "batch_size=1.5 must be a whole number of at least 1"),
    "fit seed": (lambda x: fit(x, seed="x"), "seed='x' must be a whole number of at least 0"),
    "fit steps 0": (lambda x: fit(x, num_inference_steps=0), "num_inference_steps=0 must be a whole number of at least 1"),
    "fit steps text": (lambda x: fit(x, num_inference_steps="4"), "num_inference_steps='4' must be a whole number of at least 1"),
    "fit steps 1001": (lambda x: fit(x, num_inference_steps=1001), "num_inference_steps=1001 is more than the 1000 .*; take fewer"),
    "fit gamma": (lambda x: fit(x, gamma=NAN), "gamma=nan must be a finite number"),
    "fit n_latents 0": (lambda x: fit(x, n_latents=0), "n_latents=0 must be a whole number from 1 to 40"),
    "fit n_latents 1000000": (lambda x: fit(x, n_latents=10**6), "n_latents=1000000 must be a whole number from 1 to 40"),
    "fit magnitude": (lambda x: fit(x, magnitude="x"), 'magnitude=\'x\' is not known; use "mean"'),
    "fit error": (lambda x: fit(x, error="x"), 'error=\'x\' is not known; use "keep"'),
    "fit misspelt": (lambda x: fit(x, num_infrence_steps=2), r"num_infrence_steps= is no argument .*; did you mean num_inference_steps\?"),
    "fit generator": (lambda x: fit(x, generator=torch.Generator()), "generator= is made here, from seed=; give that"),
    "union": (lambda x: x.erase.union(3), "later is int, not an Erase; make one"),
    "ItD erase text": (lambda x: itd(x, "a fox"), "erase='a fox' must be a list of prompts, as in"),
    "ItD erase None": (lambda x: itd(x, None), "erase=None must be a list of prompts, as in"),
    "ItD erase []": (lambda x: itd(x, []), r"erase=\[\] must be prompts that show the concept, at least one"),
    "ItD remain numbers": (lambda x: itd(x, remain=[3]), r"remain=\[3\] must be a list of prompts, as in"),
    "ItD top_m": (lambda x: itd(x, top_m=0), "top_m=0 must be a whole number from 1 to 40"),
    "ItD gate_reduce": (lambda x: itd(x, gate_reduce="x"), 'gate_reduce=\'x\' is not known; use "mean"'),
    "encode numpy": (lambda x: x.sae.encode(np.zeros((3, D))), r"x is ndarray, not a tensor: pass torch.as_tensor\(x\)"),
    "encode a list": (lambda x: x.sae.encode([[0.0] * D]), r"x is list, not a tensor: pass torch.as_tensor\(x\)"),
    "encode another width": (lambda x: x.sae.encode(torch.zeros(3, D + 1)), r"x has shape \[3, 33\]: its last dimension must be .* 32"),
    "decode a tensor": (lambda x: x.sae.decode(torch.zeros(3, N)), r"code is Tensor, not a SparseCode: pass what encode\(x\) gives"),
    "load_sae(None)": (lambda x: sf.load_sae(None), "source is NoneType, not a path; give a folder or a hub id"),
    "load_sae('')": (lambda x: sf.load_sae(""), "source is empty; name a folder or a hub id"),
    "load_sae(nothere)": (lambda x: sf.load_sae("nothere"), "nothere does not exist: pass a folder, or a hub id"),
    "load_sae dtype text": (lambda x: sf.load_sae(x.folder / "sae", dtype="float16"), "dtype is 'float16': choose a floating dtype"),
    "load_sae dtype of 8 bits": (lambda x: sf.load_sae(x.folder / "sae", dtype=torch.float8_e4m3fn), "dtype is torch.float8_e4m3fn: choose a floating dtype"),
    "collect in 8 bits": (lambda x: sf.CollectActivations("unet.mid_block", dtype=torch.float8_e5m2), "dtype is torch.float8_e5m2: choose a floating dtype"),
    "save to a name too long": (lambda x: x.sae.save(x.folder / ("x" * 300)), "folder has 'xxxxxxxxxxxxxxxxxxxx…' in it, too long for a file's name; choose a shorter one"),
    "save to a zero byte": (lambda x: steer(x).save("a\0b"), r"folder has 'a\\x00b' in it, and no file's name holds a null byte; leave it out"),
    "load from a zero byte": (lambda x: sf.load_sae("a\0b"), r"source has 'a\\x00b' in it, and no file's name holds a null byte; leave it out"),
    "load_sae device gpu": (lambda x: sf.load_sae(x.folder / "sae", device="gpu"), "device is 'gpu', which torch cannot use here: pass 'cpu'"),
    "load_sae device meta": (lambda x: sf.load_sae(x.folder / "sae", device="meta"), "device is 'meta', which torch cannot use here: pass 'cpu'"),
    "load_sae k 0": (lambda x: sf.load_sae(x.folder / "sae", k=0), "k is 0: pass a whole number of at least 1"),
    "load_instrument(None)": (lambda x: sf.load_instrument(None), "folder is NoneType, not a path; give a folder"),
    "load_instrument(nothere)": (lambda x: sf.load_instrument("nothere"), "folder='nothere' holds no instrument.json; give the folder"),
    "load_instrument of another SAE": (lambda x: sf.load_instrument(x.folder / "erase", sae=x.wide), "sae= is not the SAE that .*Pass the same SAE"),
    "save over an instrument": (lambda x: x.erase.save(x.folder / "erase"), "holds an instrument already; save to another folder, or replace it by overwrite=True"),
    "save another kind over it": (lambda x: steer(x).save(x.folder / "erase"), "holds an instrument already; save to another folder"),
    "save over somebody's work": (lambda x: x.erase.save(x.folder / "full", overwrite=True), "full exists already; choose another folder"),
    "save an SAE over it": (lambda x: x.wide.save(x.folder / "sae"), "holds an SAE of another config: choose a new folder"),
    "save statistics over others": (
        lambda x: (x.statistics.save(x.folder / "s"), Statistics(["a", "b"], N, [1.0]).save(x.folder / "s")), "holds statistics of other concepts or another SAE; save to another folder"
    ),
    "save(None)": (lambda x: x.erase.save(None), "folder is NoneType, not a path; give a folder"),
    "save('')": (lambda x: x.erase.save(""), "folder is empty; name a folder"),
    "save below a file": (lambda x: x.erase.save(x.folder / "full" / "thesis" / "y"), "cannot be made, .*thesis is a file; choose another place"),
    "save where nothing can be": (lambda x: x.erase.save("/proc/erase"), r"folder /proc/erase cannot be made \(.*\); choose another place"),
    "check prompts text": (lambda x: sf.check(x.sae, x.pipe, "a fox"), "prompts is 'a fox': pass a list with at least one prompt"),
    "check steps 0": (lambda x: sf.check(x.sae, x.pipe, ["a"], num_inference_steps=0), "num_inference_steps=0 must be a whole number"),
    "check pipe None": (lambda x: sf.check(x.sae, None, ["a"]), "pipe is NoneType, not a pipeline; open one"),
    "statistics of no latents": (lambda x: Statistics(["a"], 0), "n_latents=0 must be a whole number of at least 1"),
    "statistics of one word": (lambda x: Statistics("fox", N), "concepts='fox' must be one or more different names, as a list"),
    "collect_statistics of a list": (lambda x: collect_statistics(x.pipe, x.sae, ["a"]), r"prompts=\['a'\] must map concepts to their prompts"),
    "search for another": (lambda x: search(x.statistics, "owl", 1), "concept='owl' is not in these statistics, which have fox, cat"),
    "negative_prompt(None)": (lambda x: sf.negative_prompt(None), "concept=None must be a word or a list of words"),
    "a call's misspelt argument": (lambda x: run(x, sf.Record(x.sae), guidence_scale=3), r"guidence_scale= is no argument .*; did you mean guidance_scale\?"),
    "a call's NaN": (lambda x: run(x, sf.Record(x.sae), guidance_scale=NAN), "guidance_scale=nan must be a finite number"),
    "a call's latents": (
        lambda x: run(x, sf.Record(x.sae), latents=torch.full((1, 4, 16, 16), NAN)), r"latents holds NaN or infinity, 1024 of 1024"
    ),
    "Steer add of digits": (lambda x: steer(x, add={1: "8"}), r"add\[1\]='8' must be a finite number"),
    "Steer add inf": (lambda x: steer(x, add={1: np.inf}), r"add\[1\]=inf must be a finite number"),
    "Steer clamp NaN": (lambda x: steer(x, clamp={1: (0, NAN)}), r"clamp\[1\]=\(0, nan\) must be \(low, high\)"),
    "Steer add_map NaN": (lambda x: steer(x, add_map={1: [[NAN]]}), r"add_map\[1\] holds NaN or infinity, 1 of 1 entries"),
    "an SAE with a NaN": (lambda x: sf.Record(spoilt(x.sae)), r"sae\.W_dec holds NaN or infinity, 1 of 1280 entries, the first at \[3, 4\]"),
    "an SAE with a NaN steers": (lambda x: sf.Steer(spoilt(x.sae), scale={1: 0}), r"sae\.W_dec holds NaN or infinity"),
    "ItD strength": (lambda x: itd(x, strength=NAN), "strength=nan must be a finite number"),
    "ItD tau": (lambda x: sf.InterpretThenDeactivate(x.sae, [1], tau=NAN), "tau=nan must be a finite number"),
    "ItD latents": (lambda x: sf.InterpretThenDeactivate(x.sae, [1.5]), r"latents=\[1.5\] must be the latents' numbers"),
    "PromptVector strength": (lambda x: sf.PromptVector(x.sae, "a fox", NAN), "strength=nan must be a finite number"),
    "TrainConfig lr": (lambda x: sf.TrainConfig(steps=3, lr=NAN), "lr=nan must be a finite number above 0"),
    "TrainConfig steps": (lambda x: sf.TrainConfig(steps=2.5), "steps=2.5 must be a whole number of at least 1"),
    "statistics at NaN": (lambda x: Statistics(["a"], N, [NAN]), "timestep=nan must be a finite number"),
    "search for none": (lambda x: search(x.statistics, "fox", 0), "n=0 must be a whole number of at least 1"),
    "Examples of none": (lambda x: sf.Examples(N, top=0), "top=0 must be a whole number of at least 1"),
    "a call's prompt 3": (lambda x: run(x, sf.Record(x.sae), prompt=3), "prompt=3 must be a text, or a list of at least one"),
    "a call's guidance in text": (lambda x: run(x, sf.Record(x.sae), guidance_scale="3"), "guidance_scale='3' must be a number"),
    "a call's generator 3": (lambda x: run(x, sf.Record(x.sae), generator=3), "generator=3 must be a torch.Generator, as in"),
    "a call's 0 images": (lambda x: run(x, sf.Record(x.sae), num_images_per_prompt=0), "num_images_per_prompt=0 must be a whole number"),
    "word's occurrence": (lambda x: maps(x).word("fox", occurrence="first"), "occurrence=first of word='fox' does not exist; it occurs 1"),
    "map of a token": (lambda x: maps(x).map(2), r"tokens=2 must be a list of token positions, as in .map\(\[2, 3\]\)"),
    "overlay on a name": (lambda x: maps(x).word("fox").overlay("fox.png"), "image is str, not a PIL image; give one"),
    "overlay in no colours": (lambda x: maps(x).word("fox").overlay(Image.new("RGB", (8, 8)), colors="x"), "colors='x' is no colour map of matplotlib; use"),
    "map of a latent's name": (lambda x: recording(x).map("x"), "latent=x is out of range; this SAE has 40 latents"),
    "Splice(None)": (lambda x: sf.Splice(None), "sae is NoneType, not an SAE; open it first"),
    "from_statistics(None)": (lambda x: sf.Erase.from_statistics(x.sae, None, "fox"), "statistics is NoneType, not a Statistics; collect them"),
    "Erase of numbers": (lambda x: sf.Erase(x.sae, {1.0: 3}), r"selections\[1.0\] is int, not a Selection; make one"),
    "ItD of names": (lambda x: sf.InterpretThenDeactivate(x.text, "x"), "latents='x' must be the latents' numbers, as in"),
    "merge": (lambda x: x.statistics.merge(3), "statistics is int, not a Statistics; collect them"),
    "CollectStatistics of None": (lambda x: sf.CollectStatistics(x.sae, x.statistics, None), "concepts=None must be a list, one for each prompt"),
    "check rows": (lambda x: sf.check(x.sae, x.pipe, ["a"], rows=0), "rows=0 must be a whole number of at least 2"),
    "AttendAndExcite thresholds": (lambda x: sf.AttendAndExcite(["fox"], thresholds=[0.1]), r"thresholds=\[0.1\] must map steps to heights"),
    "AttendAndExcite resolution": (lambda x: sf.AttendAndExcite(["fox"], resolution=3), r"resolution=3 must be \(height, width\), two whole"),
    "AStar resolution": (lambda x: sf.AStar(["fox"], resolution=(0, 4)), r"resolution=\(0, 4\) must be \(height, width\)"),
    "HeatMaps layer_weights": (lambda x: sf.HeatMaps(layer_weights=[1.0]), r"layer_weights=\[1.0\] must map parts of layers' paths"),
    "map of a token's share": (lambda x: maps(x).map([1.5]), r"tokens=\[1.5\] must be a list of token positions"),
    "map of a word": (lambda x: maps(x).map("fox"), r"tokens='fox' must be a list of token positions"),
    "mask above all": (lambda x: maps(x).word("fox").mask(5), "threshold=5 must be a finite number from 0 to 1"),
    "mask of no size": (lambda x: maps(x).word("fox").mask(size=(0, 3)), r"size=\(0, 3\) must be \(height, width\)"),
    "resized to a number": (lambda x: maps(x).word("fox").resized(64), r"size=64 must be \(height, width\)"),
    "SelfAttention grid": (lambda x: sf.SelfAttention(grid=3), r"grid=3 must be \(height, width\), two whole numbers"),
    "propagate an array": (lambda x: run(x, sf.SelfAttention()).propagate(np.ones((4, 4))), r"maps is ndarray, not a tensor: pass torch.as_tensor\(maps\)"),
    "propagate NaN": (lambda x: run(x, sf.SelfAttention()).propagate(torch.full((4, 4), NAN)), "maps holds NaN or infinity, 16 of 16 entries"),
    "concepts' foreground": (lambda x: run(x, sf.SelfAttention()).concepts(foreground=3), "foreground is int, not a tensor"),
    "read_image of a name": (lambda x: sf.read_image(x.pipe, sf.HeatMaps(), "fox.png", "a fox"), "image is str, not an image; open one, PIL"),
    "read_image of None": (lambda x: sf.read_image(x.pipe, sf.HeatMaps(), None, "a fox"), "image is NoneType, not an image; open one"),
    "read_image without maps": (lambda x: sf.read_image(x.pipe, None, Image.new("RGB", (32, 32))), "maps is NoneType, not HeatMaps; make"),
    "CollectActivations dtype": (lambda x: sf.CollectActivations("unet.mid_block", dtype="float16"), "dtype is 'float16': choose a floating dtype"),
    "CollectActivations seed": (lambda x: sf.CollectActivations("unet.mid_block", seed=-1), "seed=-1 must be a whole number of at least 0"),
    "CollectActivations worker": (lambda x: sf.CollectActivations("unet.mid_block", worker=1.5), "worker=1.5 must be a whole number"),
    "CollectActivations steps": (lambda x: sf.CollectActivations("unet.mid_block", steps_per_image=1.5), "steps_per_image=1.5 must be a whole"),
    "CollectActivations shards": (lambda x: sf.CollectActivations("unet.mid_block", shard_rows=0), "shard_rows=0 must be a whole number of at"),
    "CollectActivations memory": (lambda x: sf.CollectActivations("unet.mid_block", max_bytes=0), "max_bytes=0 must be a whole number of at"),
    "CollectActivations twice": (lambda x: sf.CollectActivations("unet.mid_block", "unet.mid_block"), "hookpoints has 'unet.mid_block' twice: name"),
    "CollectActivations nowhere": (lambda x: sf.CollectActivations("unet.mid_block", folder="/proc/x"), r"folder /proc/x cannot be made \("),
    "CollectActivations into a file": (
        lambda x: sf.CollectActivations("unet.mid_block", folder=x.folder / "full" / "thesis"), "thesis is a file; name a folder"
    ),
    "SAETrainer of nothing": (lambda x: sf.SAETrainer(x.sae, None, sf.TrainConfig(steps=2)), "rows is NoneType, no activations: pass a tensor"),
    "SAETrainer of an array": (lambda x: sf.SAETrainer(x.sae, np.ones((9, D)), sf.TrainConfig(steps=2)), "rows is ndarray, no activations: pass"),
    "SAETrainer without an SAE": (lambda x: sf.SAETrainer(None, torch.ones(9, D), sf.TrainConfig(steps=2)), "sae is NoneType, not an SAE; make one"),
    "SAETrainer's config": (lambda x: sf.SAETrainer(x.sae, torch.ones(9, D), {"steps": 2}), "config is dict, not a TrainConfig; make one"),
    "SAETrainer nowhere": (
        lambda x: sf.SAETrainer(x.sae, torch.ones(9, D), sf.TrainConfig(steps=2, batch_size=4), "/proc/x"), r"folder /proc/x cannot be made \("
    ),
    "SAETrainer in ''": (lambda x: sf.SAETrainer(x.sae, torch.ones(9, D), sf.TrainConfig(steps=2, batch_size=4), ""), "folder is empty; name a"),
    "TrainConfig objective": (lambda x: sf.TrainConfig(steps=2, objective="topk"), "objective is str, not an Objective; make one"),
    "TrainConfig betas": (lambda x: sf.TrainConfig(steps=2, betas=0.9), "betas is 0.9: pass two numbers, from 0 to below 1"),
    "Names of a list": (lambda x: sf.Names(["fox"]), r"names=\['fox'\] must map latents to names"),
    "Names of no number": (lambda x: sf.Names({"a": "fox"}), "latent='a' must be a whole number of at least 0"),
    "Names of no text": (lambda x: sf.Names({1: 3}), r"names\[1\]=3 must be a text"),
    "PromptVector nowhere": (lambda x: sf.PromptVector(x.text, "fox", 1.0, at=[]), r"at=\[\] must be one hookpoint or a list"),
    "Record memory": (lambda x: sf.Record(x.sae, max_bytes=-1), "max_bytes=-1 must be a whole number of at least 0"),
    "Record positions": (lambda x: sf.Record(x.sae, positions="no"), "positions='no' must be True or False"),
    "Record store": (lambda x: sf.Record(x.sae, store=""), "store is empty; name a folder"),
    "Examples of others": (lambda x: sf.Examples(N, latents=[99]), r"latents=\[99\] must be a list, not empty, each a whole number from 0 to 39"),
    "Examples of no latent": (lambda x: sf.Examples(N, latents=[]), r"latents=\[\] must be a list, not empty"),
    "CollectExamples of None": (lambda x: sf.CollectExamples(x.sae, None), "examples is NoneType, not Examples; make some"),
    "CollectStatistics of others": (
        lambda x: sf.CollectStatistics(x.sae, Statistics(["a"], 7), ["a"]), "statistics are of 7 latents, the SAE has 40"
    ),
    "SAE of a dict": (lambda x: sf.SAE({"d_model": 3}), "config is dict, not an SAEConfig; make one"),
    "Hookpoint of nothing": (lambda x: sf.Hookpoint(""), "path='' is no module's path; name one"),
    "SAEConfig k": (lambda x: sf.SAEConfig(d_model=4, n_latents=4, k=9), "k is 9 but n_latents is 4: choose k no larger"),
    "attach the class": (lambda x: sf.attach(x.pipe, sf.Record), r"instruments\[0\] is type, not an Instrument"),
    "attach the wrong way round": (lambda x: sf.attach(sf.Record(x.sae), x.pipe), "attach takes the pipeline first and instruments after it"),
    "maps of a number": (lambda x: recording(x).maps(3), r"latents=3 must be a list of latents; of one, .map\(3\)"),
    "Steer clamp text": (lambda x: steer(x, clamp={1: ("a", 2)}), r"clamp\[1\]=\('a', 2\) must be \(low, high\)"),
    "Steer condition list": (lambda x: steer(x, condition=["cond"]), r"condition=\['cond'\] is not known; use one of 'cond'"),
    "Steer mask a heat map": (lambda x: steer(x, mask=maps(x).word("fox")), r"mask is HeatMap, of which one map is meant; give its .scaled\(\)"),
    "Steer mask all heat maps": (lambda x: steer(x, mask=maps(x)), r"mask is HeatMapRecording, of which one map is meant; give its \[word\]"),
    "Steer mask HeatMaps": (lambda x: steer(x, mask=sf.HeatMaps()), r"mask is HeatMaps, of which one map is meant; give its .mask\(word\)"),
    "Hookpoint rows 5": (lambda x: sf.Hookpoint("a", rows=5), r"rows=5 of hookpoint 'a' are not \(start, stop\)"),
    "Hookpoint rows text": (lambda x: sf.Hookpoint("a", rows=("a", "b")), r"rows=\('a', 'b'\) of hookpoint 'a' are not \(start, stop\)"),
    "Hookpoint rows 1.5": (lambda x: sf.Hookpoint("a", rows=(1.5, 3)), r"rows=\(1.5, 3\) of hookpoint 'a' are not \(start, stop\)"),
    "Hookpoint of all": (lambda x: sf.Hookpoint("a:diff"), r"path='a:diff' has more than the path; read it by Hookpoint.parse\('a:diff'\)"),
    "load_sae subfolder 3": (lambda x: sf.load_sae(x.folder / "sae", subfolder=3), "subfolder is 3: pass it as text"),
    "load_sae revision 3": (lambda x: sf.load_sae(x.folder / "sae", revision=3), "revision is 3: pass it as text"),
    "encode k text": (lambda x: x.sae.encode(torch.zeros(3, D), k="x"), "k is 'x': pass a whole number from 1 to 40"),
    "encode k 0": (lambda x: x.sae.encode(torch.zeros(3, D), k=0), "k is 0: pass a whole number from 1 to 40"),
    "decode like others": (
        lambda x: x.sae.decode(x.sae.encode(torch.zeros(3, D)), like=torch.zeros(4, D)), r"like has shape \[4, 32\], the code 3 rows: pass what was encoded"
    ),
    "decode like text": (lambda x: x.sae.decode(x.sae.encode(torch.zeros(3, D)), like="x"), "x is str, not a tensor"),
    "directions of a share": (lambda x: x.sae.directions([1.5]), r"latents is \[1.5\]: pass a list of whole numbers"),
    "directions of a mask": (lambda x: x.sae.directions(torch.tensor([True, False])), r"latents is tensor\(\[ True, False\]\): pass a list of whole numbers"),
    "names of a list": (lambda x: setattr(x.sae, "names", ["fox"]), r"names=\['fox'\] must map latents to names"),
    "names beyond the SAE": (lambda x: setattr(x.sae, "names", sf.Names({99: "fox"})), "names has latent 99; this SAE has latents 0 to 39"),
    "fit a number's prompts": (lambda x: fit(x, prompts={"fox": ["a"], 3: ["b"]}), "prompts has the concept 3; name each by a text"),
    "fit steps None": (lambda x: fit(x, num_inference_steps=None), "num_inference_steps=None must be a number; leave it out for 50"),
    "a call's guidance None": (lambda x: run(x, sf.Record(x.sae), guidance_scale=None), "guidance_scale=None must be a number; leave it out for 7.5"),
    "a call's callback": (lambda x: run(x, sf.Record(x.sae), callback_on_step_end=3), "callback_on_step_end=3 must be a function"),
    "a call's num_steps": (lambda x: run(x, sf.Record(x.sae), num_steps=3), r"num_steps= is no argument .*; did you mean num_inference_steps\?"),
    "Erase of a list": (lambda x: sf.Erase(x.sae, [1, 2]), r"selections=\[1, 2\] must map timesteps to selections"),
    "from_statistics of None": (lambda x: sf.Erase.from_statistics(x.sae, x.statistics, None), "concept=None must be one or more of several concepts: fox, cat"),
    "load_instrument sae text": (lambda x: sf.load_instrument(x.folder / "erase", sae="sae"), "sae is str, not an SAE; open it first"),
    "save overwrite text": (lambda x: x.erase.save(x.folder / "erase", overwrite="no"), "overwrite='no' must be True or False"),
    "save include_sae text": (lambda x: x.erase.save(x.folder / "new", include_sae="no"), "include_sae='no' must be True or False"),
    "word of image a": (lambda x: maps(x).word("fox", image="a"), "image=a is out of range; the call made 1"),
    "mask of word 3": (lambda x: sf.HeatMaps().mask(3), "word=3 is no word; name a word of the prompt"),
    "mask above all for Steer": (lambda x: sf.HeatMaps().mask("fox", threshold=2), "threshold=2 must be a finite number from 0 to 1"),
    "HeatMaps keep 3": (lambda x: sf.HeatMaps(keep=3), "keep=3 must be a list of 'layers', 'heads', 'steps'"),
    "check seed": (lambda x: sf.check(x.sae, x.pipe, ["a"], seed="x"), "seed='x' must be a whole number of at least 0"),
    "TrainConfig seed": (lambda x: sf.TrainConfig(steps=2, seed=None), "seed=None must be a whole number of at least 0"),
    "statistics of numbers": (lambda x: Statistics([3], N), r"concepts=\[3\] must be one or more different names"),
    "statistics at a number": (lambda x: Statistics(["a"], N, timesteps=3), "timesteps=3 must be a list of numbers"),
    "statistics' mean of None": (lambda x: x.statistics.mean(None), "concept=None is not in these statistics, which have fox, cat"),
    "statistics' mean at x": (lambda x: x.statistics.mean("fox", "x"), "timestep='x' must be a finite number"),
    "statistics of no code": (lambda x: x.statistics.add(3, torch.zeros(3), 1.0), "code is int, not a SparseCode; give what sae.encode"),
    "statistics of a text": (lambda x: x.statistics.add(x.sae.encode(torch.zeros(3, D)), "fox", 1.0), "concept='fox' must be a tensor of whole numbers, one for each of 3 rows"),
    "statistics of 2 rows": (lambda x: x.statistics.add(x.sae.encode(torch.zeros(3, D)), torch.zeros(2).long(), 1.0), r"concept=tensor\(\[0, 0\]\) must be a tensor of whole"),
    "statistics of concept 9": (lambda x: x.statistics.add(x.sae.encode(torch.zeros(3, D)), torch.full((3,), 9), 1.0), "concept has 9; these statistics have 2, counted from 0"),
    "statistics saved to 3": (lambda x: x.statistics.save(3), "folder is int, not a path; give a folder"),
    "search in 3": (lambda x: search(3, "fox"), "statistics is int, not a Statistics; collect them"),
    "search against a text": (lambda x: search(x.statistics, "fox", others="cat"), "others='cat' must be a list of concepts, or left out"),
    "search against none": (lambda x: search(x.statistics, "fox", others=[]), r"others=\[\] must be a list of concepts, or left out"),
    "search with examples 3": (lambda x: search(x.statistics, "fox", examples=3), "examples is int, not Examples; give those"),
    "Examples add 3": (lambda x: sf.Examples(N).add(3), "recording is int, not a Recording; give a Record's"),
    "Examples add a text": (lambda x: sf.Examples(N).add(recording(x), concepts="fox"), "concepts='fox' must be a list, one entry for each image"),
    "CollectExamples of 3": (lambda x: sf.CollectExamples(x.sae, sf.Examples(N), {"a fox": 3}), r"concepts\['a fox'\]=3 must be a concept's name, a list"),
    "CollectStatistics of an owl": (lambda x: sf.CollectStatistics(x.sae, x.statistics, {"a fox": "owl"}), "concept='owl' is not in these statistics"),
    "CollectStatistics of 3": (lambda x: sf.CollectStatistics(x.sae, x.statistics, [3]), "concept=3 must be a concept's name, a list of names, or None"),
    "read_image of no pipeline": (lambda x: sf.read_image(None, sf.HeatMaps(), Image.new("RGB", (32, 32)), "a fox"), "pipe is NoneType, not a pipeline"),
    "Names.read 3": (lambda x: sf.Names.read(3), "path is int, not a path; give a file"),
    "Names.read nothere": (lambda x: sf.Names.read("nothere"), "path nothere does not exist; name a file of latents and names"),
    "Names.find 3": (lambda x: sf.Names({1: "a"}).find(3), "the name of a latent is 3, no text: write what it says"),
    "of_neuronpedia of 3": (lambda x: sf.Names.of_neuronpedia("a/b", 3), "latents=3 must be a list, not empty"),
    "Exchange.fit pipe": (lambda x: sf.Exchange.fit(None, x.text, "fox", PROMPTS), "pipe is NoneType, not a pipeline"),
    "Exchange.fit sae": (lambda x: sf.Exchange.fit(x.pipe, None, "fox", PROMPTS), "sae is NoneType, not an SAE; open it first"),
    "Exchange.fit target list": (lambda x: sf.Exchange.fit(x.pipe, x.text, ["fox"], PROMPTS), r"target=\['fox'\] must be a key of prompts="),
    "Exchange.fit misspelt": (lambda x: sf.Exchange.fit(x.pipe, x.text, "fox", PROMPTS, clip_skipp=1), r"clip_skipp= is no argument .*; did you mean clip_skip\?"),
    "Exchange of names": (lambda x: sf.Exchange(x.text, "x", torch.zeros(1, D)), "latents is 'x': pass a list of whole numbers"),
    "Exchange of a share": (lambda x: sf.Exchange(x.text, [1.5], torch.zeros(1, D)), r"latents is \[1.5\]: pass a list of whole numbers"),
    "PosteriorAttenuation of names": (lambda x: sf.PosteriorAttenuation(x.sae, "x", torch.zeros(1, 3)), "latents is 'x': pass a list of whole numbers"),
    "ESD.fit modules": (lambda x: sf.ESD.fit(x.pipe, "fox", modules=3), "modules=3 must be a part of a path, as 'ff', or a list of paths"),
    "cad_erase of 3": (lambda x: sf.cad_erase(x.pipe, 3), r"prompts=3 must be a prompt of the concept, or a list"),
    "attribute_weights of None": (lambda x: sf.attribute_weights(x.pipe, None), "prompts=None must be a prompt of the concept, or a list"),
    "Inversion of a number": (lambda x: sf.Inversion.of(x.pipe, 3, "a"), "image is int, not an image; open one, PIL"),
    "Inversion of no pipeline": (lambda x: sf.Inversion.of(None, Image.new("RGB", (32, 32)), "a"), "pipe is NoneType, not a pipeline"),
    "SelfAttention layers": (lambda x: sf.SelfAttention(layers=3), "layers=3 must be a module path or a list of them"),
    "SelfAttention seed": (lambda x: run(x, sf.SelfAttention()).seed("a", 0.5), "y='a' must be a finite number from 0 to 1"),
    "WordCorrelations of 3": (lambda x: sf.WordCorrelations(N, 3), "words=3 must be a list of different words"),
    "WordCorrelations add": (lambda x: sf.WordCorrelations(N, ["fox"]).add(recording(x), 3), "maps is int, not a HeatMapRecording"),
    "Blindspots of one image": (lambda x: sf.Blindspots.of(x.pipe, x.sae, Image.new("RGB", (32, 32)), "a"), "images and prompts must be lists, an image and its caption"),
    "sdxl_unbox without an SAE": (lambda x: sf.presets.sdxl_unbox.paint(None, 1, torch.ones(4, 4)), "sae is NoneType, not an SAE; open it first"),
    "flux_sae without an SAE": (lambda x: sf.presets.flux_sae.steer(None, 1, 3.0), "sae is NoneType, not an SAE; open it first"),
    "flux_sae in half a rectangle": (lambda x: sf.presets.flux_sae.steer(x.sae, 1, 3.0, (3, 3)), r"rectangle=\(3, 3\) must be \(top, left, bottom, right\)"),
    "itd without an SAE": (lambda x: sf.presets.itd.erase(x.pipe, None, "style", ["a"]), "sae is NoneType, not an SAE; open it first"),
    "load_pipeline(3)": (lambda x: load_pipeline(3), "folder is int, not a path; give a folder"),
    "load_pipeline(nothere)": (lambda x: load_pipeline("nothere"), "no pipeline in nothere; give a diffusers folder, or train one"),
    "fit percentile and n_latents": (
        lambda x: fit(x, percentile=99.0), "percentile=99.0 and n_latents=3 each say how many latents are selected; give one of them"
    ),
    "from_statistics by both": (
        lambda x: sf.Erase.from_statistics(x.sae, x.statistics, "fox", percentile=0, n_latents=2), "percentile=0 and n_latents=2 each say"
    ),
    "select by both": (lambda x: select(x.statistics, "fox", 1.0, percentile=0, n_latents=2), "percentile=0 and n_latents=2 each say"),
    "select too many": (lambda x: select(x.statistics, "fox", 1.0, n_latents=N + 1), "n_latents=41 must be a whole number from 1 to 40"),
    "at_timestep x": (lambda x: x.sae.at_timestep("x"), "timestep='x' must be a finite number"),
    "at_timestep NaN": (lambda x: x.sae.at_timestep(NAN), "timestep=nan must be a finite number"),
    "selection_at x": (lambda x: x.erase.selection_at("x"), "timestep='x' must be a finite number"),
    "nearest to x": (lambda x: x.statistics.nearest("x"), "timestep='x' must be a finite number"),
    "a call's height alone": (
        lambda x: run(x, sf.Record(x.sae), height=64), "height=64 is ignored by StableDiffusionPipeline without width=; give both"
    ),
    "a call's width alone": (lambda x: run(x, sf.Record(x.sae), width=64), "width=64 is ignored by StableDiffusionPipeline without height="),
    "a fit's height alone": (lambda x: fit(x, height=64), "height=64 is ignored by StableDiffusionPipeline without width=; give both"),
    "read_image of two prompts": (
        lambda x: sf.read_image(x.pipe, sf.HeatMaps(), Image.new("RGB", (32, 32)), ["a", "b"]), r"prompt=\['a', 'b'\] must be one text"
    ),
    "read_image of two images": (
        lambda x: sf.read_image(x.pipe, sf.HeatMaps(), [Image.new("RGB", (32, 32))] * 2, "a"), "image is a list of 2; give one image"
    ),
    "read_image's steps": (
        lambda x: sf.read_image(x.pipe, sf.HeatMaps(), Image.new("RGB", (32, 32)), "a", num_inference_steps=3),
        "num_inference_steps= is made here, from noise=; give that in its place"
    ),
    "read_image's generator": (
        lambda x: sf.read_image(x.pipe, sf.HeatMaps(), Image.new("RGB", (32, 32)), "a", generator=torch.Generator()),
        "generator= is made here, from seed=; give that in its place"
    ),
    "run of another": (lambda x: session(x)["other"], "^'other' was not attached in this session, which has Record; look up by the object"),
    "run of another Record": (lambda x: session(x)[sf.Record(x.sae)], "^this Record was not attached in this session, which has Record; look"),
    "run before a call": (lambda x: session(x, calls=0)[0], "^no call of the pipeline has completed in this session; call it first"),
    "a call's recording of another": (lambda x: session(x).calls[0][3], "^3 was not attached in this session, which has Record; look"),
    "name of another": (lambda x: sf.Names({1: "fox"})[5], r"^latent 5 has no name here; .get\(latent\) gives None"),
    "name of a name": (lambda x: sf.Names({1: "fox"})["fox"], r"^latent 'fox' has no name here; .*.find\(name\) the latent"),
    "a loop of one's own of a number": (lambda x: own_loop(x, 5), "prompts=5 must be a text or a list of texts"),
    "a loop of one's own of no images": (lambda x: own_loop(x, "a fox", images_per_prompt=0), "images_per_prompt=0 must be a whole number of at least 1"),
    "a loop of one's own with a scale": (lambda x: own_loop(x, "a fox", guidance=7.5), "guidance=7.5 must be True or False"),
    "cones of latents and images": (
        lambda x: sf.cones(x.pipe, "a fox", images=3, latents=torch.zeros(2, 4, 16, 16)), "images=3 is not the 2 of latents=, which are not drawn"
    ),
    "circuit of latents and an objective": (
        lambda x: sf.circuit(x.pipe, x.sae, x.sae, "a fox", latents=[1], objective=lambda *given: 0), "objective= chooses the downstream latents"
    ),
    "a call's prompts in an array": (lambda x: run(x, sf.Record(x.sae), prompt=np.array(["a", "b"])), r"prompt=array\(.* must be a text, or a list"),
    "a call's prompt in bytes": (lambda x: run(x, sf.Record(x.sae), prompt=b"a fox"), "prompt=b'a fox' must be a text, or a list"),
    "a call's generators in a tuple": (lambda x: run(x, sf.Record(x.sae), generator=(torch.Generator(),)), "generator is a tuple; give the generators as a list"),
    "a call's guidance list": (lambda x: run(x, sf.Record(x.sae), guidance_scale=[3.0]), r"guidance_scale=\[3.0\] must be a number; leave it out for 7.5"),
    "a call's latents of numpy": (lambda x: run(x, sf.Record(x.sae), latents=np.zeros((1, 4, 16, 16))), r"latents is an array of numpy; give a tensor, torch.as_tensor\(latents\)"),
    "maps of no step": (lambda x: run(x, sf.HeatMaps(steps=[99])).word("fox"), "no maps of the call, as none of the 2 steps that ran is among its own; look at its steps="),
    "maps of no row": (
        lambda x: run(x, sf.HeatMaps(condition="uncond"), guidance_scale=1.0).word("fox"), "no maps of the call, as no row was 'uncond' in it; look at condition= and at the guidance"
    ),
    "a guard's generator": (
        lambda x: sf.guard_concept(x.pipe, [x.sae], "fox", PROMPTS, generator=torch.Generator()), "generator= is made here, from seed=; give that in its place"
    ),
    "cad_erase with a generator": (lambda x: sf.cad_erase(x.pipe, "a fox", generator=torch.Generator()), "generator= is made here, from seed=; give that"),
    "attribute_latents with a prompt": (lambda x: sf.attribute_latents(x.pipe, x.sae, "a fox", prompt="a"), "prompt= is made here, from prompts=; give that"),
    "df_cam's output": (lambda x: sf.df_cam(x.pipe, "a fox", "unet.mid_block", output_type="pil"), "output_type= is made here; leave it out"),
    "ESD of embeddings": (lambda x: sf.ESD.fit(x.pipe, "a fox", prompt_embeds=torch.zeros(1, 16, 32)), "prompt_embeds= is made here; leave it out"),
    "fit several images a prompt": (lambda x: fit(x, num_images_per_prompt=2), "num_images_per_prompt= is made here, from prompts=; give that"),
    "fit latents": (lambda x: fit(x, latents=torch.zeros(1, 4, 16, 16)), "latents= is made here, from seed=; give that in its place"),
    "fit prompts that are used up": (lambda x: fit(x, prompts={"fox": ["a fox"], "cat": (p for p in ["a cat"])}), r"prompts\['cat'\]=<generator .* must be a list"),
    "discover_direction guidance": (
        lambda x: sf.discover_direction(x.pipe, "unet.mid_block", ["a fox"], "a", epochs=1, guidance_scale=NAN), "guidance_scale=nan must be a finite number"
    ),
    "Blindspots guidance": (
        lambda x: sf.Blindspots.of(x.pipe, x.sae, [Image.new("RGB", (64, 64))], ["a"], guidance_scale=NAN), "guidance_scale=nan must be a finite number"
    ),
    "Inversion in other steps": (
        lambda x: sf.Inversion.of(x.pipe, Image.new("RGB", (64, 64)), "a", num_inference_steps=2), "num_inference_steps= is made here, from steps=; give that"
    ),
    "Inversion with guidance": (lambda x: sf.Inversion.of(x.pipe, Image.new("RGB", (64, 64)), "a", guidance_scale=7.5), "guidance_scale= is made here; leave"),
    "Inversion misspelt": (lambda x: sf.Inversion.of(x.pipe, Image.new("RGB", (64, 64)), "a", step=2), "step= is no argument .*; did you mean steps"),
    "SAE.save in integers": (lambda x: x.sae.save(x.folder / "whole", dtype=torch.int8), "dtype is torch.int8: choose a floating dtype"),
    "SAE.save in a text": (lambda x: x.sae.save(x.folder / "text", dtype="float16"), "dtype is 'float16': choose a floating dtype"),
    "step_weights by step": (lambda x: sf.HeatMaps(step_weights={0: 1.0, 1: 2.0}), r"step_weights=\{0: 1.0, 1: 2.0\} must be a list, a factor for each step"),
    "step_weights 3": (lambda x: sf.HeatMaps(step_weights=3), "step_weights=3 must be a list, a factor for each step"),
    "step_weights of more steps": (lambda x: run(x, sf.HeatMaps(step_weights=[1.0] * 9)), "step_weights has 9 numbers, and the call has 2 steps"),
    "Steer clamp True": (lambda x: steer(x, clamp={1: (False, True)}), r"clamp\[1\]=\(False, True\) must be \(low, high\)"),
    "SAETrainer of a trained SAE": (lambda x: trainer(trained(x)), r"sae has weights already, and training would begin anew .*: train a new one, sparsefeat.SAE\(sae.config\)"),
    "SAETrainer of a frozen SAE": (
        lambda x: trainer(sf.SAE(x.sae.config).requires_grad_(False)), r"sae has weights that require no gradient: call sae.requires_grad_\(True\)"
    ),
    "SAETrainer under inference_mode": (
        lambda x: torch.inference_mode()(lambda: trainer(sf.SAE(x.sae.config)))(), "sae cannot be trained under torch.inference_mode: make it, and train it, outside"
    ),
    "AddVector at two places": (
        lambda x: sf.AddVector(["unet.mid_block", "unet.up_blocks.1"], torch.ones(D)), r"at=\['unet.mid_block', .* are 2 hookpoints; give one, and each of several"
    ),
    "PrincipalDirections at two places": (
        lambda x: sf.PrincipalDirections.fit(x.pipe, ["unet.mid_block", "unet.up_blocks.1"], ["a"], n=1), "are 2 hookpoints; give one, and each"
    ),
    "AddVector of an array": (lambda x: sf.AddVector("unet.mid_block", np.ones(D)), r"vector is ndarray, not a tensor; give torch.as_tensor\(vector\)"),
    "an SAE on meta": (lambda x: run(x, sf.Record(copy.deepcopy(x.sae).to("meta"))), r"the SAE has no weights, it is on the device 'meta'; open it with sparsefeat.load_sae"),
    "a name that is not there": (lambda x: sf.Recrod, "no attribute 'Recrod'; it offers .*Record"),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_python_refuses_it_in_one_sentence_and_loses_nothing(name, x, recwarn):
    do, said = PYTHON[name]
    before = everything(x.folder)
    with pytest.raises((ValueError, TypeError, OSError, AttributeError, KeyError), match=said) as refused:
        do(x)
    assert "\n" not in str(refused.value)
    assert not re.search(r"--\w", str(refused.value))  # whoever reads Python is told arguments
    kept = everything(x.folder)
    assert {file: kept[file] for file in before} == before
    assert "_sparsefeat_wiring" not in vars(type(x.pipe))  # and the pipeline is as it was


def test_the_table_is_long_enough():
    assert len(AT_ONCE) + len(LATER) + len(PYTHON) >= 80
