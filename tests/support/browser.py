"""Chromium without a window, driven by its DevTools protocol through a pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One tab. Raises RuntimeError with the browser's words if it refuses a command."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest, self._number = to_browser, from_browser, b"", 0
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]

    _session: str | None = None

    def open(self, file: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file as a screen of `width` CSS pixels does, a phone's too, which no window is narrow enough for."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("Page.navigate", {"url": file.as_uri()})
        loaded = "new Promise(done => document.readyState == 'complete' ? done(1) : addEventListener('load', done))"
        self.evaluate(f"{loaded}.then(() => location.href)")

    def evaluate(self, script: str) -> Any:
        """The JSON value of a JavaScript expression."""
        words = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", words)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def picture(self, height: int) -> bytes:
        """A PNG of the page's first `height` CSS pixels."""
        width = self.evaluate("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shown = {"format": "png", "clip": clip, "captureBeyondViewport": True}
        return base64.b64decode(self._call("Page.captureScreenshot", shown)["data"])

    def _call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._number:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> bytes:
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 20)
            if not read:
                raise RuntimeError("Chromium ended")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser that keeps its files in `folder`."""
    assert CHROMIUM is not None
    (read, to_browser), (from_browser, write) = os.pipe(), os.pipe()
    ours = browser_reads, browser_writes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    # the protocol is spoken on descriptors 3 and 4
    shell = [
        "bash",
        "-c",
        f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}',
        "bash",
        CHROMIUM,
        *options,
        "about:blank",
    ]
    process = subprocess.Popen(shell, pass_fds=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for descriptor in (read, write, *ours):
        os.close(descriptor)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
