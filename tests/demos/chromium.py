"""A headless Chromium for tests, driven over a pipe by its own protocol; nothing else is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CONTRASTS", "CUT", "OUTSIDE", "OVERLAPS", "Chromium", "find_chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"  # a camera that shows a clock
).split()
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "Delete": 46}

# What a page looks like, as expressions that are run in it. What is not seen does not count.
_SEEN = """
const seen = e => e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
const told = e => e.outerHTML.slice(0, 100);
"""

OUTSIDE = f"""(() => {{ {_SEEN}
return [...document.querySelectorAll('body *')].filter(e => {{
  if (!seen(e) || e.parentElement.closest('.wide')) return false;
  const b = e.getBoundingClientRect();
  return b.width && (b.left < -1 || b.right > innerWidth + 1);
}}).map(told); }})()"""
"""Elements that are wider than the window, but for what scrolls inside of a `.wide`."""

CUT = f"""(() => {{ {_SEEN}
const cuts = e => e.clientWidth > 1  // else it is for those who hear the page
  && e.scrollWidth > e.clientWidth + 1 && ['hidden', 'clip'].includes(getComputedStyle(e).overflowX);
return [...document.querySelectorAll('body *')].filter(e => seen(e) && cuts(e)).map(told); }})()"""
"""Elements whose content is wider than they are and cannot be scrolled."""

OVERLAPS = f"""(() => {{ {_SEEN}
const least = 2;  // pixels; lines of text may touch
const inside = (box, e) => {{  // what the elements around it let be seen
  let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom];
  for (let p = e; p; p = p.parentElement) {{
    const style = getComputedStyle(p), b = p.getBoundingClientRect();
    if (style.overflowX !== 'visible') [left, right] = [Math.max(left, b.left), Math.min(right, b.right)];
    if (style.overflowY !== 'visible') [top, bottom] = [Math.max(top, b.top), Math.min(bottom, b.bottom)];
  }}
  return {{left, top, right, bottom}};
}};
const things = [];
for (const e of document.querySelectorAll('body *')) {{
  if (!seen(e)) continue;
  const control = e.matches('a, button, input, select, textarea') && !e.querySelector('img');
  const boxes = control ? [e.getBoundingClientRect()] : [];
  for (const node of e.childNodes) {{
    if (node.nodeType !== Node.TEXT_NODE || !node.textContent.trim()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    boxes.push(...range.getClientRects());
  }}
  for (const box of boxes) things.push({{e, box: inside(box, e)}});
}}
const found = new Set();
for (const [n, a] of things.entries()) for (const b of things.slice(n + 1)) {{
  if (a.e.contains(b.e) || b.e.contains(a.e)) continue;
  const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
  const down = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
  if (across > least && down > least) found.add(`${{told(a.e)}} AND ${{told(b.e)}}`);
}}
return [...found]; }})()"""
"""Pairs of texts and controls, none inside of the other, that cover each other; pictures may be covered."""

CONTRASTS = f"""(() => {{ {_SEEN}
const context = new OffscreenCanvas(1, 1).getContext('2d', {{willReadFrequently: true}});
const rgba = color => {{  // whatever way the style writes it
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255);
}};
const over = (top, ground) => ground.map((v, i) => top[3] * top[i] + (1 - top[3]) * v);
const behind = e => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [1, 1, 1];
const light = rgb => rgb.map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const least = {{}};
for (const e of document.querySelectorAll('body *')) {{
  if (![...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim())) continue;
  if (!seen(e) || e.closest(':disabled')) continue;
  const ground = behind(e);
  const [a, b] = [light(over(rgba(getComputedStyle(e).color), ground)), light(ground)].sort((x, y) => y - x);
  const kind = `${{e.tagName}}.${{e.className}}`;
  least[kind] = Math.min(least[kind] || 99, (a + 0.05) / (b + 0.05));
}}
return least; }})()"""
"""WCAG's contrast of text with what is behind it, the least by kind of element; 4.5 can be read."""


def find_chromium() -> str | None:
    """The program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser with one page.

    Attributes:
        errors: what the console said of errors, and exceptions of the page, since it was opened.
        addresses: of all requests since then.
    """

    def __init__(self, program: str, folder: Path) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()

        def wire() -> None:  # Chromium reads commands from 3 and writes answers to 4
            keep = os.dup(commands), os.dup(answers)
            os.dup2(keep[0], 3)
            os.dup2(keep[1], 4)

        arguments = [program, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            arguments,
            preexec_fn=wire,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        self.addresses: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, address: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Leave the page, and open another one of a size in pixels."""
        self.send("Page.navigate", url="about:blank")
        self.show(width, height, dark)
        self.errors.clear()
        self.addresses.clear()
        self.send("Page.navigate", url=address)

    def show(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Give the window another size, and the page the colours of the day or of the night."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def send(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its result; what is told in between is noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            told = self._read(end)
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self._note(told)
        raise TimeoutError(f"{method} has no result")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{script}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 90) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.2)
        raise TimeoutError(f"never true: {script}")

    def click(self, element: str, across: float = 0.5) -> None:
        """Click on what an expression gives, at a share of its width."""
        self.wait(f"!!({element})")
        self.run(f"({element}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        where = (
            f"(() => {{ const b = ({element}).getBoundingClientRect(); "
            f"return [b.left + {across} * b.width, b.top + b.height / 2]; }})()"
        )
        place, before = self.run(where), None
        while place != before:  # pictures that arrive move what is below them
            time.sleep(0.5)
            place, before = self.run(where), place
        x, y = place
        for kind, button, held in (
            ("mouseMoved", "none", 0),
            ("mousePressed", "left", 1),
            ("mouseReleased", "left", 0),
        ):
            at = {"x": x, "y": y, "button": button, "buttons": held}
            self.send("Input.dispatchMouseEvent", type=kind, clickCount=held or 1, **at)

    def press(self, key: str) -> None:
        """Press a key, one of `KEYS`."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, element: str, text: str) -> None:
        """Put text into what an expression gives, in place of what was there."""
        self.click(element)
        self.run(f"({element}).select()")
        if text:
            self.send("Input.insertText", text=text)
        else:
            self.press("Delete")

    def upload(self, element: str, path: Path) -> None:
        """Choose a file for the input of files that an expression gives."""
        self.wait(f"!!({element})")
        found = self.send("Runtime.evaluate", expression=element)["result"]["objectId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], objectId=found)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page, PNG."""
        width, height = self.run("[innerWidth, Math.ceil(document.documentElement.scrollHeight)]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        told = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def download(self, folder: Path, press: Callable[[], None]) -> Path:
        """The file that a press of something brings."""
        page, self._session = self._session, None
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self._session = page
        before = set(folder.iterdir())
        press()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            new = [path for path in set(folder.iterdir()) - before if path.suffix != ".crdownload"]
            if new and not new[0].name.startswith("."):
                return new[0]
            time.sleep(0.2)
        raise TimeoutError("nothing was downloaded")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._out)
        os.close(self._in)

    def _read(self, end: float) -> Any:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                return {}
            piece = os.read(self._in, 1 << 16)
            if not piece:
                raise RuntimeError("Chromium ended")
            self._buffer += piece
        one, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(one)

    def _note(self, told: Any) -> None:
        method, about = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.errors.append(str(about["args"]))
        elif method == "Network.requestWillBeSent":
            self.addresses.append(about["request"]["url"])
