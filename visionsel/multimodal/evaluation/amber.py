"""AMBER: what captions invent and cover, and whether questions are answered rightly (Wang et al. 2023).

    data = amber.read("AMBER/data")
    amber.generative(captions, data)         # chair, cover, hal, cog; length
    amber.discriminative(answers, data)      # on the class "No"; for each dimension too

Source: arXiv 2311.07397 and the released scorer (github.com/junyangwang0410/AMBER, Apache-2.0), whose files
are read as they are: `annotations.json`, `relation.json`, `safe_words.txt`, `metrics.txt`, `query/*.json`.

The released scorer finds nouns with NLTK's tagger and takes words for synonyms whose spaCy vectors
(en_core_web_lg) have a cosine above 0.8; its numbers change with the versions of both. Here both are
functions to pass. The defaults need no model and are stricter, so that CHAIR comes out higher and Cover lower
than the released ones: compare numbers of one scorer only.

- nouns: every word of the data's vocabulary, in singular or plural (`nouns` of `chair`'s parsers), in lower
  case. A word that is a verb or an adjective in its sentence counts, and so does one with a capital, which
  the release does not find.
- synonyms: those of `relation.json`, and no other.

Scores are shares from 0 to 1, where the release prints percentages.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from visionsel.multimodal.evaluation.files import parse_json, read_rows, read_text
from visionsel.multimodal.evaluation.nouns import count_words, lemma, split_tokens

__all__ = [
    "DIMENSIONS",
    "PARTS",
    "Amber",
    "discriminative",
    "generative",
    "known_nouns",
    "parse",
    "read",
    "read_queries",
    "read_responses",
    "score",
]

DIMENSIONS = {
    "existence": ("discriminative-hallucination",),
    "attribute": (
        "discriminative-attribute-state",
        "discriminative-attribute-number",
        "discriminative-attribute-action",
    ),
    "relation": ("discriminative-relation", "relation"),
    "state": ("discriminative-attribute-state",),
    "number": ("discriminative-attribute-number",),
    "action": ("discriminative-attribute-action",),
}
"""Types of questions of each dimension; the last three are parts of `attribute`."""

_TYPES = frozenset(kind for kinds in DIMENSIONS.values() for kind in kinds)
PARTS: dict[str, frozenset[str]] = {
    "all": _TYPES | {"generative"},
    "generative": frozenset({"generative"}),
    "discriminative": _TYPES,
    **{name: frozenset(DIMENSIONS[name]) for name in ("existence", "attribute", "relation")},
}
"""Types of the entries of each part that the release evaluates."""

# metrics.txt: what the counts of a dimension are called there
_COUNTS = {"": "qa", "existence": "ha_qa", "relation": "asso_qa", "state": "as_qa", "number": "an_qa"} | {
    "action": "aa_qa"
}


@dataclass(frozen=True)
class Amber:
    """The files of AMBER.

    Attributes:
        annotations: by id; `type`, `truth` (objects, or "yes" and "no") and, of captions, `hallu`, the
            objects that people would expect though they are absent.
        relation: words that may stand for each object.
        safe_words: words that are never invented.
        start: of `metrics.txt`, where the counts start (the release divides by 0.001 more); None: at 0.
    """

    annotations: Mapping[int, Mapping[str, Any]]
    relation: Mapping[str, Sequence[str]]
    safe_words: frozenset[str] = frozenset()
    start: Mapping[str, float] | None = None

    @cached_property
    def words(self) -> frozenset[str]:
        """Every word that counts as an object."""
        return frozenset(self.relation) | {word for words in self.relation.values() for word in words}

    def share(self, count: float, total: float, names: str, *bases: str) -> float:
        """`count / total` from where the counts start; a share of nothing is 0.

        Args:
            count, total: what was counted.
            names: as `metrics.txt` calls them: `"chair_score chair_num"`.
            bases: what goes before these, for each of the counts that are summed here.
        """
        start, (first, second) = self.start or {}, names.split()
        count += sum(start.get(base + first, 0) for base in bases or ("",))
        total += sum(start.get(base + second, 0) for base in bases or ("",))
        return count / total if total else 0.0


def read(folder: str | Path) -> Amber:
    """Read a folder with AMBER's files (`data` of the repository); `metrics.txt` may be missing.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for a file that is not AMBER's, with what is wrong.
    """
    folder = Path(folder)
    path = folder / "annotations.json"
    rows = read_rows(path, {"id": (int,), "type": (str,), "truth": (list, str)})
    for row in rows:
        if row["type"] not in PARTS["all"]:
            raise ValueError(f"{path}: entry {row['id']} has the unknown type {row['type']!r}")
        if row["type"] == "generative":
            right = isinstance(row["truth"], list) and isinstance(row.get("hallu"), list)
        else:
            right = row["truth"] in ("yes", "no")
        if not right:
            raise ValueError(
                f"{path}: entry {row['id']} needs lists in 'truth' and 'hallu' if it is generative, and "
                f"'yes' or 'no' in 'truth' otherwise; it has {str(row)[:80]}"
            )
    annotations = {row["id"]: row for row in rows}
    if len(annotations) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(annotations)} entries have the id of another")
    relation = parse_json(read_text(folder / "relation.json"), str(folder / "relation.json"))
    if not isinstance(relation, dict) or not all(isinstance(words, list) for words in relation.values()):
        raise ValueError(f"{folder / 'relation.json'} is no table of words: {{word: [word, ...], ...}}")
    safe = frozenset(filter(None, map(str.strip, read_text(folder / "safe_words.txt").splitlines())))
    metrics = folder / "metrics.txt"
    return Amber(annotations, relation, safe, _read_start(metrics) if metrics.is_file() else None)


def _read_start(path: Path) -> dict[str, float]:
    start = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, _, value = line.partition("=")
        if line.strip():
            try:
                start[name.strip()] = float(value)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not 'name=number': {line!r}") from error
    return start


def read_queries(path: str | Path) -> list[dict[str, Any]]:
    """Rows with `id`, `image` and `query`, as in `query/query_all.json`.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for a row without these.
    """
    return read_rows(path, {"id": (int,), "image": (str,), "query": (str,)})


def read_responses(path: str | Path) -> dict[int, str]:
    """What a model said to each id: a JSON list, or JSON lines, of `id` and `response`.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for a row without these, or two responses to one id.
    """
    rows = read_rows(path, {"id": (int,), "response": (str,)})
    found = {row["id"]: row["response"] for row in rows}
    if len(found) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(found)} responses have the id of another")
    return found


def parse(answer: str) -> str:
    """ "Yes" or "No" where that is the first word in whatever case, else the answer as it is.

    The release takes answers that are exactly "Yes" or "No"; this is how to get there from a sentence.
    """
    first = answer.replace(",", " ").replace(".", " ").split()[:1]
    word = first[0].capitalize() if first else ""
    return word if word in ("Yes", "No") else answer


def score(
    responses: Mapping[int, str], data: Amber, part: str = "all", first_word: bool = False
) -> dict[str, Any]:
    """Scores of captions and answers together.

    Args:
        responses: by id.
        data: of `read`.
        part: one of `PARTS`; other responses are left out.
        first_word: whether answers go through `parse`.

    Returns:
        `generative` and `discriminative`, what the functions of these names return, where there is something
        to score.

    Raises:
        ValueError: for an unknown part, an id that is not annotated, or nothing to score.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of AMBER; choose of {', '.join(PARTS)}")
    chosen = _of_type(responses, data, PARTS[part])
    kinds = {i: data.annotations[i]["type"] for i in chosen}
    captions = {i: text for i, text in chosen.items() if kinds[i] == "generative"}
    answers = {i: text for i, text in chosen.items() if kinds[i] != "generative"}
    if first_word:
        answers = {i: parse(text) for i, text in answers.items()}
    scores = {}
    if captions:
        scores["generative"] = generative(captions, data)
    if answers:
        scores["discriminative"] = discriminative(answers, data)
    return scores


