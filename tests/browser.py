"""A headless Chromium for tests, spoken to over two pipes (its DevTools protocol): no driver program, no package, no port.

with Browser(width=1280) as browser:
    browser.open(path)
    browser.run("document.title")          the value of an expression; promises are waited for
    browser.key("j"); browser.hover(x, y)  real input events
    browser.problems                       console errors and exceptions so far
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
_CODES = {"/": ("Slash", 191), "[": ("BracketLeft", 219), "]": ("BracketRight", 221), "ArrowLeft": ("ArrowLeft", 37)}
_CODES |= {
    "ArrowRight": ("ArrowRight", 39),
    "ArrowDown": ("ArrowDown", 40),
    "ArrowUp": ("ArrowUp", 38),
    "Escape": ("Escape", 27),
}


# The protocol is spoken on descriptors 3 (to the browser) and 4 (from it).
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_READY = """new Promise((done, fail) => {
    const late = setTimeout(() => fail(new Error("the page does not get ready")), 60000);
    const look = () => document.body && document.body.dataset.ready ? (clearTimeout(late), done(true)) : setTimeout(look, 5);
    look();
})"""


class Browser:
    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self.size, self.dark = (width, height), dark
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._rest = b""

    def __enter__(self) -> Browser:
        assert PROGRAM
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += [
            "--remote-debugging-pipe",
            f"--user-data-dir={self._folder}",
            "--disable-background-networking",
            "about:blank",
        ]
        command = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), PROGRAM, *flags]
        with open(os.devnull, "wb") as nowhere:
            self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=nowhere, stderr=nowhere)
        os.close(theirs_in), os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = self.size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if self.dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        """The next message; what the page complains of is kept on the way."""
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            assert part, "the browser is gone"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        about = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(about["entry"]["text"])
        if message.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(about["args"]))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        return message

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._call(method, self._session, **parameters)

    def open(self, page: Path | str) -> None:
        """A file, or an address."""
        self.call("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        self.run(_READY)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what a key or click set off is drawn."""
        self.run("new Promise(done => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 30))")

    def key(self, key: str) -> None:
        code, number = _CODES.get(key, (f"Key{key.upper()}", ord(key.upper()[0])))
        about = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": key} if len(key) == 1 else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)
        self.settle()

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)
        self.settle()

    def mouse(self, selector: str, kind: str = "mouseMoved") -> None:
        """Move onto the middle of the element, or press there."""
        x, y = self.run(
            f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: "center"}});
            const b = e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if kind == "click":
            for part in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=part, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def picture(self, path: Path, full: bool = False) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(answer["data"]))
