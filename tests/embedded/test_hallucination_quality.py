"""The table of methods against invention, on a few scenes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, ShapesWorld
from visionsel.embedded import hallucination_quality, load_lvlm
from visionsel.embedded.hallucination_quality import (
    COLUMNS,
    MEASURES,
    adapted,
    evaluate_hallucination,
    write_rows,
)
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.multimodal.evaluation import Hallucination
from visionsel.multimodal.evaluation.tuning import settings_of
from visionsel.multimodal.modulation import ACT, PAI, VAR, VHR, GroundingHeads

NO_OPS: dict[str, dict[str, Any]] = {
    "vhr": {"alpha": 1.0},
    "var": {"p": 0.0},
    "act": {"beta": 1.0},
    "pai": {"alpha": 0.0},
    "paint": {"alpha": 0.0, "beta": 0.0},
    "grounding_heads": {"heads": {1: [0]}, "strength": 1.0},
    "vcd": {"alpha": 0.0},
    "icd": {"alpha": 0.0},
    "m3id": {"decay": 0.0},
    "ritual": {"alpha": 0.0},
    "agla": {"alpha": 0.0, "view": dict},
    "pai_guidance": {"gamma": 1.0},
    "glc": {"w": 0.0},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Threads cost more than a small model has to share."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _still_one_thread(_one_seed_and_the_workers_share_of_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return load_lvlm()


@pytest.fixture(scope="module")
def rows(lvlm: tuple[Any, Any]) -> list[dict[str, Any]]:
    strong = {"pai": {"alpha": 2.0}, "vcd": {"alpha": 4.0, "beta": 0.0}}
    return evaluate_hallucination(*lvlm, ["vcd", "pai"], size=4, seeds=(3, 4), settings=strong)


def values(row: dict[str, Any]) -> list[float]:
    return [row[measure] for measure in MEASURES]


def test_every_row_shows_what_scores_can_be_bought_with(rows: list[dict[str, Any]]) -> None:
    assert [(row["method"], row["kind"]) for row in rows] == [
        ("greedy", "baseline"),
        ("sampling", "baseline"),
        ("vcd", "decoding"),
        ("pai", "modulation"),
    ]
    assert all(list(row) == COLUMNS for row in rows)
    for row in rows:
        assert (row["distribution"], row["size"], row["seeds"]) == ("anti", 4, "3 4")
        assert all(row[measure] is not None for measure in MEASURES)
        assert all(0 <= row[measure] <= 1 for measure in MEASURES if measure not in ("length", "mentions"))
        assert row["length"] > row["mentions"] > 0
    assert values(rows[2]) != values(rows[0])
    assert values(rows[3]) != values(rows[0])
    assert rows[1]["setting"] == "temperature=1"
    assert rows[3]["setting"] == "PAI(alpha=2.0, layers=(1, 2, 3))"


def test_measures_are_those_of_the_captions_counted_by_hand(lvlm: tuple[Any, Any]) -> None:
    samples = list(ShapesWorld("anti", 3, 4))
    greedy = evaluate_hallucination(*lvlm, methods=[], size=4, seeds=[3])[0]
    captions = generate_answers(*lvlm, [one.image for one in samples], [CAPTION_PROMPT] * 4)
    said = [[word for word in caption.split() if word in SHAPES] for caption in captions]
    there = [{thing.shape for thing in one.objects} for one in samples]
    wrong = [[word for word in words if word not in truth] for words, truth in zip(said, there, strict=True)]
    total = sum(map(len, said))
    assert greedy["chair_i"] == sum(map(len, wrong)) / total
    assert greedy["chair_s"] == sum(map(bool, wrong)) / 4
    assert greedy["mentions"] == total / 4
    assert greedy["length"] == sum(len(re.findall("[a-z]+", caption)) for caption in captions) / 4
    named = sum(len(truth & set(words)) for words, truth in zip(said, there, strict=True))
    assert greedy["object_recall"] == named / sum(map(len, there))
    asked = [(one.image, q) for one in samples for q in one.questions if q.kind == "exist"]
    answers = generate_answers(*lvlm, [image for image, _ in asked], [q.text for _, q in asked])
    right = [answer.strip() == q.answer for answer, (_, q) in zip(answers, asked, strict=True)]
    assert greedy["accuracy"] == sum(right) / len(asked)
    assert greedy["yes_ratio"] == sum(answer.strip() == "yes" for answer in answers) / len(asked)


def test_a_method_that_changes_nothing_has_the_row_of_the_model_exactly(lvlm: tuple[Any, Any]) -> None:
    found = evaluate_hallucination(*lvlm, list(NO_OPS), size=3, settings=NO_OPS)
    greedy, _, *others = found
    assert [row["method"] for row in others] == list(NO_OPS)
    for row in others:
        assert values(row) == values(greedy), row["method"]
        assert row["setting"]


def test_several_seeds_give_mean_and_range_of_what_each_gives(
    lvlm: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    alone = [evaluate_hallucination(*lvlm, methods=[], size=4, seeds=[seed]) for seed in (3, 4)]
    assert all(row[f"{measure}_low"] is None for one in alone for row in one for measure in MEASURES)
    for number in (0, 1):  # sampling too: its luck belongs to the seed
        for measure in MEASURES:
            first, second = (one[number][measure] for one in alone)
            assert rows[number][measure] == (first + second) / 2
            assert rows[number][f"{measure}_low"] == min(first, second)
            assert rows[number][f"{measure}_high"] == max(first, second)


def test_measuring_is_repeatable_and_leaves_model_and_luck_as_they_were(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    state = {key: value.clone() for key, value in model.state_dict().items()}
    luck = torch.get_rng_state()
    once = evaluate_hallucination(model, processor, ["ritual"], size=3, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), luck)
    torch.rand(1)
    assert evaluate_hallucination(model, processor, ["ritual"], size=3, temperature=2.0) == once
    assert values(once[1]) != values(once[0])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "generate" not in vars(model)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calibration that takes no time and tells what it got."""
    calls: list[Any] = []

    def calibrate(model: Any, processor: Any, samples: Any, **given: Any) -> GroundingHeads:
        calls.append((samples, given))
        report = {"control_heads": {"2": [1]}}
        return replace(GroundingHeads({1: [0]}, 1.3), report=report)

    monkeypatch.setattr(GroundingHeads, "calibrate", calibrate)
    return calls


