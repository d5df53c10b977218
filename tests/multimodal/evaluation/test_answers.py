"""Answers written as they come: a stopped run goes on to the same file, and other settings are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.multimodal import VHR, FastV, Ritual
from visionsel.multimodal.evaluation import Item, generate_all
from visionsel.multimodal.evaluation.answers import settings_path

ITEMS = [
    Item({"number": number, "who": "ü"}, sample.image, prompt)
    for number, sample in enumerate(ShapesWorld("anti", 3, 4))
    for prompt in (CAPTION_PROMPT, sample.questions[0].text)
][:7]
SETTING: dict[str, Any] = {"batch_size": 3, "temperature": 1.5, "max_new_tokens": 20, "seed": 4}


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return load_lvlm()


def run(lvlm: tuple[Any, Any], path: Path, **options: Any) -> list[dict[str, Any]]:
    return generate_all(*lvlm, ITEMS, path, **{**SETTING, **options})


@pytest.fixture(scope="module")
def whole(lvlm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that was not stopped."""
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    rows = run(lvlm, path, interventions=[VHR(layers=(1, 2))])
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert [row["number"] for row in rows] == [0, 0, 1, 1, 2, 2, 3]
    return path


class Stop(Exception):
    """The run is stopped here."""


def stop_at(number: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        assert total == len(ITEMS)
        if done == number:
            raise Stop

    return progress


@pytest.mark.parametrize(("number", "torn"), [(1, b""), (3, b'{"number": 1, "wh'), (5, b'{"who": "\xc3')])
def test_a_run_that_was_stopped_goes_on_to_the_same_file(
    lvlm: tuple[Any, Any], whole: Path, tmp_path: Path, number: int, torn: bytes, monkeypatch: Any
) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Stop):
        run(lvlm, path, interventions=[VHR(layers=(1, 2))], progress=stop_at(number))
    assert path.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:number])
    with path.open("ab") as file:
        file.write(torn)
    seen: list[int] = []
    asked: list[int] = []
    generate = lvlm[0].generate
    monkeypatch.setattr(lvlm[0], "generate", lambda **k: asked.append(len(k["input_ids"])) or generate(**k))
    torch.manual_seed(number)  # what was drawn before does not matter
    rows = run(lvlm, path, interventions=[VHR(layers=(1, 2))], progress=lambda done, total: seen.append(done))
    assert path.read_bytes() == whole.read_bytes()
    assert [row["answer"] for row in rows] == [
        json.loads(line)["answer"] for line in whole.read_text().splitlines()
    ]
    assert seen == list(range(number, len(ITEMS) + 1))
    assert asked == [3, 3, 1][number // 3 :]  # no whole batch twice
    asked.clear()
    assert run(lvlm, path, interventions=[VHR(layers=(1, 2))]) == rows
    assert not asked


def test_greedy_answers_are_those_of_each_item_by_itself(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "greedy.jsonl"
    side = lvlm[1].tokenizer.padding_side
    rows = run(lvlm, path, temperature=None, interventions=[FastV(0.5, 2)], said="caption")
    with FastV(0.5, 2)(lvlm[0]):
        alone = [generate_answers(*lvlm, [item.image], [item.prompt], max_new_tokens=20)[0] for item in ITEMS]
    assert [row["caption"] for row in rows] == alone
    assert len({len(answer.split()) for answer in alone}) > 2
    assert lvlm[1].tokenizer.padding_side == side
    assert "generate" not in vars(lvlm[0])


def test_sampling_follows_its_seed_and_leaves_the_callers_luck_alone(
    lvlm: tuple[Any, Any], whole: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    other = run(lvlm, tmp_path / "a", seed=5, interventions=[VHR(layers=(1, 2))])
    assert torch.equal(torch.rand(3), expected)
    first = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["answer"] for row in other] != [row["answer"] for row in first]
    # batches are told apart: the same picture and prompt twice are two draws
    twins = [Item({"number": number}, ITEMS[0].image, ITEMS[0].prompt) for number in range(4)]
    rows = generate_all(*lvlm, twins, tmp_path / "b", batch_size=1, temperature=3.0, max_new_tokens=8)
    assert len({row["answer"] for row in rows}) > 1


def test_items_have_limits_of_their_own(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    items = [
        Item({"n": n}, ITEMS[0].image, CAPTION_PROMPT, limit) for n, limit in enumerate([None, 2, 2, None])
    ]
    rows = generate_all(*lvlm, items, tmp_path / "a.jsonl", max_new_tokens=4)
    assert [len(row["answer"].split()) for row in rows] == [4, 2, 2, 4]


def test_a_file_of_other_settings_is_refused_and_left_as_it_is(
    lvlm: tuple[Any, Any], whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    for name in (whole, settings_path(whole)):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    with path.open("ab") as file:
        file.write(b"torn")
    before = path.read_bytes()
    vhr = [VHR(layers=(1, 2))]
    with pytest.raises(ValueError, match=r"other settings: seed 4, now 5. Name another file, or delete it"):
        run(lvlm, path, interventions=vhr, seed=5)
    with pytest.raises(ValueError, match=r"interventions \['VHR\(.*, now \['VHR\(.*alpha=3"):
        run(lvlm, path, interventions=[VHR(alpha=3.0, layers=(1, 2))])
    with pytest.raises(ValueError, match="model None, now 'llava'"):
        run(lvlm, path, interventions=vhr, settings={"model": "llava"})
    with pytest.raises(ValueError, match=r"items 7, now 6; asked"):
        generate_all(*lvlm, ITEMS[:-1], path, **SETTING, interventions=vhr)
    with pytest.raises(ValueError, match="is not the answer to item 1 of 7; the file was changed"):
        run(lvlm, path, interventions=vhr, said="caption")
    assert path.read_bytes() == before
    settings_path(path).unlink()
    with pytest.raises(ValueError, match=r"answers.jsonl.settings.json that says how it was made does not"):
        run(lvlm, path, interventions=vhr)
    assert path.read_bytes() == before


def test_a_file_that_was_changed_is_not_continued(lvlm: tuple[Any, Any], whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    settings_path(path).write_bytes(settings_path(whole).read_bytes())
    lines = whole.read_bytes().splitlines(keepends=True)
    for content in ([*lines[:2], *lines[3:]], [lines[0], b"no json\n"], [*lines, lines[-1]], [b"3\n"]):
        path.write_bytes(b"".join(content))
        with pytest.raises(ValueError, match=r"line \d is not the answer to item \d of 7"):
            run(lvlm, path, interventions=[VHR(layers=(1, 2))])


def test_nothing_is_written_where_nothing_can_be_asked(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="no items"):
        generate_all(*lvlm, [], path)
    for wrong in ({"batch_size": 0}, {"max_new_tokens": 0}, {"seed": -1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            run(lvlm, path, **wrong)
    with pytest.raises(ValueError, match="two decoding methods"):
        run(lvlm, path, interventions=[Ritual(), Ritual()])
    missing = [Item({"n": n}, tmp_path / f"{n}.png", "?") for n in range(3)]
    with pytest.raises(FileNotFoundError, match=r"no image at .*0.png \(nor 2 others of 3\)"):
        generate_all(*lvlm, missing, path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "0.png").write_text("no picture")
    Image.new("L", (30, 20)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"0.png is not an image"):
        generate_all(*lvlm, missing[:1], path)
    assert len(generate_all(*lvlm, [Item({}, str(tmp_path / "1.png"), "?")], tmp_path / "b")) == 1
