"""Tuning picks the lowest CHAIR_I within the limits, and asks no more questions than it must."""

import math
import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visionsel.data.shapes import ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal.evaluation import Hallucination, asking, chair, pope, shapes_synonyms
from visionsel.multimodal.evaluation.tuning import Limits, Trial, Tuning, choose, settings_of, tune
from visionsel.multimodal.modulation import PAI, VHR, GroundingHeads

BASELINE = Hallucination(0.2, 0.5, 0.95, 20.0, 0.9, 0.9, 0.5)


@pytest.fixture(autouse=True)
def _one_thread(_one_seed_and_the_workers_share_of_threads: None) -> None:
    """Threads cost more than a small model has to share."""
    torch.set_num_threads(1)


def captions(chair_i: float, recall: float = 0.95, length: float = 20.0) -> dict[str, float]:
    return {"chair_i": chair_i, "chair_s": 0.5, "recall": recall, "length": length}


def answers(f1: float) -> dict[str, float]:
    return {"accuracy": f1, "f1": f1, "yes_ratio": 0.5}


def test_the_chosen_setting_is_the_lowest_of_those_within_the_limits() -> None:
    luck = random.Random(0)
    found = set()
    for _ in range(300):
        number = luck.randint(1, 12)
        said = [
            captions(
                luck.randint(1, 5) / 20,  # with ties
                luck.choice([0.90, 0.94, 0.95, 1.0]),
                luck.choice([13.9, 14.0, 20.0, 26.0, 26.1]),
            )
            for _ in range(number)
        ]
        told = [luck.choice([0.5, 0.88, 0.89, 0.95]) for _ in range(number)]
        asked: list[int] = []

        def ask(which: int, told: list[float] = told, asked: list[int] = asked) -> Mapping[str, Any]:
            asked.append(which)
            return answers(told[which])

        settings = [{"alpha": which} for which in range(number)]
        trials, chosen = choose(settings, said.__getitem__, ask, BASELINE, Limits())
        allowed = [
            which
            for which in range(number)
            if said[which]["recall"] >= 0.94 and 14 <= said[which]["length"] <= 26 and told[which] >= 0.89
        ]
        expected = min(allowed, key=lambda which: said[which]["chair_i"], default=None)
        assert chosen == expected
        assert [trial.setting for trial in trials] == settings
        for which, trial in enumerate(trials):
            assert trial.scores.chair_i == said[which]["chair_i"]
            assert trial.scores.f1 == (told[which] if which in asked else None)
            if which in allowed:
                assert not trial.broken
            elif which in asked or said[which]["recall"] < 0.94 or not 14 <= said[which]["length"] <= 26:
                assert trial.broken
        assert len(asked) == len(set(asked))
        if chosen is not None:  # nobody is asked who could not win
            assert all(said[which]["chair_i"] <= said[chosen]["chair_i"] for which in asked)
        found.add(chosen is None)
    assert found == {True, False}


def test_without_questions_captions_decide() -> None:
    trials, chosen = choose(
        [{}, {}], [captions(0.2), captions(0.1)].__getitem__, lambda _: None, BASELINE, Limits()
    )
    assert chosen == 1
    assert trials[1].scores.f1 is None


def test_which_limit_is_broken_is_told() -> None:
    limits = Limits(recall=0.02, f1=0.03, length=(0.5, 2.0))

    def broken(**scores: float) -> str:
        return limits.broken(Hallucination(**scores), BASELINE)

    assert broken(object_recall=0.93, f1=0.87, length=40.0) == ""
    assert broken(object_recall=0.92) == "recall 0.920 is below 0.930"
    assert broken(f1=0.86) == "F1 0.860 is below 0.870"
    assert broken(length=41.0) == "41.0 words a caption are not from 10.0 to 40.0"
    assert broken(length=9.0) == "9.0 words a caption are not from 10.0 to 40.0"
    for bad in ({"recall": -0.1}, {"f1": -0.1}, {"length": (1.2, 0.8)}, {"length": (-1.0, 1.0)}):
        with pytest.raises(ValueError, match="recall and f1 must be at least 0"):
            Limits(**bad)  # type: ignore[arg-type]


