"""Exports load elsewhere and give the model's logits; one that does not is not kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from visionsel import export
from visionsel.cli import main
from visionsel.prediction import load_classifier

ARGS = {"embed_dims": [32, 32, 32, 32], "depths": [1, 0, 0, 1]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `train.classification` writes it."""
    torch.manual_seed(0)
    model = timm.create_model("biformer_tiny", num_classes=3, **ARGS)
    preprocessing = {"input_size": (3, 128, 192), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    recipe = {"model": "biformer_tiny", "model_args": ARGS, "class_names": ["ant", "bee", "cow"]}
    path = tmp_path_factory.mktemp("runs") / "best.ckpt"
    torch.save(
        {
            "hyper_parameters": {**recipe, "preprocessing": preprocessing},
            "state_dict": {f"net.{name}": value for name, value in model.state_dict().items()},
        },
        path,
    )
    return path


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    status = main(["export", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_folder_for_the_hub_comes_back_with_labels_sizes_and_a_card(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "deep" / "insects"
    status, out, _ = run(capsys, "--checkpoint", checkpoint, "--to", "hub", "-o", folder, "--json")
    assert status == 0
    assert json.loads(out) == {"path": str(folder)}
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = load_classifier(None, checkpoint, "cpu").model
    image = torch.randn(1, 3, 128, 192)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), ours(image), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "cow"]
    assert config["pretrained_cfg"]["input_size"] == [3, 128, 192]
    card = (folder / "README.md").read_text()
    assert "license: other" in card  # of weights that are the user's own, nothing is claimed
    assert f'timm.create_model("local-dir:{folder}"' in card
    assert "BiFormer" in card
    assert "3: ant, bee, cow" in card
    Image.new("RGB", (192, 128), "green").save(tmp_path / "green.png")
    arguments = ["predict", str(tmp_path / "green.png"), "--json", "--device", "cpu"]
    told = []
    for weights in (["--model", f"local-dir:{folder}"], ["--checkpoint", str(checkpoint)]):
        assert main([*arguments, *weights]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert {one["label"] for one in told[0][0]["classes"]} == {"ant", "bee", "cow"}
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--to", "hub", "-o", folder)
    assert status == 1
    assert f"{folder} exists; name another folder" in err


def test_a_push_uploads_what_is_written_by_timms_means(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is replaced; everything up to it is timm's and ours."""
    import timm.models._hub as hub

    uploaded: dict[str, Any] = {}

    class Client:
        def __init__(self, **options: Any) -> None:
            pass

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> Any:
            uploaded.update(name=name, private=private)
            return type("Address", (), {"repo_id": name})

        def file_exists(self, **options: Any) -> bool:
            return False

        def upload_folder(self, folder_path: str, **options: Any) -> Any:
            uploaded["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(hub, "HfApi", Client)
    out_folder = tmp_path / "insects"
    status, out, _ = run(
        capsys, "--checkpoint", checkpoint, "--to", "hub", "-o", out_folder, "--push", "me/insects",
        "--private", "--license", "mit",
    )  # fmt: skip
    assert status == 0
    assert out.splitlines()[-1] == "uploaded: https://hub/commit"
    assert (uploaded["name"], uploaded["private"]) == ("me/insects", True)
    assert uploaded["files"] == {path.name: path.read_bytes() for path in out_folder.iterdir()}
    assert b'"hf-hub:me/insects"' in uploaded["files"]["README.md"]
    assert b"license: mit" in uploaded["files"]["README.md"]


@pytest.mark.slow
def test_a_program_serves_other_sizes_and_onnx_the_fixed_one(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    classifier = load_classifier(None, checkpoint, "cpu")
    status, out, _ = run(
        capsys, "--checkpoint", checkpoint, "--to", "program", "-o", tmp_path / "a.pt2", "--json"
    )
    assert status == 0
    found = json.loads(out)
    assert found["shapes"] == [[1, 3, 128, 192], [3, 3, 160, 256]]
    assert 0 <= found["difference"] < 1e-4
    program = torch.export.load(tmp_path / "a.pt2").module()
    status, out, _ = run(
        capsys, "--checkpoint", checkpoint, "--to", "onnx", "-o", tmp_path / "a.onnx", "--size", 64,
        "--fixed-size",
    )  # fmt: skip
    assert status == 0
    assert "run with images of [1, 3, 64, 64] and [3, 3, 64, 64]: logits differ by" in out
    onnx = export.onnx_function(tmp_path / "a.onnx")
    for images, exported in ((torch.randn(2, 3, 150, 130), program), (torch.randn(5, 3, 64, 64), onnx)):
        with torch.inference_mode():
            logits = classifier.model(images)
        assert (exported(images) - logits).abs().max() < 1e-4 * max(1, logits.abs().max())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.pt2"]


class Moody(nn.Module):
    """Another model in each process that loads it, as far as its export knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scale = 1 if torch.compiler.is_exporting() else 1.001
        return (images.mean((2, 3)) + self.weight) * scale


def test_an_export_names_what_is_in_the_way_before_it_traces(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--to", "onnx", "-o", tmp_path)
    assert status == 1
    assert f"{tmp_path} is a folder; name a file in it" in err
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--to", "onnx", "-o", tmp_path / "a.onnx")
    assert status == 1
    assert 'ONNX needs onnxruntime: pip install "visionsel[export]"' in err
    assert list(tmp_path.iterdir()) == []


def test_each_step_of_onnx_asks_for_what_it_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    path = tmp_path / "a.onnx"
    for step, missing in (
        (lambda: export.export_onnx(None, path), "onnx, onnxscript"),
        (lambda: export.onnx_function(path), "onnxruntime"),
        (lambda: export.write_onnx(Moody(), path, (64, 64)), "onnx, onnxscript, onnxruntime"),
    ):
        with pytest.raises(ImportError, match=f"ONNX needs {missing}: pip install"):
            step()


def test_an_export_that_gives_other_logits_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other logits than the model for images of \[1, 3, 320, 320\]"):
        export.write_program(Moody(), tmp_path / "a.pt2", (320, 320))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_does_not_serve_the_sizes_says_so() -> None:
    def export_of_one_size(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-1] == 64, "Guard failed: width"
        return model(images)

    model = Moody()
    with pytest.raises(
        ValueError, match=r"not run with images of \[3, 3, 96, 128\], nothing .*Guard failed: width"
    ):
        export._compare(model, export_of_one_size, (64, 64), True)
    assert export._compare(model, export_of_one_size, (64, 64), False)["difference"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx", "--push", "me/x"), "--push, --private and --license are for --to hub"),
        (("--to", "hub", "--private"), "give --push OWNER/NAME"),
        (("--to", "hub", "--size", "64"), "--size and --fixed-size are for --to program and --to onnx"),
        (("--to", "onnx", "--size", "0"), "--size takes one or two numbers above 0"),
        (("--to", "onnx"), "name a model, or a training checkpoint with --checkpoint"),
        (("halonet_h0_256", "--to", "onnx"), "no weights of halonet_h0_256 were released"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: Any
) -> None:
    status, out, err = run(capsys, *arguments, "-o", tmp_path / "a")
    assert (status, out) == (1, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []
