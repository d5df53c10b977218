"""The quickstart, at a fraction of its length."""

import json

import pytest
from PIL import Image

from tests.train.test_quickstart_shapes import small_models
from train import quickstart
from train.quickstart import MODELS, main
from train.quickstart_shapes import load_models


@pytest.fixture(autouse=True)
def _untrained_embedded_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "load_models", small_models)


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
    assert out.rstrip().splitlines()[-1].startswith(f"open {output / 'shapes.html'} ")
    assert (output / "shapes.html").read_text().count("<article>") == 12
    for name in ("confusion.png", "predictions.png"):
        assert str(output / name) in out
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--output", str(tmp_path)]) == 1
    assert "not written by the quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_missing_embedded_models_are_told_before_anything_is_trained(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(quickstart, "load_models", lambda: load_models(tmp_path / "nothing"))
    output = tmp_path / "quickstart"
    output.mkdir()
    (output / "shapes.html").write_text("the page, written alone before")  # it makes way
    assert main(["--output", str(output)]) == 1
    assert f"no config.json in {tmp_path / 'nothing'}" in capsys.readouterr().err
    assert not list(output.iterdir())


def test_the_quickstart_trains_the_three_families_of_the_readme() -> None:
    assert set(MODELS) >= {"biformer", "nat", "selectformer"}