def test_a_grid_is_each_value_with_each() -> None:
    assert settings_of({"a": (1, 2), "b": "xy"}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    for empty in ({}, {"a": ()}):
        with pytest.raises(ValueError, match="needs values to try"):
            settings_of(empty)


def test_a_method_is_tuned_on_the_small_model_by_the_scores_of_each_setting() -> None:
    model, processor = load_lvlm()
    samples = list(ShapesWorld("anti", 11, 8))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    said: list[str] = []
    tuning = tune(
        model,
        processor,
        GroundingHeads,
        {"strength": (1.0, 2.5)},
        samples,
        fixed={"heads": {0: [0], 3: [2]}},
        synonyms=shapes_synonyms(),
        progress=said.append,
    )
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [text.split()[0] for text in said] == ["without", "1/2", "2/2"]
    table = shapes_synonyms()

    def measured(strength: float) -> Hallucination:
        with GroundingHeads({0: [0], 3: [2]}, strength)(model):
            captioned = asking.describe(model, processor, samples, table)
            return Hallucination.of(captioned, asking.ask(model, processor, samples))

    neutral, strong = tuning.trials
    assert tuning.baseline == measured(1.0)
    assert neutral.scores.chair_i == tuning.baseline.chair_i
    assert strong.scores.chair_i == measured(2.5).chair_i
    assert tuning.chosen is not None
    assert tuning.chosen.scores == measured(tuning.chosen.setting["strength"])
    assert tuning.best() == GroundingHeads({0: [0], 3: [2]}, tuning.chosen.setting["strength"])
    again = tune(
        model,
        processor,
        GroundingHeads,
        {"strength": (1.0, 2.5)},
        samples,
        fixed=tuning.fixed,
        baseline=tuning.baseline,
        synonyms=table,
        batch_size=3,
    )
    assert again == tuning


def test_bad_settings_are_found_before_anything_is_measured() -> None:
    with pytest.raises(ValueError, match="alpha must be a number from 0 up"):
        tune(None, None, PAI, {"alpha": (0.2, -1.0)}, [])


def test_the_table_shows_all_and_marks_the_best() -> None:
    trials = (
        Trial({"alpha": 2.0}, Hallucination.of(captions(0.01, 0.5)), "recall 0.500 is below 0.940"),
        Trial({"alpha": 1.5}, Hallucination.of(captions(0.1), answers(0.9))),
    )
    tuning = Tuning(VHR, {"layers": (1,)}, BASELINE, trials, trials[1])
    head, *lines = tuning.table().splitlines()
    assert head.split()[:3] == ["method", "CHAIR_I", "CHAIR_S"]
    assert [line.split()[0] for line in lines] == ["without", "alpha=2.0", "*"]
    assert lines[1].endswith("recall 0.500 is below 0.940")
    assert tuning.best() == VHR(1.5, (1,))
    none = Tuning(VHR, {}, BASELINE, trials[:1], None)
    with pytest.raises(ValueError, match="none of 1 settings keeps recall"):
        none.best()


def test_captions_and_answers_are_scored_with_what_the_samples_say(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[tuple[list[str], int]] = []

    def generate(model: Any, processor: Any, images: Any, texts: Any, size: int, most: int) -> list[str]:
        prompts.append((list(texts), size))
        return ["a dog and a cat"] * len(texts) if most > 10 else ["yes"] * len(texts)

    monkeypatch.setattr(asking, "generate", generate)
    exist = SimpleNamespace(text="is there a dog?", answer="no", kind="exist")
    color = SimpleNamespace(text="what color is it?", answer="red", kind="color")
    plain = SimpleNamespace(text="is there a cat?", answer="yes")
    samples = [
        SimpleNamespace(image=0, objects=["dog"], questions=[exist, color, plain]),
        SimpleNamespace(image=1, objects=[SimpleNamespace(name="Cat"), SimpleNamespace(name="dog")]),
    ]
    assert asking.describe(None, None, samples, prompt="say", batch_size=3) == chair.score(
        ["a dog and a cat"] * 2, [{"dog"}, {"dog", "cat"}]
    )
    assert asking.ask(None, None, samples) == pope.score(["yes", "yes"], ["no", "yes"])
    assert prompts == [(["say", "say"], 3), (["is there a dog?", "is there a cat?"], 100)]
    assert asking.ask(None, None, samples[1:]) is None
    circle = SimpleNamespace(image=0, objects=[SimpleNamespace(shape="circle")])
    scores = asking.describe(None, None, [circle], shapes_synonyms())
    assert math.isclose(scores["recall"], 0)
