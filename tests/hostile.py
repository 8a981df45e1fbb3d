"""Texts that would run in a page that shows them as they are, and a headless Chromium that sees whether one did."""

import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

RUN = "document.documentElement.classList.add(Date.name)"  # without = and quotes: Markdown takes it for HTML too
PAYLOADS = [
    f"<svg onload={RUN}>",
    f"<script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"<ScRiPt >{RUN}</sCrIpT\t>",
    f"<details open ontoggle={RUN}><summary>a</summary></details>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<a href=javascript:{RUN}>press</a>",
    f"[press](javascript:{RUN})",
    f"<a href=' java\tscript:{RUN}'>press</a>",
    f"</title></style></textarea></pre><script>{RUN}</script>",
    f"`</code><svg/onload={RUN}>` ``<svg onload={RUN}>",
    f"a | b | <img src onerror={RUN}> |\n|---|\n\n<script>{RUN}</script>\n",
    f"$\\text{{<img src=x onerror={RUN}>}}$ $$\\text{{<svg onload={RUN}>}}$$",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror={RUN}&gt;'>",
    f"<h2><svg onload={RUN}></h2><img alt='<h2><svg onload={RUN}></h2>'>",
    "<input autofocus onfocus=" + RUN + "><form action=https://example.org><button>go</button></form>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s></svg>",
    "<link rel=stylesheet href=https://example.org/a.css><style>@import '//example.org/b.css'</style>"
    "<p style='background:url(https://example.org/c.png)'>",
    "<meta http-equiv=refresh content='0;url=https://example.org'><base href=https://example.org/>"
    "![far](https://example.org/d.png)",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;svg onload={RUN}&#62; \x00<svg\x0conload={RUN}>\u202e",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --remote-debugging-port=0"
).split()


class Browser:
    """One page of a headless Chromium, spoken to over its debugging protocol."""

    def __init__(self, address: str):
        import websocket

        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=30)
        self.sent, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **params) -> dict:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("id") == self.sent:
                return said.get("result", {})
            self.events.append(said)

    def run(self, script: str):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def visit(self, page: Path, leaves: bool = False) -> dict:
        """Open a page, touch everything on it: whether a payload ran, errors on the console, requests beyond the page.
        leaves: whether the page may send the browser elsewhere."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        for _ in range(100):
            if self.run("location.href.startsWith('file:') && document.readyState == 'complete'"):
                break
            time.sleep(0.05)
        self.run(
            "document.querySelectorAll('details').forEach(d => d.open = true);"
            "document.querySelectorAll('*').forEach(e => e.focus && e.focus());"
            "document.querySelectorAll('a').forEach(a => /^\\W*java\\s*script/i.test(a.getAttribute('href')) && a.click());"
            "new Promise(done => setTimeout(done, 300))"
        )
        assert self.run("location.href") == page.as_uri() or leaves, f"{page} was not opened"
        ran = self.run("document.documentElement.classList.contains('Date')") is True
        errors, asked = [], []
        for event in self.events:
            about = event.get("params", {})
            if event["method"] == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
                errors.append(about["entry"]["text"])
            if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                errors.append(json.dumps(about)[:300])
            if event["method"] == "Network.requestWillBeSent":
                asked.append(about["request"]["url"])
        asked = [url for url in asked if not url.startswith(("data:", "about:")) and url != page.as_uri()]
        return {"ran": ran, "errors": errors, "asked": asked}


@contextmanager
def browser(folder: Path):
    """A Chromium with a fresh profile in `folder`; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [CHROMIUM, *SWITCHES, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        for _ in range(300):
            if port.is_file() and port.read_text().strip():
                break
            time.sleep(0.1)
        number = port.read_text().split()[0]
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{number}/json/list"
        ) as r:
            pages = [entry for entry in json.load(r) if entry["type"] == "page"]
        yield Browser(pages[0]["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(20)
