"""The tables of the docs are what the package is: models, methods, pictures."""

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks import method_table, model_table, pictures
from benchmarks.panels import Panel, Piece, page, veil
from tests.multimodal.decoding.test_agla import black
from tests.multimodal.pruning.test_methods import MERGING, METHODS
from tests.multimodal.runs import run, tiny
from tests.multimodal.tiny import FAMILIES, make_inputs
from visionsel import multimodal
from visionsel.multimodal import AGLA, GLC, ICD, M3ID, VCD, PAIGuidance, Ritual, decoding, grounding
from visionsel.multimodal.decoding import DECODERS, Disturbance
from visionsel.multimodal.grounding import Replay, heatmaps
from visionsel.multimodal.grounding.heatmaps import HEATMAPS
from visionsel.multimodal.intervention import Intervention, method_name
from visionsel.multimodal.modulation import ACT, MODULATORS, PAI, VAR, VHR, GroundingHeads, Paint
from visionsel.multimodal.pruning import PRUNERS, Yopo

COUNTED = ("biformer_tiny.in1k", "nat_mini.in1k", "dinat_s_tiny.in1k", "focalnet_tiny_iso_16.ms_in1k")


@cache
def rows(page: Path) -> dict[str, list[str]]:
    """The cells of each row of a page that begins with a name."""
    lines = re.findall(r"^\| `(.+?)` \| (.*) \|$", page.read_text(), flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for name, cells in lines:
        found.setdefault(name, cells.split(" | "))  # a method stands again where it says what it refuses
    return found


@cache
def sizes() -> dict[str, int]:
    return {release: model_table.parameters(model_table.build(release)) for release in model_table.releases()}


def digits(text: str) -> int:
    return len(text.partition(".")[2])


def test_the_page_of_models_has_every_release_with_its_parameters_and_what_is_published() -> None:
    found = rows(model_table.PAGE)
    known = {release.removesuffix(".untrained"): release for release in sizes()}
    of_timm = set(found) - set(known)
    assert set(known) < set(found)
    assert {"halonet26t", "focalnet_tiny_srf"} < of_timm <= set(timm.list_models())
    for name, release in known.items():
        table = model_table.PAGE.read_text().partition(f"### {model_table.family_of(release).title}\n")[2]
        assert f"| `{name}` |" in table.partition("\n### ")[0]
        size, _, _, top1, _ = found[name]
        assert size == model_table.millions(sizes()[release]), name
        assert top1 == (model_table.published(release).top1 or "-"), name


def test_parameters_are_the_published_ones_to_the_digit_that_is_printed() -> None:
    checked = 0
    for release, size in sizes().items():
        if text := model_table.published(release).parameters:
            # some round and some cut off
            assert abs(size / 1e6 - float(text)) < 10 ** -digits(text), release
            checked += 1
    assert checked > 25


@pytest.mark.parametrize("release", COUNTED)
def test_multiply_adds_are_those_of_the_page_and_of_the_paper(release: str) -> None:
    adds = model_table.multiply_adds(model_table.build(release)) / 1e9
    assert rows(model_table.PAGE)[release][1] == f"{adds:.2f} G"
    text = model_table.published(release).flops
    assert text is not None
    assert f"{adds:.{digits(text)}f}" == text


def test_the_page_of_methods_is_current() -> None:
    assert method_table.tables() in method_table.PAGE.read_text()
    kinds = [*PRUNERS, *MODULATORS, *DECODERS, *HEATMAPS]
    for kind in kinds:
        assert rows(method_table.PAGE)[kind.__name__][0] == f"`{method_name(kind)}`"


def test_what_the_page_of_methods_names_exists() -> None:
    text = method_table.PAGE.read_text()
    named = {name for name in re.findall(r"`([A-Z]\w+)", text) if not name.isupper() or len(name) > 2}
    places = (multimodal, multimodal.pruning, multimodal.modulation, decoding, grounding, heatmaps)
    classes = {name for place in places for name in vars(place)} | {"ClipRelevance"}
    assert named <= classes


def test_papers_are_those_of_the_files_of_the_methods() -> None:
    for kind in (*PRUNERS, *MODULATORS, *DECODERS, *HEATMAPS):
        source = Path(inspect.getfile(kind)).read_text()
        numbers = re.findall(r"arXiv[: ]\s?(\d{4}\.\d{5})", source)
        if numbers:
            assert method_table.ABOUT[method_name(kind)].arxiv in numbers, kind.__name__


def interventions() -> Iterator[tuple[str, Intervention]]:
    """One of each pruner, modulator and decoder, for decoders of four layers."""
    pruners = (*METHODS.values(), *MERGING.values(), Yopo(window=3, mlp_ratio=2.0, layer_stop=2))
    others = (
        VHR(layers=(1, 2)),
        VAR(layers=(1, 2), tau=2.0, sink_dims=(3,)),
        ACT(layers=(1, 2)),
        PAI(layers=(1, 2)),
        Paint(layers=(1, 2)),
        GroundingHeads({1: (0,)}),
        VCD(),
        ICD(view=Disturbance((11, 12, 13))),
        M3ID(),
        Ritual(),
        AGLA(view=black),
        PAIGuidance(),
        GLC(keep=4),
    )
    found = {method_name(type(one)): one for one in (*pruners, *others)}
    yield from found.items()


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "smolvlm"])  # as idefics3
def test_every_method_runs_on_every_family(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=1)
    expected = run(model, inputs, 2)
    names = set()
    for name, method in interventions():
        with method(model):
            assert torch.isfinite(run(model, inputs, 2).logits).all(), name
        names.add(name)
    assert torch.equal(run(model, inputs, 2).logits, expected.logits), "nothing is left behind"
    assert names == {method_name(kind) for kind in (*PRUNERS, *MODULATORS, *DECODERS)}
    replay = Replay(model, inputs, expected.tokens[:, -2:])
    for kind in HEATMAPS:
        method = kind()
        other = None if method.reference is None else Replay(model, inputs, expected.tokens[:, -2:])
        maps = method(replay, other)
        assert maps.shape[:2] == (1, 2)
        assert torch.isfinite(maps).all(), kind.__name__
        assert bool((maps >= 0).all())


