"""The command line, as a shell would call it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from visionsel.cli import main


def test_models_lists_a_release_a_line_with_its_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "dinat_large", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dinat_large.in22k_ft_in1k_384"]["input_size"] == [3, 384, 384]
    assert rows["dinat_large.in22k_ft_in1k_384"]["parameters"] == 200_943_514
    assert rows["dinat_large.in22k_ft_in1k_384_11x11"]["parameters"] == 201_144_250
    assert all(row["license"] == "mit" and row["weights"].startswith("https://") for row in rows.values())
    assert main(["models", "selectformer_n*"]) == 0
    assert "selectformer_nano  3.5 M" in capsys.readouterr().out


def test_a_pattern_without_a_match_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnet*"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no visionsel model matches 'resnet*'" in captured.err


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
    return path


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A released file: a bare state dict of one variant."""
    path = tmp_path / "halonet.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("halonet_h0_256").state_dict()}, path)
    return path


def test_predict_gives_the_models_own_probabilities(
    picture: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(picture), "--model", "halonet_h0_256", "--checkpoint", str(release), "--json"]
    assert main([*arguments, "--topk", "3", "--device", "cpu"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    model = timm.create_model("halonet_h0_256").eval()
    model.load_state_dict(torch.load(release, weights_only=True)["state_dict"])
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.inference_mode():
        expected = model(transform(Image.open(picture))[None]).softmax(-1)[0].topk(3)
    assert [c["index"] for c in result["classes"]] == expected.indices.tolist()
    assert [c["probability"] for c in result["classes"]] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert result["image"] == str(picture)


def test_predict_takes_a_training_checkpoint_that_names_model_and_classes(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"depths": (1, 1, 1, 1)}
    model = timm.create_model("selectformer_nano", num_classes=2, **small)
    recipe = {
        "model": "selectformer_nano",
        "model_args": small,
        "class_names": ["circle", "star"],
        "preprocessing": {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0},
    }
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": recipe}, file)
    assert main(["predict", str(picture), "--checkpoint", str(file)]) == 0
    out = capsys.readouterr().out
    assert "circle" in out
    assert "star" in out
    assert main(["predict", str(picture), "--checkpoint", str(file), "--model", "nat_mini"]) == 1
    assert "holds a selectformer_nano, not a nat_mini" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "--model", "halonet_h0_256", "--checkpoint", "RELEASE"], "no image at missing.png"),
        (["TEXT", "--model", "halonet_h0_256", "--checkpoint", "RELEASE"], "not an image"),
        (["PICTURE", "--model", "halonet_h0_256", "--checkpoint", "none.pth"], "no checkpoint at none.pth"),
        (["PICTURE", "--model", "halonet_h0_256", "--checkpoint", "TEXT"], "not a readable checkpoint"),
        (["PICTURE", "--model", "halonet_h1_256", "--checkpoint", "RELEASE"], "missing"),
        (["PICTURE", "--model", "selectformer_nano"], "no weights of selectformer_nano were released"),
        (["PICTURE", "--model", "selectformer_nana"], "unknown model 'selectformer_nana'"),
        (["PICTURE"], "name a model"),
        (["PICTURE", "--model", "halonet_h0_256", "--checkpoint", "RELEASE", "--topk", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_one_line(
    arguments: list[str],
    message: str,
    picture: Path,
    release: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    names = {"PICTURE": picture, "RELEASE": release, "TEXT": text}
    assert main(["predict", *(str(names.get(a, a)) for a in arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnet*", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("visionsel 0.")
