"""The grounding benchmarks on small data in the layout of each release, and runs that were stopped."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionsel.cli import main
from visionsel.data.coco import read_instances
from visionsel.data.narratives import read_narratives
from visionsel.data.refcoco import read_references
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, Sample, ShapesWorld, write_shapes
from visionsel.embedded import load_lvlm
from visionsel.multimodal.evaluation import detection, segmentation
from visionsel.multimodal.evaluation.detection_tasks import coco_results, detection_task
from visionsel.multimodal.evaluation.grounded import GroundingTask, ground_all
from visionsel.multimodal.evaluation.grounding_tasks import narratives_task, refcoco_task, vizwiz_task
from visionsel.multimodal.evaluation.labels import LabelMatcher
from visionsel.multimodal.evaluation.resume import settings_path
from visionsel.multimodal.grounding.grounder import Grounder
from visionsel.multimodal.grounding.heatmaps.chance import CentrePoint, RandomBox, RandomPoint

SPLIT, SEED, SIZE = "balanced", 2 << 30, 3  # of the world that is written


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return list(ShapesWorld(SPLIT, SEED, SIZE))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes world as RefCOCO, COCO, LVIS and CODA, PNG and VizWiz release theirs."""
    root = write_shapes(tmp_path_factory.mktemp("shapes") / "world", size=1, test_size=SIZE)
    refs = json.loads((root / "refcoco" / "refs.json").read_text())
    (root / "refcoco" / "refs.json").unlink()
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    content = json.loads((root / "annotations" / f"instances_{SPLIT}.json").read_text())
    lvis = json.loads(json.dumps(content))
    for row in lvis["images"]:
        row["coco_url"] = f"http://images.cocodataset.org/train2017/{row.pop('file_name')}"
        row |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for number, row in enumerate(lvis["categories"]):
        row |= {"frequency": "rcf"[number % 3], "synonyms": [row["name"]]}
    (root / "lvis_v1_minival.json").write_text(json.dumps(lvis))
    for number, row in enumerate(content["annotations"]):
        row["corner_case"] = number % 2 == 0
        del row["segmentation"]
    (root / "coda.json").write_text(json.dumps(content))
    _narratives(root, list(ShapesWorld(SPLIT, SEED, SIZE)))
    _vizwiz(root, list(ShapesWorld(SPLIT, SEED, SIZE)))
    return root


def _file(number: int) -> str:
    return f"shapes_{SPLIT}_{number:06d}.png"


def _narratives(root: Path, scenes: list[Sample]) -> None:
    """Captions of objects and their background: things, and stuff."""
    (root / "annotations" / "panoptic_val2017").mkdir()
    panoptic: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate([*SHAPES, "background"], 1):
        panoptic["categories"].append({"id": number, "name": name, "isthing": int(name != "background")})
    rows = []
    for number, scene in enumerate(scenes):
        ids = np.where(scene.labels == 0, 70000, 300 + scene.labels.astype(np.int64))
        pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(pixels).save(root / "annotations" / "panoptic_val2017" / f"{number}.png")
        height, width = scene.labels.shape
        image = {"id": number, "file_name": _file(number), "height": height, "width": width}
        panoptic["images"].append(image)
        infos = [
            {"id": 301 + place, "category_id": 1 + SHAPES.index(thing.shape)}
            for place, thing in enumerate(scene.objects)
        ]
        infos.append({"id": 70000, "category_id": len(SHAPES) + 1})
        panoptic["annotations"].append(
            {"image_id": number, "file_name": f"{number}.png", "segments_info": infos}
        )
        parts: list[dict[str, Any]] = []
        for place, thing in enumerate(scene.objects):
            phrase = f"a {thing.size} {thing.color} {thing.shape}"
            parts += [{"utterance": phrase, "segment_ids": [str(301 + place)], "plural": place == 1}]
            parts += [{"utterance": "and", "segment_ids": []}]
        parts[-1] = {"utterance": "on", "segment_ids": []}
        parts.append({"utterance": "the background", "segment_ids": ["70000"], "plural": False})
        caption = " ".join(part["utterance"] for part in parts)
        rows.append({"image_id": str(number), "caption": caption, "segments": parts})
    (root / "png_coco_val2017.json").write_text(json.dumps(rows))
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(panoptic))


def _vizwiz(root: Path, scenes: list[Sample]) -> None:
    """What the first object of each scene is; its mask as a file."""
    folder = root / "vizwiz" / "binary_masks_png" / "val"
    folder.mkdir(parents=True)
    content = {}
    for number, scene in enumerate(scenes):
        height, width = scene.labels.shape
        content[_file(number)] = {
            "question": "what is the largest shape?",
            "answers": [scene.objects[0].shape],
            "height": height,
            "width": width,
            "answer_grounding": [],
        }
        Image.fromarray(scene.objects[0].mask).convert("L").save(folder / _file(number))
    (root / "vizwiz" / "val_grounding.json").write_text(json.dumps(content))


