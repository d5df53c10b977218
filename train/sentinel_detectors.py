"""Who says what an image shows, for the pairs of SENTINEL: functions of an image and some names.

The paper asks GroundingDINO and YOLO-World. Any open-vocabulary detector of transformers does
(`OpenVocabulary`); YOLO-World is none of them, OWLv2 is. The scenes of the shapes world know what they show
(`annotations`), and a vision-language model that answers questions better than it describes can be asked
(`Answers`), itself too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.sentinel_pairs import Picture
from visionsel.embedded.lvlm_quality import generate_answers

__all__ = ["Answers", "OpenVocabulary", "annotations"]


def annotations(picture: Picture, names: Sequence[str]) -> dict[str, bool]:
    """What is known of the image: the truth, where there is one.

    Raises:
        ValueError: when nothing is known of it.
    """
    if picture.objects is None:
        raise ValueError(f"{picture.path} has no annotations; name detectors of transformers instead")
    return {name: name in picture.objects for name in names}


@dataclass(frozen=True)
class Answers:
    """A vision-language model, asked whether there is such a thing; its answer counts if it begins with yes.

    Attributes:
        model, processor: of transformers.
        question: with a place for the name and its article.
    """

    model: Any
    processor: Any
    question: str = "is there {} in the image?"

    def __call__(self, picture: Picture, names: Sequence[str]) -> dict[str, bool]:
        asked = [self.question.format(f"{'an' if name[0] in 'aeiou' else 'a'} {name}") for name in names]
        answers = generate_answers(
            self.model, self.processor, [picture.image] * len(asked), asked, max_new_tokens=8
        )
        said = [answer.strip().lower().startswith("yes") for answer in answers]
        return dict(zip(names, said, strict=True))


@dataclass(frozen=True)
class OpenVocabulary:
    """An open-vocabulary detector of transformers: GroundingDINO, OWL-ViT, OWLv2 and their like.

    Each name is asked by itself, as the phrases of one prompt can run into each other in GroundingDINO.

    Attributes:
        model: an `AutoModelForZeroShotObjectDetection`.
        processor: of it.
        threshold: the score from which a box counts (GroundingDINO's for boxes is 0.3 in its demos; OWLv2's
            scores are lower, 0.1 to 0.2 is usual).
    """

    model: Any
    processor: Any
    threshold: float = 0.3

    @classmethod
    def load(cls, name: str | Path, threshold: float = 0.3, device: Any = "cpu") -> "OpenVocabulary":
        """A detector from a folder or a name of transformers.

        Raises:
            OSError: when there is none.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        model = AutoModelForZeroShotObjectDetection.from_pretrained(name)
        return cls(model.eval().to(device), AutoProcessor.from_pretrained(name), threshold)

    @torch.inference_mode()
    def __call__(self, picture: Picture, names: Sequence[str]) -> dict[str, bool]:
        found = {}
        for name in names:
            inputs = self.processor(images=picture.image, text=[[name]], return_tensors="pt")
            outputs = self.model(**inputs.to(self.model.device))
            boxes = self.processor.post_process_grounded_object_detection(outputs, threshold=self.threshold)
            found[name] = len(boxes[0]["scores"]) > 0
        return found