def known_nouns(text: str, words: Collection[str]) -> list[str]:
    """The words of a text that are in the vocabulary, in the form that it has, in order, with repetitions."""
    known = frozenset(words)
    forms = (lemma(token, known, "nouns") for token in split_tokens(text))
    return [form for form in forms if form in known]


def generative(
    captions: Mapping[int, str],
    data: Amber,
    nouns: Callable[[str], Sequence[str]] | None = None,
    similar: Callable[[str, str], bool] | None = None,
) -> dict[str, Any]:
    """Scores of captions.

    A noun that stands for several objects counts for the first of them, in the order of the release: the
    words that may stand for the objects before the objects themselves.

    Args:
        captions: by id; ids of questions are left out.
        data: of `read`.
        nouns: the nouns of a caption, in the form of the dictionary; those outside of the vocabulary are
            left out (default: see the module).
        similar: whether two words mean the same (default: none do but those of `relation.json`).

    Returns:
        `chair`, invented nouns / nouns (safe words and repetitions are nouns); `cover`, objects mentioned /
        objects; `hal`, captions with an invented noun / captions; `cog`, expected but absent objects
        mentioned / such objects; `length`, words a caption; the counts `captions` and `nouns`; `invented`,
        how often each noun was.

    Raises:
        ValueError: for an id that is not annotated, or no captions.
    """
    said = _of_type(captions, data, PARTS["generative"])
    extract = nouns or (lambda text: known_nouns(text, data.words))
    covered = objects = expected = targets = count = bad = words = 0
    invented: Counter[str] = Counter()
    for number, caption in said.items():
        row = data.annotations[number]
        found = [noun for noun in extract(caption) if noun in data.words]
        wrong, there, absent = _judge(found, row["truth"], row["hallu"], data, similar)
        invented.update(wrong)
        bad += bool(wrong)
        covered += len(there)
        objects += len(row["truth"])
        expected += len(absent)
        targets += len(row["hallu"])
        count += len(found)
        words += count_words(caption)
    return {
        "chair": data.share(invented.total(), count, "chair_score chair_num"),
        "cover": data.share(covered, objects, "safe_cover_score safe_cover_num"),
        "hal": 1 - data.share(len(said) - bad, len(said), "non_hallu_score non_hallu_num"),
        "cog": data.share(expected, targets, "hallu_cover_score hallu_cover_num"),
        "length": words / len(said),
        "captions": len(said),
        "nouns": count,
        "invented": dict(sorted(invented.items(), key=lambda item: (-item[1], item[0]))),
    }


