"""The demos in a real browser, served by the command itself."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.demos.chromium import CONTRASTS, CUT, OUTSIDE, OVERLAPS, Chromium, find_chromium
from visionsel.data.shapes.masks import decode_rle

pytest.importorskip("gradio", reason='the demos need Gradio: pip install "visionsel[demo]"')

from demos.examples import scenes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None,
        reason="no Chromium was found, so the demos were not seen in a browser: apt-get install chromium",
    ),
]
BUTTON = "[...document.querySelectorAll('button')].find(b => b.offsetParent && b.innerText.trim() === '{}')"
LABELLED = "[...document.querySelectorAll('{} button')].find(b => b.ariaLabel === '{}')"
TABS = ("Grounding", "Pruning", "Hallucination")
TAB = "[...document.querySelectorAll('[role=tab]')].find(t => t.innerText.trim() === '{}')"
WORD = "[...document.querySelectorAll('#answer .token')].find(t => t.innerText.trim() === '{}')"
FOLDED = "[...document.querySelectorAll('button.label-wrap')].find(b => b.innerText.includes('{}'))"
CHOICES = (
    "[...document.querySelectorAll('input[role=combobox]')].find(i => i.offsetParent && i.ariaLabel === '{}')"
)
CHOICE = "[...document.querySelectorAll('[role=option]')].find(o => o.ariaLabel === '{}')"
HEADS = "[...document.querySelectorAll('#heads img')]"
QUESTION = "document.querySelector('textarea')"
TOLD = "document.querySelector('#word').innerText"
Open = Callable[..., Chromium]
# notes to which hosts a process looks or connects; Python imports a module of this name as it starts
WATCH = """
import os, sys
def note(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple):
        host = given[1][0]
    elif event == "socket.getaddrinfo":
        host = given[0]
    else:
        return
    with open(os.environ["HOSTS"], "a") as file:
        print(host, file=file)
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its files."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`visionsel demo`, until the last test is done; then it must leave nothing behind.

    From its start to its end it may look for no other host than this one.
    """
    beside = tmp_path_factory.mktemp("beside")
    (beside / "sitecustomize.py").write_text(WATCH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "visionsel", "demo", "--port", str(port), "--device", "cpu"]
    # visitors who left are noticed at once, not in 15 s
    own = {"TMPDIR": str(folder), "GRADIO_IS_E2E_TEST": "1", "HOSTS": str(beside / "hosts")}
    path = os.pathsep.join([str(beside), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(command, env={**os.environ, **own, "PYTHONPATH": path})
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
        hosts = set((beside / "hosts").read_text().split())  # Gradio asks itself whether it is there
        assert hosts <= {"127.0.0.1", "localhost"}
        assert hosts
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    opened = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def open_page(address: str, browser: Chromium) -> Open:
    def open_(width: int, dark: bool = False) -> Chromium:
        browser.open(address, width, dark=dark)
        browser.wait("!!document.querySelector('#answer')")
        time.sleep(1)  # until the page listens
        return browser

    return open_


def press(page: Chromium, name: str) -> None:
    page.click(BUTTON.format(name))


def open_tab(page: Chromium, name: str) -> None:
    """Click on a tab, or on its line in the menu where Gradio found too little room for it."""
    if not page.run(f"!!({TAB.format(name)})"):
        page.click(LABELLED.format(".overflow-menu", "More tabs"))
        page.click(BUTTON.format(name))
    else:
        page.click(TAB.format(name))


def choose(page: Chromium, label: str, choice: str) -> None:
    """Choose a line of a list that opens."""
    page.click(CHOICES.format(label))
    page.click(CHOICE.format(choice))


def source(page: Chromium, name: str, before: str = "") -> str:
    """The address of the picture of a component, once there is another one than before."""
    found = f"(document.querySelector('#{name} img') || {{}}).src || ''"
    picture: str = page.wait(f"({found}) !== {before!r} && ({found})")
    return picture


def pixels(address: str) -> np.ndarray:
    """Of a picture that the server has, uint8 `[H, W, 3]`."""
    with Image.open(io.BytesIO(httpx.get(address).content)) as opened:
        return np.asarray(opened.convert("RGB"))


def answer_in_every_tab(page: Chromium) -> None:
    """One answer in each tab, with all that it shows unfolded."""
    press(page, "Ask")
    objects = source(page, "overlay")
    page.click(WORD.format("triangle"))
    source(page, "overlay", objects)
    source(page, "heat")
    page.click(FOLDED.format("Layers and heads"))
    press(page, "Show what the last word saw")
    page.wait(f"{HEADS}.length === 4")
    page.click(FOLDED.format("How attention becomes a heatmap"))
    open_tab(page, "Pruning")
    press(page, "Compare")
    source(page, "kept-2")
    open_tab(page, "Hallucination")
    press(page, "Answer with and without")
    page.wait("!!document.querySelector('#remedied table')")


def said(page: Chromium, words: str) -> None:
    """Wait for a message, and close it."""
    page.wait(f"document.body.innerText.includes({words!r})")
    page.run("document.querySelectorAll('.toast-close').forEach(b => b.click())")
    page.wait(f"!document.body.innerText.includes({words!r})")


def check(page: Chromium, address: str) -> None:
    """What holds of every page, whatever was done on it."""
    assert page.errors == []
    outside = [url for url in page.addresses if not url.startswith((address, "data:", "blob:", "about:"))]
    assert outside == []
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "something is wider than the page"
    silent = "[...document.querySelectorAll('img')].filter(i => i.offsetParent && !i.alt).map(i => i.src)"
    assert page.run(silent) == [], "pictures without a text for those who do not see them"


def test_a_visitor_asks_clicks_a_word_and_exports(open_page: Open, address: str, tmp_path: Path) -> None:
    page = open_page(1280)
    assert page.run("document.title") == "visionsel: grounding, pruning, hallucination"
    press(page, "Ask")
    objects = source(page, "overlay")
    page.click(WORD.format("triangle"))
    heat = source(page, "heat")
    mask = source(page, "overlay", objects)
    assert "score" in page.run(TOLD)
    assert min(pixels(heat).shape[:2]) >= 384
    coco = page.download(tmp_path, lambda: press(page, "Objects (COCO JSON)"))
    found = {one["name"]: one for one in json.loads(coco.read_text())}
    assert set(found) == {"bar", "star", "triangle"}
    scene = np.asarray(scenes()[0].image)
    changed = (pixels(mask) != scene).any(2)
    assert changed[decode_rle(found["triangle"]["segmentation"])].mean() > 0.99
    rows = changed.any(1).nonzero()[0]
    _, top, _, height = found["triangle"]["bbox"]
    assert (rows[0], rows[-1]) == (top, top + height - 1)
    with Image.open(page.download(tmp_path, lambda: press(page, "Picture (PNG)"))) as opened:
        assert (opened.format, opened.size) == ("PNG", (384, 384))
    page.click(WORD.format("shaded"))  # a word that names nothing
    page.wait(f"{TOLD}.startsWith('shaded')")
    check(page, address)


def test_keys_alone_choose_a_word(open_page: Open, address: str) -> None:
    page = open_page(1280)
    page.type(QUESTION, "how many objects are there?")
    page.press("Enter")
    objects = source(page, "overlay")
    for _ in range(12):
        page.press("Tab")
        if page.run("document.activeElement.matches('#answer .token')"):
            break
    page.press("Enter")
    page.wait(f"{TOLD}.startsWith('three')")
    word = source(page, "overlay", objects)
    press(page, "Detect everything")
    page.wait(f"{TOLD}.includes('objects found')")
    assert source(page, "overlay", word)
    check(page, address)


def test_a_slider_prunes_anew_and_remedies_are_compared(open_page: Open, address: str) -> None:
    page = open_page(390, dark=True)
    open_tab(page, "Pruning")
    press(page, "Compare")
    before = source(page, "kept-2")
    assert page.run("document.querySelectorAll('#costs tr').length") == 5
    page.click("document.querySelector('#budget-2 input[type=range]')", across=0.7)
    slid = source(page, "kept-2", before)
    assert float(page.run("document.querySelector('#budget-2 input[type=range]').value")) > 0.5
    choose(page, "Method", "fastv")
    assert not np.array_equal(pixels(source(page, "kept-2", slid)), pixels(slid))
    check(page, address)
    open_tab(page, "Hallucination")
    press(page, "Answer with and without")
    page.wait("!!document.querySelector('#remedied table')")
    assert page.run("document.querySelectorAll('#remedied mark.invented').length") > 0
    assert page.run("document.querySelectorAll('#head-table td').length") == 16
    assert page.run("document.querySelectorAll('#redistributed img').length") == 6
    check(page, address)


def test_layers_and_heads_are_looked_into_and_another_method_sees_otherwise(
    open_page: Open, address: str
) -> None:
    page = open_page(1280)
    page.type(QUESTION, "how many objects are there?")
    press(page, "Ask")
    objects = source(page, "overlay")
    page.click(WORD.format("three"))
    word, heat = source(page, "overlay", objects), source(page, "heat")
    page.click(FOLDED.format("Layers and heads"))
    press(page, "Show what the last word saw")
    page.wait(f"{HEADS}.length === 4")
    layers = page.run(f"{HEADS}.map(i => i.src)")
    assert len({pixels(one).tobytes() for one in layers}) == 4
    choose(page, "Look into", "layer 2")
    press(page, "Show what the last word saw")
    page.wait(f"{HEADS}.length === 4 && {HEADS}.every(i => i.src.includes('head'))")
    assert len({pixels(one).tobytes() for one in page.run(f"{HEADS}.map(i => i.src)")}) == 4
    page.click(FOLDED.format("How attention becomes a heatmap"))
    choose(page, "Method", "mean of all heads")
    press(page, "Ask")
    source(page, "overlay", word)
    page.click(WORD.format("three"))
    assert not np.array_equal(pixels(source(page, "heat", heat)), pixels(heat))
    check(page, address)


@pytest.fixture(scope="module")
def answered(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A page with an answer in each tab, in a browser of its own."""
    program = find_chromium()
    assert program is not None
    page = Chromium(program, tmp_path_factory.mktemp("answered"))
    try:
        page.open(address, 1280)
        page.wait("!!document.querySelector('#answer')")
        time.sleep(1)  # until the page listens
        answer_in_every_tab(page)
        yield page
    finally:
        page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overlaps_or_is_cut_and_text_can_be_read(
    answered: Chromium, address: str, width: int, dark: bool
) -> None:
    answered.show(width, dark=dark)
    for tab in TABS:
        open_tab(answered, tab)
        time.sleep(1)  # until colours have changed
        check(answered, address)
        for look in (OUTSIDE, CUT, OVERLAPS):
            assert answered.run(look) == []
        contrasts = answered.run(CONTRASTS)
        assert len(contrasts) > 10
        assert {kind: contrast for kind, contrast in contrasts.items() if contrast < 4.5} == {}


