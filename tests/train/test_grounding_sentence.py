"""The training program of sentence attention: shapes and folders of VizWiz, resumable runs, an export."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.train.conftest import record_losses, run_writer
from train.grounding_sentence import AnswerMaskData, SentenceTraining, main
from visionsel.multimodal.grounding.sentence_attention import SentenceAttentionNet

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [CONFIGS / folder / "sentence_attention.yaml" for folder in ("shapes", "vizwiz")]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration of a short run; keyword arguments are merged into its parts."""
    return run_writer(
        tmp_path,
        model={"backbone": "test_efficientnet", "hidden": 16, "warmup_steps": 0},
        data={"batch_size": 2, "epoch_size": 6, "val_size": 2},
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, SentenceTraining)


def write_vizwiz(root: Path, sizes: dict[str, int], png: bool = False) -> Path:
    """A folder of images whose left half is red, the answer."""
    for split, number in sizes.items():
        (root / split).mkdir(parents=True)
        rows = {}
        for i in range(number):
            pixels = np.full((30, 40, 3), 200, np.uint8)
            pixels[:, :20] = (255, 0, 0)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            corners = [{"x": x, "y": y} for x, y in ((0, 0), (20, 0), (20, 30), (0, 30))]
            rows[f"{i}.png"] = {
                "height": 30,
                "width": 40,
                "answer_grounding": corners,
                "answers": ["red", "pink"],
                "question": "what color is this?",
            }
            if png:
                folder = root / "binary_masks_png" / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(((np.arange(40) < 10) * np.ones((30, 1)) * 255).astype(np.uint8)).save(
                    folder / f"{i}.png"
                )
        (root / f"{split}_grounding.json").write_text(json.dumps(rows))
    return root


@pytest.mark.slow
def test_a_short_run_lowers_the_loss_and_its_export_loads(tmp_path, write_run, losses) -> None:
    config = write_run(
        trainer={"max_epochs": 1},
        model={"lr": 5e-3},
        data={"batch_size": 8, "epoch_size": 320, "val_size": 8},
    )
    assert main(["fit", "--config", str(config)]) == 0
    values = list(losses.values())
    assert sum(values[-5:]) < 0.85 * sum(values[:5])
    net = SentenceAttentionNet.load(tmp_path / "run" / "export")
    training = SentenceTraining(backbone="test_efficientnet", hidden=16)
    sentence = training.encode(["where is the red star? top left"], torch.device("cpu"))
    assert net(torch.rand(1, 3, 64, 64), sentence).shape == (1, 64, 64)


def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tmp_path, write_run, losses
) -> None:
    every = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "checkpoints"),
            "filename": "step{step}",
            "auto_insert_metric_name": False,
            "enable_version_counter": False,
            "every_n_train_steps": 1,
            "save_top_k": -1,
        },
    }
    whole = write_run("whole", trainer={"callbacks": [every]})
    assert main(["fit", "--config", str(whole)]) == 0
    expected = dict(losses)
    losses.clear()
    resumed = write_run("resumed", trainer={"callbacks": [every]})
    checkpoint = tmp_path / "checkpoints" / "step4.ckpt"
    assert main(["fit", "--config", str(resumed), "--ckpt_path", str(checkpoint)]) == 0
    assert losses == {key: expected[key] for key in list(expected)[4:]}
    nets = [SentenceAttentionNet.load(tmp_path / run / "export") for run in ("whole", "resumed")]
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(one, other)


def test_it_trains_on_a_folder_of_vizwiz_and_validates_there(tmp_path, write_run, losses, capsys) -> None:
    root = write_vizwiz(tmp_path / "vizwiz", {"train": 4, "val": 3})
    config = write_run(trainer={"max_epochs": 1}, data={"root": str(root), "image_size": 32})
    assert main(["fit", "--config", str(config)]) == 0
    assert len(losses) == 2
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    assert "val/iou" in capsys.readouterr().out
    other = write_run("other", model={"hidden": 8})
    assert main(["validate", "--config", str(other), "--ckpt_path", checkpoint]) == 1
    assert "was trained with hidden 16, not 8" in capsys.readouterr().err
    assert main(["validate", "--config", str(config)]) == 1
    assert "give --ckpt_path" in capsys.readouterr().err


