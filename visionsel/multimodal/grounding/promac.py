"""ProMaC's cycle: look, fade what was not looked at, and look again.

Hu et al. 2024, "Leveraging Hallucinations to Reduce Manual Prompt Dependency in Promptable Segmentation",
NeurIPS 2024, arXiv:2408.15205. After each round the model sees 0.3 of the image under the soft mask of this
round and 0.7 of what it saw before, so that the rest grows dark. The result is that of the rounds which comes
nearest to the mean of them all. The image is segmented as it is in every round. Of the paper's other parts
(questions about halves, an image painted over by diffusion, a CLIP for the points) none is here: the points
are those of attention.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from visionsel.multimodal.grounding.results import Word

__all__ = ["fade", "nearest_to_mean", "promac"]

ROUNDS = 4  # the first and three more, as released
SHARE = 0.3


def promac(
    refer: Callable[[Image.Image, str, Image.Image], Word],
    image: Image.Image,
    text: str,
    rounds: int = ROUNDS,
    share: float = SHARE,
) -> Word:
    """The best of several looks at what an expression means.

    Args:
        refer: gets the image that the model sees, the expression, and the image to segment.
        image: in RGB.
        text: the expression.
        rounds: in all.
        share: of the masked image in what is seen next.

    Returns:
        the word of one of the rounds. Where nothing stands out in a round, the cycle ends before it, unless
        it is the first.
    """
    seen = np.asarray(image, dtype=np.float64)
    original = seen
    words: list[Word] = []
    masks: list[np.ndarray] = []
    for _ in range(rounds):
        word = refer(Image.fromarray(seen.round().astype(np.uint8)), text, image)
        if word.proposal is None:
            if not words:
                return word
            break
        soft = 1 / (1 + np.exp(-word.proposal.logits().astype(np.float64).clip(-50, 50)))
        words.append(word)
        masks.append(soft)
        seen = fade(original, seen, soft, share)
    return words[nearest_to_mean(masks)]


def fade(original: np.ndarray, seen: np.ndarray, soft: np.ndarray, share: float = SHARE) -> np.ndarray:
    """What the model sees next: `share * original * soft + (1 - share) * seen`.

    Args:
        original: `[H, W, 3]`.
        seen: `[H, W, 3]`, in the round that ends.
        soft: `[H, W]`, its mask, 0 to 1.
        share: of the masked original.
    """
    return share * original * soft[..., None] + (1 - share) * seen


def nearest_to_mean(masks: list[np.ndarray]) -> int:
    """Which of some soft masks has the least mean absolute difference to their mean; the first of equals."""
    mean = np.mean(masks, axis=0)
    return int(np.argmin([np.abs(mask - mean).mean() for mask in masks]))
