"""Training, validating and applying detectors through the command line."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.train.conftest import record_losses, rows
from tests.train.detection_mini import CATEGORIES, make_coco, make_config
from train.detection import DetectionCLI, Detector, main
from train.detection_data import CocoData
from train.detection_recipe import backbone_of, load_start, parameter_groups
from train.detection_results import average_precision, coco_rows, precision_metric
from visionsel.data.imagefolder import open_image
from visionsel.embedded import load_classifier

RECIPE = {
    "batch_norm": "eval",
    "ema_decay": 0.8,
    "layer_decay": 0.7,
    "backbone_lr": 0.5,
    "frozen_stages": 1,
    "schedule": "step",
    "lr_epochs": [1],
    "lr_factor": 0.5,
}


def crowd(split: str, content: Any) -> None:
    """One of the objects is a crowd."""
    row = content["annotations"][-1]
    row["iscrowd"] = 1


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"), edit=crowd)


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory) -> Path:
    """A run of two epochs of three updates, to read only."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    path = "lightning.pytorch.callbacks.ModelCheckpoint"
    every = {"dirpath": str(folder / "all"), "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    ends = {
        "dirpath": str(folder / "run" / "checkpoints"),
        "filename": "last",
        "save_on_train_epoch_end": True,
    }
    ends["enable_version_counter"] = False
    callbacks = [{"class_path": path, "init_args": args} for args in (every, ends)]
    config = make_config(coco, folder / "run", model=RECIPE, trainer={"callbacks": callbacks})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "plain.yaml").write_text(yaml.safe_dump(make_config(coco, folder / "run", model=RECIPE)))
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder / "run"


def build(**arguments: Any) -> Detector:
    model = make_config(Path(), Path())["model"]
    torch.manual_seed(0)
    options = {"categories": CATEGORIES, "size": 48, "max_size": 64, **model, **arguments}
    return Detector(**options)


def sample(height: int = 50, width: int = 70, count: int = 1) -> tuple[list[torch.Tensor], list[dict]]:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    masks[:, 10:30, 5:40] = True
    boxes = torch.tensor([[5.0, 10, 40, 30]]).repeat(count, 1)
    labels = torch.full((count,), 2)
    return [image], [{"image_id": 1, "boxes": boxes, "labels": labels, "masks": masks}]


def test_a_run_leaves_config_checkpoints_logs_and_pictures(trained) -> None:
    assert (trained / "config.yaml").is_file()
    assert (trained / "checkpoints" / "last.ckpt").is_file()
    saved = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["categories"] == CATEGORIES
    assert not any("_metric" in key for key in saved["state_dict"])
    assert len(rows(trained, "train/loss_step")) == 6
    for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap75"):
        assert len(rows(trained, f"val/{name}")) == 2
    assert rows(trained, "lr") == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4])
    names = sorted(path.name for path in (trained / "pictures").iterdir())
    assert names == ["val_epoch000.png", "val_epoch001.png"]
    with Image.open(trained / "pictures" / names[0]) as picture:
        assert picture.size == (2 * 256 + 4, 4 * 48)
    (events,) = (trained / "logs" / "version_0").glob("events.out.tfevents*")
    assert b"val/detections" in events.read_bytes()


