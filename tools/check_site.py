"""Every link of the built site leads somewhere, and no page fetches anything from elsewhere: `python tools/check_site.py FOLDER`.

Links to other sites are not followed. Exit code 1 and a line for each fault.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"img": "src", "script": "src", "source": "src", "iframe": "src", "video": "src"}


class Page(HTMLParser):
    """What a page links to, what it fetches, and the places in it that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and {"stylesheet", "icon", "preload", "preconnect"} & set(given.get("rel", "").split()):
            self.fetched.append(given.get("href", ""))
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])


def faults(folder: Path) -> list[str]:
    pages: dict[Path, Page] = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path.resolve()] = page = Page()
        page.feed(path.read_text())
    if not pages:
        return [f"{folder}: no page in it; build it with `make docs`"]
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for target in [*page.links, *page.fetched]:
            parts = urlsplit(target)
            if parts.scheme in ("data", "mailto") or (parts.scheme and target in page.links):
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{name}: fetches {target}")
                continue
            # 404.html alone has links from the root: a server shows it at any depth.
            base = folder if name.name == "404.html" else path.parent
            there = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                found.append(f"{name}: {target} is not there")
            elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].places:
                found.append(f"{name}: {target} has no such place")
    for path in sorted(folder.rglob("*.css")):
        for target in re.findall(r"(?:url\(|@import )['\"]?(https?:[^'\")]+)", path.read_text()):
            found.append(f"{path.relative_to(folder)}: fetches {target}")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{sys.argv[1]}/index.html: every link leads somewhere, nothing is fetched from elsewhere")
