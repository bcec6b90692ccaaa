"""The code in the README and the guides runs as it stands."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import check_site
import numpy as np
import pytest
import site_pages
import sparsefeat_kernels
import typer
from typer.testing import CliRunner

import sparsefeat
from sparsefeat.assets import emojicanvas
from sparsefeat.cli import app
from sparsefeat.evaluation.judge import judge_images, load_judge
from tests.families import families
from tests.features.test_language_models import N, gemma_scope
from tests.tiny import tiny_sd

ROOT = Path(__file__).resolve().parents[1]
WRITTEN_BY_SPARSIFY = ROOT / "tests" / "sae" / "formats" / "fixtures" / "sparsify" / "readme"
PAGES = (
    "README.md",
    "docs/start.md",
    "docs/steer.md",
    "docs/erase.md",
    "docs/own_pipeline.md",
    "docs/own_sae.md",
    "docs/attention.md",
    "docs/attribution.md",
    "docs/embedded.md",
    "docs/features.md",
    "docs/instruments.md",
    "docs/interop.md",
    "docs/presets.md",
    "docs/steering.md",
    "docs/training.md",
)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_python_blocks(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.embedded
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/training.md"])  # test_training_guide.py
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if page in ("docs/own_pipeline.md", "docs/own_sae.md"):
        tiny_sd().save_pretrained("my-pipeline")
        shutil.copytree(WRITTEN_BY_SPARSIFY, "my-run/unet.up_blocks.1.attentions.1")
    if page == "docs/interop.md":
        families()["lumina2"].build().save_pretrained("my-lumina-2")
        gemma_scope(tmp_path)
        labels = [{"index": str(i), "description": f"what {i:02d} is about"} for i in range(1, N)]
        labels.append({"index": "0", "description": "falling snow, winter"})
        Path("labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    names = run_python_blocks(page)
    if page == "README.md":
        assert len(names["top"]) == 10
        assert names["overlay"].size == names["image"].size
        image, steered = (np.asarray(names[name], dtype=float) for name in ("image", "steered"))
        assert np.abs(steered - image).mean() > 5  # of 255: it can be seen
    if page == "docs/erase.md":
        objects = judge_images(load_judge(), [names["before"], names["after"]]).objects
        assert [emojicanvas.OBJECTS[i] == "fox" for i in objects] == [True, False]
    if page == "docs/own_sae.md":
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TopLatent(latent=")]
        assert len(printed) == 10
    if page == "docs/interop.md":
        assert all(str(latent.latent) in latent.name for latent in names["run"][names["rec"]].top(3))
        assert names["image"].size == (16, 16)
    if page == "docs/features.md":
        assert names["naming"].word == "mono"  # the latent that a search for it finds
        assert len(names["examples"]) == 64
        assert names["found"].p is not None


SHELL_LINES = [
    (page, line)
    for page in (*PAGES, "docs/benchmarks.md", "docs/command_line.md")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if not language and line.startswith("sparsefeat ")
]


@pytest.mark.parametrize(("page", "line"), SHELL_LINES)
def test_the_shell_lines_of_a_page_are_understood(page, line):
    """Commands, arguments and options are those there are, and have values that are read; nothing is run."""
    understood = []

    def not_run(command: Any) -> None:
        for below in getattr(command, "commands", {}).values():
            below.callback = lambda **given: understood.append(given)
            not_run(below)

    command = typer.main.get_command(app)
    not_run(command)
    command.main(args=shlex.split(line, comments=True)[1:], prog_name="sparsefeat", standalone_mode=False)
    assert understood


def test_there_are_shell_lines_on_the_pages_that_tell_of_the_shell():
    assert {page for page, _ in SHELL_LINES} >= {"docs/start.md", "docs/steer.md", "docs/command_line.md"}


def test_every_command_is_in_the_guide():
    text = (ROOT / "docs" / "command_line.md").read_text()
    command = typer.main.get_command(app)
    names = [*command.commands]
    for group in ("sae", "evaluate"):
        names += [f"{group} {name}" for name in command.commands[group].commands]
    for name in names:
        assert f"`sparsefeat {name}" in text or f"`{name.rpartition(' ')[2]}`" in text, name


def test_the_shell_completes_commands_and_options():
    def completed(words: str) -> list[str]:
        asked = {"_SPARSEFEAT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, [], env=asked, prog_name="sparsefeat").output.split()

    assert completed("sparsefeat fea") == ["features"]
    assert completed("sparsefeat sae con") == ["convert"]
    assert completed("sparsefeat steer --sc") == ["--scale"]


def test_opening_anybodys_sae_takes_fewer_than_ten_lines():
    block = next(block for block in python_blocks("docs/own_sae.md") if "my-run/" in block)
    assert len([line for line in block.splitlines() if line]) < 10


def test_the_readme_is_two_screens_and_its_example_thirteen_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 95
    assert len(python_blocks("README.md")[0].strip().splitlines()) <= 13


# The site and the notebooks ------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference_and_every_system_has_a_page():
    written = "\n".join(text for _, text in site_pages.api_pages())
    for module in (sparsefeat, sparsefeat_kernels):
        for name in {*module.__all__} - {"__version__", "presets", "flops"}:
            value = getattr(module, name)
            assert re.search(rf"^::: sparsefeat\S*\.{re.escape(name)}$", written, re.MULTILINE), (name, value)
    pages = dict(site_pages.system_pages())
    text = (ROOT / "docs" / "presets.md").read_text()
    systems = re.findall(r"^\| (.+?) \(.*?\|.*`(?:sf|presets)\.", text, re.MULTILINE)
    titles = {page.splitlines()[0] for page in pages.values()}
    assert len(systems) >= 25
    assert {f"# {system}" for system in systems} <= titles
    for name in sparsefeat.presets.__all__:
        assert sum(f"::: sparsefeat.presets.{name}\n" in page for page in pages.values()) == 1, name


def test_every_page_is_in_the_navigation():
    shown = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    for path in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"[-:] {re.escape(path.name)}$", shown, re.MULTILINE), path.name


def test_a_link_that_leads_nowhere_and_a_script_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">b</a> <a href="https://example.org">there</a> <img src="p.svg">'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><script src="s.js"></script>')
    for name in ("p.svg", "s.js"):
        (tmp_path / name).touch()
    assert check_site.faults(tmp_path) == []
    (tmp_path / "a.html").write_text(
        '<a href="c.html">c</a> <a href="b.html#nowhere">b</a> <img src="https://example.org/p">'
    )
    (tmp_path / "b.html").write_text('<script src="//example.org/s.js"></script><p name="b"></p>')
    (tmp_path / "s.css").write_text("@import 'https://example.org/f.css'; p { background: url(https://example.org/p) }")
    said = check_site.faults(tmp_path)
    assert [line.partition(": ")[2].split()[0] for line in said if "is not there" in line or "no such place" in line] == [
        "c.html", "b.html#nowhere",
    ]  # fmt: skip
    assert sum("fetches" in line for line in said) == 4


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


@pytest.mark.embedded
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = path.read_text()
    assert re.findall(r"^# %%", code, re.MULTILINE)[:1]
    few = 4 if path.stem == "paint" else 2  # half of two steps is one, which says little of where
    quick, n = re.subn(r"^STEPS = 20$", f"STEPS = {few}", code, flags=re.MULTILINE)
    assert n == 1
    names: dict = {"__name__": "notebook"}
    exec(compile(quick, path.name, "exec"), names)
    written = {file.name for file in tmp_path.rglob("*")}
    said = capsys.readouterr().out
    if path.stem == "find":
        assert len(re.findall(r"^a \w+ emoji of ", said, re.MULTILINE)) == 20
        assert said.count("auc") == 3
    if path.stem == "paint":
        assert "instrument.json" in written
        before, after = (np.asarray(image, dtype=float) for image in (names["target"], names["again"]))
        changed = np.abs(after - before).mean(axis=(0, 2))
        assert changed[40:].mean() > 4 * changed[:24].mean()  # the right half was painted
    if path.stem == "unlearn":
        assert "foxes seen: " in said
        assert sum(1 for file in tmp_path.rglob("instrument.json")) == 3
    if path.stem == "words":
        assert {"words.png", "0-fox.png", "3-key.png"} <= written


def test_jupytext_reads_the_notebooks_as_cells_of_text_and_code():
    jupytext = pytest.importorskip("jupytext")
    for path in NOTEBOOKS:
        cells = jupytext.read(path).cells
        assert cells[0].cell_type == "markdown"
        assert cells[0].source.startswith("# ")
        assert sum(cell.cell_type == "code" for cell in cells) >= 3


def test_every_relative_link_and_picture_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`(docs/[a-z_]+\.md)`", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_file_target_and_module_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"(?<![\w/.])(?:tests|tools|bench|docs|sparsefeat)/[\w/*]+(?:\.\w+)?", text)
    assert len(paths) > 30
    for path in paths:
        assert list(ROOT.glob(path)), path
    made = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+)(?: +#| PYTHON|`)", text)) <= {*made}
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
