"""The command line where shells differ: pipes that close, disks that are full, letters that a terminal has not, and two
commands at once in one folder."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsefeat as sf
from sparsefeat.cli import app
from sparsefeat.cli.failures import plain_errors, reason
from sparsefeat.disk import InUseError, alone_in
from sparsefeat.training import CollectActivations
from tests.tiny import tiny_sd

COMMAND = [sys.executable, "-m", "sparsefeat.cli"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    line = line.replace("sparsefeat", " ".join(COMMAND), 1)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, check=False)


def test_a_reader_that_has_enough_ends_the_command_without_a_word(tmp_path):
    """`| head`: typer ends quietly on the error that it is left."""

    def command() -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(BrokenPipeError):
        plain_errors(command)()


def test_an_output_that_cannot_be_written_is_one_sentence():
    sentence = "the output could not be written (No space left on device); make room, and run it again"
    assert reason(OSError(errno.ENOSPC, "No space left on device")) == sentence


@pytest.mark.parametrize("line", ["--help", "features --help", "sae convert --help"])
def test_help_is_shown_in_a_terminal_that_has_ascii_alone(line, tmp_path):
    done = shell(f"sparsefeat {line}", tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert b"Usage: sparsefeat" in done.stdout


@pytest.mark.parametrize("environment", [{}, ASCII])
def test_a_prompt_that_is_no_text_is_one_sentence(environment, tmp_path):
    done = shell(r"sparsefeat features $'a \xff' --steps 1", tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr == b"error: PROMPT is not text in UTF-8; type it in a terminal of UTF-8\n"
    assert not list(tmp_path.iterdir())


def test_json_is_json_in_a_terminal_that_has_ascii_alone(tmp_path):
    told = "from sparsefeat.cli.outputs import print_json; print_json({'prompt': '\\u72d0 \\U0001f98a'})"
    done = subprocess.run([sys.executable, "-c", told], env={**os.environ, **ASCII}, capture_output=True, check=True)
    assert json.loads(done.stdout.decode("ascii")) == {"prompt": "\u72d0 \U0001f98a"}


def test_a_folder_that_another_run_writes_into_is_refused_and_free_again_after_it(tmp_path):
    with alone_in(tmp_path / "a" / "b"):
        said = r"another run is writing into .*b; wait until it ends, or choose another"
        with pytest.raises(InUseError, match=said), alone_in(tmp_path / "a" / "b"):
            pass
        (tmp_path / "a" / "b").mkdir()
        (tmp_path / "a" / "b" / "made").write_text("")
    with alone_in(tmp_path / "a" / "b"), alone_in(tmp_path / "c" / "d"):
        pass
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b", "a/b/made"]


def test_after_a_kill_a_folder_is_free_and_empty(tmp_path):
    told = f"import os, pathlib, sparsefeat.disk as d\nwith d.alone_in(pathlib.Path({str(tmp_path)!r}) / 'a'): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == -9
    assert not (tmp_path / "a").exists()
    with alone_in(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_second_training_in_a_folder_is_refused_in_one_sentence(tmp_path, monkeypatch):
    with alone_in(tmp_path / "sae"):
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, shlex.split("train --at unet.mid_block --limit 1 --steps 1 --out sae"))
    assert done.exit_code == 1
    assert done.output == "error: another run is writing into sae; wait until it ends, or choose another folder\n"


def test_of_two_collectors_in_one_folder_the_later_writes_no_row_twice(tmp_path):
    pipe, at = tiny_sd(), "unet.mid_block"
    first, second = (CollectActivations(at, folder=tmp_path) for _ in range(2))  # both found an empty folder
    with sf.attach(pipe, first):
        pipe("a fox", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    with (
        sf.attach(pipe, second),
        pytest.raises(InUseError, match=r"another writer has worker 0 of .*: wait until it ends"),
    ):
        pipe("a fox", num_inference_steps=1)
    first.close()
    late = CollectActivations(at, folder=tmp_path)
    assert late.images_done == 1
    third = CollectActivations(at, folder=tmp_path / "new")
    with CollectActivations(at, folder=tmp_path / "new") as other, sf.attach(pipe, other):
        pipe("a fox", num_inference_steps=1)
    with (
        sf.attach(pipe, third),
        pytest.raises(InUseError, match=r"another run has written into .* meanwhile; run it again"),
    ):
        pipe("a fox", num_inference_steps=1)
