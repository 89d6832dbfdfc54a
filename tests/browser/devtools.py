"""Headless Chromium by its DevTools protocol over a pipe: the standard library is enough."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
DEADLINE = 60.0
# Chromium reads commands from descriptor 3 and writes to 4; one of them may be the other's at first.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A Chromium without a network. Use it as a context."""

    def __init__(self, profile: Path):
        assert FOUND is not None
        read, child_write = os.pipe()
        child_read, write = os.pipe()
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
        ]
        start = [sys.executable, "-c", _START, str(child_read), str(child_write), FOUND, *options, "about:blank"]
        self.process = subprocess.Popen(
            start, pass_fds=(child_read, child_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(child_read)
        os.close(child_write)
        self._read, self._write, self._buffer, self._last = read, write, b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            assert answer is not None, f"{method}: no answer in {DEADLINE:.0f} s"
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self, seconds: float = DEADLINE) -> dict[str, Any] | None:
        """The next message; events are kept. None: there was none in that time."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def page(self, width: int = 1440, height: int = 900, dark: bool = False) -> "Page":
        return Page(self, width, height, dark)


class Page:
    """A tab: opens files, runs expressions, points, types, takes pictures, and records what a page asks for."""

    def __init__(self, browser: Browser, width: int, height: int, dark: bool):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def open(self, path: Path, fragment: str = "") -> "Page":
        """Open a file and wait until it has loaded and painted twice."""
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")
        self.settle()
        return self

    def settle(self) -> None:
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression (of a promise, once it is kept)."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer.get("exceptionDetails")
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + DEADLINE
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        while self.browser.receive(0.05) is not None:
            pass
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        return [event["params"] for event in mine if event["method"] in methods]

    def requests(self) -> list[str]:
        """Addresses of all that was asked for, data in the page itself left out."""
        asked = [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [address for address in asked if not address.startswith(("data:", "blob:"))]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, violations of the page's policy."""
        logged = [event["entry"]["text"] for event in self._events("Log.entryAdded")]
        called = self._events("Runtime.consoleAPICalled")
        said = [str(event["args"]) for event in called if event["type"] in ("error", "warning", "assert")]
        details = [event["exceptionDetails"] for event in self._events("Runtime.exceptionThrown")]
        thrown = [detail.get("exception", detail).get("description", detail["text"]) for detail in details]
        return logged + said + thrown

    def point(self, x: float, y: float, click: bool = False) -> None:
        where = {"x": x, "y": y}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)
        self.settle()

    def press(self, key: str, times: int = 1) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])
        self.settle()

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)
        self.settle()

    def choose(self, element: str, value: str) -> None:
        """Set a form control by its id, as a person would: with its events."""
        self.run(
            f"(() => {{ const e = document.getElementById({json.dumps(element)}); e.value = {json.dumps(value)};"
            "for (const t of ['input', 'change']) e.dispatchEvent(new Event(t, { bubbles: true })); })()"
        )
        self.settle()

    def downloads(self, folder: Path, act: Callable[[], None]) -> Path:
        """The file that `act` downloads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        before = set(folder.iterdir())
        act()
        end = time.monotonic() + DEADLINE
        while True:
            new = [path for path in set(folder.iterdir()) - before if path.suffix != ".crdownload"]
            if new and new[0].stat().st_size:
                return new[0]
            assert time.monotonic() < end, "nothing was downloaded"
            time.sleep(0.05)

    def picture(self, path: Path, whole: bool = False) -> Path:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path
