"""The table of exports: the page has the models that it says, and a row is what was measured."""

import re

import pytest

from benchmarks import export_table
from visionsel.export import TOLERANCE
from visionsel.models import registered_names


def test_the_page_has_the_architectures_that_it_says_within_the_tolerance() -> None:
    text = export_table.PAGE.read_text().partition(export_table.BEGIN)[2].partition(export_table.END)[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \| (\S+) \|$", text, flags=re.MULTILINE)
    assert tuple(name for name, *_ in rows) == export_table.SMALLEST
    assert all(float(value) <= TOLERANCE for _, *values in rows for value in values)
    families = {name.partition("_")[0] for name in registered_names()}
    assert {name.partition("_")[0] for name, *_ in rows} == families


def test_a_row_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [[1, 3, 64, 64], [3, 3, 96, 128]]

    def written(model, path, size):
        assert size == (224, 224)
        difference = {"model.pt2": 0.0, "model.onnx": 2e-6}[path.name]
        return {"path": str(path), "shapes": shapes, "difference": difference}

    monkeypatch.setattr(export_table, "write_program", written)
    monkeypatch.setattr(export_table, "write_onnx", written)
    said: list[str] = []
    [row] = export_table.measure(["selectformer_nano"], said.append)
    assert said == ["selectformer_nano"]
    line = export_table.table([row]).splitlines()[-1]
    expected = "| `selectformer_nano` | 3.5 M | 1 of 64 x 64, 3 of 96 x 128 | 0e+00 | 2e-06 |"
    assert line == expected