@dataclass
class Found:
    """What a grounder gives of one thing."""

    mask: np.ndarray
    name: str = ""
    score: float = 0.5

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        if not self.mask.any():
            return None
        rows, columns = np.nonzero(self.mask)
        return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@dataclass
class Knowing:
    """Stands for a grounder: it knows the scenes, and calls things a "red" or "big" name of its own."""

    scenes: list[Sample]
    asked: list[str] = field(default_factory=list)
    words: list[Found] = field(default_factory=list)
    answer: str = ""

    def _scene(self, image: Image.Image) -> Sample:
        return next(scene for scene in self.scenes if np.array_equal(scene.pixels, np.asarray(image)))

    def refer_many(self, images: Any, texts: Any) -> list[Found]:
        found = []
        for image, text in zip(images, texts, strict=True):
            scene = self._scene(image)
            (one,) = (one for one in scene.expressions if one.text == text)
            found.append(Found(scene.objects[one.object].mask))
        return found

    def ask(self, image: Image.Image, question: str, **options: Any) -> "Knowing":
        self.asked.append(question)
        scene = self._scene(image)
        return Knowing(self.scenes, answer=scene.objects[0].shape if len(scene.objects) > 1 else "")

    def ground_text(self, image: Image.Image, prompt: str, text: str, spans: Any) -> list[Found]:
        scene = self._scene(image)
        self.asked.append(prompt)
        if len(spans) == 1:  # the answer of VizWiz
            assert spans == [(0, len(text))]
            return [Found(scene.objects[0].mask)]
        assert [text[slice(*span)] for span in spans][-1] == "the background"
        masks = [thing.mask for thing in scene.objects]
        return [Found(mask) for mask in [*masks, np.zeros_like(masks[0])]]

    def detect(self, image: Image.Image, **options: Any) -> "Knowing":
        self.asked.append(str(options))
        words = [Found(thing.mask, f"big {thing.shape}") for thing in self._scene(image).objects]
        return Knowing(self.scenes, words=[*words, Found(np.zeros((64, 64), dtype=bool), "nothing")])


def test_refcoco_counts_sentences_and_what_masks_share(
    root: Path, scenes: list[Sample], tmp_path: Path
) -> None:
    task = refcoco_task(root / "refcoco", root / "images", SPLIT)
    rows = ground_all(Knowing(scenes), task, tmp_path / "rows.jsonl")
    references = read_references(root / "refcoco", SPLIT)
    assert [row["text"] for row in rows] == [one.text for one in references]
    assert [row["overlap"] for row in rows] == [[one.mask().sum()] * 4 for one in references]
    scores = task.score(rows)
    assert (scores["c_iou"], scores["g_iou"], scores["precision_90"], scores["box_accuracy"]) == (1, 1, 1, 1)
    assert (scores["samples"], scores["box_iou"]) == (len(references), 1)
    rows[0] = {**rows[0], "overlap": [0, rows[0]["overlap"][3], 0, rows[0]["overlap"][3]], "box": None}
    scores = task.score(rows)
    assert scores["g_iou"] == scores["box_accuracy"] == pytest.approx(1 - 1 / len(rows))
    assert "each sentence is a sample" in task.protocol
    first = refcoco_task(root / "refcoco", root / "images", SPLIT, "first", limit=2)
    assert len(first.cases) == 2
    assert "first sentence of each ref alone" in first.protocol
    with pytest.raises(ValueError, match="limit must be at least 1"):
        refcoco_task(root / "refcoco", root / "images", SPLIT, limit=0)


def test_phrases_of_true_captions_are_grounded_by_kind(
    root: Path, scenes: list[Sample], tmp_path: Path
) -> None:
    task = narratives_task(root, root / "images", prompt="describe it")
    knowing = Knowing(scenes)
    scores = task.score(ground_all(knowing, task, tmp_path / "rows.jsonl"))
    things = sum(len(scene.objects) for scene in scenes)
    assert (scores["narratives"], scores["phrases"]) == (SIZE, things + SIZE)
    assert (scores["things"], scores["stuff"], scores["plural"]) == (1, 0, 1)
    assert scores["all"] == pytest.approx(things / (things + SIZE))
    plural = sum(len(scene.objects) > 1 for scene in scenes)
    assert scores["singular"] == pytest.approx((things - plural) / (things + SIZE - plural))
    assert set(knowing.asked) == {"describe it"}