def test_results_scored_by_pycocotools_give_the_logged_numbers(trained, coco, tmp_path, monkeypatch) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = CocoData(str(coco), size=48, max_size=64)
    data.setup("validate")
    truth = iter([target for _, target in data.val_dataloader().dataset])
    generator = np.random.default_rng(0)

    def nearly(self: Detector, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The truth, moved by a few pixels, with scores, one wrong class and one wrong box."""
        found = []
        for _ in images:
            target = next(truth)
            count = len(target["boxes"])
            moved = torch.from_numpy(generator.uniform(-3, 3, (count, 4)).astype(np.float32))
            labels = target["labels"].clone()
            labels[0] = labels[0] % 10 + 1
            boxes = torch.cat([target["boxes"] + moved, torch.tensor([[1.0, 2, 9, 30]])])
            masks = torch.cat([target["masks"].roll(1, 2), target["masks"][:1].roll(9, 1)])
            scores = torch.from_numpy(generator.random(count + 1, dtype=np.float32))
            one = {"boxes": boxes, "masks": masks, "scores": scores}
            found.append({**one, "labels": torch.cat([labels, labels[:1]])})
        return found

    monkeypatch.setattr(Detector, "_detect", nearly)
    given = ["--config", str(trained.parent / "plain.yaml"), "--output", str(tmp_path / "out")]
    cli = DetectionCLI(["validate", *given, "--ckpt_path", str(trained / "checkpoints" / "last.ckpt")])
    logged = cli.trainer.callback_metrics
    with redirect_stdout(io.StringIO()):
        annotated = COCO(str(coco / "annotations" / "instances_val2017.json"))
        results = annotated.loadRes(str(tmp_path / "out" / "val_results.json"))
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(annotated, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for index, suffix in enumerate(("ap", "ap50", "ap75", "ap_small")):
                expected = evaluation.stats[index]
                assert 0.05 < expected < 1
                assert logged[f"val/{name}_{suffix}"].item() == pytest.approx(expected, abs=1e-6), (
                    kind,
                    suffix,
                )
    assert (tmp_path / "out" / "pictures" / "val.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # on purpose: the first run is kept
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    trained, tmp_path, monkeypatch
) -> None:
    losses = record_losses(monkeypatch, Detector)
    config = yaml.safe_load((trained.parent / "config.yaml").read_text())
    for callback, name in zip(config["trainer"]["callbacks"], ("all", "checkpoints"), strict=True):
        callback["init_args"]["dirpath"] = str(tmp_path / name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "output": str(tmp_path / "run")}))
    middle = trained.parent / "all" / "step=2.ckpt"
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(middle)]) == 0
    assert list(losses.values()) == pytest.approx(rows(trained, "train/loss_step")[2:], abs=1e-5)
    whole = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    again = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        for key, value in whole[part].items():
            torch.testing.assert_close(again[part][key], value, rtol=0, atol=1e-6)
    assert again["lr_schedulers"] == whole["lr_schedulers"]


def test_predict_needs_images_only_and_speaks_of_ids_and_files(trained, coco, tmp_path, capsys) -> None:
    checkpoint = trained / "checkpoints" / "last.ckpt"
    given = ["--config", str(trained.parent / "plain.yaml"), "--ckpt_path", str(checkpoint)]
    given += ["--data.root", "nowhere", "--data.predict_folder", str(coco / "val2017")]
    given += ["--model.checkpoint", "gone.pth"]  # the first weights are not needed any more
    target = tmp_path / "found.json"
    assert main(["predict", *given, "--predictions", str(target)]) == 0
    assert f"in 3 images in {target}" in capsys.readouterr().out
    found = json.loads(target.read_text())
    assert {row["file_name"] for row in found} == {str(path) for path in (coco / "val2017").iterdir()}
    assert {row["category_id"] for row in found} <= set(CATEGORIES)
    model = Detector.load_from_checkpoint(checkpoint, weights_only=True).eval()
    files = sorted((coco / "val2017").iterdir())
    image = torch.from_numpy(np.array(open_image(files[1]))).permute(2, 0, 1)
    with torch.inference_mode():
        (expected,) = model([image])
    mine = [row for row in found if row["image_id"] == 2]
    assert [row["score"] for row in mine] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
    x0, y0, x1, y1 = expected["boxes"][0].tolist()
    assert mine[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
    assert mine[0]["segmentation"]["size"] == [48, 64]


def test_rates_fall_towards_the_image_and_frozen_stages_do_not_train(trained, coco) -> None:
    model = build(**RECIPE)
    groups = parameter_groups(model._built[0], model.hparams, 1.0)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate)
    for name, parameter in model.net.named_parameters():
        frozen = any(part in name for part in ("body.stem", "body.stages_0"))
        assert parameter.requires_grad != frozen, name
        assert (id(parameter) in rate) != frozen, name
        if frozen:
            continue
        assert (decay[id(parameter)] > 0) == (parameter.ndim > 1 and not name.endswith("rpb")), name
        if "body" not in name:
            assert rate[id(parameter)] == 1, name
    body = dict(backbone_of(model.net).named_parameters())
    last = [rate[id(p)] for name, p in body.items() if name.startswith("stages_2.blocks")]
    first = [rate[id(p)] for name, p in body.items() if name.startswith("stages_1.downsample")]
    assert set(last) == {0.5 * 0.7}
    assert max(first) < min(last)
    before = build(**RECIPE).state_dict()
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["current_model_state"]
    for key, value in before.items():
        if key.startswith("net.backbone.body.stages_1") and key.endswith("weight"):
            assert not torch.equal(value, state[key]), key


@pytest.mark.parametrize(("mode", "moves", "trains"), [("eval", 0, 1), ("frozen", 0, 0), ("train", 1, 1)])
def test_batch_norms_of_the_backbone_do_as_they_are_told(mode, moves, trains) -> None:
    args = {"embed_dims": [32, 32, 32], "depths": [1, 1, 1], "num_windows": 2, "topks": [1, 1, -1]}
    model = build(backbone="biformer_tiny", backbone_args=args, batch_norm=mode, output_norms=True)
    model.on_train_epoch_start()
    norm = backbone_of(model.net).stem_1
    before = norm.running_mean.clone()
    sum(model(*sample()).values()).backward()
    assert torch.equal(norm.running_mean, before) != bool(moves)
    gradient = norm.weight.grad if isinstance(norm.weight, torch.nn.Parameter) else None
    assert (gradient is not None) == bool(trains)


@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn", "retinanet"])
@pytest.mark.parametrize("group_norm", [False, True])
def test_images_of_any_size_and_without_objects_have_finite_losses(detector, group_norm) -> None:
    args: dict[str, Any] = {} if detector != "retinanet" else {"detector_args": {"score_thresh": 0.0}}
    model = build(detector=detector, group_norm=group_norm, **args)
    images, targets = [], []
    for size in ((50, 70, 2), (33, 47, 0)):
        image, target = sample(*size)
        images, targets = images + image, targets + target
    for chosen in ([0, 1], [1, 1]):
        losses = model([images[i] for i in chosen], [targets[i] for i in chosen])
        total = sum(losses.values())
        assert bool(torch.isfinite(total))
        total.backward()
    with torch.inference_mode():
        found = model.eval()(images)
    for one, image in zip(found, images, strict=True):
        height, width = image.shape[1:]
        assert len(one["boxes"])
        assert bool((one["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all())
        assert 1 <= int(one["labels"].min()) <= int(one["labels"].max()) <= len(CATEGORIES)


@pytest.mark.parametrize(
    ("backbone", "args"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1, 1, 1], "img_size": 64}),
    ],
)
def test_backbones_of_timm_serve_too(backbone, args) -> None:
    args = {**args, "strict_img_size": False} if args else args
    model = build(backbone=backbone, backbone_args=args)
    names = [name for name, p in model.net.named_parameters() if p.requires_grad]
    sum(model(*sample(64, 96)).values()).backward()
    without = [n for n, p in model.net.named_parameters() if p.requires_grad and p.grad is None]
    assert names
    assert not without
    parameter_groups(model._built[0], {**model.hparams, "layer_decay": 0.9}, 1.0)


def test_boxes_are_computed_in_float32_under_autocast() -> None:
    model = build()
    seen = []
    backbone_of(model.net).register_forward_hook(lambda m, i, out: seen.extend(x.dtype for x in out))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*sample())
        assert model.net.backbone.fpn.inner_blocks[0][0](torch.ones(1, 16, 2, 2)).dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in losses.values())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model.eval()(sample()[0])
    assert found["boxes"].dtype == torch.float32
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())
    assert torch.bfloat16 in seen


def test_a_detector_is_a_start_for_other_categories_only_of_its_kind(trained, tmp_path) -> None:
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = build(categories={1: "cat", 2: "dog"}, start=checkpoint)
    torch.testing.assert_close(
        model.net.rpn.head.cls_logits.weight, weights["net.rpn.head.cls_logits.weight"]
    )
    fresh = load_start(model.net, checkpoint)
    assert sorted({name.split(".")[1] for name in fresh}) == ["box_predictor", "mask_predictor"]
    for other in ({"detector": "faster_rcnn"}, {"pyramid_channels": 8}):
        with pytest.raises(ValueError, match="not a checkpoint of this detector and backbone"):
            build(start=checkpoint, **other)


def test_the_pixels_are_prepared_as_for_the_classifier_that_the_backbone_was() -> None:
    args = {"embed_dim": 32, "depths": [1, 2, 2], "num_heads": [1, 2, 4], "kernel_size": 5}
    model = build(backbone_args=args, checkpoint="embedded:nat")
    assert model.hparams["mean"] == model.net.transform.image_mean == [0.5, 0.5, 0.5]
    assert model.hparams["std"] == model.net.transform.image_std == [0.25, 0.25, 0.25]
    classifier = load_classifier("nat").state_dict()
    body = backbone_of(model.net).state_dict()
    assert len(body) > 20
    for name, value in body.items():
        torch.testing.assert_close(value, classifier[name.replace("stages_", "stages.")], rtol=0, atol=0)


def test_a_checkpoint_of_other_categories_is_refused(trained, tmp_path, capsys) -> None:
    given = [
        "--config",
        str(trained.parent / "plain.yaml"),
        "--ckpt_path",
        str(trained / "checkpoints" / "last.ckpt"),
    ]
    assert main(["validate", *given, "--model.backbone_args.embed_dim", "32"]) == 1
    assert "was trained with backbone_args" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_with_the_images(coco, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Detector, "forward", lambda *_: {"loss": torch.tensor(float("nan"))})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_config(coco, tmp_path / "run")))
    assert main(["fit", "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert "the loss is nan at images [10" in said
    assert "warmup_steps" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "nat_huge"}, "unknown model 'nat_huge'; near it are"),
        ({"backbone_args": {"depth": 3}}, "depth"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": {}}, "is no backbone for images of any size"),
        ({"checkpoint": "embedded:nat"}, "and the weights of embedded:nat: "),
        ({"checkpoint": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
        ({"pretrained": True, "checkpoint": "x.pth"}, "not both"),
        ({"least_stride": 64}, "none from 64 on"),
        ({"frozen_stages": 9}, "frozen_stages must be at most"),
        ({"detector_args": {"nms": 1}}, "nms"),
        ({"detector": "yolo"}, "choose one of mask_rcnn"),
        ({"detector": "d_fine", "group_norm": True}, "belongs to torchvision's detectors"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'"),
    ],
)
def test_arguments_are_checked(arguments, message) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(**arguments)


def test_devices_with_different_numbers_of_images_measure_together(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> tuple[list[dict], list[dict]]:
        _, target = sample(20, 30, 2)
        target[0]["boxes"] = torch.tensor([[2.0, 3, 12, 15], [14, 4, 25, 17]])
        moved = target[0]["boxes"] + torch.rand(2, 4, generator=generator) * 4
        scores = torch.rand(2, generator=generator)
        found = {"boxes": moved, "scores": scores, "labels": target[0]["labels"]}
        return [{**found, "masks": target[0]["masks"].roll(1, 2)}], target

    images = [drawn() for _ in range(5)]
    whole, first, second = (precision_metric(masks=True) for _ in range(3))
    for index, (found, target) in enumerate(images):
        whole.update(found, target)
        (first if index < 3 else second).update(found, target)
    expected = average_precision(whole)
    assert 0 < expected["box_ap"] < 1
    others = iter(second.metric_state.values())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda parts, own: parts.__setitem__(slice(2), [own, next(others)]),
    )
    assert average_precision(first) == expected


def test_overlaps_on_a_threshold_count_as_in_pycocotools() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metric, rows, truth = precision_metric(masks=True), [], []
    for number, share in enumerate(range(5, 10), 1):  # overlaps of exactly 0.5 to 0.9
        masks = torch.zeros(2, 20, 20, dtype=torch.bool)
        masks[0, :10, :10] = masks[1, :10, :share] = True
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, share, 10]])
        labels = torch.tensor([1])
        found = {
            "boxes": boxes[1:],
            "masks": masks[1:],
            "labels": labels,
            "scores": torch.tensor([share / 10]),
        }
        target = {"boxes": boxes[:1], "masks": masks[:1], "labels": labels}
        metric.update([found], [target])
        rows += coco_rows(found, number, [7])
        one = coco_rows({**target, "scores": torch.ones(1)}, number, [7])[0]
        truth.append({**one, "id": number, "iscrowd": 0, "area": 100})
    scores = average_precision(metric)
    with redirect_stdout(io.StringIO()):
        annotated = COCO()
        images = [{"id": row["image_id"], "height": 20, "width": 20} for row in truth]
        annotated.dataset = {"images": images, "annotations": truth, "categories": [{"id": 7, "name": "x"}]}
        annotated.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(annotated, annotated.loadRes(rows), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert scores[f"{name}_ap"].item() == pytest.approx(evaluation.stats[0], abs=1e-6)
