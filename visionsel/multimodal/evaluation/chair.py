"""CHAIR: which objects captions invent (Rohrbach et al. 2018, Object Hallucination in Image Captioning).

    chair.score(captions, objects)     # chair_i, chair_s; recall and length, without which these say little

The parser is that of the released code. Tokens are brought to their dictionary form (see `nouns` for the
three ways), pairs of words are joined ("hot dog"; "baby bear" is a bear), "seat" is left out of captions that
have a "toilet", and words of the table are named after their object. Mentions count each time. What differs:
marks always part words ("boat.There", where NLTK sees one word), and the words that the stray spaces and the
capital of the released table hide from its code ("motor bike", "cheesecake", "iPhone") are heard.

Both scores fall when a model says less: they are worth something beside `recall` and `length` only.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from visionsel.multimodal.evaluation.nouns import PARSERS, count_words, lemma, split_tokens
from visionsel.multimodal.evaluation.synonyms import Synonyms, coco_synonyms

__all__ = ["PARSERS", "ground_truth", "mentions", "score"]


def mentions(caption: str, synonyms: Synonyms | None = None, parser: str = "nouns") -> list[str]:
    """The objects that a caption mentions, in order; an object that is mentioned again stands again.

    Args:
        caption: any text.
        synonyms: the table (default: that of the 80 COCO classes).
        parser: `nouns`, `pattern` or `wordnet`, see `visionsel.multimodal.evaluation.nouns`.

    Raises:
        TypeError: for a caption that is no string.
        ValueError: for another parser.

    Examples:
        >>> from visionsel.multimodal.evaluation import chair
        >>> chair.mentions("A puppy sits on a bench beside two bikes.")
        ['dog', 'bench', 'bicycle']
    """
    if not isinstance(caption, str):
        raise TypeError(f"a caption must be a string, got {type(caption).__name__}")
    if parser not in PARSERS:
        raise ValueError(f"unknown parser {parser!r}; choose one of {', '.join(PARSERS)}")
    table = synonyms or coco_synonyms()
    tokens = [lemma(token, table.words, parser) for token in split_tokens(caption)]
    words = []
    position = 0
    while position < len(tokens):
        pair = table.pairs.get(" ".join(tokens[position : position + 2]))
        words.append(tokens[position] if pair is None else pair)
        position += 1 if pair is None else 2
    if "toilet" in words:  # its seat is not a chair
        words = [word for word in words if word != "seat"]
    return [table.names[word] for word in words if word in table.names]


def score(
    captions: Sequence[str],
    objects: Sequence[Collection[str]],
    synonyms: Synonyms | None = None,
    parser: str = "nouns",
) -> dict[str, Any]:
    """Scores of captions against the objects of their images.

    Args:
        captions: one an image.
        objects: for each image the objects that it has, see `ground_truth`; synonyms are allowed.
        synonyms: the table (default: that of the 80 COCO classes).
        parser: see `mentions`.

    Returns:
        `chair_i`, invented mentions / mentions; `chair_s`, captions with an invented mention / captions
        (Rohrbach et al. 2018, section 2.2); `recall`, objects mentioned / objects, and `precision`, of
        the different objects of each caption, summed over the images, with their `f1`; `length`, words a
        caption, without punctuation; the counts `captions`, `mentions`, and `invented`, how often each object
        was mentioned where it is not; and the `parser`. A share of nothing is 0.

    Raises:
        ValueError: for no captions, another number of images than captions, or an object that is not in
            the table.

    Examples:
        >>> from visionsel.multimodal.evaluation import chair
        >>> scores = chair.score(["a dog sits on a bench beside a bicycle."], [{"dog", "bench"}])
        >>> scores["chair_i"], scores["chair_s"], scores["recall"], scores["invented"]
        (0.3333333333333333, 1.0, 1.0, {'bicycle': 1})
    """
    if isinstance(captions, str):
        raise ValueError("captions must be a list of strings, got one string")
    if len(captions) != len(objects) or not captions:
        raise ValueError(
            f"each caption needs the objects of its image, and there must be one; got {len(captions)} "
            f"captions and objects of {len(objects)} images"
        )
    table = synonyms or coco_synonyms()
    said = right = named = there = bad = words = 0
    invented: Counter[str] = Counter()
    for number, (caption, present) in enumerate(zip(captions, objects, strict=True)):
        truth = _name_objects(present, table, f"objects[{number}]")
        found = mentions(caption, table, parser)
        wrong = [name for name in found if name not in truth]
        invented.update(wrong)
        said += len(found)
        bad += bool(wrong)
        named += len(set(found))
        right += len(truth & set(found))
        there += len(truth)
        words += count_words(caption)
    return {
        "chair_i": invented.total() / max(1, said),
        "chair_s": bad / len(captions),
        "recall": right / max(1, there),
        "precision": right / max(1, named),
        "f1": 2 * right / max(1, named + there),
        "length": words / len(captions),
        "captions": len(captions),
        "mentions": said,
        "invented": dict(sorted(invented.items(), key=lambda item: (-item[1], item[0]))),
        "parser": parser,
    }


def ground_truth(
    instances: Mapping[str, Any] | None = None,
    captions: Mapping[str, Any] | None = None,
    synonyms: Synonyms | None = None,
    parser: str = "nouns",
) -> dict[int, set[str]]:
    """The objects of each image as CHAIR defines them: those annotated, and those that people mention.

    Args:
        instances: the content of a file of COCO's instances; of several files one after the other, merge the
            results.
        captions: the content of a file of COCO's captions, read with the same parser as the model's.
        synonyms: the table (default: that of the 80 COCO classes).
        parser: see `mentions`.

    Returns:
        for each image id the names of its objects; images with neither have an empty set.

    Raises:
        ValueError: for content that is not COCO's, or a category that is not in the table.
    """
    if instances is None and captions is None:
        raise ValueError("give COCO's instances, its captions, or (as CHAIR does) both")
    table = synonyms or coco_synonyms()
    found: dict[int, set[str]] = {}
    for name, content, keys in (
        ("instances", instances, ("annotations", "categories")),
        ("captions", captions, ("annotations",)),
    ):
        if content is None:
            continue
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"{name} has no {missing[0]!r}; a file of COCO's {name} has {', '.join(keys)}")
        for image in content.get("images", ()):
            found.setdefault(image["id"], set())
        try:
            categories = {
                category["id"]: _name_objects([category["name"]], table, "categories")
                for category in content.get("categories", ())
            }
            for row in content["annotations"]:
                new = categories[row["category_id"]] if name == "instances" else None
                names = mentions(row["caption"], table, parser) if new is None else new
                found.setdefault(row["image_id"], set()).update(names)
        except (KeyError, TypeError) as error:
            raise ValueError(f"an annotation of {name} is not COCO's: {error} is missing or wrong") from error
    return found


def _name_objects(objects: Collection[str], table: Synonyms, where: str) -> set[str]:
    """The objects under the names of the table."""
    if isinstance(objects, str):
        raise ValueError(f"{where} must be a set of names, got the string {objects!r}")
    if unknown := sorted(repr(name) for name in objects if name not in table.names):
        raise ValueError(
            f"{where} has {', '.join(unknown)}, which is not in the table of synonyms; it knows "
            f"{len(table.objects)} objects: {', '.join(sorted(table.objects)[:8])}, ..."
        )
    return {table.names[name] for name in objects}
