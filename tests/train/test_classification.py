"""Training, validating, testing and predicting through the command line."""

import csv
import math
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from tests.train.conftest import SMALL, rows
from train.classification import ClassificationCLI, ImageClassifier, main
from train.classifier_net import build_classifier
from train.image_data import ImageFolderData, read_class_names
from train.recipe import peak_lr


def fit(config: Path, *options: str) -> ClassificationCLI:
    return ClassificationCLI(["fit", "--config", str(config), *options])


def test_a_run_leaves_config_checkpoints_and_both_logs(trained) -> None:
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert (trained / "config.yaml").is_file()
    names = sorted(path.name for path in (trained / "logs" / "version_0").iterdir())
    assert names[1:] == ["hparams.yaml", "metrics.csv"]
    assert names[0].startswith("events.out.tfevents")
    assert len(rows(trained, "train/loss_step")) == 12
    assert len(rows(trained, "val/top1")) == len(rows(trained, "val/top5")) == 2


@pytest.mark.slow
def test_a_short_run_on_digits_learns(tmp_path, write_config) -> None:
    config = write_config(
        trainer={"max_epochs": 4, "limit_train_batches": 15, "limit_val_batches": 4},
        model={"lr": 4e-3},
        data={
            "root": str(tmp_path / "digits"),
            "dataset": "digits",
            "batch_size": 32,
            "hflip": 0,
            "crop_pct": 1.0,
            "scale": [0.8, 1.0],
        },
    )
    assert main(["fit", "--config", str(config)]) == 0
    losses = rows(tmp_path / "run", "train/loss_epoch")
    assert losses[-1] < 0.7 * losses[0]
    assert rows(tmp_path / "run", "val/top1")[-1] > 0.4  # chance is 0.1


@pytest.mark.slow
def test_validate_test_and_predict_agree_with_a_computation_by_hand(trained, tmp_path, capsys) -> None:
    image_folder = trained.parent / "images"
    checkpoint = trained / "checkpoints" / "last.ckpt"
    given = ["--config", str(trained / "config.yaml"), "--ckpt_path", str(checkpoint)]
    measured = ClassificationCLI(["validate", *given]).trainer.callback_metrics

    state = torch.load(checkpoint, weights_only=True)
    model = ImageClassifier(**state["hyper_parameters"])
    model.load_state_dict(state["state_dict"])
    data = ImageFolderData(str(image_folder), image_size=32, batch_size=4)
    for split in ("val", "test"):
        loader = getattr(data, f"{split}_dataloader")()
        with torch.inference_mode():
            logits = torch.cat([model.eval()(images) for images, _ in loader])
        labels = torch.cat([labels for _, labels in loader])
        if split == "val":
            assert measured["val/top1"].item() == pytest.approx(
                (logits.argmax(1) == labels).double().mean().item()
            )
            top3 = (logits.topk(3, 1).indices == labels[:, None]).any(1).double().mean().item()
            assert measured["val/top5"].item() == pytest.approx(top3)  # three classes
            assert measured["val/loss"].item() == pytest.approx(
                cross_entropy(logits, labels).item(), abs=1e-5
            )
    tested = ClassificationCLI(["test", *given]).trainer.callback_metrics
    assert tested["test/top1"].item() == pytest.approx((logits.argmax(1) == labels).double().mean().item())

    target = tmp_path / "out" / "answers.csv"
    assert main(["predict", *given, "--predictions", str(target)]) == 0
    assert f"9 predictions in {target}" in capsys.readouterr().out
    with target.open() as stream:
        answers = list(csv.DictReader(stream))
    probability, index = logits.softmax(1).max(1)
    expected = sorted((image_folder / "test").rglob("*.png"))
    assert [row["file"] for row in answers] == [str(path) for path in expected]
    assert [row["class"] for row in answers] == [["ant", "bee", "cat"][i] for i in index]
    assert [float(row["probability"]) for row in answers] == pytest.approx(probability.tolist(), abs=1e-5)
    assert [path.name for path in target.parent.iterdir()] == ["answers.csv"]


def test_predict_reads_any_folder_of_images(trained, tmp_path, image_folder) -> None:
    folder = tmp_path / "loose"
    folder.mkdir()
    (image_folder / "test" / "ant" / "0.png").rename(folder / "one.png")
    given = [
        "--config",
        str(trained / "config.yaml"),
        "--ckpt_path",
        str(trained / "checkpoints" / "best.ckpt"),
    ]
    given += ["--output", str(tmp_path / "out")]
    assert main(["predict", *given, "--data.predict_folder", str(folder)]) == 0
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "file,class,probability"
    assert lines[1].startswith(f"{folder / 'one.png'},")


