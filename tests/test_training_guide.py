"""The guide to training runs as it stands, its commands and its code: from a pipeline to an SAE with its card."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsefeat.cli import app
from tests.test_docs import SHELL_LINES, run_python_blocks

PAGE = "docs/training.md"


@pytest.mark.embedded
def test_the_guide_runs_in_order(tmp_path, monkeypatch):
    """Lines on the reader's own files are left out."""
    monkeypatch.chdir(tmp_path)
    for line in (line for page, line in SHELL_LINES if page == PAGE and "my-pipeline" not in line):
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output)
        if line.startswith("sparsefeat sae check"):
            assert "The SAE fits." in result.output
    folder = Path("saes/unet.mid_block.attentions.0")
    card = (folder / "README.md").read_text()
    assert f'sf.load_sae("{folder}")' in card
    assert "| hookpoint | `unet.mid_block.attentions.0` |" in card
    assert Path("saes/index.html").read_text().count("<polyline") > 10
    assert {path.name for path in Path("codecs").iterdir() if path.is_dir()} == {
        f"unet.{block}.attentions.0-{preset}"
        for block in ("mid_block", "up_blocks.0")
        for preset in ("batch-topk", "matryoshka", "jumprelu")
    }
    run_python_blocks(PAGE)
