"""Heads that point are found, they lower invention, and the control beside them does not."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.multimodal.runs import ByScore
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import make_model
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import pointing_game
from visionsel.multimodal.families.family import TokenLayout, View
from visionsel.multimodal.intervention import parse
from visionsel.multimodal.modulation import MODULATORS
from visionsel.multimodal.modulation.grounding_heads import GroundingHeads, _others, invention
from visionsel.multimodal.modulation.pointing import Pointing, _cover, pointing
from visionsel.multimodal.modulation.samples import generate_captions


@lru_cache
def shapes() -> tuple[Any, Any, list[Any]]:
    world = ShapesWorld("anti", seed=4, size=80)
    return *load_lvlm(), [world[number] for number in range(80)]


@lru_cache
def calibrated(number: int = 16, candidates: int = 3) -> GroundingHeads:
    model, processor, samples = shapes()
    return GroundingHeads.calibrate(model, processor, samples[:number], candidates=candidates, most=3)


def test_pointing_is_the_pointing_game_of_each_head() -> None:
    model, processor, samples = shapes()
    unique = [s for s in samples if len({item.shape for item in s.objects}) == len(s.objects)]
    assert len(unique) > 20
    found = pointing(model, processor, unique, batch_size=7)
    expected = pointing_game(model, processor, unique)
    assert torch.allclose(found.hits, torch.tensor(expected["heads"], dtype=torch.float64))
    assert found.chance == pytest.approx(expected["chance"], abs=1e-6)
    assert found.named == sum(len(s.objects) for s in unique)


@pytest.mark.slow
def test_chosen_heads_lower_invention_at_equal_recall_and_other_heads_do_not() -> None:
    model, _, _ = shapes()
    before = everything_on(model)
    heads = calibrated(80, 6)
    assert everything_on(model) == before
    report: Any = heads.report
    base, good, control = (report[name] for name in ("baseline", "chosen", "control"))
    assert good["chair_i"] < 0.7 * base["chair_i"]
    assert good["recall"] > base["recall"] - 0.03
    assert control["chair_i"] > 0.85 * base["chair_i"]
    assert 1 <= sum(map(len, heads.heads.values())) <= 3
    for layer, others in report["control_heads"].items():
        assert not set(others) & set(heads.heads.get(int(layer), []))
    assert sum(map(len, report["control_heads"].values())) == sum(map(len, heads.heads.values()))
    assert report["samples"] == [40, 40]
    assert report["trials"][0]["heads"] == {}
    assert len(report["trials"]) >= 5


def test_calibrating_twice_gives_the_same_in_any_batch() -> None:
    model, processor, samples = shapes()
    again = GroundingHeads.calibrate(model, processor, samples[:16], candidates=3, most=3, batch_size=3)
    assert again == calibrated()
    assert again.report == calibrated().report


def test_a_preset_is_saved_and_read_with_its_report(tmp_path: Path) -> None:
    heads = calibrated()
    path = heads.save(tmp_path / "presets" / "shapes.json")
    again = GroundingHeads.load(path)
    assert again == heads
    assert again.report == heads.report
    content = json.loads(path.read_text())
    assert content["strength"] == 1.6
    shape = {"type": "llava", "decoder": "llama", "layers": 4, "heads": 4, "width": 128}
    assert content["model"] == heads.model == again.model == shape
    by_hand = GroundingHeads({1: (0, 2)}, 2.0)
    assert GroundingHeads.load(by_hand.save(path)) == GroundingHeads({1: [0, 2]}, 2.0)
    bad = ('{"heads": [1], "strength": 1}', '{"heads": {"a": [1]}, "strength": 1}')
    for text in ("{", "[]", *bad, '{"heads": {"1": [1]}, "strength": 1, "model": {"type": "llava"}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"shapes\.json is no preset of heads"):
            GroundingHeads.load(path)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    model, _, _ = shapes()
    heads = calibrated()
    path = heads.save(tmp_path / "heads.json")
    assert GroundingHeads.load(path, model) == heads
    other = make_model("llava")
    before = everything_on(other)
    sentence = (
        "these heads are of another model: llava with a llama of 4 layers, 4 heads a layer, width 128; this"
    )
    with pytest.raises(ValueError, match=sentence):
        GroundingHeads.load(path, other)
    with pytest.raises(ValueError, match=sentence), replace(heads, strength=1.0)(other):
        pass
    assert everything_on(other) == before
    with GroundingHeads(heads.heads)(other):  # by hand they are taken as they are
        pass


def test_the_preset_of_the_package_lowers_invention_on_scenes_it_has_not_seen() -> None:
    model, processor, samples = shapes()
    heads = GroundingHeads.preset("embedded")
    report: Any = heads.report
    assert report["chosen"]["chair_i"] < report["baseline"]["chair_i"] < report["control"]["chair_i"]
    assert report["made"]["command"] == "python -m visionsel.embedded.grounding_preset"
    assert parse("grounding_heads:preset=embedded", MODULATORS) == heads
    assert parse('grounding_heads:preset="embedded",strength=2.0', MODULATORS) == replace(heads, strength=2.0)

    def measured() -> dict[str, float]:
        said = generate_captions(model, processor, samples, CAPTION_PROMPT, 40, 64)
        return invention(said, samples, SHAPES)

    before = measured()
    with heads(model):
        after = measured()
    assert after["chair_i"] < 0.7 * before["chair_i"]
    assert after["recall"] > before["recall"] - 0.04
    with pytest.raises(ValueError, match="no preset of heads is called 'llava'; there are embedded"):
        GroundingHeads.preset("llava")
    with pytest.raises(ValueError, match="cannot read 'vhr:preset=embedded'"):
        parse("vhr:preset=embedded", MODULATORS)


def test_the_table_shows_the_control_beside_the_heads() -> None:
    head, *lines = calibrated().table().splitlines()
    assert head.split() == ["chair_i", "chair_s", "recall", "mentions"]
    assert [line.split()[0] for line in lines] == ["baseline", "chosen", "control"]
    assert lines[2].endswith("x1.6")
    with pytest.raises(ValueError, match="given by hand"):
        GroundingHeads({0: [1]}).table()


def test_when_no_head_helps_that_is_said() -> None:
    model, processor, samples = shapes()

    def constant(captions: Any, samples: Any) -> dict[str, float]:
        return {"chair_i": 0.25, "recall": 0.5}

    with pytest.raises(ValueError, match=r"none of 2 heads that point lowers chair_i below 0\.250"):
        GroundingHeads.calibrate(model, processor, samples[:4], candidates=2, score=constant)


def test_heads_that_cost_recall_are_not_chosen() -> None:
    model, processor, samples = shapes()
    calls: list[int] = []

    def falling(captions: Any, samples: Any) -> dict[str, float]:
        calls.append(len(captions))
        return {"chair_i": 0.5 / len(calls), "recall": 0.9 if len(calls) != 2 else 0.5}

    heads = GroundingHeads.calibrate(model, processor, samples[:8], candidates=2, score=falling)
    assert heads.report is not None
    first, second = (trial["heads"] for trial in heads.report["trials"][1:3])
    assert {str(layer): chosen for layer, chosen in heads.heads.items()} == second != first
    assert calls == [4] * 6


def test_bad_calls_are_refused() -> None:
    model, processor, samples = shapes()
    with pytest.raises(ValueError, match="at least 4 samples"):
        GroundingHeads.calibrate(model, processor, samples[:3])
    with pytest.raises(ValueError, match="at least 4 samples, 1 candidate and 1 head"):
        GroundingHeads.calibrate(model, processor, samples, candidates=0)
    with ByScore({1: (0.5,)})(model), pytest.raises(ValueError, match="calibrate outside of its context"):
        pointing(model, processor, samples[:4])
    blank = [SimpleNamespace(image=samples[0].image, captions=["a wall"], objects=[])]
    with pytest.raises(ValueError, match="no caption names an object"):
        pointing(model, processor, blank)


def test_invention_counts_each_name_once_a_caption() -> None:
    samples = [
        SimpleNamespace(objects=[SimpleNamespace(name="dog"), SimpleNamespace(name="Cat")]),
        SimpleNamespace(objects=[SimpleNamespace(name="dog")]),
        SimpleNamespace(objects=[]),
    ]
    captions = ["A dog, a cat and a dog.", "a CAT sees a dog; catalog", ""]
    assert invention(captions, samples, {"dog", "cat", "cow"}) == {
        "chair_i": 1 / 4,
        "chair_s": 1 / 3,
        "recall": 1.0,
        "mentions": 4 / 3,
    }
    assert invention(["nothing"] * 3, samples, ["dog"])["recall"] == 0


def test_the_control_takes_other_layers_where_one_has_no_heads_left() -> None:
    points = Pointing(torch.zeros(2, 3), 0.1, 1)
    control = _others({0: [0, 1, 2], 1: [1]}, points, seed=0)
    assert set(control) == {1}
    assert sorted(control[1]) == [0, 2]
    assert _others({1: [0]}, points, seed=1) == _others({1: [0]}, points, seed=1)
    assert set(_others({1: [0]}, points, seed=1)) == {1}


def test_what_a_token_shows_of_a_mask_is_its_share_of_the_patch() -> None:
    mask = np.zeros((8, 12), dtype=bool)
    mask[:4, :3] = True
    index = torch.tensor([[0, 1], [2, 3]])
    over_the_border = View("image", index, index, (0.0, -4.0, 12.0, 12.0))
    cover, seen = _cover(torch.from_numpy(mask), TokenLayout(5, (over_the_border,)))
    assert cover.tolist() == [12 / 48, 0, 0, 0, 0]
    assert seen.tolist() == [True] * 4 + [False]
