"""The table of methods never shows a score without what it is bought with."""

import pytest

from visionsel.multimodal.evaluation import Hallucination, chair, pope, table

CHAIR = chair.score(["a dog and a cat", "a bus"], [{"dog"}, {"bus"}])
POPE = pope.score(["yes", "yes", "no", "yes"], ["yes", "no"] * 2)


def test_the_table_has_all_columns_for_all_methods() -> None:
    text = table({"none": Hallucination.of(CHAIR, POPE), "VHR(alpha=2)": Hallucination.of(chair=CHAIR)})
    head, first, second = text.splitlines()
    assert head.split() == ["method", "CHAIR_I", "CHAIR_S", "recall", "words", "accuracy", "F1", "yes"]
    assert first.split() == ["none", "0.333", "0.500", "1.000", "3.5", "0.250", "0.400", "0.750"]
    assert second.split() == ["VHR(alpha=2)", "0.333", "0.500", "1.000", "3.5", "-", "-", "-"]
    assert len(head) == len(first) == len(second)


def test_plain_numbers_for_files() -> None:
    assert Hallucination.of(pope=POPE).to_dict() == {
        "chair_i": None,
        "chair_s": None,
        "object_recall": None,
        "length": None,
        "accuracy": 0.25,
        "f1": pytest.approx(0.4),
        "yes_ratio": 0.75,
    }


def test_scores_without_recall_length_or_the_share_of_yes_are_refused() -> None:
    with pytest.raises(ValueError, match="chair has no recall, length; give all"):
        Hallucination.of(chair={"chair_i": 0.1, "chair_s": 0.2})
    with pytest.raises(ValueError, match="pope has no yes_ratio"):
        Hallucination.of(pope={"accuracy": 1, "f1": 1})
    with pytest.raises(ValueError, match="give the scores"):
        Hallucination.of()
    with pytest.raises(ValueError, match="no method"):
        table({})
