"""Knowledge distillation on logits, soft (Hinton et al. 2015) or hard (DeiT, Touvron et al. 2021)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from train.classifier_net import build_classifier

__all__ = ["Teacher", "build_teacher", "distillation_loss"]


class Teacher(nn.Module):
    """A frozen classifier that reads the images of its student, normalized as it is used to.

    A copy of a student, such as the average of its weights, shares it.

    Args:
        net: a classifier of the student's classes.
        preprocessing: of the student, in the words of timm's pretrained configurations.
        own: the same of the teacher.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, preprocessing: dict[str, Any], own: dict[str, Any]) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (preprocessing["mean"], preprocessing["std"], own["mean"], own["std"])
        )
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` as the student sees them -> float32 logits `[B, classes]`."""
        return self.net(images * self.scale + self.shift).float()

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher only evaluates."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, kind: Literal["soft", "hard"], temperature: float = 1.0
) -> Tensor:
    """How far a student is from its teacher.

    Args:
        logits, teacher_logits: `[B, classes]`.
        kind: "soft" is `T^2 KL(softmax(teacher / T) || softmax(student / T))`, the mean over the images;
            "hard" is the cross entropy with the teacher's likeliest class (Touvron et al. 2021, eq. 2 and 3).
        temperature: T of the soft kind.
    """
    if kind == "hard":
        return cross_entropy(logits, teacher_logits.argmax(-1))
    student, teacher = (part.div(temperature).log_softmax(-1) for part in (logits, teacher_logits))
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def build_teacher(
    name: str,
    class_names: Sequence[str],
    preprocessing: dict[str, Any],
    arguments: dict[str, Any] | None = None,
    checkpoint: str | None = None,
) -> Teacher:
    """A teacher from a timm name, with its released weights or those of a file.

    Args:
        name: of timm.
        class_names: of the student.
        preprocessing: of the student; the teacher reads images of the same size.
        arguments: of the teacher's model.
        checkpoint: its weights, see `read_backbone_weights`; None downloads the release.

    Raises:
        ValueError: naming what does not fit, such as a teacher of other classes.
    """
    own = {"input_size": preprocessing["input_size"]}
    net: Any = build_classifier(
        name, class_names, own, arguments, checkpoint is None, checkpoint, same_classes=True
    )
    return Teacher(net, preprocessing, net.pretrained_cfg)