def test_the_faults_of_a_page_are_noticed(browser: Chromium) -> None:
    page = """<style>body { background: white } p { width: 200px }</style>
        <p style='width: 600px'>wider than the window</p>
        <input value='a long line of text' style='width: 50px'>
        <p style='width: 50px; overflow: hidden; white-space: nowrap'>a line that is cut</p>
        <p>covered</p><p><button style='position: relative; top: -34px'>above it</button></p>
        <p style='color: #999'>faint</p><p style='visibility: hidden; width: 900px'>not seen</p>"""
    browser.open(f"data:text/html,{quote(page)}", 390)
    browser.wait("document.readyState === 'complete' && !!document.querySelector('button')")
    (wide,) = browser.run(OUTSIDE)
    assert "wider than the window" in wide
    cut = browser.run(CUT)
    assert [tag for tag in cut if "a line that is cut" in tag or "<input" in tag] == cut
    assert len(cut) == 2
    (pair,) = browser.run(OVERLAPS)
    assert re.fullmatch("<p>covered</p> AND <button .*>above it</button>", pair)
    assert [contrast < 4.5 for contrast in browser.run(CONTRASTS).values()].count(True) == 1


def test_what_cannot_be_answered_is_answered_by_a_message(
    open_page: Open, address: str, folder: Path, tmp_path: Path
) -> None:
    page = open_page(1280)
    for question, words in (
        ("", "The question is empty"),
        ("a" * 5000, "has 5,000 characters; at most 1,000"),
    ):
        page.type(QUESTION, question)
        press(page, "Ask")
        said(page, words)
    (tmp_path / "notes.png").write_text("no image at all")
    Image.new("RGB", (8000, 5000), "red").save(tmp_path / "large.jpg")
    page.type(QUESTION, "how many objects are there?")
    for name, words in (
        ("notes.png", "notes.png is not an image that can be read"),
        ("large.jpg", "it is scaled down to 1024 x 640"),
    ):
        page.click(LABELLED.format("#asked", "Remove Image"))
        page.upload("document.querySelector('#asked input[type=file]')", tmp_path / name)
        page.wait(f"(document.querySelector('#asked img') || {{}}).src?.includes({name!r})")
        press(page, "Ask")
        said(page, words)
    source(page, "overlay")
    check(page, address)
    assert list(folder.rglob("large.jpg"))
    page.open("about:blank", 1280)
    end = time.monotonic() + 40
    while time.monotonic() < end and list(folder.rglob("large.jpg")):
        time.sleep(0.2)
    assert not [*folder.rglob("large.jpg"), *folder.rglob("notes.png")]


def test_a_photo_is_taken_and_a_picture_fills_the_window(open_page: Open, address: str) -> None:
    page = open_page(1280)
    for name in ("Remove Image", "Capture from camera"):
        page.click(LABELLED.format("#asked", name))
    press(page, "Click to Access Webcam")
    page.wait("(document.querySelector('#asked video') || {}).videoWidth > 0")
    page.click(LABELLED.format("#asked", "capture photo"))
    source(page, "asked")
    page.type(QUESTION, "how many objects are there?")
    press(page, "Ask")
    source(page, "overlay")
    wide = "document.querySelector('#overlay').getBoundingClientRect().width > 0.9 * innerWidth"
    assert not page.run(wide)
    page.click(LABELLED.format("#overlay", "Fullscreen"))
    page.wait(wide)
    page.press("Escape")
    page.wait(f"!({wide})")
    check(page, address)