def test_heads_are_chosen_on_other_scenes_and_have_a_control_beside_them(
    lvlm: tuple[Any, Any], seen: list[Any]
) -> None:
    found = evaluate_hallucination(
        *lvlm,
        ["grounding_heads"],
        size=1,
        seeds=(7, 5),
        calibration=6,
        settings={"grounding_heads": {"most": 2}},
    )
    assert [row["method"] for row in found[2:]] == ["grounding_heads", "grounding_heads control"]
    assert found[2]["setting"] == "GroundingHeads(heads={1: [0]}, strength=1.3)"
    assert found[3]["setting"] == "GroundingHeads(heads={2: [1]}, strength=1.3)"
    ((samples, given),) = seen
    assert given == {"most": 2}
    other = list(ShapesWorld("anti", 8, 6))
    assert [one.pixels.tolist() for one in samples] == [one.pixels.tolist() for one in other]


def test_heads_are_found_on_the_small_model(lvlm: tuple[Any, Any]) -> None:
    found = evaluate_hallucination(
        *lvlm,
        ["grounding_heads"],
        size=1,
        calibration=24,
        settings={"grounding_heads": {"candidates": 4, "most": 1}},
    )
    assert [row["kind"] for row in found] == ["baseline", "baseline", "modulation", "modulation"]


