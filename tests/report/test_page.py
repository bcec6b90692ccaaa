"""The page: it shows what results.json holds, fits every screen, and nothing on disk is ever half written."""

from __future__ import annotations

import copy
import errno
import html
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsefeat.report import write_page
from tests.browser import chromium, tab
from tests.report.sample import sample

HOSTILE = """"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&lt;"""
LONG = "Donaudampfschifffahrtsgesellschaft" * 8


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("report") / "page", *sample()).parent


def small() -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """A report with every section, few entries and pictures of a few pixels: quick to write."""
    results, images = sample(n_features=1, n_examples=1)
    return results, dict.fromkeys(images, Image.new("RGB", (3, 3), "teal"))


class Page(HTMLParser):
    """The numbers (`<data>`: value and text), the other visible text, the ids and every start tag of a page."""

    def __init__(self, folder: Path, name: str = "index.html") -> None:
        super().__init__()
        self.numbers: list[tuple[Any, str]] = []
        self.texts: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._value: Any = None
        self.source = (folder / name).read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.add(str(attributes["id"]))
        if tag == "data":
            self._value = json.loads(str(attributes["value"]))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if "style" in self._open or not text.strip():
            return
        if self._open[-1] == "data":
            self.numbers.append((self._value, text))
        else:
            self.texts.append(text)


def leaves(value: Any) -> Iterator[Any]:
    """What results.json holds, but for what is drawn as a curve."""
    if isinstance(value, dict):
        value = [entry for name, entry in value.items() if name != "curves"]
    if isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value


def read_back(text: str) -> tuple[float, float]:
    """The number that a formatted text says, and half a unit of its last digit."""
    match = re.fullmatch(r"([+−]?)([\d,]+)(\.\d+)?(?:e([+-]\d+))?\s*(%|ms|s|min|h)?", text)
    assert match, text
    sign, whole, decimals, exponent, unit = match.groups()
    scale = {None: 1, "%": 0.01, "ms": 1e-3, "s": 1, "min": 60, "h": 3600}[unit] * 10.0 ** int(exponent or 0)
    value = float(whole.replace(",", "") + (decimals or "")) * scale
    # Seconds and large values show three digits and strengths four, whatever follows the point; a share shows one.
    digit = max(10.0 ** -len((decimals or ".")[1:]) * scale, 0)
    if unit == "%":
        digit = 1e-3
    elif decimals is None and (unit or abs(value) >= 100):
        digit = max(digit, scale)
    return -value if sign == "−" else value, digit / 2


# What the page says --------------------------------------------------------------------------------------------------


def test_every_number_on_the_page_is_in_results_json_and_every_one_there_is_shown(page: Path) -> None:
    shown = Page(page)
    stored = list(leaves(json.loads((page / "results.json").read_text())))
    numbers = {value for value in stored if isinstance(value, (int, float)) and not isinstance(value, bool)}
    assert {value for value, _ in shown.numbers} == numbers

    words = [value for value in stored if isinstance(value, str)]
    for text in shown.texts:
        for digits in re.findall(r"\d+", text):
            assert any(digits in word for word in words), f"{digits!r} in {text!r} comes from nowhere"


def test_every_number_is_shown_as_it_is_up_to_its_last_digit(page: Path) -> None:
    shown = Page(page)
    assert len(shown.numbers) > 150
    for value, text in shown.numbers:
        said, half = read_back(text)
        assert math.isclose(said, value, rel_tol=1e-9, abs_tol=half * 1.0001), f"{value} is shown as {text}"


@pytest.mark.parametrize(
    ("value", "shown_as", "text"),
    [
        (0.9123, "share", "91.2 %"),
        (1.0, "share", "100 %"),
        (20480, "number", "20,480"),
        (1234.56, "number", "1,235"),
        (-0.02134, "number", "−0.0213"),
        (0, "number", "0"),
        (0.00021, "chance", "0.021 %"),
        (0.0123, "seconds", "12.3 ms"),
        (4.5678, "seconds", "4.57 s"),
        (1843.2, "seconds", "30.7 min"),
        (9000, "seconds", "2.5 h"),
        (1234567, "identifier", "1234567"),
        (-1.5, "signed", "−1.5"),
        (None, "number", "–"),
        ("seven", "number", "seven"),
    ],
)
def test_a_value_is_shown_in_its_unit(value: Any, shown_as: str, text: str) -> None:
    from sparsefeat.report.page import _FILTERS

    assert re.sub(r"<[^>]*>", "", str(_FILTERS[shown_as](value))) == text