def test_the_schedule_warms_up_falls_as_a_cosine_and_cools_down_after_every_update(
    tmp_path, write_config
) -> None:
    model = {
        "lr": 0.1,
        "lr_batch_size": 16,
        "warmup_epochs": 1,
        "warmup_lr": 0.0,
        "min_lr": 1e-3,
        "cooldown_epochs": 1,
    }
    config = write_config(
        model={**model, "optimizer": "sgd"}, trainer={"max_epochs": 6, "accumulate_grad_batches": 2}
    )
    cli = fit(config)
    assert peak_lr(cli.model) == pytest.approx(0.1 * 8 / 16)
    # 3 updates an epoch, two batches each: logged before the update that uses it
    rates = rows(tmp_path / "run", "lr")
    peak, total = 0.05, 15

    def expected(update: int) -> float:
        if update < 3:
            return peak * update / 3
        if update >= total:
            return 1e-3
        return 1e-3 + 0.5 * (peak - 1e-3) * (1 + math.cos(math.pi * update / total))

    assert len(rates) == 18
    assert rates == pytest.approx([expected(update) for update in range(18)], abs=1e-7)


def test_weight_decay_spares_biases_norms_and_what_the_model_names(write_config) -> None:
    cli = fit(write_config(model={"layer_decay": 0.5}), "--trainer.max_epochs", "1")
    named = {id(p): name for name, p in cli.model.net.named_parameters()}
    for group in cli.trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            name = named.pop(id(parameter))
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and not name.endswith(".bias")), name
            if name.startswith("head"):
                assert group["lr_scale"] == 1
            if name.startswith("stem"):
                assert group["lr_scale"] < 0.1
    assert not named


@pytest.mark.slow
def test_mixup_average_accumulation_clipping_and_bfloat16_work_together(tmp_path, write_config) -> None:
    config = write_config(
        model={"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.5, "channels_last": True},
        trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    )
    cli = fit(config)
    assert cli.trainer.global_step == 4
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    average, raw = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(average[key], raw[key]) for key in average)
    # what is saved first, and what the model holds in the end, is the average
    for key, value in cli.model.state_dict().items():
        torch.testing.assert_close(value, average[key])


def test_the_average_is_the_exponential_one(tmp_path, write_config, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    end = ImageClassifier.optimizer_step

    def step(self, *args, **kwargs):
        end(self, *args, **kwargs)
        seen.append(self.net.head.fc.weight.detach().clone())

    monkeypatch.setattr(ImageClassifier, "optimizer_step", step)
    fit(write_config(model={"ema_decay": 0.75}), "--trainer.max_epochs", "1")
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["net.head.fc.weight"], average)
    torch.testing.assert_close(saved["current_model_state"]["net.head.fc.weight"], seen[-1])


def test_a_checkpoint_is_a_start_for_another_number_of_classes(
    trained, tmp_path, write_config, image_folder
) -> None:
    checkpoint = trained / "checkpoints" / "last.ckpt"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    for split in ("train", "val", "test"):
        for path in sorted((image_folder / split / "cat").iterdir()):
            path.unlink()
        (image_folder / split / "cat").rmdir()
    config = write_config("other.yaml", model={"checkpoint": str(checkpoint)}, output=str(tmp_path / "other"))
    cli = fit(config, "--trainer.max_epochs", "1", "--model.lr", "1e-9")
    assert cli.model.net.head.fc.out_features == 2
    torch.testing.assert_close(cli.model.net.stem[0].weight, weights["net.stem.0.weight"], rtol=0, atol=1e-6)


def test_a_checkpoint_of_the_same_classes_keeps_its_classifier(trained, tmp_path, write_config) -> None:
    checkpoint = trained / "checkpoints" / "last.ckpt"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    config = write_config("again.yaml", model={"checkpoint": str(checkpoint)}, output=str(tmp_path / "again"))
    cli = fit(config, "--trainer.max_epochs", "1", "--model.lr", "1e-9")
    torch.testing.assert_close(cli.model.net.head.fc.weight, weights["net.head.fc.weight"], rtol=0, atol=1e-6)
    assert "state_dict" not in cli.model.net.pretrained_cfg


@pytest.fixture
def five_classes(tmp_path: Path) -> tuple[str, str]:
    """A release of five classes, two of them ours, and the names of the five."""
    torch.manual_seed(1)
    net = timm.create_model(SMALL["model"], num_classes=5, **SMALL["model_args"])
    state = {key.replace("head.fc.", "head."): value for key, value in net.state_dict().items()}
    torch.save({"model": state}, tmp_path / "five.pth")
    (tmp_path / "five.txt").write_text("wasp\nbee\nyak\nant\nzebra\n")
    return str(tmp_path / "five.pth"), str(tmp_path / "five.txt")


