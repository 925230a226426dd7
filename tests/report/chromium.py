"""A real headless Chromium, spoken to through its DevTools pipe: no driver and no library in between."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
)


def find() -> str | None:
    """The browser's program, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser with one page, for the length of a with-statement.

    Attributes:
        events: what the browser has told unasked, in its order: method and parameters.
    """

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs, self._write = os.pipe()
        self._read, ours = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        # The protocol wants its pipes as descriptors 3 and 4; from high ones, so that neither is in the other's place.
        own = (theirs, ours, os.open(os.devnull, os.O_RDWR))
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64) for descriptor in own]
        moves = [(os.POSIX_SPAWN_DUP2, high[source], target) for source, target in ((0, 3), (1, 4), (2, 1), (2, 2))]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=moves)
        for descriptor in (*own, *high):
            os.close(descriptor)
        self._buffer, self._last = b"", 0
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __enter__(self) -> Chromium:
        pages = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        target = pages[0]["targetId"] if pages else self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        for descriptor in (self._read, self._write):
            os.close(descriptor)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file at a width in CSS pixels, without any network."""
        self.events.clear()
        self.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._note(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """What is seen, or the page from top to bottom, as PNG."""
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))
        return path

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and uncaught exceptions, since the page was opened."""
        found = []
        for method, told in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
        return found

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for since the page was opened, but for data in the page itself."""
        urls = [told["request"]["url"] for method, told in self.events if method == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, message: dict[str, Any]) -> None:
        if "method" in message:
            self.events.append((message["method"], message.get("params", {})))