def test_where_the_models_own_answer_is_seen(root: Path, scenes: list[Sample], tmp_path: Path) -> None:
    task = vizwiz_task(root / "vizwiz", root / "images", prompt="Q: {}")
    knowing = Knowing(scenes)
    rows = ground_all(knowing, task, tmp_path / "rows.jsonl")
    silent = [len(scene.objects) == 1 for scene in scenes]  # an empty answer is nowhere
    assert [row["answer"] == "" for row in rows] == silent
    assert [row["overlap"][0] == 0 for row in rows] == silent
    assert task.score(rows)["g_iou"] == pytest.approx(1 - sum(silent) / SIZE)
    assert set(knowing.asked) == {"Q: what is the largest shape?"}
    with pytest.raises(ValueError, match="where the question stands"):
        vizwiz_task(root / "vizwiz", root / "images", prompt="?")


@pytest.mark.parametrize(
    ("benchmark", "file", "measure"),
    [
        ("coco", f"annotations/instances_{SPLIT}.json", "ap"),
        ("lvis", "lvis_v1_minival.json", "ap"),
        ("coda", "coda.json", "ar"),
    ],
)
def test_detections_get_categories_when_they_are_scored(
    benchmark: str, file: str, measure: str, root: Path, scenes: list[Sample], tmp_path: Path
) -> None:
    categories = {row["id"]: row["name"] for row in json.loads((root / file).read_text())["categories"]}
    named = {name: number for number, name in categories.items()}

    def match(names: Any) -> list[list[tuple[int, float]]]:
        return [[(named[name.removeprefix("big ")], 0.5)] for name in names]

    knows = None if benchmark == "coda" else match
    task = detection_task(benchmark, root / file, root / "images", knows, detect={"crops": False})
    knowing = Knowing(scenes)
    rows = ground_all(knowing, task, tmp_path / "rows.jsonl")
    assert [len(row["found"]) for row in rows] == [len(scene.objects) for scene in scenes]  # no empty masks
    assert knowing.asked == ["{'crops': False}"] * SIZE
    scores = task.score(rows)
    assert scores["bbox"][measure] == 1
    assert ("segm" in scores) == (benchmark != "coda")
    assert task.results is not None
    results = task.results(rows)
    assert [row["score"] for row in results] == [0.5 if knows is None else 0.25] * len(results)
    if knows is not None:
        rate = {"coco": detection.average_precision, "lvis": detection.fixed_average_precision}[benchmark]
        truth = read_instances(root / file).content
        lost = rows[0]["found"].pop()
        expected = rate(truth, coco_results(rows, match), "segm")
        assert task.score(rows)["segm"] == pytest.approx(expected, nan_ok=True)
        assert task.score(rows)["segm"]["ap"] < 1
        rows[0]["found"].append(lost)
        unknown = detection_task(
            benchmark, root / file, root / "images", LabelMatcher(categories, exact=True)
        )
        assert unknown.score(rows)["without_category"] == len(results)
    with pytest.raises(ValueError, match="names are matched"):
        detection_task(benchmark, root / file, root / "images", None if knows else match)


def test_corner_cases_of_coda_are_counted_alone(root: Path, scenes: list[Sample], tmp_path: Path) -> None:
    task = detection_task("coda", root / "coda.json", root / "images", corner_cases=True)
    rows = ground_all(Knowing(scenes), task, tmp_path / "rows.jsonl")
    assert task.score(rows)["bbox"]["ar"] == 1
    kept = [  # found every second one only
        {**row, "found": [one for one in row["found"] if _is_corner(root, row["image"], one["bbox"])]}
        for row in rows
    ]
    assert 0 < sum(len(row["found"]) for row in kept) < sum(len(row["found"]) for row in rows)
    assert task.score(kept)["bbox"]["ar"] == 1
    file = root / "annotations" / f"instances_{SPLIT}.json"
    with pytest.raises(ValueError, match="not a file of CODA"):
        detection_task("coda", file, root / "images", corner_cases=True)


def _is_corner(root: Path, image: int, box: list[float]) -> bool:
    rows = json.loads((root / "coda.json").read_text())["annotations"]
    return any(row["corner_case"] for row in rows if row["image_id"] == image and row["bbox"] == box)


class Stop(Exception):
    """The run is stopped here."""