def test_a_release_of_other_classes_starts_a_classifier_afresh_or_keeps_the_rows_of_ours(
    five_classes,
) -> None:
    checkpoint, names = five_classes
    weights = torch.load(checkpoint, weights_only=True)["model"]
    ours, preprocessing = ["ant", "bee", "cat"], {"input_size": (3, 32, 32)}

    def build(**options) -> torch.nn.Module:
        return build_classifier(SMALL["model"], ours, preprocessing, SMALL["model_args"], **options)

    fresh = build(checkpoint=checkpoint)
    kept = build(checkpoint=checkpoint, checkpoint_classes=names)
    for net in (fresh, kept):
        torch.testing.assert_close(net.stem[0].weight, weights["stem.0.weight"])
        assert net.num_classes == net.head.fc.out_features == 3
    torch.testing.assert_close(kept.head.fc.weight[:2], weights["head.weight"][[3, 1]])
    torch.testing.assert_close(kept.head.fc.bias[:2], weights["head.bias"][[3, 1]])
    for net in (fresh, kept):
        distance = (net.head.fc.weight[2] - weights["head.weight"]).abs().amax(1)
        assert distance.min() > 1e-3

    Path(names).write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(ValueError, match="name none of ours, such as ant"):
        build(checkpoint=checkpoint, checkpoint_classes=names)
    Path(names).write_text("ant\nbee\n")
    with pytest.raises(ValueError, match=r"has 5 classes, checkpoint_classes .* names 2"):
        build(checkpoint=checkpoint, checkpoint_classes=names)
    with pytest.raises(ValueError, match="give checkpoint or pretrained"):
        build(checkpoint_classes=names)
    Path(names).write_text("ant\nant\n")
    with pytest.raises(ValueError, match="names a class twice"):
        read_class_names(names)


def test_the_classes_of_imagenet_22k_hold_all_but_one_of_those_of_1k() -> None:
    few, many = read_class_names("imagenet-1k"), read_class_names("imagenet-22k")
    assert (len(few), len(many)) == (1000, 21841)
    assert set(few) - set(many) == {"n04399382"}
    assert few == sorted(few)  # as class folders are


@pytest.mark.slow
def test_a_checkpoint_is_finetuned_at_a_higher_resolution(tmp_path, write_config) -> None:
    model = {"model": "test_vit", "model_args": {}, "lr": 1e-9, "layer_decay": 0.7, "ema_decay": 0.9}
    small = write_config("small.yaml", model={"model": "test_vit", "model_args": {}})
    fit(small, "--trainer.max_epochs", "1")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    config = write_config("large.yaml", model=model, data={"image_size": 64}, output=str(tmp_path / "large"))
    cli = fit(config, "--trainer.max_epochs", "1", "--model.checkpoint", str(checkpoint))
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = cli.model.state_dict()
    assert before["net.pos_embed"].shape[1] < after["net.pos_embed"].shape[1]
    name = "net.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_loss(tmp_path, write_config) -> None:
    found = []
    for number, checkpointing in enumerate((False, True)):
        config = write_config(output=str(tmp_path / f"{number}"), model={"grad_checkpointing": checkpointing})
        cli = fit(config, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3")
        assert all(stage.grad_checkpointing == checkpointing for stage in cli.model.net.stages)
        found.append(rows(tmp_path / f"{number}", "train/loss_step"))
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_the_model_knows_how_its_images_were_prepared(trained) -> None:
    model = ImageClassifier.load_from_checkpoint(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert tuple(model.net.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert model.hparams["class_names"] == ["ant", "bee", "cat"]


def test_the_command_line_reads_a_checkpoint_of_training(trained, image_folder) -> None:
    from visionsel.prediction import load_classifier, predict_images

    classifier = load_classifier(None, trained / "checkpoints" / "last.ckpt")
    paths = sorted((image_folder / "test" / "bee").iterdir())
    results = predict_images(classifier, paths, topk=3)
    model = ImageClassifier.load_from_checkpoint(
        trained / "checkpoints" / "last.ckpt", weights_only=True
    ).eval()
    data = ImageFolderData(str(image_folder), image_size=32, batch_size=9)
    images, labels = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        expected = model(images[labels == 1]).softmax(1)
    for result, probabilities in zip(results, expected, strict=True):
        for entry in result["classes"]:
            assert entry["probability"] == pytest.approx(probabilities[entry["index"]].item(), abs=1e-5)
            assert entry["label"] == ["ant", "bee", "cat"][entry["index"]]


def test_any_timm_model_can_be_trained(tmp_path, write_config) -> None:
    config = write_config(model={"model": "test_vit", "model_args": {}})
    cli = fit(config, "--trainer.max_epochs", "1")
    assert cli.model.net.patch_embed.img_size == (32, 32)