def test_a_latent_that_chance_explains_is_not_said_to_stand_for_its_concept(page: Path) -> None:
    source = re.sub(r"<[^>]*>", "", Page(page).source)
    chances = {entry["concept"]: entry["p"] for entry in sample()[0]["steering"]}
    assert chances["frog"] < 0.05 < chances["noto"]
    assert "The latent most specific to the object “frog”\n" in source.replace("</h3>", "\n")
    assert "The latent most specific to the style “noto”, no more than chance gives" in source
    no_name = [feature["latent"] for feature in sample()[0]["features"]["top"] if feature["name"] is None]
    for latent in no_name:
        assert re.search(rf"Latent {latent}\s+No name\b", re.sub(r"\s*\n\s*", " ", source))


def test_columns_of_counts_are_there_where_the_benchmark_has_counts(tmp_path: Path) -> None:
    results, images = sample(n_features=2, n_examples=2)
    columns = "Target seen, before → after", "Others right, before → after"
    for there in (True, False):
        source = write_page(tmp_path / str(there), results, images).read_text()
        assert [name in source for name in columns] == [there, there]
        table = source[source.index('id="benchmark"') :]
        table = table[: table.index("</table>")]
        rows = [row.count("<td") for row in table.split("<tr>")[2:] if "<td" in row]
        assert set(rows) == {table.count('scope="col" class="number"')}
        for row in results["benchmark"]["erasure"]:
            row.pop("before_after", None)


def test_results_json_is_what_was_given_with_paths_for_image_keys(tmp_path: Path) -> None:
    results, images = sample(n_features=2, n_examples=2)
    given = copy.deepcopy(results)
    folder = write_page(tmp_path / "page", results, images).parent
    assert results == given  # the caller's dict is not touched
    stored = json.loads((folder / "results.json").read_text())
    assert stored["benchmark"] == given["benchmark"]
    assert stored["features"]["top"][0]["overlay"] == f"images/{given['features']['top'][0]['overlay']}.png"
    assert stored["prompts"][1] == given["prompts"][1] | {"image": "images/sunflower-noto.png"}
    for key, image in images.items():
        with Image.open(folder / "images" / f"{key}.png") as written:
            assert np.array_equal(np.asarray(written), np.asarray(image))


def test_numpy_and_torch_numbers_are_numbers_and_nan_is_null(tmp_path: Path) -> None:
    results = {
        "timings": [
            {"name": "a", "seconds": np.float32(1.5)},
            {"name": "b", "seconds": torch.tensor(2.5)},
            {"name": "c", "seconds": float("nan")},
            {"name": "d", "seconds": np.float64("inf")},
        ]
    }
    folder = write_page(tmp_path / "page", results, {}).parent
    stored = json.loads((folder / "results.json").read_text())
    assert [entry["seconds"] for entry in stored["timings"]] == [1.5, 2.5, None, None]
    assert [text for _, text in Page(folder).numbers] == ["1.5 s", "2.5 s"]
    assert Page(folder).texts.count("–") == 2


def test_a_section_without_data_is_left_out(tmp_path: Path) -> None:
    sections = {
        "prompts": "prompts",
        "features": "features",
        "steering": "steering",
        "benchmark": "benchmark",
        "heat_maps": "heat-maps",
    }
    whole, images = small()
    everything = {*sections.values(), "main", "erasure", "words", "timings"}
    for (name, section), empty in zip(sections.items(), [None, [], {}, "missing", ()], strict=True):
        results = {key: value for key, value in whole.items() if key != name}
        if empty != "missing":
            results[name] = empty
        folder = write_page(tmp_path / section, results, images).parent
        assert Page(folder).ids == everything - {section}


@pytest.mark.parametrize("empty", [None, [], {}])
def test_a_report_of_nothing_is_still_a_page(tmp_path: Path, empty: Any) -> None:
    whole, _ = small()
    assert Page(write_page(tmp_path / "nulls", dict.fromkeys(whole, empty), {}).parent).ids == {"main"}
    assert Page(write_page(tmp_path / "nothing", {}, {}).parent).ids == {"main"}


