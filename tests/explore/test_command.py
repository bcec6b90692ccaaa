"""`sparsefeat explore` before its page is there: what cannot be is told at once, before anything is opened."""

from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner

from sparsefeat.cli.app import app


def explore(*arguments: str):
    result = CliRunner().invoke(app, ["explore", *arguments])
    assert "opening" not in result.output
    return result


def test_a_port_that_another_program_has_is_told_before_anything_is_opened():
    pytest.importorskip("gradio")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        result = explore("--port", str(port))
    assert result.exit_code == 1
    assert result.output.strip() == f"error: --port {port} cannot be opened (address already in use); choose another"


WRONG = {
    "no pipeline": (["nowhere-at-all"], "PIPELINE 'nowhere-at-all' does not exist"),
    "a folder that is no pipeline": (["."], "PIPELINE '.' has no model_index.json"),
    "a pipeline without a name": ([""], "PIPELINE '' does not exist"),
    "an SAE that is not there": (["--sae", "nowhere-at-all"], "--sae 'nowhere-at-all' does not exist"),
    "more steps than there are": (["--steps", "5000"], "--steps 5000 is more than the 1000"),
    "prompts that are not there": (["--prompts", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_opened_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    result = explore(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert result.output.strip().count("\n") == 0
