"""The tables of synonyms."""

import hashlib
from pathlib import Path

import pytest

from visionsel.multimodal.evaluation import chair, coco_synonyms, read_synonyms

# of CHAIR's own file: its pairs of word and object, without stray spaces and capitals
CHAIRS_TABLE = "195a306fa8f233d6b3a00febcc7fb873b3d7121304fcfa84fd1ee7f158ce07ad"


def test_the_table_of_coco_has_the_words_of_chairs_table() -> None:
    names = coco_synonyms().names
    text = "\n".join(f"{word}={name}" for word, name in sorted(names.items()))
    assert len(names) == 403
    assert len(coco_synonyms().objects) == 80
    assert hashlib.sha256(text.encode()).hexdigest() == CHAIRS_TABLE


def test_a_table_is_read_with_the_stray_spaces_capitals_and_repetitions_of_the_released_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text(
        "motorcycle, scooter,  motor bike, scooter\ncell phone, iPhone, phone \n\nbison \n# none\n"
    )
    table = read_synonyms(path)
    assert table.names == {
        "motorcycle": "motorcycle",
        "scooter": "motorcycle",
        "motor bike": "motorcycle",
        "cell phone": "cell phone",
        "iphone": "cell phone",
        "phone": "cell phone",
        "bison": "bison",
    }
    assert chair.mentions("Bison on motor bikes, with iPhones", table) == [
        "bison",
        "motorcycle",
        "cell phone",
    ]
    assert chair.mentions("a baby elephant", read_synonyms(path, pairs={})) == []


def test_words_joined_by_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("lamp\nstreet lamp\n")
    assert chair.mentions("street lamps and a lamp", read_synonyms(path)) == ["street lamp", "lamp"]
    assert chair.mentions("street lamps", read_synonyms(path, pairs={"street lamp": "lamp"})) == ["lamp"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the table of synonyms is empty"),
        ("dog, puppy\ncat, puppy\n", r"'puppy' means 'dog' and, in row 2, 'cat'"),
        ("dog,, puppy\n", "row 1 of the synonyms has an empty word"),
    ],
)
def test_a_table_that_says_nothing_or_two_things_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_synonyms(path)
    with pytest.raises(FileNotFoundError, match="no table of synonyms"):
        read_synonyms(tmp_path / "none.txt")
