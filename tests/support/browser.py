"""A headless Chromium, driven through the DevTools protocol over a pair of pipes."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60.0


def find_chromium() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab.

    Args:
        reading, writing: file descriptors of the pipes to it.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """What a page said on the console, in the log and as exceptions."""
        self.requests: list[str] = []
        """The addresses that were asked for; data: addresses are not asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.call(f"{domain}.enable")

    def open(
        self,
        page: Path,
        *,
        scheme: Literal["light", "dark"] = "light",
        media: Literal["screen", "print"] = "screen",
        width: int = 1000,
    ) -> None:
        """Loads a file with that colour scheme and waits for it."""
        self.complaints.clear()
        self.requests.clear()
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self._loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        limit = time.monotonic() + _SECONDS
        while not self._loaded:
            self._take(self._receive(limit))
        self.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => null)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + _SECONDS
        while True:
            received = self._receive(limit)
            if received.get("id") == self._number:
                assert "error" not in received, f"{method}: {received['error']}"
                return dict(received["result"])
            self._take(received)

    def _receive(self, limit: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"Chromium did not answer within {_SECONDS:.0f} s"
            received = os.read(self._reading, 2**20)
            assert received, "Chromium ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _take(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            values = [str(one.get("value", one.get("description"))) for one in parameters["args"]]
            self.complaints.append(f"console.{parameters['type']}: {' '.join(values)}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {parameters['exceptionDetails'].get('text')}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith("data:"):
            self.requests.append(parameters["request"]["url"])


@contextmanager
def started_browser(chromium: str, profile: Path) -> Iterator[Browser]:
    """Starts Chromium with an empty profile, and ends it.

    Args:
        chromium: the path of its program.
        profile: a folder for its files.
    """
    to_read, from_writer = os.pipe()
    from_reader, to_write = os.pipe()
    options = [
        "--headless",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium's sandbox refuses root
    ]
    # Chromium reads commands from descriptor 3 and answers on 4.
    moved = f'exec "$0" "$@" 3<&{from_reader} 4>&{from_writer}'
    process = subprocess.Popen(
        ["bash", "-c", moved, chromium, *options],
        pass_fds=(from_reader, from_writer),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
    )
    os.close(from_reader)
    os.close(from_writer)
    try:
        yield Browser(to_read, to_write)
    finally:
        os.close(to_write)
        os.close(to_read)
        process.terminate()
        process.wait(timeout=30)
