"""Files are written whole or not at all."""

import json
from pathlib import Path

import pytest

from visionsel.files import whole_file, write_json


def test_json_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_file_keeps_what_it_had_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    with whole_file(path) as partial:
        assert partial.suffix == ".csv"  # by which some libraries know what to write
        partial.write_text("first")
    with pytest.raises(IsADirectoryError), whole_file(path) as partial:
        partial.write_text("half of the sec") and tmp_path.read_text()
    assert path.read_text() == "first"
    assert [one.name for one in path.parent.iterdir()] == ["table.csv"]
    assert json.loads(write_json({"a": [1]}, tmp_path / "a.json").read_text()) == {"a": [1]}
