"""The whole report: one file that needs no other, the same in two runs, whole or not at all."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.demos.chromium import CONTRASTS, OUTSIDE, Chromium, find_chromium
from tests.train.pages import SMALLEST, Reader, pixels_of, small_models
from train import report
from train.report import PAGE, fresh_scenes, main, write_report
from train.report_digits import SELECTS, Digits, classification_section
from train.report_page import Section, bar, fill_page, table

ANCHORS = ["classification", "captions", "grounding", "pruning", "hallucination"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    """The page of the stand-ins, written by the command, and what that printed."""
    output = tmp_path_factory.mktemp("report") / "new"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(report, "load_models", lambda lvlm, segmenter: small_models())
        patch.setattr(report, "Sizes", lambda: SMALLEST)
        assert main(["--output", str(output)]) == 0
    return output / PAGE, said.getvalue()


def test_the_page_needs_no_other_file(written) -> None:
    path, said = written
    assert said.splitlines()[-1] == str(path)
    assert list(path.parent.iterdir()) == [path]
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|srcset|javascript:", text)
    assert len(page.sources) > 14
    for source in page.sources:
        assert pixels_of(source).shape[2] == 3
    assert page.tags.count("img") == len(page.sources)
    alts = [value for name, value in page.attributes if name == "alt"]
    assert len(alts) == len(page.sources)
    assert all(alts)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_contents_lead_to_the_sections_in_order(written) -> None:
    page = Reader(written[0].read_text(encoding="utf-8"))
    links = [value for name, value in page.attributes if name == "href"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert links[:5] == [f"#{anchor}" for anchor in ANCHORS]
    assert [one for one in ids if one in ANCHORS] == ANCHORS
    assert set(links[5:]) == {"#contents"}
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    for _, value in [pair for pair in page.attributes if pair[0] == "aria-labelledby"]:
        assert value in ids
    assert "make quickstart" in page.texts["section"][0]


def test_another_run_differs_in_times_only(written, tmp_path) -> None:
    models = small_models()
    again = write_report(tmp_path, *models, sizes=SMALLEST).read_text(encoding="utf-8")
    timeless = [
        re.sub(r'<span class="time">.*?</span>', "", text) for text in (written[0].read_text(), again)
    ]
    assert timeless[0] == timeless[1]
    assert 'class="time"' in again


@pytest.mark.parametrize("failing", ANCHORS[1:])
def test_a_section_that_fails_is_an_error_and_leaves_the_old_page(
    tmp_path, monkeypatch, failing: str
) -> None:
    (tmp_path / PAGE).write_text("old")
    for name in ANCHORS[1:]:
        section = Section(name, name, "", "", "")

        def make(*_: object, section: Section = section) -> Section:
            if section.anchor == failing:
                raise ValueError(f"no {failing} today")
            return section

        monkeypatch.setattr(report, f"{name}_section", make)
    monkeypatch.setattr(report, "load_models", lambda *_: small_models())
    with pytest.raises(ValueError, match=f"no {failing} today"):
        write_report(tmp_path, *small_models(), sizes=SMALLEST)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    (tmp_path / PAGE).write_text("old")
    for name in ANCHORS[1:]:
        monkeypatch.setattr(report, f"{name}_section", lambda *_, name=name: Section(name, name, "", "", ""))
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        write_report(tmp_path, *small_models(), sizes=SMALLEST)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_page_alone_says_what_is_missing(tmp_path, capsys) -> None:
    assert main(["--output", str(tmp_path / "page"), "--lvlm", str(tmp_path)]) == 1
    assert f"no config.json in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_scenes_are_always_the_same_and_no_section_has_those_of_another() -> None:
    for one, other in zip(fresh_scenes("anti", 3, 3), fresh_scenes("anti", 3, 5), strict=False):
        assert (one.pixels == other.pixels).all()
    firsts = [fresh_scenes("balanced", number, 1)[0].pixels.tobytes() for number in range(4)]
    assert len(set(firsts)) == 4


def test_classification_shows_the_table_and_the_pictures_as_they_are(tmp_path) -> None:
    row = {"name": "nat", "parameters": 12345, "test_top1": 0.9876, "test_images": 359}
    row |= {"images_per_second": 99.6, "training_seconds": 41.2}
    pictures = []
    for name, level in (("confusion.png", 10), ("predictions.png", 200)):
        pixels = np.full((20, 30, 3), level, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        pictures.append(pixels)
    digits = Digits(
        [row, row | {"test_top1": 0.5}], *(tmp_path / n for n in ("confusion.png", "predictions.png"))
    )
    section = classification_section(digits)
    page = Reader(section.body)
    assert page.rows[1] == [f"nat {SELECTS['nat']}", "12,345", "98.76%", "100", "41"]
    assert section.figure == "98.8%"
    assert all((a == b).all() for a, b in zip(page.pictures, pictures, strict=True))
    assert "359" in page.texts["p"][0]


def test_what_sections_say_as_text_is_escaped() -> None:
    section = Section("a", "<b>Title</b>", "1", "one", table("<em>", ["x"], [["y", bar(0.5, "<u>")]]))
    page = Reader(fill_page([section], ["<s>fact</s>"], {"<p>": 1.0}))
    assert not {"b", "em", "u", "s"} & set(page.tags)
    assert page.rows == [["x"], ["y", "<u>"]]
    assert "<s>fact</s>" in page.texts["footer"][0]


def test_configurations_have_words_for_what_they_select() -> None:
    configs = Path(report.__file__).parent.parent / "configs" / "digits"
    assert set(SELECTS) == {path.stem for path in configs.glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium was found: apt-get install chromium")
def test_nothing_is_cut_or_fetched_in_a_browser_and_text_can_be_read(written, tmp_path) -> None:
    browser = Chromium(find_chromium(), tmp_path)
    address = written[0].as_uri()
    try:
        for width, dark in ((1280, False), (390, True)):
            browser.open(address, width, dark=dark)
            browser.wait("document.readyState === 'complete' && !!document.querySelector('footer')")
            assert browser.run("document.documentElement.scrollWidth") == width
            assert browser.run(OUTSIDE) == []
            assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert min(browser.run(CONTRASTS).values()) > 4.5
            assert not browser.errors
            assert {one for one in browser.addresses if not one.startswith("data:")} == {address}
    finally:
        browser.close()
