"""HTML pages as a parser reads them, and as a headless Chromium shows them.

Chromium is driven by the DevTools protocol through two pipes: JSON messages that end in a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60  # seconds for one answer
VOID = {"meta", "img", "br", "input"}  # tags that nothing closes
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Reader(HTMLParser):
    """Tables as rows of cells' texts, every tag with its attributes, the scripts, all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._open, self._region = "", [""], [""], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        own = dict(attrs)
        self.tags.append((tag, own))
        if tag not in VOID:
            self._open.append(tag)
        if own.get("role") == "region":
            self._region = own["aria-label"] or ""
            self.tables[self._region] = []
        if tag == "tr":
            self.tables[self._region].append([])
        if tag in ("td", "th"):
            self.tables[self._region][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open[-1] != "style":
            self.text += data
            if "table" in self._open and self.tables[self._region] and self.tables[self._region][-1]:
                self.tables[self._region][-1][-1] += data.strip()


class Page:
    """One page. complaints: what its console and its log said. requests: the addresses it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._read, self._count, self._session = commands, answers, b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; what the page tells in between is taken down."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + WAIT
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._answers, 2**20)
            assert chunk, "the browser has ended"
            self._read += chunk
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(event["params"]))
        elif event.get("method") == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {event['params']['message']}")
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.until("location.protocol + document.readyState === 'file:complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Waits for an expression to become true."""
        end = time.monotonic() + WAIT
        while not self.run(script):
            assert time.monotonic() < end, f"it never came to {script}"
            time.sleep(0.02)

    def look(self, width: int, height: int = 900, media: str = "screen", scheme: str = "light") -> None:
        """The size of the window, on paper or not, light or dark."""
        narrow = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=narrow)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def press(self, key: str) -> None:
        """Space and Enter act as on a real keyboard: they come with their character."""
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        codes = {"Enter": 13, "Space": 32, "Escape": 27, "ArrowRight": 39, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            letter = " " if key == "Space" else key
            more = {"text": text} if text and kind == "keyDown" else {}
            own = {"key": letter, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", type=kind, **own, **more)

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """profile: an empty folder of the browser's own."""
    assert CHROMIUM
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    inherited = f'exec 3<&{command_out} 4>&{answer_in}; exec "$0" "$@"'  # the protocol asks for these two numbers
    running = subprocess.Popen(
        ["bash", "-c", inherited, CHROMIUM, *flags, "--remote-debugging-pipe"],
        pass_fds=(command_out, answer_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_out)
    os.close(answer_in)
    try:
        page = Page(command_in, answer_out)
        yield page
        page._session = ""
        page.call("Browser.close")
    finally:
        os.close(command_in)
        os.close(answer_out)
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
