"""The demos in a real browser, served by the command itself."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.demos.chromium import Chromium, find_chromium

pytest.importorskip("gradio", reason='the demos need Gradio: pip install "visionsel[demo]"')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None,
        reason="no Chromium was found, so the demos were not seen in a browser: apt-get install chromium",
    ),
]
BUTTON = "[...document.querySelectorAll('button')].find(b => b.offsetParent && b.innerText.trim() === '{}')"
TAB = "[...document.querySelectorAll('[role=tab]')].find(t => t.innerText.trim() === '{}')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its files."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """`visionsel demo`, until the last test is done; then it must leave nothing behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "visionsel", "demo", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)})
    try:
        url = f"http://127.0.0.1:{port}/"
        end = time.monotonic() + 180
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.5)
        yield url
        assert list(folder.glob("visionsel-demo-*"))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not list(folder.glob("visionsel-demo-*"))
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def open_page(address: str, tmp_path: Path) -> Iterator[object]:
    pages: list[Chromium] = []

    def open_(width: int, dark: bool = False) -> Chromium:
        program = find_chromium()
        assert program is not None
        pages.append(Chromium(program, tmp_path / f"profile-{len(pages)}", width, dark=dark))
        pages[-1].send("Page.navigate", url=address)
        pages[-1].wait("!!document.querySelector('#answer')")
        time.sleep(2)  # until the page listens
        return pages[-1]

    yield open_
    for page in pages:
        page.close()


def press(page: Chromium, name: str) -> None:
    page.click(BUTTON.format(name))


def source(page: Chromium, name: str, before: str = "") -> str:
    """The address of the picture of a component, once there is another one than before."""
    found = f"(document.querySelector('#{name} img') || {{}}).src || ''"
    picture: str = page.wait(f"({found}) !== {before!r} && ({found})")
    return picture


def check(page: Chromium, address: str) -> None:
    assert page.errors == []
    outside = [url for url in page.addresses if not url.startswith((address, "data:", "blob:", "about:"))]
    assert outside == []
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "something is wider than the page"


def test_a_visitor_asks_clicks_a_word_and_exports(open_page: object, address: str, tmp_path: Path) -> None:
    page: Chromium = open_page(1280)  # type: ignore[operator]
    press(page, "Ask")
    objects = source(page, "overlay")
    word = "[...document.querySelectorAll('#answer .token')].find(t => t.innerText.trim() === 'triangle')"
    page.click(word)
    heat = source(page, "heat")
    mask = source(page, "overlay", objects)
    assert "score" in page.run("document.querySelector('#word').innerText")
    for picture in (heat, mask):
        with Image.open(io.BytesIO(httpx.get(picture).content)) as opened:
            assert min(opened.size) >= 384
    coco = page.download(tmp_path, lambda: press(page, "Objects (COCO JSON)"))
    assert {"bar", "star", "triangle"} == {one["name"] for one in json.loads(coco.read_text())}
    with Image.open(page.download(tmp_path, lambda: press(page, "Picture (PNG)"))) as opened:
        assert (opened.format, opened.size) == ("PNG", (384, 384))
    page.click(word.replace("'triangle'", "'shaded'"))  # a word that names nothing
    page.wait("document.querySelector('#word').innerText.startsWith('shaded')")
    check(page, address)


def test_a_slider_prunes_anew_and_remedies_are_compared(open_page: object, address: str) -> None:
    page: Chromium = open_page(390, dark=True)  # type: ignore[operator]
    page.click(TAB.format("Pruning"))
    press(page, "Compare")
    before = source(page, "kept-2")
    assert page.run("document.querySelectorAll('#costs tr').length") == 5
    page.click("document.querySelector('#budget-2 input[type=range]')", across=0.7)
    source(page, "kept-2", before)
    assert float(page.run("document.querySelector('#budget-2 input[type=range]').value")) > 0.5
    check(page, address)
    page.click(TAB.format("Hallucination"))
    press(page, "Answer with and without")
    page.wait("!!document.querySelector('#remedied table')")
    assert page.run("document.querySelectorAll('#remedied mark.invented').length") > 0
    assert page.run("document.querySelectorAll('#head-table td').length") == 16
    check(page, address)


def test_an_empty_question_is_answered_by_a_message(open_page: object, address: str) -> None:
    page: Chromium = open_page(1280)  # type: ignore[operator]
    page.click("document.querySelector('textarea')")
    page.run("document.querySelector('textarea').select()")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="Delete", code="Delete", windowsVirtualKeyCode=46)
    press(page, "Ask")
    page.wait("document.body.innerText.includes('The question is empty')")
    check(page, address)
