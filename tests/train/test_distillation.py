"""Distillation is the formula of its papers, from a teacher that nothing changes and nobody saves."""

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from train.classification import ClassificationCLI, ImageClassifier, main
from train.distillation import Teacher, build_teacher, distillation_loss

PREPROCESSING = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


def test_the_losses_are_the_formulas() -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    for temperature in (1.0, 3.0):
        p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
        divergence = (p * (p / q).log()).sum(1).mean()
        found = distillation_loss(student, teacher, "soft", temperature)
        torch.testing.assert_close(found, temperature**2 * divergence)
    hard = -student.log_softmax(1)[torch.arange(5), teacher.argmax(1)].mean()
    torch.testing.assert_close(distillation_loss(student, teacher, "hard", 3.0), hard)
    assert distillation_loss(teacher, teacher, "soft", 3.0).abs() < 1e-12


def test_the_gradient_does_not_fade_with_the_temperature() -> None:
    student = torch.randn(5, 7, requires_grad=True)
    teacher = torch.randn(5, 7)
    sizes = []
    for temperature in (10.0, 100.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, "soft", temperature), student)
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_teacher_sees_the_images_normalized_as_it_is_used_to_and_does_not_change() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten())
    teacher = Teacher(net, PREPROCESSING, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}).train()
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in PREPROCESSING.values())
    wanted = (pixels - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    # batch norm as it was made divides by sqrt(1 + eps)
    found = teacher((pixels - mean) / std)
    torch.testing.assert_close(found, wanted.flatten(1), rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.fixture
def recipe(trained) -> dict:
    """Distill the run of the other tests into itself."""
    given = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    return {
        "teacher": given["model"],
        "teacher_args": given["model_args"],
        "teacher_checkpoint": str(trained / "checkpoints" / "last.ckpt"),
        "distillation": "soft",
        "distillation_weight": 0.25,
        "temperature": 2.0,
    }


def test_training_weighs_labels_and_teacher_and_saves_the_student_alone(
    trained, tmp_path, write_config, recipe, monkeypatch
) -> None:
    seen = []
    forward = Teacher.forward

    def recorded(self, images):
        seen.append((images, forward(self, images)))
        return seen[-1][1]

    monkeypatch.setattr(Teacher, "forward", recorded)
    # a student that does not change: its loss can be computed afterwards
    model = {**recipe, "lr": 1e-12, "ema_decay": 0.5, "model_args": {**recipe["teacher_args"]}}
    model["model_args"]["drop_path_rate"] = 0.0
    config = write_config(model=model, trainer={"max_epochs": 1}, data={"batch_size": 24})  # one batch
    cli = ClassificationCLI(["fit", "--config", str(config)])
    ((images, answers),) = seen
    labels = next(iter(cli.datamodule.train_dataloader()))[1]
    logits = cli.model.train()(images)
    expected = 0.75 * nn.functional.cross_entropy(logits, labels)
    expected = expected + 0.25 * distillation_loss(logits, answers, "soft", 2.0)
    assert cli.trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), abs=1e-4)

    released = ImageClassifier.load_from_checkpoint(
        trained / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu"
    )
    torch.testing.assert_close(answers, released.eval()(images).detach())
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"net"}
    # what was trained is used without its teacher
    config.unlink()
    student = ImageClassifier(**saved["hyper_parameters"] | {"teacher_checkpoint": "gone.ckpt"})
    student.load_state_dict(saved["state_dict"])
    assert not student.teachers


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, write_config, recipe, image_folder, capsys) -> None:
    for wrong, message in (
        ({"teacher": "biformer_tny"}, "near it are"),
        ({"teacher_checkpoint": "some.ckpt"}, "needs teacher"),
        ({"temperature": 0.0}, "temperature"),
        ({"distillation_weight": 1.5}, "distillation_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageClassifier("test_vit", ["ant", "bee"], {}, **wrong)
    own, names = recipe["teacher_checkpoint"], ["ant", "bee", "cat"]
    torch.save({"head.fc.weight": torch.zeros(5, 4)}, tmp_path / "five.pth")
    preprocessing = {"input_size": (3, 32, 32), **PREPROCESSING}
    for name, classes, checkpoint, message in (
        ("biformer_tiny", ["ant", "bee", "cow"], own, "trained on 3 classes"),
        ("biformer_tiny", names, str(tmp_path / "five.pth"), "trained on 5 classes"),
        ("test_vit", names, own, "weights of"),
    ):
        with pytest.raises(ValueError, match=message):
            build_teacher(name, classes, preprocessing, checkpoint=checkpoint)

    config = write_config(model=recipe | {"teacher_checkpoint": str(tmp_path / "none.ckpt")})
    assert main(["fit", "--config", str(config)]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
