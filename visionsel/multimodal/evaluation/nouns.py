"""Which words of a caption are nouns of a table: the tokens, and three ways to undo inflection.

CHAIR's scores depend on how a word is brought to the form that the table of synonyms has. Three ways are in
use, and their scores differ a little, so that a score should say which it is:

- `nouns`, our default: plurals, regular or not, and nothing else; what the other two are meant to do. On real
  captions the mentions that it hears and one of them does not, or the reverse, are below 2 %.
- `pattern`: the release of 2018, which makes every token singular with the rules of the library `pattern`.
  These take the last `s` from anything ("bus" becomes "bu", so a bus counts only in the plural) and bend some
  plurals wrongly ("ties", "canoes", "thieves"), so that these are missed.
- `wordnet`: the port that papers on vision-language models use, which looks up WordNet's lemmas by part of
  speech. A verb becomes its stem: "skiing" counts as skis and "seated" as a chair. A tagger decides in the
  port what is a verb; here a form in -ing or -ed that can come from a verb of the table is one (`VERBS`), but
  for "seating", and irregular past forms ("bore", "sunk") are not. Plurals of words that WordNet lacks are
  missed as in the port (`UNKNOWN`).
"""

import re
from collections.abc import Iterator, Set

__all__ = ["PARSERS", "count_words", "lemma", "split_tokens"]

PARSERS = ("nouns", "pattern", "wordnet")

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]|_")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
# endings of compounds too: policemen, grandchildren
_IRREGULAR = {
    "men": "man",
    "children": "child",
    "people": "person",
    "geese": "goose",
    "mice": "mouse",
    "oxen": "ox",
}
_PLURALS = (
    ("s", ""),
    *((f"{ending}es", ending) for ending in ("s", "x", "z", "ch", "sh", "o")),  # skies are no skis
    ("ies", "y"),
    ("ves", "f"),
    ("ves", "fe"),
)
# what `pattern` does with the end of a token, the first that fits
_PATTERN = (
    *((ending, ending) for ending in ("scissors", "bison", "luggage", "doggies", "collies")),
    *_IRREGULAR.items(),
    ("oes", "o"),
    *((f"{ending}es", ending) for ending in ("bus", "x", "ch", "ss", "sh")),
    *((f"{ending}ies", f"{ending}ie") for ending in "aeiouy"),
    ("quies", "quy"),
    ("ies", "y"),
    *((f"{ending}lves", f"{ending}lf") for ending in "aeo"),
    *((f"{ending}ves", f"{ending}fe") for ending in ("ni", "li", "wi")),
    *((f"{ending}ves", f"{ending}ve") for ending in "aeo"),
    ("s", ""),
)
# words of COCO's table that WordNet has as verbs too
VERBS = frozenset(
    "automobile baby backpack ball barge bear bed bench bicycle bike bird boat book bottle bow bowl "
    "buffalo bull bulldog bus cab cake canoe cat chair clock cop couch cow crow cup doctor dog duck "
    "falcon father ferry foal fork fowl goose groom gull guy horse hound jet kayak kid kite kitten knife "
    "lamb man microwave monitor mother motorbike motorboat motorcycle mouse officer parrot phone plane "
    "pup purse quail racket ram raven sandwich seat ship sink skateboard ski snowboard soldier spoon "
    "stool sub surfboard swan table taxi telephone tie train truck unicycle yacht".split()
)
# and words whose plural has another lemma or none: WordNet 3.0 has "vas" for "vases", and lacks the others
UNKNOWN = frozenset(
    "biker bluejay brindle coworker firetruck hairdryer iphone lenovo longboard macbook netbook paddleboat "
    "pitbull riverboat sailboard shortboard skimboard smartphone solider stovetop teddybear televison "
    "vase".split()
)


def split_tokens(caption: str) -> list[str]:
    """Words and marks in lower case; a word with hyphens is one, a genitive ('s) stands apart."""
    return _TOKEN.findall(caption.lower())


def count_words(caption: str) -> int:
    """The length of a caption: its words without punctuation; "man's" and "hot-dog" are one each."""
    return len(_WORD.findall(caption))


def lemma(token: str, known: Set[str], parser: str) -> str:
    """The form of a token under which a table knows it; the token itself if there is none.

    Args:
        token: in lower case.
        known: the single words of the table.
        parser: one of `PARSERS`.
    """
    if parser == "pattern":
        return _pattern_singular(token)
    if token in known:
        return token
    forms = _noun_forms(token)
    if parser == "wordnet":
        forms = [form for form in forms if form not in UNKNOWN]
        forms += [stem for stem in _verb_stems(token) if stem in VERBS]
    return next((form for form in forms if form in known), token)


def _noun_forms(token: str) -> list[str]:
    """What the token can be a plural of."""
    endings = (*_IRREGULAR.items(), *_PLURALS)
    return [token.removesuffix(end) + to for end, to in endings if token.endswith(end)]


def _verb_stems(token: str) -> Iterator[str]:
    """What the token can be a participle of: seated, taxiing, tied, tying, manned."""
    if token == "seating":  # the furniture, as a rule
        return
    if token == "tying":
        yield "tie"
    for end in ("ed", "ing"):
        stem = token.removesuffix(end)
        if stem != token and len(stem) > 1:
            yield stem
            yield f"{stem}e"
            if stem[-1] == stem[-2]:
                yield stem[:-1]
            if end == "ed" and stem.endswith("i"):
                yield f"{stem[:-1]}y"


def _pattern_singular(token: str) -> str:
    for end, to in _PATTERN:
        if token.endswith(end):
            return token.removesuffix(end) + to
    return token
