"""The quickstart, at a fraction of its length."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.train.pages import SMALLEST, Reader, small_models
from train import quickstart, report
from train.quickstart import MODELS, main
from train.report import load_models


@pytest.fixture(autouse=True)
def _untrained_embedded_models_and_few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "load_models", small_models)
    monkeypatch.setattr(report, "Sizes", lambda: SMALLEST)


@pytest.mark.slow
def test_three_epochs_write_table_and_pictures_and_are_told_apart_from_a_good_result(
    tmp_path, capsys
) -> None:
    output = tmp_path / "quickstart"
    assert main(["--output", str(output), "--models", "biformer", "--epochs", "1"]) == 1
    assert (
        "warmup_epochs" in capsys.readouterr().err
    )  # refused; the next makes way for itself, reuses the digits
    assert main(["--output", str(output), "--models", "biformer", "--epochs", "3"]) == 1
    out, err = capsys.readouterr()
    assert "test accuracy not above 97%: biformer" in err.strip().splitlines()[-1]
    (row,) = json.loads((output / "results.json").read_text())
    assert row["model"] == "biformer_tiny"
    assert row["test_images"] == 359
    assert 0 < row["test_top1"] < 0.97
    assert row["images_per_second"] > 0
    assert f"{row['parameters']:,}" in out
    assert f"{row['test_top1']:.2%}" in out
    assert out.splitlines()[-1] == str(output / "report.html")
    page = Reader((output / "report.html").read_text())
    assert page.rows[1][0].startswith("biformer ")
    assert page.rows[1][1:3] == [f"{row['parameters']:,}", f"{row['test_top1']:.2%}"]
    for name, shown in zip(("confusion.png", "predictions.png"), page.pictures, strict=False):
        assert str(output / name) in out
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
            assert (np.asarray(picture.convert("RGB")) == shown).all()
    assert {path.name for path in output.iterdir()} == {*quickstart.FILES, "digits", "runs"}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--output", str(tmp_path)]) == 1
    assert "not written by the quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_missing_embedded_models_are_told_before_anything_is_trained(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(quickstart, "load_models", lambda: load_models(tmp_path / "nothing"))
    output = tmp_path / "quickstart"
    output.mkdir()
    for name in ("report.html", "shapes.html"):  # written alone before, and by an older version
        (output / name).write_text("make way")
    assert main(["--output", str(output)]) == 1
    assert f"no config.json in {tmp_path / 'nothing'}" in capsys.readouterr().err
    assert not list(output.iterdir())


def test_the_quickstart_trains_the_three_families_of_the_readme() -> None:
    assert set(MODELS) >= {"biformer", "nat", "selectformer"}