def test_a_sample_of_a_folder_is_image_sentence_and_mask_at_one_size(tmp_path) -> None:
    root = write_vizwiz(tmp_path / "vizwiz", {"train": 2, "val": 1})
    data = AnswerMaskData(str(root), batch_size=2, image_size=16)
    pixels, sentence, mask = data.make(data.scene(0, 1), np.random.default_rng(0), 0)
    assert sentence == "what color is this? red"
    assert pixels.shape == (16, 16, 3)
    assert pixels[8, 2].tolist() == [255, 0, 0]
    assert mask[:, :7].all()
    assert not mask[:, 9:].any()
    masked = write_vizwiz(tmp_path / "masked", {"train": 2, "val": 1}, png=True)
    data = AnswerMaskData(str(masked), batch_size=2, image_size=16, with_answer=False)
    [loader] = data.val_dataloader()
    [batch] = list(loader)
    assert batch["sentence"] == ["what color is this?"]
    assert batch["image"].dtype == torch.float32
    assert torch.equal(batch["mask"][0], torch.arange(16).lt(4).expand(16, 16))
    (root / "val" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images are not in .*val, such as 0\.png"):
        AnswerMaskData(str(root), batch_size=2)
    Image.new("RGB", (9, 9)).save(root / "val" / "0.png")
    data = AnswerMaskData(str(root), batch_size=2)
    with pytest.raises(ValueError, match=r"9 x 9 pixels, but its grounding is for 30 x 40"):
        next(iter(data.val_dataloader()[0]))


def test_a_scene_is_asked_where_an_object_is_and_the_answer_says_it() -> None:
    data = AnswerMaskData()
    items = [data.make(data.scene(0, i), np.random.default_rng(i), 0) for i in range(20)]
    for pixels, sentence, mask in items:
        assert sentence.startswith("where is the ")
        assert pixels.shape == (64, 64, 3)
        assert mask.any()
        answer = sentence.partition("? ")[2].split()
        if answer:  # rows and columns of thirds
            rows, columns = np.nonzero(mask)
            middle = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
            cells = [int(side // (64 / 3)) for side in middle]
            assert answer == [["top", "middle", "bottom"][cells[0]], ["left", "center", "right"][cells[1]]]
    assert sum("? " in sentence for _, sentence, _ in items) > 10
    silent = AnswerMaskData(with_answer=False)
    assert silent.make(silent.scene(0, 0), np.random.default_rng(0), 0)[1].endswith("?")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "lr", 0.0),
        ("model", "warmup_steps", 6),
        ("model", "dropout", 1.0),
        ("model", "backbone", "nonet"),
        ("model", "sentences", "nowhere"),
        ("data", "root", "nowhere"),
        ("data", "image_size", 0),
    ],
)
def test_a_value_that_is_wrong_is_named_and_leaves_no_folder(
    tmp_path, write_run, capsys, part, name, value
) -> None:
    config = write_run(**{part: {name: value}})
    assert main(["fit", "--config", str(config)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if line.startswith("train.grounding_sentence: ")]
    assert any((value if isinstance(value, str) else name) in line for line in said), lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_a_shipped_configuration_parses_and_names_no_class_of_ours(path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == f"runs/{path.parent.name}/sentence_attention"
    assert timm.is_model(config["model"]["backbone"])
    if config["model"]["pretrained"]:
        assert timm.is_model_pretrained(config["model"]["backbone"])
    else:
        SentenceTraining(**config["model"])
    text = path.read_text()
    assert "class_path" not in text
    assert text.startswith("# ")
    assert f"train.grounding_sentence fit --config configs/{path.parent.name}/{path.name}" in text
    assert (path.parent.name == "vizwiz") == ("not run by us" in text.lower())
