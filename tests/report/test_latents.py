"""Pages of latents: what they say follows from the codes, a killed run goes on, and the index is searched in a browser."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparsefeat.features import Record
from sparsefeat.features.scores import area_under_curve
from sparsefeat.pipeline import attach
from sparsefeat.report.latents import unfinished_place, words_of, write_feature_pages
from sparsefeat.sae import SAE, Names, SAEConfig
from tests.browser import chromium, tab
from tests.killing import killed, run
from tests.report.test_page import Page, leaves
from tests.tiny import tiny_sd

AT = "unet.up_blocks.1.attentions.1"
N, STEPS = 48, 2
OBJECTS, STYLES = ("fox", "owl", "key", "star"), ("red", "big")
PROMPTS = {f"a {style} {name}": (name, style) for style in STYLES for name in OBJECTS}
HOSTILE = "</script><img src=x onerror=alert(1)>"
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "height": 48, "width": 64}


def sae() -> SAE:
    torch.manual_seed(1)
    made = SAE(SAEConfig(d_model=32, n_latents=N, k=4, hookpoint=AT)).requires_grad_(False).eval()
    made.names = Names({5: HOSTILE, 7: "a given name"})
    return made


def write(folder: Path, steer: tuple[int, ...] = ()) -> Path:
    return write_feature_pages(folder, tiny_sd(), sae(), PROMPTS, steer=steer, batch_size=3, **CALL)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("latents") / "pages").parent


@pytest.fixture(scope="module")
def lines(pages: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (pages / "latents.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """[images, steps, positions, latents]: every image drawn again by itself, its codes written out."""
    record, pipe, drawn = Record(sae()), tiny_sd(), []
    for i, prompt in enumerate(PROMPTS):
        with attach(pipe, record) as run:
            pipe(prompt, generator=torch.Generator().manual_seed(i), **CALL)
        drawn.append(torch.stack([run[record].codes(step).dense() for step in range(STEPS)]))
    return torch.stack(drawn).double()


def page_of(folder: Path, latent: int) -> Page:
    return Page(folder, f"latents/{latent:05d}.html")


def test_a_line_says_what_the_codes_say(lines, dense) -> None:
    assert [line["latent"] for line in lines] == list(range(N))
    prompts, directions = list(PROMPTS), torch.nn.functional.normalize(sae().W_dec, dim=1)
    for latent, line in enumerate(lines):
        own = dense[..., latent]
        active = own != 0
        assert line["density_share"] == pytest.approx(float(active.double().mean()), rel=1e-3, abs=1e-3)
        assert line["maximum"] == pytest.approx(float(own.max()), rel=1e-3)
        assert line["n_images_active"] == int(active.any(2).any(1).sum())
        assert line["curves"]["by_step"] == pytest.approx(own.mean((0, 2)).tolist(), rel=1e-2, abs=1e-4)
        means = own.mean((1, 2))
        assert [e["score"] for e in line["examples"]] == pytest.approx(
            sorted((m for m in means.tolist() if m > 0), reverse=True), rel=1e-2, abs=1e-5
        )
        for example in line["examples"]:
            assert example["prompt"] == prompts[int(re.findall(r"\d+", example["image"])[0])]
        for concept in line["concepts"]:
            has = torch.tensor([concept["word"] in names for names in PROMPTS.values()])
            peaks = own.amax((1, 2))
            assert concept["auc"] == pytest.approx(area_under_curve(peaks[has], peaks[~has]), abs=0.07)
        for other in line["nearest"]:
            assert other["cosine"] == pytest.approx(float(directions[latent] @ directions[other["latent"]]), abs=1e-5)
        for other in line["together"]:
            both = (active & (dense[..., other["latent"]] != 0)).double().sum()
            assert other["share"] == pytest.approx(float(both / active.sum()), abs=0.01)
        evidence = line["evidence"]
        named = evidence and evidence["p_chosen"] <= 0.05 and evidence["p"] <= 0.05 and evidence["auc"] >= 0.75
        assert bool(named) == (line["name"] is not None)


def test_every_number_on_a_page_is_in_its_line_and_every_one_there_is_shown(pages, lines) -> None:
    settings = json.loads((pages / "settings.json").read_text())
    beside = {settings["n_images"], 8 * STEPS * 6 * 8}  # the kept positions are all there are
    for latent in (int(max(lines, key=lambda line: line["density_share"])["latent"]), 5, 7):
        shown = page_of(pages, latent)
        numbers = {value for value, _ in shown.numbers}
        stored = {v for v in leaves(lines[latent]) if isinstance(v, (int, float)) and not isinstance(v, bool)}
        edges = {lines[latent]["curves"]["edges"][i] for i in (0, -1)}
        # The cosine only ranks companions; what chance stays below is said by p.
        unsaid = {other["cosine"] for other in lines[latent]["together"]}
        unsaid |= {(lines[latent]["evidence"] or {}).get("chance")}
        assert numbers - beside - edges <= stored
        assert stored - unsaid - {latent} <= numbers


def test_a_page_shows_what_is_there_and_names_are_text(pages, lines) -> None:
    for latent in (5, 7):
        shown = page_of(pages, latent)
        assert sae().names[latent] in shown.texts
        assert {tag for tag, _ in shown.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form"})
        assert all("alt" in attributes for tag, attributes in shown.tags if tag == "img")
        for tag, attributes in shown.tags:
            for name in {"src", "href"} & set(attributes):
                target = str(attributes[name])
                assert target.startswith(("data:", "#")) or (pages / "latents" / target).resolve().is_file(), (
                    tag,
                    target,
                )
        levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for line in lines:
        assert (pages / "latents" / f"{line['latent']:05d}.html").is_file()
    with Image.open(pages / "images" / "00003.webp") as image:
        assert image.size == (64, 48)


def test_the_same_call_again_draws_nothing_and_other_settings_are_refused(pages, monkeypatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in pages.rglob("*")}
    write(pages)
    assert {path: path.stat().st_mtime_ns for path in pages.rglob("*")} == before
    with pytest.raises(FileExistsError, match="had seed 0, this one has 3; choose another folder"):
        write_feature_pages(pages, tiny_sd(), sae(), PROMPTS, seed=3, **CALL)
    other = sae()
    other.W_dec += 1
    with pytest.raises(FileExistsError, match="had sae"):
        write_feature_pages(pages, tiny_sd(), other, PROMPTS, **CALL)
    (pages.parent / "mine").mkdir()
    (pages.parent / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists already"):
        write(pages.parent / "mine")
    assert not unfinished_place(pages.parent / "mine").exists()


def test_what_cannot_be_is_refused_before_anything_is_drawn(tmp_path) -> None:
    for wrong, said in (
        ({"steer": [N]}, "steer"),
        ({"prompts": {}}, "prompts is empty"),
        ({"latents": torch.zeros(1)}, "latents is Tensor"),
        ({"num_steps": 3}, "num_steps"),
    ):
        given = {"prompts": PROMPTS, **CALL, **wrong}
        with pytest.raises((ValueError, TypeError), match=said):
            write_feature_pages(tmp_path / "pages", tiny_sd(), sae(), given.pop("prompts"), **given)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="attentions"):  # only known when it is attached
        write_feature_pages(tmp_path / "pages", tiny_sd(), sae(), PROMPTS, at="unet.up_blocks.1.atentions.1", **CALL)
    assert not list(tmp_path.iterdir())


def test_strips_come_to_the_latents_asked_for(pages, lines, tmp_path) -> None:
    ranked = sorted(lines, key=lambda line: -line["density_share"])
    latent, idle = ranked[0]["latent"], [line["latent"] for line in lines if not line["n_images_active"]]
    assert 'id="steering"' not in page_of(pages, latent).source
    write(pages, steer=(latent,))
    shown, told = page_of(pages, latent), json.loads((pages / "steering" / f"{latent:05d}.json").read_text())
    assert told["usual"] == lines[latent]["mean_active"]
    for entry in told["strips"]:
        assert [step["times"] for step in entry["strip"]] == [-3, 0, 3, 6]
        pictures = [Image.open(pages / step["image"]).tobytes() for step in entry["strip"]]
        assert len(set(pictures)) == 4  # each strength does something else
        assert entry["maximum"] in {value for value, _ in shown.numbers}
    assert told["strips"][0]["maximum"] == lines[latent]["maximum"] >= told["strips"][1]["maximum"]
    assert 'id="steering"' not in page_of(pages, ranked[1]["latent"]).source
    if idle:
        with pytest.raises(ValueError, match=f"steer={idle[0]} is active in none of the 8 images"):
            write(pages, steer=(idle[0],))


def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_with_the_same_pages(tmp_path) -> None:
    pages = tmp_path / "whole"
    run(write, pages)  # with as many threads as those that are killed: sums are in the same order
    assert killed(2, 0.5, write, tmp_path / "pages") == 2
    for name in ("index.html", "latents.jsonl", "latents/00007.html", "images/00005.webp"):
        assert (tmp_path / "pages" / name).read_bytes() == (pages / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"pages", "whole"}
    assert {p.name for p in (tmp_path / "pages" / "latents").iterdir()} == {f"{i:05d}.html" for i in range(N)}


def test_latents_of_a_text_encoder_have_pages_without_maps(tmp_path) -> None:
    pipe = tiny_sd()
    width = pipe.text_encoder.config.hidden_size
    torch.manual_seed(2)
    of_text = SAE(SAEConfig(d_model=width, n_latents=16, k=2, hookpoint="text_encoder.encoder.layers.0")).eval()
    write_feature_pages(tmp_path / "pages", pipe, of_text.requires_grad_(False), PROMPTS, batch_size=4, **CALL)
    lines = [json.loads(line) for line in (tmp_path / "pages" / "latents.jsonl").read_text().splitlines()]
    latent = max(lines, key=lambda line: line["density_share"])["latent"]
    shown = page_of(tmp_path / "pages", latent)
    assert "activation by position in the text" in shown.source
    assert 'class="over"' not in shown.source


def test_prompts_without_a_word_in_common_have_pages_of_latents_without_names(tmp_path) -> None:
    write_feature_pages(tmp_path / "pages", tiny_sd(), sae(), {"a fox": (), "two owls": ()}, batch_size=2, **CALL)
    lines = [json.loads(line) for line in (tmp_path / "pages" / "latents.jsonl").read_text().splitlines()]
    assert all(line["name"] is None for line in lines)
    assert any(line["density_share"] for line in lines)
    assert (tmp_path / "pages" / "index.html").is_file()


def test_images_that_are_drawn_are_not_drawn_again(tmp_path, monkeypatch) -> None:
    pipe, calls = tiny_sd(), []
    usual = type(pipe).__call__

    class Counted(type(pipe)):
        def __call__(self, prompt, **given):
            calls.append(list(prompt))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return usual(self, prompt, **given)

    pipe.__class__ = Counted
    with pytest.raises(KeyboardInterrupt):
        write_feature_pages(tmp_path / "pages", pipe, sae(), PROMPTS, batch_size=3, **CALL)
    assert not (tmp_path / "pages").exists()
    lines = unfinished_place(tmp_path / "pages") / "latents.jsonl"
    assert not lines.exists()
    write_feature_pages(tmp_path / "pages", pipe, sae(), PROMPTS, batch_size=3, **CALL)
    prompts = list(PROMPTS)
    assert calls == [prompts[:3], prompts[3:6], prompts[3:6], prompts[6:]]


def test_a_cut_line_is_made_again(pages, tmp_path) -> None:
    from sparsefeat.features.survey import Survey
    from sparsefeat.report.latents.pages import write_lines

    whole = (pages / "latents.jsonl").read_bytes()
    (tmp_path / "latents.jsonl").write_bytes(whole[: len(whole) // 2])
    write_lines(tmp_path, Survey.load(pages / "data"), sae())
    assert (tmp_path / "latents.jsonl").read_bytes() == whole


def test_the_words_of_prompts_that_tell_them_apart_are_their_concepts() -> None:
    prompts = [f"A {style} photo of a {name}, 4k" for style in ("red", "big", "old") for name in ("Fox", "owl", "key")]
    words = words_of(prompts + ["photo"] * 3)
    assert words["photo"] == ()
    assert set(itertools.chain(*words_of([*prompts, "one", "two", "red"]).values())) == {"red"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


ROWS = "[...document.querySelectorAll('#latents tbody tr')].map(row => row.querySelector('th a').getAttribute('href'))"


def test_the_index_is_searched_by_typing_and_sorted_by_its_heads(browser, pages, lines) -> None:
    with tab(browser) as (page, heard):
        page.goto((pages / "index.html").as_uri())

        def rows() -> list[int]:
            return [int(re.findall(r"\d+", href)[0]) for href in page.evaluate(ROWS)]

        densest = sorted(lines, key=lambda line: (-line["density_share"], line["latent"]))
        assert rows() == [line["latent"] for line in densest]
        assert (
            page.evaluate("new Set([...document.querySelectorAll('#latents tr')].map(row => row.cells.length)).size")
            == 1
        )
        page.keyboard.press("Tab")  # the link that skips
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.type("GIVEN")
        assert rows() == [7]
        assert page.evaluate("document.getElementById('found').textContent") == f"1 of {N} latents"
        page.evaluate("document.getElementById('search').select()")
        page.keyboard.type("fox")
        assert set(rows()) == {
            line["latent"]
            for line in lines
            if "fox" in [c["word"] for c in line["concepts"][:3]] or "fox" in (line["name"] or "")
        }
        page.evaluate("document.getElementById('search').select()")
        page.keyboard.type("7")
        assert rows() == [7]
        page.evaluate("(document.getElementById('search').value = '', search.dispatchEvent(new Event('input')))")
        page.evaluate("document.querySelector('th[data-by=\"0\"] button').focus()")
        page.keyboard.press("Enter")
        assert rows() == list(range(N))
        page.keyboard.press("Enter")
        assert rows() == list(range(N))[::-1]
        assert page.evaluate("document.querySelector('th[data-by=\"0\"]').ariaSort") == "descending"
        page.evaluate("document.getElementById('named').click()")
        assert set(rows()) == {line["latent"] for line in lines if line["given_name"] or line["name"]}
        assert page.evaluate("document.querySelectorAll('#latents tbody script, #latents img[src=x]').length") == 0
    assert heard.console == []


# What stands on two lines of what should stand on one: "latent 12" in a link, a name within a hookpoint, the search's hint.
BROKEN = """() => {
  const parts = document.createTreeWalker(document.querySelector("h1 + .lead code") ?? document.querySelector("h1"), 4);
  const lines = [], range = document.createRange();
  while (parts.nextNode()) if (!parts.currentNode.data.includes(" ")) lines.push(parts.currentNode);
  for (const link of document.querySelectorAll("table a")) if (/^latent/.test(link.innerText)) lines.push(link);
  const tops = part => (range.selectNodeContents(part), new Set([...range.getClientRects()].map(box => box.y)).size);
  const broken = lines.filter(part => tops(part) !== 1).map(part => part.textContent);
  const search = document.getElementById("search"), pen = document.createElement("canvas").getContext("2d");
  if (search) {
    pen.font = getComputedStyle(search).font;
    if (pen.measureText(search.placeholder).width > search.clientWidth - 48) broken.push(search.placeholder);
  }
  return broken;
}"""


@pytest.mark.parametrize("width", [360, 1440])
def test_index_and_pages_fit_the_screen(browser, pages, width) -> None:
    with tab(browser, width) as (page, heard):
        for name in ("index.html", "latents/00005.html", "latents/00007.html"):
            page.goto((pages / name).as_uri())
            assert page.evaluate("innerWidth") == width
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length") == 0, name
            assert page.evaluate(BROKEN) == [], name
    assert heard.console == []
