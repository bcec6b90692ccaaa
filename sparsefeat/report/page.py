"""The report: one HTML file that needs nothing else, its numbers as JSON, its images as PNG.

    write_page("demo", results, images)

writes `demo/index.html` (images inside, no script, no request), `demo/results.json` and `demo/images/<key>.png`.
`results` is a dict of plain values with the units in the key names (`dead_share`, `seconds`); wherever it names an
image (the fields of `IMAGE_FIELDS`) it holds a key of `images`. A section whose data are missing is left out.

Every number on the page stands in a `<data value="...">` element that carries the raw value, and the page is rendered
from what `results.json` holds: nothing is computed for the page alone. What lies under a key `curves` is drawn, not
written out.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from sparsefeat.report.figures import enlarge, on_white
from sparsefeat.whole import check_writable, whole_folder

TEMPLATE = "page.html.jinja"

# The fields of `results` that hold an image's key.
IMAGE_FIELDS = frozenset({"image", "overlay", "before", "after"})

# An image larger than this is scaled down inside the page (never under images/): nothing there is shown wider.
LARGEST_SIDE = 512
# At 90 the page's copy of a flat drawing shows no ringing beside its edges and takes about 4 kB. Method 2
# encodes in half the time of the default, 4, for 5 % more bytes.
WEBP_QUALITY, WEBP_METHOD = 90, 2

# A key becomes a file name: no absolute path, no "..", no hidden file.
_KEY = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)*")

_OUR_ENTRIES = {"index.html", "results.json", "images"}


@dataclass(frozen=True)
class Picture:
    """An image inside the page: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int


def write_page(
    folder: Path | str, results: Mapping[str, Any], images: Mapping[str, Image.Image], *, force: bool = False
) -> Path:
    """Write the report into a new `folder` and return the path of its `index.html`.

    The files are written into a sibling folder that is renamed at the end: `folder` is complete or absent. NaN and
    infinity become `null` and are shown as "–"; numpy and torch scalars become numbers.

    Raises FileExistsError when `folder` exists (with `force`: when it is not an earlier report), OSError when it cannot
    be written, ValueError when `results` names an image that is not in `images` or a key is not a usable file name,
    TypeError when `results` holds what JSON cannot.
    """
    check_folder(folder, force=force)
    for key in images:
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"the image key {key!r} cannot be a file name; use letters, digits, '_', '+', '-', '.' and '/'"
            )
    plain = _plain(results, "results")
    pictures: dict[str, Picture] = {}
    _resolve(plain, "results", images, pictures)

    html = (
        environment()
        .get_template(TEMPLATE)
        .render(results=plain, pictures=pictures, project=project_facts(), by_chance=by_chance, convincing=convincing)
    )
    files = {
        "index.html": html.encode(),
        "results.json": (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    for key, image in images.items():
        files[_path(key)] = _encoded(image, "PNG")
    _write_folder(Path(folder), files, force)
    return Path(folder) / "index.html"


def check_folder(folder: Path | str, *, force: bool = False) -> None:
    """Raise FileExistsError if `write_page` would refuse `folder`, OSError if it could not write; call it before work
    that takes minutes."""
    folder = Path(folder)
    check_writable(folder.resolve(), "the report's folder")
    if not os.path.lexists(folder):
        return
    if not force:
        raise FileExistsError(f"{folder} already exists; choose another folder, or force=True to replace a report")
    if not ((folder / "results.json").is_file() and (folder / "index.html").is_file()):
        raise FileExistsError(
            f"{folder} exists and holds no earlier report, so it is left alone; choose another folder"
        )
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _OUR_ENTRIES)
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0]!r}, which no report wrote, so it is left alone; choose another folder"
        )


# What results.json holds ---------------------------------------------------------------------------------------------


def _plain(value: Any, place: str) -> Any:
    """A deep copy of `value` made of what JSON has."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, f"{place}.{name}") for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
    if getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        return _plain(value.item(), place)
    raise TypeError(f"{place} is a {type(value).__name__}, which JSON cannot hold; give plain numbers, text and lists")


def _path(key: str) -> str:
    return f"images/{key}.png"


def _resolve(value: Any, place: str, images: Mapping[str, Image.Image], pictures: dict[str, Picture]) -> None:
    """Replace, in place, every image key in `value` by its file's path, and put its picture under that path.

    `benchmark` was measured elsewhere and names no image of this report.
    """
    if isinstance(value, list):
        for i, entry in enumerate(value):
            _resolve(entry, f"{place}[{i}]", images, pictures)
    elif isinstance(value, dict) and place != "results.benchmark":
        for name, entry in value.items():
            if name in IMAGE_FIELDS and isinstance(entry, str):
                if entry not in images:
                    raise ValueError(f"{place}.{name} names the image {entry!r}, which is not among the images given")
                value[name] = _path(entry)
                if value[name] not in pictures:
                    pictures[value[name]] = picture(images[entry])
            else:
                _resolve(entry, f"{place}.{name}", images, pictures)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(image: Image.Image) -> Picture:
    """The image as the page shows it: on white, small ones enlarged, large ones scaled down."""
    shown = enlarge(on_white(image))
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    data = base64.b64encode(_encoded(shown, "WEBP", quality=WEBP_QUALITY, method=WEBP_METHOD)).decode()
    return Picture(f"data:image/webp;base64,{data}", shown.width, shown.height)


# How a number is shown -----------------------------------------------------------------------------------------------


def _data(value: Any, text: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _or_dash(show: Any) -> Any:
    """A filter that shows a missing value as "–" and text as it is."""

    def shown(value: Any) -> Any:
        if _is_number(value):
            return _data(value, show(value))
        return value if isinstance(value, (str, bool)) else "–"

    return shown


def significant(value: float) -> str:
    """Three significant digits, thousands separated: 0.0213, 1.20, 20,480; whole numbers in full."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}".replace("-", "−")
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}" if digits <= 6 else f"{value:.2e}"
    return text.replace("-", "−")


