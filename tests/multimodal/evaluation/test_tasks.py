"""What the benchmarks ask: which images, in which words, with which limits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from visionsel.multimodal.evaluation import amber_task, chair_task, mme_task, pope_task, shapes_task


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_pope_asks_the_first_images_in_the_words_that_are_wished(tmp_path: Path) -> None:
    rows = [{"image": f"{n // 2}.jpg", "text": f"Is there a {n}?", "label": "yes"} for n in (0, 2, 1, 4)]
    path = tmp_path / "asked.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = pope_task(tmp_path, path, "{} One word, {}", limit=2)
    assert [item.prompt for item in task.items] == [
        f"Is there a {n}? One word, Is there a {n}?" for n in (0, 2, 1)
    ]
    assert [dict(item.fields) for item in task.items] == [
        {"question_id": number, "image": f"{name}.jpg"} for number, name in ((1, 0), (2, 1), (3, 0))
    ]
    assert task.items[1].image == tmp_path / "1.jpg"
    assert task.score(["no", "yes", "yes"])["recall"] == 2 / 3


def test_chair_takes_the_annotated_images_that_are_in_the_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "b.jpg", "c.jpg", "other.jpg")
    names = {5: "a.jpg", 3: "b.jpg", 4: "c.jpg"}
    content = {
        "images": [{"id": i, "file_name": name} for i, name in names.items()],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 3, "category_id": 1}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    task = chair_task(tmp_path, [path])
    assert [(item.fields, item.image) for item in task.items] == [
        ({"image_id": 3}, tmp_path / "b.jpg"),
        ({"image_id": 4}, tmp_path / "c.jpg"),
    ]
    assert task.score(["a dog", "a dog"])["chair_i"] == 0.5  # nothing is annotated in the second
    assert (task.max_new_tokens, task.said) == (512, "caption")
    assert len(chair_task(tmp_path, [path], limit=1).items) == 1
    with pytest.raises(ValueError, match="the limit of images must be at least 1, got 0"):
        chair_task(tmp_path, [path], limit=0)


def test_mme_finds_its_images_in_every_layout(tmp_path: Path) -> None:
    pictures(tmp_path, "existence/a.png", "count/images/b.jpg", "color/c.jpg", "d.jpg")
    (tmp_path / "count" / "questions_answers_YN").mkdir()
    pair = "One?\tYes\nTwo?\tNo\n"
    (tmp_path / "existence" / "a.txt").write_text(pair)
    (tmp_path / "count" / "questions_answers_YN" / "b.txt").write_text(pair)
    lines = [f"{name}.jpg\t{line}\n" for name in "cd" for line in pair.splitlines()]
    (tmp_path / "color.txt").write_text("".join(lines))
    task = mme_task(tmp_path, tmp_path)
    found = [Path(str(item.image)).relative_to(tmp_path).as_posix() for item in task.items]
    assert found[::2] == ["existence/a.png", "count/images/b.jpg", "color/c.jpg", "d.jpg"]
    assert found[1::2] == found[::2]
    limited = mme_task(tmp_path, tmp_path, limit=1)  # of each subset
    assert [item.fields["subset"] for item in limited.items[::2]] == ["existence", "count", "color"]
    assert limited.score(["yes", "no"] * 3)["total"] == 600


def test_amber_asks_for_captions_and_answers_with_limits_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "query").mkdir()
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": []},
        {"id": 2, "type": "relation", "truth": "no"},
        {"id": 3, "type": "discriminative-hallucination", "truth": "yes"},
    ]
    queries = [{"id": i, "image": "AMBER_1.jpg", "query": f"Query {i}"} for i in (1, 2, 3)]
    for name, content in (
        ("annotations.json", annotations),
        ("relation.json", {"sky": []}),
        ("query/query_all.json", queries),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "safe_words.txt").write_text("")
    task = amber_task(tmp_path, tmp_path, prompt="{} Yes or no?")
    assert [(item.prompt, item.max_new_tokens) for item in task.items] == [
        ("Query 1", None),
        ("Query 2 Yes or no?", 16),
        ("Query 3 Yes or no?", 16),
    ]
    assert [item.max_new_tokens for item in task.cut(5).items] == [None] * 3
    assert (task.max_new_tokens, task.cut(5).max_new_tokens, task.said) == (512, 5, "response")
    scores = task.score(["a sky", "no, not at all", "Yes."])
    assert scores["generative"]["cover"] == 1
    assert scores["discriminative"]["accuracy"] == 1  # by the first word
    assert [item.fields for item in amber_task(tmp_path, tmp_path, "relation").items] == [{"id": 2}]
    with pytest.raises(ValueError, match="AMBER's part 'attribute' has no queries here"):
        amber_task(tmp_path, tmp_path, "attribute")
    (tmp_path / "annotations.json").write_text(json.dumps(annotations[:2]))
    with pytest.raises(ValueError, match="1 queries are not annotated, such as 3"):
        amber_task(tmp_path, tmp_path)


def test_a_perfect_witness_scores_perfectly_in_the_shapes_world() -> None:
    tasks = {name: shapes_task(name, "balanced", 4, seed=2) for name in ("chair", "pope", "amber", "mme")}
    captions = tasks["chair"].score(["a circle"] * 4)
    assert captions["mentions"] == 4
    yes = tasks["mme"].score(["yes", "no"] * (len(tasks["mme"].items) // 2))
    assert yes["total"] == yes["maximum"] == 400
    assert tasks["pope"].score(["yes"] * len(tasks["pope"].items))["yes_ratio"] == 1
    with pytest.raises(ValueError, match="unknown benchmark 'x'"):
        shapes_task("x", size=1)
    with pytest.raises(ValueError, match="seed from 0 to"):
        shapes_task("pope", size=1, seed=2**28)
