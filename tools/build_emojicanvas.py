"""Build EmojiCanvas: emoji of four vendors, rasterised to 64x64 RGBA, as an object x style grid.

    python tools/build_emojicanvas.py

Fetches four permissively licensed icon sets with the npm client, keeps the names that all four draw
(without skin tones), renders each with resvg, and writes

* `build/emojicanvas/grid.npz`: the whole grid, for training the autoencoder and the judge;
* `sparsefeat/assets/emojicanvas/objects.npz`: the fifty clearly shaped objects that the embedded pipeline draws.

Both hold `images` uint8 [style, concept, 64, 64, 4] (RGBA: the alpha channel is the exact mask), `names` and `styles`.
Fetched packages stay in `build/npm/`, so a second run needs no network.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from sparsefeat.assets.emojicanvas import OBJECTS, STYLES

ROOT = Path(__file__).resolve().parents[1]
NPM_CACHE = ROOT / "build" / "npm"
GRID = ROOT / "build" / "emojicanvas" / "grid.npz"
SHIPPED = ROOT / "sparsefeat" / "assets" / "emojicanvas" / "objects.npz"
SIZE = 64

# Style word in a prompt -> the icon set it names. Versions are pinned: a later release redraws icons.
PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "mono": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
}


def fetch(package: str, version: str) -> dict:
    """The icon set's `icons.json`, from the cache or with `npm pack`."""
    NPM_CACHE.mkdir(parents=True, exist_ok=True)
    archive = NPM_CACHE / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", f"{package}@{version}", "--silent"], cwd=NPM_CACHE, check=True)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise FileNotFoundError(f"{archive} holds no package/icons.json; delete it and run again")
        return json.load(member)


def render(icons: dict, name: str) -> np.ndarray:
    """One icon as uint8 [SIZE, SIZE, 4], transparent where the vendor drew nothing."""
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    view_box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view_box}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (SIZE, SIZE):  # a non-square icon keeps its aspect: centre it
        canvas = Image.new("RGBA", (SIZE, SIZE))
        canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = canvas
    return np.asarray(image)


def save(path: Path, images: np.ndarray, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images, names=np.array(names), styles=np.array(STYLES))
    print(f"{path.relative_to(ROOT)}: {images.shape}, {path.stat().st_size / 2**20:.2f} MiB")


def main() -> None:
    sets = {style: fetch(*PACKAGES[style]) for style in STYLES}
    shared = set.intersection(*(set(icons["icons"]) for icons in sets.values()))
    names = sorted(name for name in shared if "skin-tone" not in name)
    missing = sorted(set(OBJECTS) - set(names))
    if missing:
        raise ValueError(f"objects that some set does not draw: {missing}")
    images = np.stack(
        [np.stack([render(sets[style], name) for name in tqdm(names, desc=f"render {style}")]) for style in STYLES]
    )
    save(GRID, images, names)
    keep = [names.index(name) for name in OBJECTS]
    save(SHIPPED, images[:, keep], list(OBJECTS))


if __name__ == "__main__":
    main()