def identifier(value: float) -> str:
    """A latent's or a seed's number, or a setting as it was given: no separators, no digits added or lost."""
    return str(int(value)) if float(value).is_integer() else str(value)


def breakable(path: str) -> Markup:
    """A hookpoint that breaks before its names where the line is too short for it, not within them."""
    return Markup(".<wbr>").join(re.split(r"\.(?=\D)", str(path)))


def share(value: float) -> str:
    """A share of 1 as percent with one decimal: 0.9123 is 91.2 %."""
    return f"{value * 100:.1f} %".replace(".0 %", " %").replace("-", "−")


def share_precisely(value: float) -> str:
    """A share that may be small as percent with three digits: 0.000213 is 0.0213 %."""
    return f"{significant(float(value) * 100)} %"


def signed(value: float) -> str:
    """A strength with its sign: +8, −2.5, 0."""
    return f"{value:+.4g}".replace("-", "−") if value else "0"


def seconds(value: float) -> str:
    """A duration in the unit that suits it: 12.3 ms, 4.56 s, 31 min, 2.5 h."""
    for limit, unit, size in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60)):
        if abs(value) < limit:
            return f"{value / size:.3g} {unit}"
    return f"{value / 3600:.3g} h"


def chance(value: float) -> str:
    """A share of shuffles as percent, three digits: 0.00342 is 0.342 %."""
    return f"{value * 100:.3g} %"


def bars(values: list[float], marked: list[bool] | None = None) -> Markup:
    """A bar chart as SVG, from 0 to the largest value, a bar a value; `marked` ones in another colour."""
    largest = max(values, default=0) or 1
    shapes = Markup("").join(
        Markup('<rect{} x="{}" y="{}" width="{}" height="{}"/>').format(
            Markup(' class="marked"') if marked and marked[i] else "",
            f"{i * 100 / len(values):.2f}",
            f"{30 - 30 * value / largest:.2f}",
            f"{100 / len(values) * 0.86:.2f}",
            f"{30 * value / largest:.2f}",
        )
        for i, value in enumerate(max(value, 0) for value in values)
    )
    svg = '<svg class="bars" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    return Markup(svg).format(shapes)


def by_chance(entry: Mapping[str, Any]) -> bool:
    """Whether the best of all latents on shuffled images does as well more often than one time in twenty."""
    return _is_number(entry.get("p")) and entry["p"] > 0.05


def convincing(
    erasure: Sequence[Mapping[str, Any]], steering: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Any, ...] | None]:
    """What the top of the page shows, by the judge's shares: `erased`, the erasure and its pair in which the erased word fell
    most; `steered`, the strip and its two images, unedited and turned up, between which the word rose most; if there are such,
    of those in which the rest of the prompt stayed. Where the judge was not asked, the first pair that should lose the word, and the highest strength."""

    def difference(low: Any, high: Any) -> float:
        return high - low if _is_number(low) and _is_number(high) else -math.inf

    targets = [(entry, pair) for entry in erasure for pair in entry["pairs"] if pair.get("is_target", True)]
    turned_up = [
        (entry, before, after)
        for entry in steering
        for before in entry["strip"]
        if before.get("times") == 0
        for after in reversed(entry["strip"])
        if (after.get("times") or 0) > 0
    ]
    return {
        "erased": max(
            targets, key=lambda t: difference(t[1].get("share_after"), t[1].get("share_before")), default=None
        ),
        "steered": max(
            turned_up,
            key=lambda t: (bool(t[2].get("became")), difference(t[1].get("judge_share"), t[2].get("judge_share"))),
            default=None,
        ),
    }


def ranked(peaks: list[float], concepts: list[list[str]], word: str | None) -> Markup:
    """A latent's largest activation in every image, largest first; the images of the word, if there is one, are marked."""
    order = sorted(range(len(peaks)), key=lambda i: -peaks[i])
    concept = str(word or "").replace(" ", "-")
    return bars([peaks[i] for i in order], [concept in concepts[i] for i in order])


def project_facts() -> dict[str, Any]:
    """What the installed package says of itself: its licence and its links, `{"license": ..., "links": {...}}`."""
    try:
        about = metadata("sparsefeat")
    except PackageNotFoundError:  # run from a folder that was not installed
        return {"license": None, "links": {}}
    links = dict(entry.split(", ", 1) for entry in about.get_all("Project-URL") or [])
    kept = {name: url for name, url in links.items() if url.startswith("https://")}
    return {"license": about["License-Expression"], "links": kept}


_FILTERS = {
    "number": _or_dash(significant),
    "identifier": _or_dash(identifier),
    "breakable": breakable,
    "share": _or_dash(share),
    "share_precisely": _or_dash(share_precisely),
    "signed": _or_dash(signed),
    "seconds": _or_dash(seconds),
    "chance": _or_dash(chance),
    "bars": bars,
    "ranked": ranked,
    "is_number": _is_number,
}


def environment() -> Environment:
    """Of the templates here: how numbers are written, what is drawn."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,
    )
    environment.filters.update(_FILTERS)
    return environment


# Disk ----------------------------------------------------------------------------------------------------------------


def _write_folder(folder: Path, files: Mapping[str, bytes], force: bool) -> None:
    """Write `files` into `folder`, in the place of an earlier report with `force`."""
    folder = folder.resolve()  # a link's target is replaced, not the link
    with whole_folder(folder, "the report's folder", replace="results.json" if force else None) as new:
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        check_folder(folder, force=force)  # again: minutes may have passed
