"""A headless Chromium for the tests that look at pages, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

FLAGS = ("--no-sandbox", "--disable-quic", "--disable-background-networking", "--enable-unsafe-swiftshader")
PATIENCE_MS = 600_000  # a loaded machine takes a while for what takes a second


def _path() -> str:
    """Of Chromium; without one the test is skipped, but in CI, which must look at pages."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    if os.environ.get("CI") == "true":
        pytest.fail("no chromium on this machine, and CI must look at the page: run `make browser`")
    pytest.skip("no chromium on this machine: `make browser` installs one")


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's `Browser`."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = _path()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Heard:
    """What a tab said on its console, errors among it, and the addresses that it asked."""

    console: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def tab(browser: Any, width: int = 1440, height: int = 900) -> Iterator[tuple[Any, Heard]]:
    """Playwright's `Page`, a phone's below 700 pixels."""
    page = browser.new_page(viewport={"width": width, "height": height}, is_mobile=width < 700)
    page.set_default_timeout(PATIENCE_MS)
    heard = Heard()
    page.on("request", lambda request: heard.asked.append(request.url))
    page.on("console", lambda message: heard.console.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.console.append(f"error: {error}"))
    yield page, heard
    page.close()
