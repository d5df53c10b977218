"""`visionsel evaluate refcoco|png|coco|lvis|coda|vizwiz-grounding`, as a shell would call it."""

import json
from pathlib import Path
from typing import Any

import pytest

from visionsel.cli import main
from visionsel.data.shapes import write_shapes
from visionsel.embedded import load_lvlm
from visionsel.multimodal.evaluation import detection
from visionsel.multimodal.evaluation.grounded import overlaps_of
from visionsel.multimodal.evaluation.segmentation import score
from visionsel.multimodal.grounding.grounder import Grounder

SPLIT = "balanced"


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return load_lvlm()


@pytest.fixture(autouse=True)
def _one_model(monkeypatch: pytest.MonkeyPatch, lvlm: tuple[Any, Any]) -> None:
    monkeypatch.setattr("visionsel.generation.load_lvlm", lambda name, device, dtype: lvlm)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "world", size=1, test_size=2)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    assert main(["evaluate", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err if status else captured.out


def test_refcoco_is_kept_continued_and_compared_with_chance(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["refcoco", "--data", root / "refcoco", "--images", root / "images", "--split", SPLIT]
    command += ["--limit", 6, "--heatmap", "mean"]
    out = tmp_path / "rows.jsonl"
    found = json.loads(run(capsys, *command, "--out", out, "--json"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == found["samples"] == 6
    assert {key: found[key] for key in ("c_iou", "g_iou")} == {
        key: score(overlaps_of(rows))[key] for key in ("c_iou", "g_iou")
    }
    assert found["method"] == "mean"
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))
    text = run(capsys, *command, "--out", out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert text.startswith(f"refcoco, split {SPLIT}, each sentence is a sample, as LISA and GLaMM count: 6")
    assert f"{found['c_iou']:.3f}" in text.splitlines()[-1].split()
    error = run(capsys, *command, "--baseline", "points", "--out", out, status=1)
    assert "baseline None, now 'points'" in error
    chance = json.loads(run(capsys, *command, "--baseline", "center", "--json"))
    assert chance["method"] == "center"
    assert chance["g_iou"] < found["g_iou"]
    other = run(capsys, *command, "--heatmap", "nothing", status=1)
    assert "no method is called 'nothing'" in other


def test_detections_are_matched_by_names_or_by_clip(
    root: Path, lvlm: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instances = root / "annotations" / f"instances_{SPLIT}.json"
    command = ["coco", "--data", instances, "--images", root / "images", "--heatmap", "mean"]
    command += ["--no-crops", "--questions", "describe the image.", "--out", tmp_path / "rows.jsonl"]
    results = tmp_path / "results.json"
    found = json.loads(run(capsys, *command, "--results", results, "--json"))
    truth = json.loads(instances.read_text())
    names = {row["id"]: row["name"] for row in truth["categories"]}
    made = json.loads(results.read_text())
    assert found["bbox"]["ap"] == pytest.approx(detection.average_precision(truth, made)["ap"])
    assert found["matching"] == "equal names"
    assert found["detections"] == found["without_category"] + len(made)
    grounder = Grounder(*lvlm, "embedded", "mean")
    image = truth["images"][0]
    seen = grounder.detect(root / "images" / image["file_name"], "describe the image.", crops=False)
    assert sorted(names[row["category_id"]] for row in made if row["image_id"] == image["id"]) == sorted(
        word.name for word in seen.words if word.name in names.values()
    )
    text = run(capsys, *command, "--clip", "embedded", "--temperature", "0.1")  # the same lines
    assert "text similarity by embedded, temperature 0.1" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["bbox", "segm"]
    assert "is for --clip" in run(capsys, *command, "--temperature", "0.1", status=1)
    coda = ["coda", "--data", instances, "--images", root / "images", "--heatmap", "mean", "--limit", 1]
    found = json.loads(run(capsys, *coda, *command[7:10], "--json"))
    assert set(found["bbox"]) == {"ar", "ar_50", "ar_75"}
    assert found["images"] == 1


def test_what_is_missing_is_said(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (
        ("png", "no file png_coco_val2017.json"),
        ("vizwiz-grounding", "val_grounding.json"),
        ("lvis", "there is no file"),
        ("refcoco", "instances.json"),
    ):
        data = tmp_path / "none.json" if name == "lvis" else tmp_path
        assert message in run(capsys, name, "--data", data, "--images", tmp_path, status=1)
    command = ["refcoco", "--data", root / "refcoco", "--images", root / "images", "--split", SPLIT]
    assert "--threshold is a number or otsu" in run(capsys, *command, "--threshold", "x", status=1)
    assert "no segmenter 'sam'" in run(capsys, *command, "--segmenter", "sam", status=1)