def stop_at(number: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == number:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder(*load_lvlm(), "embedded", RandomPoint())


def test_a_run_that_was_stopped_goes_on_to_the_same_file(
    grounder: Grounder, root: Path, tmp_path: Path
) -> None:
    task = refcoco_task(root / "refcoco", root / "images", SPLIT, limit=8)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    options: dict[str, Any] = {"batch_size": 3, "seed": 4, "settings": {"heatmap": "points"}}
    rows = ground_all(grounder, task, whole, **options)
    assert len({json.dumps(row["overlap"]) for row in rows}) > 1
    with pytest.raises(Stop):
        ground_all(grounder, task, path, **options, progress=stop_at(4))
    assert path.read_bytes().count(b"\n") == 4
    with path.open("ab") as file:
        file.write(b'{"sentence": 1, "re')
    torch.manual_seed(9)  # what was drawn before does not matter
    expected = torch.rand(2)
    torch.manual_seed(9)
    seen: list[int] = []
    again = ground_all(grounder, task, path, **options, progress=lambda done, total: seen.append(done))
    assert torch.equal(torch.rand(2), expected)  # nor does what is drawn here for others
    assert again == rows
    assert path.read_bytes() == whole.read_bytes()
    assert seen == [4, 5, 6, 7, 8]
    assert json.loads(settings_path(path).read_text())["heatmap"] == "points"
    for changed in ({"seed": 5}, {"settings": {"heatmap": "mean"}}, {"batch_size": 2}):
        with pytest.raises(ValueError, match=f"made with other settings: {next(iter(changed))}|heatmap"):
            ground_all(grounder, task, path, **{**options, **changed})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[3]]))
    with pytest.raises(ValueError, match="line 3 is not that of case 3 of 8"):
        ground_all(grounder, task, path, **options)


def test_images_that_are_missing_or_of_another_size_are_named(
    root: Path, scenes: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    task: GroundingTask = refcoco_task(root / "refcoco", tmp_path / "images", SPLIT, limit=1)
    with pytest.raises(FileNotFoundError, match=f"no image at .*{_file(0)}"):
        ground_all(Knowing(scenes), task, tmp_path / "rows.jsonl")
    scenes[0].image.resize((32, 64)).save(tmp_path / "images" / _file(0))
    with pytest.raises(ValueError, match="64 x 32 pixels, its annotations are for 64 x 64"):
        ground_all(Knowing(scenes), task, tmp_path / "rows.jsonl")
    (tmp_path / "images" / _file(0)).write_text("no image")
    with pytest.raises(ValueError, match="is not an image"):
        ground_all(Knowing(scenes), task, tmp_path / "rows.jsonl")
    turned = Image.Exif()
    turned[0x0112] = 6
    scenes[0].image.save(tmp_path / "images" / _file(0), exif=turned)
    (row,) = ground_all(Knowing(scenes), task, tmp_path / "turned.jsonl")  # as stored, as annotated
    assert row["overlap"][0] == row["overlap"][1]


def test_chance_is_one_cell_the_middle_or_a_rectangle(grounder: Grounder, scenes: list[Sample]) -> None:
    sees = {}
    for method in (RandomPoint(), CentrePoint(), RandomBox()):
        other = Grounder(grounder.model, grounder.processor, "embedded", method)
        torch.manual_seed(1)
        words = other.ask(scenes[0].image, CAPTION_PROMPT).words[:6]
        sees[type(method)] = np.stack([word.heatmap for word in words])
    points, middle, boxes = sees.values()
    assert len({int(one.argmax()) for one in points}) > 2
    for one in points:  # a cell of 8 pixels, blurred over its neighbours
        y, x = np.unravel_index(int(one.argmax()), one.shape)
        rows, columns = np.nonzero(one)
        assert max(abs(rows - y).max(), abs(columns - x).max()) <= 12
        assert 0.5 <= one.max() <= 1
    assert (middle == middle[0]).all()
    np.testing.assert_array_equal(middle[0], middle[0][::-1, ::-1])
    assert middle[0][32, 32] == middle[0].max() == 1
    for one in boxes:  # rows times columns
        assert one.max() == 1
        np.testing.assert_allclose(one, np.outer(one.max(1), one.max(0)), atol=1e-6)
    assert len({one.sum() for one in boxes}) > 2


def test_captions_and_answers_are_grounded_from_the_shell(
    root: Path, grounder: Grounder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = grounder.model, grounder.processor
    monkeypatch.setattr("visionsel.generation.load_lvlm", lambda name, device, dtype: models)
    found = {}
    for name, folder, prompt in (
        ("png", root, CAPTION_PROMPT),
        ("vizwiz-grounding", root / "vizwiz", "where is the {}?"),
    ):
        command = ["evaluate", name, "--data", str(folder), "--images", str(root / "images")]
        assert main([*command, "--prompt", prompt, "--heatmap", "mean", "--limit", "2", "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    other = Grounder(*models, "embedded", "mean")
    narratives = read_narratives(root)[:2]
    ious = [
        segmentation.overlap(word.mask, truth).iou
        for one in narratives
        for word, truth in zip(
            other.ground_text(
                root / "images" / one.file_name, CAPTION_PROMPT, one.caption, [p.span for p in one.phrases]
            ),
            one.masks(),
            strict=True,
        )
    ]
    assert found["png"]["phrases"] == len(ious)
    assert found["png"]["all"] == pytest.approx(np.mean(ious))
    assert found["vizwiz-grounding"]["samples"] == 2
    assert f"to {'where is the {}?'!r}" in found["vizwiz-grounding"]["protocol"]
