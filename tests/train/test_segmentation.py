"""The segmentation program: measures, schedule, and runs that train, resume, test and predict."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from tests.train.conftest import TRAINER, merged, record_losses, rows
from tests.train.test_segmentation_data import make_ade20k, spoil
from train.segmentation import SemanticSegmentation, main, pixel_loss, poly_rate
from train.segmentation_metrics import class_measures, mean_measures
from train.segmentation_pictures import class_colors, draw_labels, save_label_map
from visionsel.data.imagefolder import open_image

SMALL = {
    "model": "biformer_tiny",
    "model_args": {
        "embed_dims": [32, 32, 32],
        "depths": [1, 1, 1],
        "num_windows": [2, 2, 1],
        "topks": [2, 2, -1],
        "drop_path_rate": 0.2,
    },
    "decoder_args": {"decoder_channels": 8},
    "auxiliary_channels": 8,
    "warmup_steps": 2,
    "lr": 1e-3,
}
"""UPerNet of 60 thousand parameters, with stochastic depth and dropout."""


def make_config(path: Path, root: Path, **parts: Any) -> Path:
    """Write a configuration over an ADE20K folder; keyword arguments are merged into its parts."""
    config: dict[str, Any] = {
        "output": str(path.parent / "run"),
        "trainer": TRAINER,
        "model": SMALL,
        "data": {"root": str(root), "crop_size": 32, "image_scale": [80, 40], "batch_size": 2},
    }
    path.write_text(yaml.safe_dump(merged(config, parts)))
    return path


def read(path: Path) -> tuple[np.ndarray, str]:
    """Pixels and mode of an image."""
    with Image.open(path) as image:
        return np.array(image), image.mode


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images to train on and two, of two sizes, to validate on; to read only."""
    return make_ade20k(tmp_path_factory.mktemp("ade20k"), train=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A run of two epochs with the average of the weights, to read only."""
    folder = tmp_path_factory.mktemp("segmentation")
    config = make_config(folder / "config.yaml", data_root, model={"ema_decay": 0.5})
    assert main(["fit", "--config", str(config)]) == 0
    return folder / "run"


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, SemanticSegmentation)


def test_measures_are_those_of_a_count_pixel_by_pixel() -> None:
    generator = np.random.default_rng(0)
    true, found = generator.integers(0, 3, 500), generator.integers(0, 4, 500)  # 3 is predicted only
    confusion = np.zeros((5, 5), dtype=np.int64)  # 4 is nowhere
    np.add.at(confusion, (true, found), 1)
    iou, accuracy = class_measures(torch.from_numpy(confusion))
    for k in range(4):
        assert iou[k] == pytest.approx(
            ((true == k) & (found == k)).sum() / ((true == k) | (found == k)).sum()
        )
    assert torch.isnan(iou[4])
    assert torch.isnan(accuracy[3:]).all()
    measures = mean_measures(torch.from_numpy(confusion))
    assert measures["miou"] == pytest.approx(iou[:4].mean().item())  # 3 counts, as 0
    assert measures["macc"] == pytest.approx(np.mean([(found[true == k] == k).mean() for k in range(3)]))
    assert measures["aacc"] == pytest.approx((true == found).mean())
    with pytest.raises(ValueError, match="no labelled pixel"):
        mean_measures(torch.zeros(3, 3, dtype=torch.long))


def test_unlabelled_pixels_weigh_nothing_and_a_crop_without_labels_gives_0() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    labels[0, :2] = 255
    chosen = logits.log_softmax(1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
    expected = -chosen[labels != 255].sum() / 32
    torch.testing.assert_close(pixel_loss(logits, labels), expected)
    loss = pixel_loss(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_the_schedule_is_mmsegmentations() -> None:
    peak, least, updates, warmup, ratio, power = 6e-5, 1e-6, 1000, 100, 1e-3, 0.9
    for step in (0, 1, 50, 99, 100, 101, 500, 999, 1000):
        # mmcv's PolyLrUpdaterHook.get_lr and LrUpdaterHook.get_warmup_lr
        regular = (peak - least) * (1 - step / updates) ** power + least
        expected = regular * (1 - (1 - step / warmup) * (1 - ratio)) if step < warmup else regular
        found = poly_rate(step, updates, power, least / peak, warmup, ratio) * peak
        assert found == pytest.approx(expected, rel=1e-9)
    assert poly_rate(0, 10, 1.0, 0.0, 0, 1e-6) == 1


def test_a_run_leaves_its_metrics_its_configuration_and_safe_checkpoints(trained) -> None:
    last = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    for name in ("miou", "macc", "aacc"):
        first, last = rows(trained, f"val/{name}")
        assert 0 < min(first, last) <= max(first, last) < 1
    expected = [1e-3 * poly_rate(step, 8, 1.0, 0.0, 2, 1e-6) for step in range(8)]
    assert rows(trained, "lr") == pytest.approx(expected, abs=1e-9)
    assert (trained / "config.yaml").is_file()
    assert not (trained / "bad_samples.csv").exists()


def test_test_and_predict_write_measures_label_maps_and_pictures(trained, data_root, capsys) -> None:
    config, best = str(trained / "config.yaml"), str(trained / "checkpoints" / "best.ckpt")
    assert main(["test", "--config", config, "--ckpt_path", best]) == 0
    assert "test/miou" in capsys.readouterr().out
    with (trained / "classes_test.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["class"] for row in table] == ["wall", "building", "sky"]
    arguments = ["predict", "--config", config, "--ckpt_path", best, "--pictures", "true"]
    arguments += ["--model.checkpoint", "gone.pth"]  # the first weights are not needed any more
    assert main(arguments) == 0
    assert "2 label maps" in capsys.readouterr().out

    model = SemanticSegmentation.load_from_checkpoint(best, weights_only=True, map_location="cpu").eval()
    mean, std = (torch.tensor(model.hparams["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
    right = total = 0
    for file in sorted((data_root / "images" / "validation").iterdir()):
        image = read(file)[0]
        written, mode = read(trained / "predictions" / f"{file.stem}.png")
        assert mode == "P"
        if len(image) == 40:  # what image_scale gives; 44 is scaled down
            pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
            with torch.no_grad():
                found = model(((pixels - mean) / std)[None]).argmax(1)[0].numpy()
            assert np.array_equal(written, found + 1)  # as ADE20K numbers them
        assert written.shape == image.shape[:2]
        true = read(data_root / "annotations" / "validation" / f"{file.stem}.png")[0]
        right += ((written == true) & (true > 0)).sum()
        total += (true > 0).sum()
        assert read(trained / "pictures" / f"{file.stem}.png")[0].shape[1] > image.shape[1]
    correct = sum(float(row["accuracy"] or 0) * int(row["pixels"]) for row in table)
    assert correct / total == pytest.approx(right / total, abs=1e-3)  # what was measured is what is written


@pytest.mark.parametrize("evaluation", ["whole", "slide"])
def test_windows_and_whole_images_see_every_pixel_at_any_size(evaluation, trained) -> None:
    model = SemanticSegmentation.load_from_checkpoint(
        trained / "checkpoints" / "best.ckpt", weights_only=True, evaluation=evaluation, map_location="cpu"
    ).eval()
    for size in ((32, 32), (33, 61), (16, 90)):
        with torch.no_grad():
            logits = model(torch.randn(1, 3, *size))
        assert logits.shape == (1, 3, *size)
        assert logits.isfinite().all()


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tmp_path, data_root, losses
) -> None:
    path = "lightning.pytorch.callbacks.ModelCheckpoint"
    folder = str(tmp_path / "checkpoints")
    kept = {"dirpath": folder, "save_top_k": -1, "every_n_train_steps": 2, "filename": "step{step}"}
    kept |= {"auto_insert_metric_name": False, "enable_version_counter": False}
    trainer = {"callbacks": [{"class_path": path, "init_args": kept}]}  # two epochs of four updates
    model = {"ema_decay": 0.8, "layer_decay": 0.7}
    arguments: dict[str, Any] = {"trainer": trainer, "model": model}
    config = make_config(tmp_path / "whole.yaml", data_root, output=str(tmp_path / "whole"), **arguments)
    assert main(["fit", "--config", str(config)]) == 0
    expected = dict(losses)
    final = torch.load(tmp_path / "checkpoints" / "step8.ckpt", weights_only=True)
    for done in (4, 2):  # after an epoch, and in the middle of one
        losses.clear()
        output = str(tmp_path / f"resumed{done}")
        config = make_config(tmp_path / f"{done}.yaml", data_root, output=output, **arguments)
        checkpoint = str(tmp_path / "checkpoints" / f"step{done}.ckpt")
        (tmp_path / "checkpoints" / "step8.ckpt").unlink()  # what is compared below is this run's
        assert main(["fit", "--config", str(config), "--ckpt_path", checkpoint]) == 0
        assert list(losses.items()) == list(expected.items())[done:]
        end = torch.load(tmp_path / "checkpoints" / "step8.ckpt", weights_only=True)
        for part in ("state_dict", "current_model_state"):
            for key, value in final[part].items():
                assert torch.equal(end[part][key], value), key


def test_a_run_goes_on_without_bad_files_and_lists_them(tmp_path, losses, capsys) -> None:
    root = make_ade20k(tmp_path / "data", train=6, val=3)
    bad = [spoil(root, "training", 1, "cut image"), spoil(root, "training", 4, "range")]
    bad.append(spoil(root, "validation", 0, "nothing labelled"))
    config = make_config(tmp_path / "config.yaml", root, trainer={"max_epochs": 1})
    assert main(["fit", "--config", str(config)]) == 1
    assert str(bad[0]) in (message := capsys.readouterr().err) or str(bad[1]) in message
    losses.clear()
    report = make_config(
        tmp_path / "report.yaml",
        root,
        output=str(tmp_path / "reported"),
        trainer={"max_epochs": 2},
        data={"on_bad": "report"},
    )
    assert main(["fit", "--config", str(report)]) == 0
    assert len(losses) == 6
    assert np.isfinite(list(losses.values())).all()
    assert "3 bad samples in" in capsys.readouterr().out
    with (tmp_path / "reported" / "bad_samples.csv").open() as stream:
        assert {row["file"] for row in csv.DictReader(stream)} == {str(path) for path in bad}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "upernets"}, "unknown decoder"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"min_lr": 1.0}, "min_lr must be from 0 to below lr"),
        ({"power": 0.0}, "power must be above 0"),
        ({"optimizer": "adamww"}, "unknown optimizer"),
        ({"stride": 40}, "stride 40 must be from 1 to window 32"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"pretrained": True, "checkpoint": "a.pth"}, "either pretrained or checkpoint"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message) -> None:
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    arguments: dict[str, Any] = {"class_names": ["a", "b"], "preprocessing": preprocessing, **SMALL}
    with pytest.raises(ValueError, match=message):
        SemanticSegmentation(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"checkpoint": "nowhere.pth"}}, "no checkpoint at nowhere.pth"),
        ({"data": {"val_batch_size": 2}}, "val_batch_size 1"),
        ({"model": {"warmup_steps": 100}}, "warmup_steps 100 leave none of the 8 updates"),
        ({"trainer": {"sync_batchnorm": True}}, "set model.sync_batchnorm instead"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(changes, message, tmp_path, data_root, capsys) -> None:
    config = make_config(tmp_path / "config.yaml", data_root, **changes)
    assert main(["fit", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("train.segmentation: ")


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path, data_root, capsys) -> None:
    last = str(trained / "checkpoints" / "last.ckpt")
    other = make_config(tmp_path / "config.yaml", data_root, model={"decoder_args": {"decoder_channels": 16}})
    strange = tmp_path / "strange.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"model": "biformer_tiny"}}, strange)
    for arguments, message in (
        (["test", "--config", str(other), "--ckpt_path", last], "was trained with decoder_args"),
        (["test", "--config", str(other)], "test needs weights"),
        (["test", "--config", str(other), "--ckpt_path", str(strange)], "not a checkpoint of this program"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_batch_norm_is_synchronized_where_there_are_several_devices(monkeypatch) -> None:
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    arguments: dict[str, Any] = {"class_names": ["a", "b"], "preprocessing": preprocessing, **SMALL}
    model = SemanticSegmentation(**arguments, sync_batchnorm=True).eval()
    images, keys = torch.randn(1, 3, 32, 32), model.state_dict().keys()
    norms, before = count(model, nn.modules.batchnorm._BatchNorm), model(images)
    assert norms > 5
    for devices in (1, 2, 2):
        monkeypatch.setattr(SemanticSegmentation, "trainer", SimpleNamespace(world_size=devices))
        model.configure_model()
        assert count(model, nn.SyncBatchNorm) == (norms if devices == 2 else 0)
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(model(images), before)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_an_encoder_starts_from_a_run_of_another_decoder(trained) -> None:
    last = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    other = {**last["hyper_parameters"], "decoder_args": {"decoder_channels": 16}}
    model = SemanticSegmentation(**{**other, "checkpoint": str(trained / "checkpoints" / "last.ckpt")})
    encoder = {k: v for k, v in last["state_dict"].items() if k.startswith("net.smp.encoder.")}
    assert len(encoder) > 50
    assert all(torch.equal(model.state_dict()[key], value) for key, value in encoder.items())
    assert model.hparams["decoder_args"] == {"decoder_channels": 16}


def test_label_maps_are_written_as_the_data_set_numbers_them(tmp_path) -> None:
    labels = np.array([[0, 1], [2, 149]], dtype=np.uint8)
    for reduced in (False, True):
        path = save_label_map(tmp_path / "map.png", labels, 150, reduced)
        assert read(path)[1] == "P"
        assert np.array_equal(read(path)[0], labels + reduced)
        colors = np.array(open_image(path))
        assert "#{:02x}{:02x}{:02x}".format(*colors[1, 1]) == class_colors(150)[149]
    assert len(set(class_colors(150))) == 150


def test_pictures_of_labels_colour_classes_and_leave_the_rest(tmp_path) -> None:
    image = Image.fromarray(np.full((40, 30, 3), 100, dtype=np.uint8))
    labels = np.full((40, 30), 255, dtype=np.uint8)
    labels[:20] = 1
    plain = np.array(draw_labels(image, labels, ["a", "b"], legend=False))
    assert (plain[20:] == 100).all()
    assert (plain[:20] != 100).any(-1).all()
    assert draw_labels(image, labels, ["a", "b"]).width > 30
    with pytest.raises(ValueError, match=r"labels are \[40, 30\]"):
        draw_labels(image, labels[1:], ["a", "b"])
