"""The picture of the demo in the README: `python -m tests.demos.screenshot [--out docs/images/demo.png]`.

It starts `visionsel demo`, asks about the first example, clicks on a word and writes what a headless Chromium
shows. With `--all DIR` it writes the three tabs with an answer, wide and narrow, by day and by night: twelve
pictures to look at.
"""

import argparse
import io
import signal
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from pathlib import Path

import httpx
from PIL import Image

from tests.demos.chromium import Chromium, find_chromium
from tests.demos.test_browser import BUTTON, TABS, WORD, answer_in_every_tab, open_tab, source
from visionsel.files import whole_file

OUT = Path(__file__).parents[2] / "docs" / "images" / "demo.png"
WIDTH, HEIGHT, DENSITY = 1180, 800, 1.5  # of the window in its pixels, and how many of ours each has
LARGEST = 200_000  # bytes


def main() -> None:
    """Serve, look, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file (default: docs/images/demo.png)")
    parser.add_argument("--all", type=Path, metavar="DIR", help="write all tabs, sizes and colours instead")
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.error("no Chromium was found: apt-get install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "visionsel", "demo", "--port", str(port), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as profile, subprocess.Popen(command) as server:
        page = None
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_for(address, server)
            page = Chromium(program, Path(profile))
            if options.all is not None:
                _look_at_all(page, address, options.all)
                return
            picture = _look(page, address)
        finally:
            if page is not None:
                page.close()
            server.send_signal(signal.SIGTERM)
    with whole_file(options.out) as partial:
        picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
            partial, optimize=True
        )
        if partial.stat().st_size > LARGEST:
            raise RuntimeError(f"the picture has {partial.stat().st_size} bytes, more than {LARGEST}")
    print(options.out)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            httpx.get(address)
            return
        except httpx.TransportError:
            if server.poll() is not None:
                raise RuntimeError(f"visionsel demo ended with status {server.returncode}") from None
            time.sleep(0.5)
    raise TimeoutError("visionsel demo does not answer")


def _look(page: Chromium, address: str) -> Image.Image:
    _open(page, address, WIDTH, HEIGHT)
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": DENSITY, "mobile": False}
    page.send("Emulation.setDeviceMetricsOverride", **size)
    page.click(BUTTON.format("Ask"))
    objects = source(page, "overlay")
    page.click(WORD.format("triangle"))
    source(page, "overlay", objects)
    source(page, "heat")
    page.run("window.scrollTo(0, 0)")
    time.sleep(2)  # until the pictures have come
    data = page.send("Page.captureScreenshot")["data"]
    return Image.open(io.BytesIO(b64decode(data))).convert("RGB")


def _look_at_all(page: Chromium, address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for width in (1280, 390):
        _open(page, address, width, HEIGHT)
        answer_in_every_tab(page)
        for dark in (False, True):
            page.show(width, HEIGHT, dark)
            for tab in TABS:
                open_tab(page, tab)
                time.sleep(2)  # until the pictures have come
                path = folder / f"{tab.lower()}-{width}-{'dark' if dark else 'light'}.png"
                page.screenshot(path)
                print(path)


def _open(page: Chromium, address: str, width: int, height: int) -> None:
    page.open(address, width, height)
    page.wait("!!document.querySelector('#answer')")
    time.sleep(3)  # until the page listens


if __name__ == "__main__":
    main()