def _judge(
    nouns: Sequence[str],
    truth: Sequence[str],
    expected: Sequence[str],
    data: Amber,
    similar: Callable[[str, str], bool] | None,
) -> tuple[list[str], set[int], set[int]]:
    """The invented nouns, and the positions of the objects and of the expected ones that are mentioned."""
    wrong: list[str] = []
    there: set[int] = set()
    absent: set[int] = set()
    of_truth, of_expected = (_stand_ins(names, data.relation) for names in (truth, expected))
    for noun in nouns:
        if noun in data.safe_words:
            continue
        if (exact := _find(of_truth, noun, None)) is not None:
            there.add(exact)
            continue
        absent |= {_find(of_expected, noun, rule) for rule in (None, similar)} - {None}  # type: ignore[arg-type]
        alike = None if similar is None else _find(of_truth, noun, similar)
        if alike is None:
            wrong.append(noun)
        else:
            there.add(alike)
    return wrong, there, absent


def _stand_ins(names: Sequence[str], relation: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """The words that may stand for objects, each with the position of its object."""
    others = [(word, i) for i, name in enumerate(names) for word in relation.get(name, ())]
    return others + [(name, i) for i, name in enumerate(names)]


def _find(
    words: Sequence[tuple[str, int]], noun: str, similar: Callable[[str, str], bool] | None
) -> int | None:
    """The object of the first word that the noun equals, or is similar to."""
    same = similar or str.__eq__
    return next((i for word, i in words if same(noun, word)), None)


def discriminative(answers: Mapping[int, str], data: Amber) -> dict[str, Any]:
    """Scores of answers to questions; "No" is the positive class.

    An answer is right if it is exactly "Yes" or "No"; see `parse` for others. The release rounds precision
    and recall before it makes F1 of them and adds a little to the denominator, a tenth of a percent at most.

    Args:
        answers: by id; ids of captions are left out.
        data: of `read`.

    Returns:
        `accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (answers that are "Yes" / answers) and the counts
        `questions` and `other` (answers that are neither), of all and, in dicts of their own, of each of
        `DIMENSIONS` that has questions. A share of nothing is 0.

    Raises:
        ValueError: for an id that is not annotated, or no answers.
    """
    said = _of_type(answers, data, PARTS["discriminative"])
    parts = {
        name: [(data.annotations[i]["truth"], answer) for i, answer in rows.items()]
        for name, kinds in {"": _TYPES, **DIMENSIONS}.items()
        if (rows := {i: a for i, a in said.items() if data.annotations[i]["type"] in kinds})
    }
    scores = {name: _score_answers(rows, data, name) for name, rows in parts.items()}
    return {**scores.pop(""), **scores}


def _score_answers(rows: Sequence[tuple[str, str]], data: Amber, dimension: str) -> dict[str, Any]:
    count = Counter(rows)
    parts = ("state", "number", "action") if dimension == "attribute" else (dimension,)
    bases = [_COUNTS[part] for part in parts]
    rejected = count["no", "No"]
    absent = sum(number for (truth, _), number in count.items() if truth == "no")
    no, yes = (
        sum(number for (_, said), number in count.items() if said == answer) for answer in ("No", "Yes")
    )
    precision = data.share(rejected, no, "_ans_no_score _ans_no_num", *bases)
    recall = data.share(rejected, absent, "_no_score _no_num", *bases)
    return {
        "accuracy": data.share(
            rejected + count["yes", "Yes"], len(rows), "_correct_score _correct_num", *bases
        ),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": yes / len(rows),
        "questions": len(rows),
        "other": len(rows) - yes - no,
    }


def _of_type(said: Mapping[int, str], data: Amber, kinds: Collection[str]) -> dict[int, str]:
    """What was said to the entries of these types."""
    if unknown := [i for i in said if i not in data.annotations]:
        raise ValueError(f"{len(unknown)} ids are not annotated, such as {unknown[0]}")
    if wrong := [i for i, text in said.items() if not isinstance(text, str)]:
        raise ValueError(f"what is said to id {wrong[0]} must be a string, got {said[wrong[0]]!r}")
    found = {i: text for i, text in said.items() if data.annotations[i]["type"] in kinds}
    if not found:
        raise ValueError("there is nothing to score: no id of this kind; captions and questions have others")
    return found
