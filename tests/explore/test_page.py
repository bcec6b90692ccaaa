"""The page in a browser: by clicking and painting, on the embedded pipeline as `sparsefeat explore` opens it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sparsefeat as sf
from sparsefeat.assets import load_pipeline
from tests.browser import chromium, tab

STEPS = 4
ASKED = {"prompt": "a noto emoji of a fox", "num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address, and the folder the command runs in."""
    where = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "sparsefeat.cli", "explore", "--steps", str(STEPS), "--seed", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert line.startswith("http://127.0.0.1:"), line + (process.stderr.read() if process.stderr else "")
        yield line.split()[0], where
    finally:
        process.terminate()
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.startswith("opening the embedded pipeline; the address follows\n")
    assert said.strip().endswith("ended; what was saved is kept")
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, served: tuple[str, Path]) -> Iterator[Any]:
    """A tab of its own, which asks nobody but this machine and says nothing on its console."""
    with tab(browser, height=1000) as (page, heard):
        page.goto(served[0])
        page.wait_for_selector("#draw")
        yield page
    assert len(heard.asked) > 10
    elsewhere = [url for url in heard.asked if not re.match(r"(https?|ws)://127\.0\.0\.1:|data:|blob:", url)]
    assert elsewhere == []
    assert [line for line in heard.console if line.startswith("error")] == []


def says(page: Any, sentence: str) -> None:
    page.locator("#status p", has_text=sentence).wait_for()


def draw(page: Any, prompt: str | None = None) -> None:
    if prompt is not None:
        page.locator("#prompt textarea").fill(prompt)
    page.locator("#draw").click()


def choose(page: Any, rank: int = 0) -> int:
    """Click the feature of this rank; its latent."""
    page.locator("#features button.thumbnail-item, #features .thumbnail-lg").nth(rank).click()
    heading = page.locator("#about h2")
    heading.wait_for()
    return int(re.findall(r"\d+", heading.inner_text())[0])


def set_strength(page: Any, times: float) -> None:
    field = page.locator("#strength input[type=number]")
    field.fill(str(times))
    field.press("Enter")


def paint(page: Any) -> None:
    """A stroke down the left part of the image. Of few moves: without a GPU the brush takes its time over each."""
    canvas = page.locator("#before canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x = box["x"] + 0.38 * box["width"]
    page.mouse.move(x, box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(x, box["y"] + 0.7 * box["height"], steps=2)
    page.mouse.up()


def save(page: Any, folder: str) -> None:
    page.get_by_role("tab", name="Save").click()
    page.locator("#folder textarea, #folder input").fill(folder)
    page.locator("#save").click()


def drawn_by(*instruments: Any) -> Image.Image:
    pipe = load_pipeline()
    noise = torch.Generator("cpu").manual_seed(7)
    if not instruments:
        return pipe(**ASKED, generator=noise).images[0]
    with sf.attach(pipe, *instruments):
        return pipe(**ASKED, generator=noise).images[0]


def test_a_feature_is_painted_and_saved(page: Any, served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    draw(page)
    says(page, "Choose a feature")
    latent = choose(page, 1)
    paint(page)
    page.get_by_label("where I painted").check()
    page.locator("#last input").fill("2")
    set_strength(page, 8)
    page.locator("#apply").click()
    says(page, "Done.")
    page.screenshot(path=os.environ.get("EXPLORE_SHOTS", str(served[1])) + "/painted.png", full_page=True)
    save(page, "painted")
    says(page, "Saved in")

    folder = served[1] / "painted"
    steer = sf.load_instrument(folder).instruments[0]
    assert list(steer.add) == [latent]
    assert steer.window.indices == {0, 1}
    assert 0 < steer.mask.mean() < 0.6
    half = steer.mask.shape[1] // 2
    assert steer.mask[:, :half].sum() > 4 * steer.mask[:, half:].sum()
    before, after = drawn_by(), drawn_by(steer)
    assert before.tobytes() != after.tobytes()
    lines = (folder / "edit.py").read_text()
    monkeypatch.chdir(served[1])
    names: dict[str, Any] = {}
    exec(compile(lines, "edit.py", "exec"), names)
    assert names["image"].tobytes() == after.tobytes()
    assert "Image.open(" in page.locator("#code, .cm-content").last.inner_text()


def test_a_word_is_mapped_and_erased_and_an_edit_taken_back(page: Any, served: tuple[str, Path]) -> None:
    draw(page)
    says(page, "Choose a feature")
    page.get_by_role("tab", name="Words").click()
    words = page.locator("#words .caption-label")
    words.last.wait_for()
    assert [word.strip() for word in words.all_inner_texts()] == ["a", "noto", "emoji", "of", "fox"]
    page.locator("#words button.thumbnail-item, #words .thumbnail-lg").last.click()
    page.wait_for_function("document.querySelector('#word textarea, #word input').value == 'fox'")
    page.locator("#erase").click()
    says(page, "Done.")
    page.get_by_role("tab", name="Save").click()
    box = page.get_by_label("erase “fox” (exchange)")
    box.uncheck()
    says(page, "No edit is at work.")
    save(page, "nothing")
    says(page, "nothing to save yet")
    assert not (served[1] / "nothing").exists()


def test_mistakes_are_one_sentence(page: Any) -> None:
    draw(page, " ")
    says(page, "the prompt is empty")
    draw(page, "a mono emoji of a key")
    says(page, "Choose a feature")
    page.locator("#find input, #find textarea").fill("5000")
    page.locator("#find input, #find textarea").press("Enter")
    says(page, "latent 5000 is not in this SAE, which has 0 to 1023")
    page.locator("#find input, #find textarea").fill("17")
    page.locator("#find input, #find textarea").press("Enter")
    page.locator("#about h2", has_text="Latent 17").wait_for()
    page.get_by_label("where I painted").check()
    set_strength(page, 5)
    page.locator("#apply").click()
    says(page, "nothing is painted")


def test_a_run_is_stopped(page: Any) -> None:
    draw(page, "a mono emoji of a key")
    says(page, "Choose a feature")
    page.get_by_text("Seed, steps, guidance").click()
    page.get_by_label("Steps", exact=True).fill("900")
    draw(page)
    page.wait_for_function(r"/\d\s*\/\s*900 steps/.test(document.body.innerText)")
    page.locator("#stop").click()
    says(page, "of 900 steps; everything is as it was")


@pytest.mark.parametrize("width", [360, 1440])
def test_it_fits_the_screen(page: Any, served: tuple[str, Path], width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    draw(page)
    says(page, "Choose a feature")
    choose(page)
    page.wait_for_timeout(500)
    canvas = page.locator("#before canvas").first.bounding_box()
    shown = 512 * int(page.locator("#before .zoom-number").inner_text().strip("%")) / 100
    assert 0.7 * min(canvas["width"], canvas["height"]) <= shown <= min(canvas["width"], canvas["height"])
    shots = os.environ.get("EXPLORE_SHOTS", str(served[1]))
    for name in ("Words", "Save", "Features"):
        page.get_by_role("tab", name=name).click()
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, name
        page.screenshot(path=f"{shots}/{name.split()[0].lower()}-{width}.png", full_page=True)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent && "
        "!(e.innerText || e.ariaLabel || e.title || e.labels?.length || e.placeholder || e.querySelector('img[alt]')))"
        ".map(e => e.outerHTML.slice(0, 120))"
    )
    assert unnamed == []