def test_a_method_that_needs_more_is_left_out_unless_it_is_asked_for(
    lvlm: tuple[Any, Any], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hallucination_quality, "adapted", lambda name, *given: {} if name == "agla" else adapted(name, *given)
    )
    said: list[str] = []
    found = evaluate_hallucination(*lvlm, size=1, progress=said.append)
    names = [name for name in hallucination_quality._pick(None) if name != "agla"]
    names.insert(names.index("grounding_heads") + 1, "grounding_heads control")
    assert [row["method"] for row in found] == ["greedy", "sampling", "sampling T=0.25", *names]
    assert any(text.startswith("agla is left out: AGLA needs a view") for text in said)
    with pytest.raises(ValueError, match="AGLA needs a view"):
        evaluate_hallucination(*lvlm, ["agla"], size=1)


def test_agla_sees_what_the_clip_of_the_package_finds_and_its_setting_stays_short(
    lvlm: tuple[Any, Any],
) -> None:
    found = evaluate_hallucination(*lvlm, ["agla"], size=2)
    assert [row["method"] for row in found] == ["greedy", "sampling", "sampling T=0.33", "agla"]
    assert found[3]["setting"] == "AGLA(alpha=2.0, beta=0.5, view=MatchingView, fidelity='paper')"


def test_a_method_is_tuned_on_scenes_of_its_own_and_keeps_what_is_given(
    lvlm: tuple[Any, Any], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {"vhr": {"alpha": (1.0, 9.0), "layers": ((1,), (3,))}, "grounding_heads": {"strength": (1.0,)}}
    monkeypatch.setattr(hallucination_quality, "grid_of", lambda name, *_: grids.get(name, {}))
    tunings: dict[str, Any] = {}
    found = evaluate_hallucination(
        *lvlm,
        ["vhr", "grounding_heads", "vcd"],
        size=2,
        seeds=(7,),
        settings={"vhr": {"layers": (2,)}},
        tune=True,
        validation=6,
        tables=tunings.__setitem__,
    )
    assert [row["method"] for row in found] == [
        *("greedy", "sampling", "vhr", "vhr tuned", "grounding_heads", "grounding_heads control"),
        *("grounding_heads tuned", "grounding_heads control tuned", "vcd"),
    ]
    assert found[2]["setting"] == "VHR(alpha=2.0, layers=(2,))"
    assert found[3]["setting"] == "VHR(alpha=1.0, layers=(2,))"  # at 9 it babbles
    assert values(found[3]) == values(found[6]) == values(found[7]) == values(found[0])
    assert found[6]["setting"] == "GroundingHeads(heads={1: [0]}, strength=1.0)"
    assert found[7]["setting"] == "GroundingHeads(heads={2: [1]}, strength=1.0)"
    assert list(tunings) == ["vhr", "grounding_heads"]
    assert [trial.setting for trial in tunings["vhr"].trials] == [{"alpha": 1.0}, {"alpha": 9.0}]
    other = evaluate_hallucination(*lvlm, [], size=6, seeds=[9])[0]  # after those of calibration
    assert tunings["vhr"].baseline == Hallucination(
        **{key: other[key] for key in MEASURES if key != "mentions"}
    )
    assert tunings["grounding_heads"].baseline is tunings["vhr"].baseline


def test_a_method_without_a_setting_within_the_limits_has_no_tuned_form(
    lvlm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hallucination_quality, "grid_of", lambda *_: {"alpha": (9.0,)})
    said: list[str] = []
    found = evaluate_hallucination(*lvlm, ["vhr"], size=1, tune=True, validation=3, progress=said.append)
    assert [row["method"] for row in found] == ["greedy", "sampling", "vhr"]
    assert any(text.startswith("vhr has no tuned form") for text in said)


def test_every_grid_has_the_setting_of_the_untuned_method_first_and_fits(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    grids = 0
    for name, (_, method) in hallucination_quality._pick(None).items():
        given = adapted(name, model, processor)
        grid = hallucination_quality.grid_of(name, model, processor, given)
        if not grid:
            continue
        grids += 1
        given |= {"grounding_heads": {"heads": {1: [0]}}, "agla": {"view": dict}}.get(name, {})
        first, *_ = settings = settings_of(grid)
        untuned = method(**given)
        assert all(getattr(untuned, key) in (None, value) for key, value in first.items()), name
        assert len(settings) == len({repr(one) for one in settings})
        method(**{**given, **first})
        with method(**{**given, **settings[-1]})(model):
            pass
    assert grids >= 10


def test_decoders_that_agree_have_sampling_at_their_temperature_beside_them(lvlm: tuple[Any, Any]) -> None:
    given = {"ritual": {"alpha": 4.0}, "agla": {"alpha": 1.0, "view": dict}}
    found = evaluate_hallucination(*lvlm, ["ritual", "agla", "vcd"], size=2, settings=given)
    names = [row["method"] for row in found]
    assert names == ["greedy", "sampling", "sampling T=0.5", "sampling T=0.2", "ritual", "agla", "vcd"]
    assert [row["kind"] for row in found[:4]] == ["baseline"] * 4
    assert [row["setting"] for row in found[2:4]] == ["temperature=0.5", "temperature=0.2"]
    cool = evaluate_hallucination(*lvlm, [], size=2, temperature=0.5)[1]
    assert values(cool) == values(found[2])


def test_defaults_for_32_layers_stay_and_those_for_4_are_the_same_part(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    small = {name: adapted(name, model, processor).get("layers") for name in ("vhr", "var", "act", "pai")}
    assert small == {"vhr": (1, 2, 3), "var": (1, 2), "act": (1, 2), "pai": (1, 2, 3)}
    assert adapted("vcd", model, processor) == adapted("grounding_heads", model, processor) == {}

    class Large:
        class config:
            num_hidden_layers = 32

            @classmethod
            def get_text_config(cls) -> Any:
                return cls

    assert adapted("vhr", Large, processor)["layers"] == (1, *range(18, 32))
    assert adapted("var", Large, processor)["layers"] == adapted("act", Large, processor)["layers"]
    assert adapted("act", Large, processor)["layers"] == tuple(range(2, 31))
    assert adapted("pai", Large, processor)["layers"] == tuple(range(2, 32))
    assert all(kind().layers is None for kind in (VHR, VAR, ACT, PAI))  # or this would be in vain


def test_what_cannot_be_measured_is_refused(lvlm: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"no method is called fast, slow; there are vhr, var, .*, agla"):
        evaluate_hallucination(*lvlm, methods=["fast", "slow"])
    with pytest.raises(ValueError, match="unknown distribution 'uncle'"):
        evaluate_hallucination(*lvlm, methods=[], distribution="uncle")
    for seeds in ([], [1, 1], [-1], [2**28 - 3]):
        with pytest.raises(ValueError, match="seeds must be different numbers"):
            evaluate_hallucination(*lvlm, seeds=seeds)
    numbers = {"size": 0, "calibration": 3, "batch_size": 0, "temperature": 0.0, "validation": 0}
    for name, value in numbers.items():
        with pytest.raises(ValueError, match="size and batch_size must be at least 1"):
            evaluate_hallucination(*lvlm, **{name: value})
    with pytest.raises(ValueError, match="layers"):
        evaluate_hallucination(*lvlm, methods=["vhr"], size=1, settings={"vhr": {"layers": (9,)}})


def test_a_table_is_written_whole_or_not_at_all(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows(rows, tmp_path / "rows.csv")
    before = path.read_text()
    assert before.splitlines()[0] == ",".join(COLUMNS)
    assert len(before.splitlines()) == len(rows) + 1
    with pytest.raises(ValueError, match="surprise"):
        write_rows([*rows, {"surprise": 1}], path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
