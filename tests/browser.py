"""A headless Chromium that tests drive by its own protocol, over two pipes: pages are opened, typed into, measured, pictured."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)
PATIENCE_S = 120


def find_chromium() -> str:
    """Its path; without one the test is skipped, but in CI, which must look at pages."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    if os.environ.get("CI") == "true":
        pytest.fail("no chromium on this machine, and CI must look at the page: run `make browser`")
    pytest.skip("no chromium on this machine: `make browser` installs one")


class Browser:
    """One tab. `console`: what the page said there, errors among it."""

    def __init__(self, profile: Path):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, find_chromium(), *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self._buffer, self._number, self._loaded = b"", 0, 0
        self.console: list[str] = []
        self._session: str | None = None
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)

    def open(self, page: Path, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        """Load a file and wait for it."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        before = self._loaded
        self._call("Page.navigate", url=page.resolve().as_uri())
        while self._loaded == before:
            self._read()

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise AssertionError(done["exceptionDetails"]["exception"].get("description", done))
        return done["result"].get("value")

    def type(self, text: str) -> None:
        """Key by key, into what has the focus."""
        for key in text:
            self._call("Input.dispatchKeyEvent", type="keyDown", text=key, key=key)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def press(self, key: str, code: int) -> None:
        """A key that is no letter, such as Tab (9) or Enter (13)."""
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self._call("Input.dispatchKeyEvent", key=key, windowsVirtualKeyCode=code, **down)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path, whole: bool = False) -> None:
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number = self._number
        while True:
            heard = self._read()
            if heard.get("id") == number:
                if "error" in heard:
                    raise AssertionError(f"{method}: {heard['error']}")
                return heard["result"]

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_S} s")
            more = os.read(self._in, 1 << 16)
            if not more:
                raise AssertionError("the browser ended")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        heard = json.loads(message)
        if heard.get("method") == "Page.loadEventFired":
            self._loaded += 1
        elif heard.get("method") == "Runtime.consoleAPICalled":
            self.console.append(str([value.get("value") for value in heard["params"]["args"]]))
        elif heard.get("method") == "Runtime.exceptionThrown":
            self.console.append(str(heard["params"]["exceptionDetails"]))
        elif heard.get("method") == "Log.entryAdded":
            self.console.append(heard["params"]["entry"]["text"])
        return heard
