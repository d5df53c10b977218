"""The training program of `RoIHead`: targets without boxes, resumable runs, an export that looks closer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.train.conftest import record_losses, run_writer
from train.grounding_roi import LocateData, RoITraining, main, region_scores
from visionsel.data.shapes import answer_to_box
from visionsel.embedded import load_lvlm
from visionsel.multimodal.grounding.roi_head import RoIHead
from visionsel.multimodal.grounding.roi_labels import IGNORED, answer_attention
from visionsel.multimodal.grounding.roi_regions import propose_regions

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "roi_head.yaml"


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration of a short run; keyword arguments are merged into its parts."""
    return run_writer(
        tmp_path, model={"warmup_steps": 0}, data={"batch_size": 2, "epoch_size": 6, "val_size": 2}
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, RoITraining)


@pytest.mark.slow
def test_a_short_run_lowers_the_loss_and_its_export_proposes_regions(tmp_path, write_run, losses) -> None:
    config = write_run(
        trainer={"max_epochs": 1, "gradient_clip_val": 1.0},
        model={"lr": 2e-3},
        data={"batch_size": 8, "epoch_size": 120, "val_size": 4},
    )
    assert main(["fit", "--config", str(config)]) == 0
    values = list(losses.values())
    assert sum(values[-5:]) < 0.6 * sum(values[:5])
    model, processor = load_lvlm()
    head = RoIHead.load(tmp_path / "run" / "export", model)
    data = LocateData()
    pixels, question, *_ = data.make(data.scene(0, 0), np.random.default_rng(0), 0)
    regions = propose_regions(model, processor, pixels, question, head, threshold=0.2)
    assert regions.map.shape == (8, 8)
    assert 0 < float(regions.map.max()) < 1


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
    assert list(expected) == [(epoch, batch) for epoch in range(2) for batch in range(3)]
    losses.clear()
    resumed = write_run("resumed", trainer={"callbacks": [every]})
    checkpoint = tmp_path / "checkpoints" / "step4.ckpt"
    assert main(["fit", "--config", str(resumed), "--ckpt_path", str(checkpoint)]) == 0
    assert losses == {key: expected[key] for key in list(expected)[4:]}
    model, _ = load_lvlm()
    heads = [RoIHead.load(tmp_path / run / "export", model) for run in ("whole", "resumed")]
    for one, other in zip(*(head.state_dict().values() for head in heads), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path, write_run, capsys) -> None:
    config = write_run(trainer={"max_epochs": 1}, data={"epoch_size": 2})
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(name.startswith("head.") for name in state)
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    out = capsys.readouterr().out
    assert "val/iou" in out
    assert "val/prompt_recall" in out
    other = write_run("other", model={"number": 2})
    assert main(["validate", "--config", str(other), "--ckpt_path", checkpoint]) == 1
    assert "was trained with number 3, not 2" in capsys.readouterr().err
    assert main(["validate", "--config", str(config)]) == 1
    assert "give --ckpt_path" in capsys.readouterr().err
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    assert main(["validate", "--config", str(config), "--ckpt_path", str(foreign)]) == 1
    assert "is not a checkpoint of train.grounding_roi" in capsys.readouterr().err


def test_targets_come_from_attention_while_the_model_reads_the_answer() -> None:
    training = RoITraining(heads=[[2, 1], [2, 2]])
    data = LocateData()
    batch = data.collate([data.make(data.scene(0, i), np.random.default_rng(i), 0) for i in range(3)])
    for answer, mask in zip(batch["answer"], batch["mask"], strict=True):
        x0, y0, x1, y1 = (round(side) for side in answer_to_box(answer, 64))
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
    replay = training.read(batch)
    assert replay.valid.sum(1).tolist() == [len(answer.split()) + 1 for answer in batch["answer"]]
    labels = training.targets(replay)
    attention = answer_attention(replay, [(2, 1), (2, 2)])
    for row in range(3):
        if (labels[row] != IGNORED).any():
            peak = attention[row].max()
            assert torch.equal(labels[row] == 1, attention[row] >= 0.2 * peak)
            assert (attention[row][labels[row] == 0] <= 0.1 * peak).all()
    assert (labels == 1).any()
    assert (labels == 0).any()
    assert not any(parameter.requires_grad for parameter in training._lvlm[0].parameters())
    assert (training.head.start, training.head.number) == (1, 3)


def test_scores_of_regions_are_those_worked_out_by_hand() -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 4:8, 4:12] = True
    grid = torch.zeros(8, 8)
    grid[2:4, 2:4] = 1  # cells of 2 x 2 pixels: the left half of the object
    scores = region_scores([grid], mask, 0.5)
    assert scores == {"recall": 0.5, "area": 16 / 256, "iou": 0.5}
    assert region_scores([grid * 0], mask, 0.5) == {"recall": 0, "area": 0, "iou": 0}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "lr", 0.0),
        ("model", "warmup_steps", 6),
        ("model", "heads", []),
        ("model", "heads", [[9, 0]]),
        ("model", "start", 3),
        ("model", "background", 0.4),
        ("model", "threshold", 1.0),
        ("model", "lvlm", "nowhere"),
        ("data", "batch_size", 0),
    ],
)
def test_a_value_that_is_wrong_is_named_and_leaves_no_folder(
    tmp_path, write_run, capsys, part, name, value
) -> None:
    config = write_run(**{part: {name: value}})
    assert main(["fit", "--config", str(config)]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.grounding_roi: ")
    assert {"start": "from layer 3 on", "lvlm": "nowhere"}.get(name, name) in line
    assert not (tmp_path / "run").exists()


def test_the_shipped_configuration_parses_and_names_no_class_of_ours(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIG), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == "runs/shapes/roi_head"
    RoITraining(**config["model"])
    text = CONFIG.read_text()
    assert "class_path" not in text
    assert text.startswith("# ")
    assert "train.grounding_roi fit --config configs/shapes/roi_head.yaml" in text
