"""Commands that are interrupted or ended from outside say what is true, keep what they say, and do not block the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsefeat.assets import cross_attention_sae_folders
from sparsefeat.cli import app
from tests import killing

COMMAND = [sys.executable, "-m", "sparsefeat.cli"]


def start(line: list[str], folder: Path) -> subprocess.Popen:
    # Whoever started these tests in the background may have had signals ignored, which children inherit.
    heard = "import signal, os, sys; signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heard, *COMMAND, *line]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Forked:
    """A command whose imports are done: what is interrupted is its work. Of Popen, what these tests ask."""

    def __init__(self, line: list[str], folder: Path):
        self._heard = folder.with_name(f"{folder.name}-heard")
        self._process = killing.begin(command, line, folder, self._heard)

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        return "", self._heard.read_text()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def command(line: list[str], folder: Path, heard: Path) -> None:
    os.chdir(folder)
    with heard.open("w") as file:
        os.dup2(file.fileno(), 2)
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)
    app(line, prog_name="sparsefeat")


def wait_for(condition, process: subprocess.Popen | Forked, seconds: float = 900) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)


def end(process: subprocess.Popen | Forked, number: signal.Signals) -> str:
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_nothing_and_says_so(number, tmp_path):
    process = start(["features", "a noto emoji of a fox", "--steps", "1000", "--out", "a/b"], tmp_path)
    wait_for(lambda: list(tmp_path.glob("a/.b.*.unfinished")), process)
    time.sleep(1)  # into its imports, or its drawing
    assert end(process, number) == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.embedded
def test_an_erasure_that_was_fitted_is_kept_when_the_drawing_is_interrupted(tmp_path, monkeypatch):
    (tmp_path / "concepts.json").write_text(json.dumps({"fox": ["a fox"], "owl": ["an owl"]}))
    sae = str(cross_attention_sae_folders()[-1])
    options = ["--concept", "fox", "--concepts", "concepts.json", "--sae", sae, "--save", "fit", "--latents", "2"]
    process = Forked(["erase", "a noto emoji of a fox", *options, "--steps", "100", "--out", "out"], tmp_path)
    wait_for((tmp_path / "fit").exists, process)
    assert end(process, signal.SIGTERM) == "interrupted; the fitted erasure is kept in fit"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["concepts.json", "fit"]
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(app, ["erase", "a fox", "--fitted", "fit", "--steps", "1", "--out", "out"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "after.png").is_file()


def test_what_was_killed_outright_does_not_block_the_next_run(tmp_path):
    line = ["features", "a noto emoji of a fox", "--steps", "1000", "--out", "out"]
    process = start(line, tmp_path)
    wait_for(lambda: list(tmp_path.glob(".out.*.unfinished")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    process = start(line, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob(".out.*.unfinished"))) == 2, process)  # it was let in
    end(process, signal.SIGTERM)


@pytest.mark.embedded
def test_training_that_is_ended_saves_says_so_and_goes_on(tmp_path):
    line = [
        "train",
        "--at",
        "unet.mid_block.attentions.0",
        "--limit",
        "4",
        "--steps",
        "2",
        "--latents",
        "64",
        "--k",
        "4",
    ]
    line += [
        "--batch-size",
        "64",
        "--rows-per-image",
        "16",
        "--window",
        "4",
        "--checkpoint-every",
        "2",
        "--log-every",
        "1",
    ]
    process = Forked([*line, "--train-steps", "100000", "--lr", "1e-3", "--decay-steps", "0"], tmp_path)
    run = tmp_path / "saes" / "unet.mid_block.attentions.0"
    wait_for(lambda: list(run.glob("checkpoint-*")), process)
    said = end(process, signal.SIGTERM)
    assert said == "interrupted; checkpoints are in saes, and the same command goes on from them"
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, step + 1)
    )
    process = Forked([*line, "--train-steps", "100000", "--lr", "1e-3", "--decay-steps", "0"], tmp_path)
    wait_for(lambda: [path for path in run.glob("checkpoint-*") if int(path.name.split("-")[1]) > step], process)
    end(process, signal.SIGINT)


@pytest.mark.embedded
def test_collecting_that_is_ended_keeps_what_is_complete_and_says_so(tmp_path, monkeypatch):
    line = ["collect", "--at", "unet.mid_block.attentions.0", "--steps", "2", "--batch", "2", "--rows-per-image", "4"]
    process = Forked(line, tmp_path)
    store = tmp_path / "activations" / "unet.mid_block.attentions.0-output-image"
    wait_for(lambda: list(store.glob("w0000-*.safetensors")), process)
    said = end(process, signal.SIGTERM)
    assert said == "interrupted; what is complete is in activations, and the same command goes on from it"
    shards = {path.name: path.read_bytes() for path in store.glob("*.safetensors")}
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 0, again.output
    assert "1,280 rows of width 128" in again.stdout
    assert all((store / name).read_bytes() == content for name, content in shards.items())
