"""Chromium without a window, over the pipe of its DevTools protocol: what a page does in a real browser."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_PATIENCE_S = 60.0


def installed() -> str | None:
    """Path of the browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """A page that is open, and what it has said and asked for."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._unread = b""
        self._number = 0
        self._session = ""
        self.complaints: list[str] = []
        """Errors and warnings of the console, violations of the policy, and exceptions."""
        self.requests: list[str] = []
        """Addresses that were asked for."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path, width: int = 1280, height: int = 900, **media: str) -> None:
        """Load a file and wait until its script has run."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.complaints.clear()
        self.requests.clear()
        self.send("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + _PATIENCE_S
        while self.run("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page, as plain values."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def hover(self, selector: str, right: float = 0.5, down: float = 0.5) -> None:
        """Move the pointer over an element, at fractions of its width and height."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', "
            "behavior: 'instant'}); const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
        )
        x, y = box[0] + box[2] * right, box[1] + box[3] * down
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        code = {"Tab": 9, "ArrowRight": 39, "End": 35, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, file: Path, *, height: int | None = None) -> None:
        """Write a screenshot of the whole page, or of its upper part."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._read], [], [], _PATIENCE_S)
            assert ready, "the browser does not answer"
            received = os.read(self._read, 1 << 20)
            assert received, "the browser has ended"
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        facts = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Audits.issueAdded":
                self.complaints.append(json.dumps(facts))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(facts["args"]))
            case "Log.entryAdded":
                self.complaints.append(facts["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(facts["request"]["url"])
        return message


@contextlib.contextmanager
def browser(program: str) -> Iterator[Tab]:
    """Start the browser with an empty profile; it is ended after the block."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, from_write)]
    os.close(to_read)
    os.close(from_write)

    def move() -> None:
        for end, number in zip(theirs, (3, 4), strict=True):  # where the browser looks for them
            os.dup2(end, number)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=move, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            for end in theirs:
                os.close(end)
            yield Tab(from_read, to_write)
        finally:
            process.kill()
            process.wait()
            os.close(from_read)
            os.close(to_write)
