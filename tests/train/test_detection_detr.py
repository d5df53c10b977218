"""DETRs of transformers over timm's backbones, behind the interface of torchvision's detectors."""

import pytest
import torch
import yaml

from tests.train.detection_mini import CATEGORIES, make_coco, make_config
from tests.train.test_detection_configs import QUERIES
from train.detection import DetectionCLI, Detector

OBJECT = {"boxes": torch.tensor([[5.0, 10, 40, 30]]), "labels": torch.tensor([2])}
NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def build(detector: str, backbone: str = "selectformer_pico", **arguments) -> Detector:
    torch.manual_seed(0)
    options = {"detector_args": QUERIES, **arguments}
    return Detector(backbone=backbone, categories=CATEGORIES, size=64, detector=detector, **options)


@pytest.mark.parametrize("detector", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_losses_are_finite_with_and_without_objects_and_reach_every_parameter(detector) -> None:
    model = build(detector)
    images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
    for targets in ([NONE, NONE], [OBJECT, NONE]):
        model.zero_grad()
        loss = sum(model(images, targets).values())
        assert bool(torch.isfinite(loss))
        loss.backward()
        without = [n for n, p in model.net.named_parameters() if p.requires_grad and p.grad is None]
        assert not without


@pytest.mark.parametrize("detector", ["rt_detr_v2", "d_fine"])
def test_detections_are_those_of_the_image_processor(detector) -> None:
    from transformers import RTDetrImageProcessor

    model = build(detector).eval()
    images = [torch.rand(3, 60, 90), torch.rand(3, 64, 40)]
    seen = []
    model.net.model.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.inference_mode():
        found = model(images)
        expected = RTDetrImageProcessor().post_process_object_detection(
            seen[0], threshold=0.0, target_sizes=[(60, 90), (64, 40)]
        )
    for one, theirs, (height, width) in zip(found, expected, [(60, 90), (64, 40)], strict=True):
        count = len(theirs["scores"])
        torch.testing.assert_close(one["scores"][:count], theirs["scores"])
        assert torch.equal(one["labels"][:count] - 1, theirs["labels"])
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        torch.testing.assert_close(one["boxes"][:count], theirs["boxes"].clamp(min=0).minimum(limit))


@pytest.mark.slow
def test_biformer_by_its_timm_name_trains_and_its_model_is_saved_and_read_again(tmp_path) -> None:
    from transformers import AutoModelForObjectDetection

    root = make_coco(tmp_path / "coco", train=2, val=2)
    trainer = {"max_steps": 1, "enable_checkpointing": False, "logger": False}
    config = make_config(root, tmp_path / "run", trainer=trainer, data={"size": 64, "max_size": 96})
    config["model"] = {
        "backbone": "biformer_tiny",
        "detector": "rt_detr_v2",
        "detector_args": QUERIES,
        "warmup_steps": 0,
        "pictures": 2,
        "picture_threshold": 0.0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = DetectionCLI(["fit", "--config", str(tmp_path / "config.yaml")])
    assert cli.trainer.global_step == 1
    assert "val/box_ap" in cli.trainer.callback_metrics
    assert "val/mask_ap" not in cli.trainer.callback_metrics
    model = cli.model.net.model.eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved").eval()
    assert again.config.id2label == dict(enumerate(CATEGORIES.values()))
    pixels = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="takes no backbone_args"):
        build("rt_detr", backbone_args={"drop_path_rate": 0.1})
    with pytest.raises(ValueError, match="has no num_querys"):
        build("rt_detr", detector_args={"num_querys": 3})