def test_a_section_with_holes_still_renders(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "red")
    results = {
        "prompts": [{"prompt": "no seed", "image": "a"}, {"prompt": "no image"}],
        "features": {"top": [{"latent": 5}, {"latent": 6, "overlay": "a", "examples": [{"prompt": "no image"}]}]},
        "steering": [{"strip": []}, {"latent": 4, "strip": [{"times": 0, "image": "a"}]}],
        "erasure": [{"target": "x", "pairs": []}, {"target": "fox", "pairs": [{"prompt": "p", "before": "a"}]}],
        "benchmark": {"erasure": [{"method": "m", "ua": None}], "saes": [{"a": 1}, {"b": "two", "c": [1, 2]}]},
        "heat_maps": [{"prompt": "p", "words": [{"word": "w", "overlay": None}]}],
    }
    shown = Page(write_page(tmp_path / "page", results, {"a": image}).parent)
    assert {"main", "words", "prompts", "features", "steering", "erasure", "benchmark", "heat-maps"} == shown.ids
    assert {value for value, _ in shown.numbers} == {0, 4, 5, 6}


# What the page is not ------------------------------------------------------------------------------------------------


def with_text(value: Any, text: str) -> Any:
    """`value` with every text but the image keys replaced."""
    if isinstance(value, dict):
        keys = ("image", "overlay", "before", "after", "target_kind")
        return {name: entry if name in keys else with_text(entry, text) for name, entry in value.items()}
    if isinstance(value, list):
        return [with_text(entry, text) for entry in value]
    return text if isinstance(value, str) else value


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    results, images = small()
    results = with_text(results, HOSTILE)
    results["features"]["code"] = results["versions"][HOSTILE] = HOSTILE
    results["judge"]["unseen_vendor"][HOSTILE] = {"object_accuracy": 0.5, "n_images": 7}
    shown = Page(write_page(tmp_path / "page", results, images).parent)
    assert sum(HOSTILE in text for text in shown.texts) > 40
    assert "49" not in "".join(shown.texts)
    assert {tag for tag, _ in shown.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/webp;base64,")


def test_the_page_asks_for_nothing_outside_itself(page: Path) -> None:
    shown = Page(page)
    for tag, attributes in shown.tags:
        for name in {"src", "href", "srcset", "action", "poster"} & set(attributes):
            target = str(attributes[name])
            assert target.startswith(("data:", "#")) or (tag, target) in (("a", "results.json"), ("a", "images/"))
    assert not re.search(r"https?://|url\(|@import", re.sub(r"data:[^\"]*", "", shown.source))
    policy = [a["content"] for _, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_picture_has_words_and_every_heading_its_level(page: Path) -> None:
    shown = Page(page)
    assert all(attributes.get("alt") for tag, attributes in shown.tags if tag == "img")
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_text_can_be_read_in_light_and_in_dark(page: Path) -> None:
    """WCAG AA: a contrast of at least 4.5 between every text colour and every ground it stands on."""
    style = Page(page).source.split("<style>")[1].split("</style>")[0]
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root {([^}]*)}", style)]
    assert len(themes) == 2

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in themes:
        for ground in ("page", "card", "gone-soft", "stay-soft"):
            for ink in ("ink", "soft", "accent", ground.replace("-soft", "") if "-" in ground else "ink"):
                low, high = sorted((luminance(theme[ground]), luminance(theme[ink])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


# What is on disk -----------------------------------------------------------------------------------------------------


def entries(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for force, message in ((False, "already exists"), (True, "holds no earlier report")):
        with pytest.raises(FileExistsError, match=message):
            write_page(folder, {}, {}, force=force)
    (folder / "index.html").touch()
    (folder / "results.json").touch()
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.txt'"):
        write_page(folder, {}, {}, force=True)
    assert entries(tmp_path) == {"page/thesis.txt": b"mine", "page/index.html": b"", "page/results.json": b""}


def test_force_replaces_an_earlier_report_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "page", {"date": "monday"}, {"old": Image.new("RGB", (2, 2))})
    with pytest.raises(FileExistsError, match="force=True"):
        write_page(tmp_path / "page", {"date": "tuesday"}, {})
    index = write_page(tmp_path / "page", {"date": "tuesday"}, {"new": Image.new("RGB", (2, 2))}, force=True)
    assert set(entries(tmp_path)) == {"page/index.html", "page/results.json", "page/images/new.png"}
    assert "tuesday" in index.read_text()


def test_force_replaces_what_a_link_points_to_and_keeps_the_link(tmp_path: Path) -> None:
    write_page(tmp_path / "disk" / "page", {"date": "monday"}, {})
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "page")
    write_page(tmp_path / "link", {"date": "tuesday"}, {}, force=True)
    assert (tmp_path / "link").is_symlink()
    assert "tuesday" in (tmp_path / "disk" / "page" / "index.html").read_text()


@pytest.mark.parametrize("broken", ["write_bytes", "rename"])
def test_a_report_that_cannot_be_finished_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_page(tmp_path / "page", {"date": "monday"}, {})
    before = entries(tmp_path)
    original = getattr(Path, broken)

    def full(path: Path, argument: Any) -> Any:
        if ".unfinished" in str(path) and (broken == "rename" or path.name == "results.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, argument)

    monkeypatch.setattr(Path, broken, full)
    with pytest.raises(OSError, match=r"^the report's folder .*page could not be written \(the disk is full\)"):
        write_page(tmp_path / "page", {"date": "tuesday"}, {}, force=True)
    with pytest.raises(OSError, match="the disk is full"):
        write_page(tmp_path / "other", {}, {})
    assert entries(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "page", tmp_path / "file" / "deeper" / "page"):
        with pytest.raises(OSError, match=r"^the report's folder .*page cannot be made, .*file is a file; choose"):
            write_page(folder, {}, {})

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(OSError, match=r"^the report's folder .*page cannot be made \(Permission denied\); choose"):
        write_page(tmp_path / "page", {}, {})


def test_a_missing_image_is_named_with_its_place(tmp_path: Path) -> None:
    results, images = small()
    results["features"]["top"][0]["examples"][0]["overlay"] = "nowhere"
    with pytest.raises(ValueError, match=r"results\.features\.top\[0\]\.examples\[0\]\.overlay names .* 'nowhere'"):
        write_page(tmp_path / "page", results, images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["../escape", "/etc/passwd", ".hidden", "a//b", "a/../b", "", "a\nb", "a b"])
def test_an_image_key_that_is_no_file_name_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file name"):
        write_page(tmp_path / "page", {}, {key: Image.new("RGB", (2, 2))})
    assert not list(tmp_path.iterdir())


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"results\.timings\[0\]\.seconds is a ndarray"):
        write_page(tmp_path / "page", {"timings": [{"seconds": np.zeros(3)}]}, {})


# In a browser --------------------------------------------------------------------------------------------------------

# A frame measures a width exactly; a headless window is never narrower than 500 pixels.
MEASURE = """
<script>
const report = {};
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = frame.clientWidth;
    const outside = [...page.body.querySelectorAll("*")].filter(element => {
      const box = element.getBoundingClientRect();
      return !element.closest(".scroll > *") && (box.right > width + 0.5 || box.left < -0.5);
    });
    const cut = [...page.querySelectorAll("table, .scroll")].filter(box => {
      for (let up = box.parentElement; up; up = up.parentElement) if (up.tagName == "DETAILS") up.open = true;
      return box.scrollWidth > box.clientWidth + 1 && !box.matches("pre");
    });
    report[frame.id] = {
      cut: cut.length,
      tall: page.documentElement.scrollHeight,
      width, wide: page.documentElement.scrollWidth, images: page.images.length,
      broken: [...page.images].filter(image => !image.complete || !image.naturalWidth).length,
      outside: outside.slice(0, 5).map(element => element.outerHTML.slice(0, 120)),
      scripts: page.scripts.length,
    };
  }
  console.error("the harness is heard");
  document.body.textContent = JSON.stringify(report);
});
</script>
"""


def test_the_page_fits_narrow_and_wide_screens_and_its_console_is_silent(page: Path, tmp_path: Path) -> None:
    results, images = small()
    write_page(tmp_path / "hostile", with_text(results, HOSTILE + LONG), images)
    frames = "".join(
        f'<iframe id="{name}-{width}" style="border:0;width:{width}px;height:800px" '
        f'srcdoc="{html.escape((folder / "index.html").read_text())}"></iframe>'
        for name, folder in (("page", page), ("hostile", tmp_path / "hostile"))
        for width in (360, 1440)
    )
    (tmp_path / "harness.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{MEASURE}")
    with chromium() as browser:
        with tab(browser, width=1500) as (harness, heard):
            harness.goto((tmp_path / "harness.html").as_uri())
            report = json.loads(harness.text_content("body"))
        with tab(browser, width=1500) as (alone, heard_alone):
            alone.goto((page / "index.html").as_uri())
            assert "The features of one image" in alone.content()
    assert len(report) == 4
    for name, seen in report.items():
        assert seen["width"] == int(name.rpartition("-")[2])
        assert seen["wide"] <= seen["width"], (name, seen)
        assert not seen["outside"], (name, seen)
        assert seen["images"] > 30
        assert seen["broken"] == 0
        assert seen["cut"] == 0, name  # no table hides columns
        assert seen["scripts"] == 0
    assert heard.console == ["error: the harness is heard"]  # so silence of the pages is not deafness
    assert heard_alone.console == []
