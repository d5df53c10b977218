"""POPE: does a model say yes to objects that are not there (Li et al. 2023, section 5)?

The rules are those of the released code (github.com/AoiDragon/POPE, MIT). Accuracy and F1 are worth something
beside `yes_ratio` only: half of the questions have the answer yes, and a method that makes a model say yes
more often gains recall without seeing more.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["KINDS", "PER_IMAGE", "parse", "questions", "score"]

KINDS = ("random", "popular", "adversarial")
PER_IMAGE = 3  # objects that are there, and as many that are not


def parse(answer: str) -> str:
    """ "no" if the first sentence has the word "No", "no" or "not", else "yes".

    This is the released rule to the letter: an empty answer is a yes, and so are "NO" and "isn't". Words are
    parted by blanks, after commas are taken out; the first sentence ends at the first full stop.

    Raises:
        TypeError: for an answer that is no string.
    """
    if not isinstance(answer, str):
        raise TypeError(f"an answer must be a string, got {type(answer).__name__}")
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(answers: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of answers; "yes" is the positive class.

    Args:
        answers: what the model said, see `parse`.
        labels: "yes" or "no", one a question.

    Returns:
        `accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (answers that are yes / answers), and the counts
        `questions`, `true_positive`, `false_positive`, `true_negative`, `false_negative`. A share of nothing
        is 0.

    Raises:
        ValueError: for no answers, another number of labels than answers, or another label.

    Examples:
        >>> from visionsel.multimodal.evaluation import pope
        >>> scores = pope.score(["Yes, there is.", "No.", "Yes.", "No."], ["yes", "no", "no", "yes"])
        >>> scores["accuracy"], scores["f1"], scores["yes_ratio"]
        (0.5, 0.5, 0.5)
    """
    if isinstance(answers, str) or isinstance(labels, str):
        raise ValueError("answers and labels must be lists of strings, got one string")
    if len(answers) != len(labels) or not answers:
        raise ValueError(
            f"each answer needs a label, and there must be one; got {len(answers)} answers and "
            f"{len(labels)} labels"
        )
    if wrong := [label for label in labels if label not in ("yes", "no")]:
        raise ValueError(f"a label must be 'yes' or 'no', got {wrong[0]!r}")
    count = Counter((parse(answer), label) for answer, label in zip(answers, labels, strict=True))
    hits, false = count["yes", "yes"], count["yes", "no"]
    missed, rejected = count["no", "yes"], count["no", "no"]
    return {
        "accuracy": (hits + rejected) / len(answers),
        "precision": hits / max(1, hits + false),
        "recall": hits / max(1, hits + missed),
        "f1": 2 * hits / max(1, 2 * hits + false + missed),
        "yes_ratio": (hits + false) / len(answers),
        "questions": len(answers),
        "true_positive": hits,
        "false_positive": false,
        "true_negative": rejected,
        "false_negative": missed,
    }


def questions(
    objects: Mapping[str, Sequence[str]], kind: str = "random", seed: int = 0
) -> list[dict[str, str]]:
    """Questions of POPE: is there a ... in the image?

    Images with fewer than three objects are left out, also of the counts. The first three objects of an image
    are asked for, each followed by one that is absent and was not asked for in this image: any (`random`),
    the one that most images have (`popular`), or the one that most images have together with the object
    before it (`adversarial`). Ties go to the object that comes first in `objects`; where no absent object
    comes together with the one before it, any is taken.

    Args:
        objects: the names of the objects of each image, in an order that matters; repetitions do not count.
        kind: one of `KINDS`.
        seed: of the random choices.

    Returns:
        rows of `image`, `object`, `label` ("yes", "no") and `text`, in the order of the images.

    Raises:
        ValueError: for another kind, names that are one string, or an image that has so many of all objects
            that fewer than three are absent.

    Examples:
        >>> from visionsel.multimodal.evaluation import pope
        >>> objects = {"a.jpg": ["dog", "bench", "tree"], "b.jpg": ["cat", "sofa", "lamp"]}
        >>> rows = pope.questions(objects, kind="popular")
        >>> rows[0]["text"], rows[0]["label"]
        ('Is there a dog in the image?', 'yes')
        >>> len(rows), rows[1]["label"]
        (12, 'no')
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    if strings := [image for image, names in objects.items() if isinstance(names, str)]:
        raise ValueError(f"the objects of {strings[0]!r} must be a list of names, got one string")
    images = {image: list(dict.fromkeys(names)) for image, names in objects.items()}
    images = {image: names for image, names in images.items() if len(names) >= PER_IMAGE}
    often = Counter(name for names in images.values() for name in names)
    together: dict[str, Counter[str]] = {name: Counter() for name in often}
    for names in images.values():
        for name in names:
            together[name].update(other for other in names if other != name)
    dice = random.Random(seed)
    rows = []
    for image, present in images.items():
        absent = [name for name in often if name not in present]
        if len(absent) < PER_IMAGE:
            raise ValueError(
                f"image {image!r} has all objects but {len(absent)}, and {PER_IMAGE} must be absent; "
                "leave the image out, or name more objects in others"
            )
        for name in present[:PER_IMAGE]:
            if kind == "random":
                negative = dice.choice(absent)
            else:
                counts = often if kind == "popular" else together[name]
                ranked = [other for other, _ in counts.most_common() if other in absent]
                negative = ranked[0] if ranked else dice.choice(absent)
            absent.remove(negative)
            rows += [_question(image, name, "yes"), _question(image, negative, "no")]
    return rows


def _question(image: str, name: str, label: str) -> dict[str, str]:
    """As in the released files; the released generator writes "imange" after "an", which they do not have."""
    article = "an" if name[:1] in ("a", "e", "i", "o", "u") else "a"
    return {
        "image": image,
        "object": name,
        "label": label,
        "text": f"Is there {article} {name} in the image?",
    }