def test_pictures_are_there_small_and_all_on_white() -> None:
    for name in pictures.PICTURES:
        path = pictures.OUT / f"{name}.png"
        assert path.stat().st_size <= pictures.LARGEST
        with Image.open(path) as picture:
            assert picture.width >= 1200, "sharp at half the size"
            assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_a_picture_is_drawn_of_a_name_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.main(["selection", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["selection.png"]
    with pytest.raises(SystemExit):
        pictures.main(["selections"])
    assert "there are grounding, budgets, hallucination, selection" in capsys.readouterr().err


def test_neighborhoods_move_inside_the_map_and_halos_are_cut() -> None:
    side = pictures.SIDE
    for row, column, dilation in ((0, 0, 1), (8, 3, 1), (15, 15, 3)):
        assert pictures._neighborhood(row, column, dilation).sum() == 25
    assert pictures._neighborhood(0, 0, 1)[:5, :5].all()
    assert pictures._halo(0, 0).sum() == 36
    assert pictures._halo(8, 8).sum() == 64
    assert pictures._halo(side - 1, side - 1).sum() == 36


def test_a_veil_leaves_what_is_kept_as_it_was() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    kept = np.zeros((4, 4), dtype=bool)
    kept[1, 2] = True
    found, before = np.asarray(veil(image, kept)), np.asarray(image)
    inside = (slice(18, 30), slice(34, 46))
    assert np.array_equal(found[inside], before[inside])
    assert np.ptp(found[40:, :30], axis=-1).max() < 120
    assert np.array_equal(np.asarray(veil(image, np.ones((4, 4), dtype=bool))), before)


def test_a_page_wraps_its_text_and_is_as_high_as_it_needs_to_be() -> None:
    image = Image.new("RGB", (64, 64), "#808080")
    words = [Piece(f"word{number}") for number in range(40)]
    low = page("", [], [Panel("a", image)] * 4)
    high = page("asked", [Piece("said", "#e69f00")], [Panel("a", image, [words])] * 4)
    assert low.width == high.width
    assert high.height > low.height + 200
    assert np.asarray(high)[:, -20:].min() == 255, "nothing leaves the page"


def test_numbers_of_the_readme_are_those_of_the_pages() -> None:
    text = model_table.PAGE.parents[1].joinpath("README.md").read_text()
    number = len([*PRUNERS, *MODULATORS, *DECODERS, *HEATMAPS])
    assert f"And {number} methods" in text
    table = text.partition("## Does it work?")[2].partition("\n## ")[0]
    results = re.findall(
        r"^\| (?!question)[^|]+ \| (.+) \| (.+) \| \[.*?\]\((.*?)\) \|$", table, flags=re.MULTILINE
    )
    assert len(results) == 4
    for without, with_, page_ in results:
        told = model_table.PAGE.parents[1].joinpath(page_).read_text()
        for value in re.findall(r"0?\.\d+", f"{without} {with_}"):
            assert value in told or value.removeprefix("0") in told, value
        for value, name in re.findall(r"(\d*\.\d+) `(\w+)`", with_):
            rows = [line.lower().replace("_", "") for line in told.splitlines() if line.startswith("|")]
            row = [one for one in rows if f"`{name.lower().replace('_', '')}" in one]
            assert any(value.removeprefix("0") in one for one in row), (name, value)
    for family in model_table.FAMILIES:
        tops = sorted(float(one.top1) for one in family.published.values() if one.top1)
        if tops:
            assert f"| {tops[0]} to {tops[-1]} |" in text, family.title
