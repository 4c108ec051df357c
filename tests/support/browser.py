"""A headless Chromium, driven over its debugging pipe: no driver, no further package."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """A page of the browser; its methods raise AssertionError for an error in the page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = to_browser, from_browser
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.errors: list[str] = []
        self("Runtime.enable")
        self("Page.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next())["id"] != self._number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self) -> Any:
        """The next answer; notes the errors among the events before it."""
        while True:
            while b"\0" not in self._unread:
                assert select.select([self._read], [], [], 60)[0], "the browser does not answer"
                self._unread += os.read(self._read, 2**20)
            text, _, self._unread = self._unread.partition(b"\0")
            message = json.loads(text)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"])[:500])
            if "id" in message:
                return message

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is awaited."""
        result = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Until a JavaScript expression holds."""
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < end, (
                f"{condition} never held; the page shows: {self.js('document.body.innerText')}"
            )
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def press(self, key: str, code: str | None = None, *, alt: bool = False) -> None:
        number = {"Enter": 13, "Escape": 27}.get(key) or ord(key.upper())
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": code or key, "windowsVirtualKeyCode": number, "modifiers": int(alt)}
        self("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **common)


@contextmanager
def open_page() -> Iterator[Page]:
    """A page in a browser of its own, with nothing stored."""
    assert CHROMIUM
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        # The browser reads commands from descriptor 3 and writes to 4.
        command = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, "--remote-debugging-pipe", *flags],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])
            os.close(from_browser[0])
            process.terminate()
            process.wait(timeout=30)
