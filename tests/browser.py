"""A headless Chromium that a test drives over its DevTools socket: Debian's `chromium` and nothing else."""

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stubs import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODIFIERS = {"alt": 1, "ctrl": 2, "meta": 4, "shift": 8}


class Page:
    """One tab. Commands wait for their answer; what JavaScript throws is an AssertionError."""

    def __init__(self, address: str, folder: Path):
        import websocket

        self.folder = folder
        self.socket = websocket.create_connection(address, timeout=60)
        self.sent = 0

    def call(self, method: str, **params: object) -> dict:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            pass  # an event
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, expression: str) -> object:
        """The value of a JavaScript expression; of a promise, what it comes to."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        try:
            wait_for(lambda: self.js(f"Boolean({expression})"), seconds, expression)
        except AssertionError:
            self.picture(self.folder / "seen.png")
            raise

    def click(self, selector: str) -> None:
        """A mouse click near the top left corner of the first element that matches."""
        x, y = self.js(f"(r => [r.x + 20, r.y + 10])(document.querySelector('{selector}').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *modifiers: str) -> None:
        """A key by its name in KeyboardEvent: "Enter", "Escape", "a"."""
        code = {"Enter": 13, "Escape": 27, "End": 35}.get(key) or ord(key.upper())
        about = {"key": key, "code": f"Key{key.upper()}" if len(key) == 1 else key, "windowsVirtualKeyCode": code}
        about["modifiers"] = sum(MODIFIERS[name] for name in modifiers)
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text and not modifiers else {})
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, file: Path) -> None:
        """What the tab shows, as a PNG: for whoever looks into a failure."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}.split('?')[0]) && document.readyState == 'complete'")


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """A fresh browser whose profile lies in `folder`."""
    words = [
        "--headless=new",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-port=0",
    ]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []
    words += ["--remote-allow-origins=*", "--window-size=1400,1000", f"--user-data-dir={folder}", "about:blank"]
    with (folder.parent / "chromium.log").open("w") as log:
        browser = subprocess.Popen([CHROMIUM, *words], stdout=log, stderr=log)
    try:
        told = folder / "DevToolsActivePort"
        wait_for(lambda: told.is_file() and told.read_text().count("\n"), what="Chromium")
        with urllib.request.urlopen(f"http://127.0.0.1:{told.read_text().split()[0]}/json/list") as listed:
            tab = next(tab for tab in json.load(listed) if tab["type"] == "page")
        yield Page(tab["webSocketDebuggerUrl"], folder.parent)
    finally:
        browser.terminate()
        browser.wait(timeout=20)
