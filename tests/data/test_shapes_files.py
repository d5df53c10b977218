"""The written shapes world: other people's readers read it, and the checker finds nothing untrue in it."""

import contextlib
import io
import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionsel.cli import main
from visionsel.data.imagefolder import check_image_folder, list_images, read_image_folder
from visionsel.data.shapes import (
    COLORS,
    PARTNERS,
    SHAPES,
    ShapesWorld,
    check_shapes,
    write_shapes,
)
from visionsel.data.shapes.files import POPE_KINDS, SPLITS
from visionsel.data.shapes.masks import decode_rle, encode_rle, trace_polygons

# pycocotools 2.0.11 has not followed NumPy 2 in its own classes
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
MASK_READERS = ["pycocotools.mask", "faster_coco_eval.core.mask"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "world"
    return write_shapes(folder, size=200, test_size=200, caption_noise=0.5, co_occurrence=0.5)


def copy_texts(root: Path, target: Path) -> Path:
    """A copy of the folder to write lies into; it shares the images."""
    shutil.copytree(root, target, ignore=shutil.ignore_patterns("images", "classification"))
    (target / "images").symlink_to(root / "images")
    return target


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_that_the_files_say_is_true(root: Path) -> None:
    assert check_shapes(root) == []


def test_everything_is_true_at_another_size(tmp_path: Path) -> None:
    write_shapes(tmp_path / "large", size=60, test_size=60, image_size=96, distribution="balanced")
    assert check_shapes(tmp_path / "large") == []


# one lie a file, and what the checker says of it
LIES = {
    "captions_val": ("annotations/captions_val.json", "is not true"),
    "instances_val": ("annotations/instances_val.json", "is not that of its mask"),
    "instances_rle_val": ("annotations/instances_rle_val.json", "is not that of its mask"),
    "questions": ("questions/anti.jsonl", "is not true"),
    "pope": ("pope/balanced_popular.json", "is not true"),
    "refs": ("refcoco/refs.json", "is not annotation"),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_checker_finds_a_single_lie(root: Path, tmp_path: Path, lie: str) -> None:
    name, message = LIES[lie]
    copy = copy_texts(root, tmp_path / "copy")
    path = copy / name
    if name.endswith("refs.json"):
        content = read(path)
        first, second = next(pair for pair in pairwise(content) if pair[0]["image_id"] == pair[1]["image_id"])
        first["sentences"], second["sentences"] = second["sentences"], first["sentences"]
        path.write_text(json.dumps(content))
    elif name.startswith("annotations"):
        content = read(path)
        if "captions" in name:
            caption = content["annotations"][7]["caption"]
            color = next(word for word in caption.split() if word in COLORS)
            other = next(word for word in COLORS if word != color)
            content["annotations"][7]["caption"] = caption.replace(color, other, 1)
        else:
            content["annotations"][7]["bbox"][0] += 1
        path.write_text(json.dumps(content))
    else:
        rows = read_lines(path)
        key = "label" if lie == "pope" else "answer"
        rows[0][key] = "no" if rows[0][key] == "yes" else "yes"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any(message in problem for problem in check_shapes(copy))


@pytest.mark.parametrize("kind", ["color", "absent", "count", "where", "what", "relation", "refer"])
def test_the_checker_judges_every_kind_of_question(root: Path, tmp_path: Path, kind: str) -> None:
    """Each answer is swapped for that of the next question of its kind; none that differs is passed over."""
    copy = copy_texts(root, tmp_path / "copy")
    path = copy / "questions" / "balanced.jsonl"
    rows = read_lines(path)
    chosen = [row for row in rows if row["kind"] == kind]
    swapped = {"yes": "no", "no": "yes"} if kind == "relation" else {}
    different = 0
    for row, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        answer = "red" if kind == "absent" else swapped.get(row["answer"], other["answer"])
        different += answer != row["answer"]
        row["wrong"] = answer
    for row in chosen:
        row["answer"] = row.pop("wrong")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(check_shapes(copy)) == different > 20


def test_noise_is_in_the_captions_of_the_training_split_only(root: Path) -> None:
    for split in SPLITS:
        instances = read(root / "annotations" / f"instances_{split}.json")
        there = Counter(row["image_id"] for row in instances["annotations"])
        captions = read(root / "annotations" / f"captions_{split}.json")["annotations"]
        too_many = [
            row
            for row in captions
            if sum(word in SHAPES for word in row["caption"].split()) > there[row["image_id"]]
        ]
        assert (len(too_many) > 20) == (split == "train")
        assert split == "train" or not too_many


def test_the_checker_allows_no_noise_where_the_card_has_none(root: Path, tmp_path: Path) -> None:
    copy = copy_texts(root, tmp_path / "copy")
    card = read(copy / "shapes.json")
    (copy / "shapes.json").write_text(json.dumps({**card, "caption_noise": 0.0}))
    problems = check_shapes(copy)
    assert len(problems) > 20
    assert all(problem.startswith("shapes_train_") for problem in problems)


def coco(reader: str, path: Path) -> Any:
    module = pytest.importorskip(reader)
    with contextlib.redirect_stdout(io.StringIO()):
        return module.COCO(str(path))


@pytest.mark.parametrize("reader", ["pycocotools.coco", "faster_coco_eval"])
@pytest.mark.parametrize("split", ["train", "balanced"])
def test_coco_readers_get_the_masks_from_polygons_and_from_run_lengths(
    root: Path, reader: str, split: str
) -> None:
    polygons = coco(reader, root / "annotations" / f"instances_{split}.json")
    runs = coco(reader, root / "annotations" / f"instances_rle_{split}.json")
    card = read(root / "shapes.json")["splits"][split]
    switches = {"co_occurrence": 0.5} if split == "train" else {}
    world = ShapesWorld(card["distribution"], card["seed"], card["size"], **switches)
    assert [c["name"] for c in polygons.loadCats(polygons.getCatIds())] == list(SHAPES)
    names = {row["file_name"]: image_id for image_id, row in polygons.imgs.items()}
    checked = 0
    for index, sample in enumerate(world):
        image_id = names[f"shapes_{split}_{index:06d}.png"]
        annotations = polygons.loadAnns(polygons.getAnnIds(imgIds=image_id))
        assert len(annotations) == len(sample.objects)
        for o, annotation in zip(sample.objects, annotations, strict=True):
            x0, y0, x1, y1 = o.box
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert annotation["area"] == o.area
            assert polygons.cats[annotation["category_id"]]["name"] == o.shape
            assert np.array_equal(polygons.annToMask(annotation).astype(bool), o.mask)
            assert np.array_equal(runs.annToMask(runs.anns[annotation["id"]]).astype(bool), o.mask)
            checked += 1
    assert checked > 400


@pytest.mark.parametrize("reader", ["pycocotools.coco", "faster_coco_eval"])
def test_coco_readers_get_the_captions(root: Path, reader: str) -> None:
    captions = coco(reader, root / "annotations" / "captions_anti.json")
    card = read(root / "shapes.json")["splits"]["anti"]
    for image_id, sample in zip(
        captions.getImgIds(), ShapesWorld("anti", card["seed"], card["size"]), strict=True
    ):
        rows = captions.loadAnns(captions.getAnnIds(imgIds=image_id))
        assert [row["caption"] for row in rows] == sample.captions


def test_refs_have_the_published_layout(root: Path) -> None:
    refs = read(root / "refcoco" / "refs.json")
    instances = read(root / "refcoco" / "instances.json")
    annotations = {row["id"]: row for row in instances["annotations"]}
    images = {row["id"]: row for row in instances["images"]}
    assert {ref["split"] for ref in refs} == set(SPLITS)
    for ref in refs:
        assert annotations[ref["ann_id"]]["image_id"] == ref["image_id"]
        assert annotations[ref["ann_id"]]["category_id"] == ref["category_id"]
        assert images[ref["image_id"]]["file_name"] == ref["file_name"]
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        assert all({"tokens", "raw", "sent", "sent_id"} == set(sentence) for sentence in ref["sentences"])
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    sentences = [i for ref in refs for i in ref["sent_ids"]]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", POPE_KINDS)
def test_pope_files_ask_as_pope_defines(root: Path, split: str, kind: str) -> None:
    rows = read_lines(root / "pope" / f"{split}_{kind}.json")
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(set(row) == {"question_id", "image", "text", "label"} for row in rows)
    assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
    asked = [(row["image"], row["text"].split()[3]) for row in rows]
    assert len(set(asked)) == len(asked)
    present = objects_by_image(root, split)
    assert set(Counter(image for image, _ in asked).values()) == {6}
    assert {image for image, _ in asked} == {image for image, shapes in present.items() if len(shapes) >= 3}
    known = list(objects_by_image(root, "train").values())
    often = Counter(shape for shapes in known for shape in shapes)
    together = Counter((a, b) for shapes in known for a in shapes for b in shapes)
    used: set[tuple[str, str]] = set()
    for (image, positive), (_, negative) in zip(asked[::2], asked[1::2], strict=True):
        assert positive in present[image]
        others = [s for s in SHAPES if s not in present[image] and (image, s) not in used]
        used.add((image, negative))
        if kind == "popular":
            assert often[negative] == max(often[shape] for shape in others)
        if kind == "adversarial":
            assert together[positive, negative] == max(together[positive, shape] for shape in others)


def test_adversarial_questions_ask_for_the_absent_partner(root: Path) -> None:
    rows = read_lines(root / "pope" / "anti_adversarial.json")
    pairs = [(a["text"].split()[3], b["text"].split()[3]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    bringing = [(positive, negative) for positive, negative in pairs if positive in PARTNERS]
    assert sum(PARTNERS[positive] == negative for positive, negative in bringing) > 0.6 * len(bringing) > 0


def objects_by_image(root: Path, split: str) -> dict[str, set[str]]:
    content = read(root / "annotations" / f"instances_{split}.json")
    names = {row["id"]: row["file_name"] for row in content["images"]}
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for row in content["annotations"]:
        found[names[row["image_id"]]].add(SHAPES[row["category_id"] - 1])
    return found


def test_images_are_the_samples(root: Path) -> None:
    card = read(root / "shapes.json")["splits"]["val"]
    world = ShapesWorld(card["distribution"], card["seed"], card["size"], co_occurrence=0.5)
    files = sorted((root / "images").glob("shapes_val_*"))
    for path, sample in zip(files, world, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), sample.pixels)


def test_the_splits_share_no_image(root: Path) -> None:
    digests = Counter(path.read_bytes() for path in list_images(root / "images"))
    assert max(digests.values()) == 1


def test_the_image_folder_has_every_shape_equally_often(root: Path) -> None:
    parts = ("train", "val", "test")
    assert check_image_folder(root / "classification", parts, verify=True) == sorted(SHAPES)
    for part, count in zip(parts, (20, 20, 20), strict=True):
        data = read_image_folder(root / "classification" / part)
        assert set(Counter(data.targets).values()) == {count}
    every = Counter(path.read_bytes() for path in list_images(root / "classification"))
    assert max(every.values()) == 1


def test_the_same_settings_write_the_same_files(tmp_path: Path) -> None:
    one = write_shapes(tmp_path / "one", size=12, test_size=3)
    other = write_shapes(tmp_path / "other", size=12, test_size=3)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_a_finished_folder_is_reused_and_others_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "world"
    write_shapes(target, size=5, test_size=2)
    stamp = (target / "shapes.json").stat().st_mtime_ns
    write_shapes(target, size=5, test_size=2)
    assert (target / "shapes.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="was written with"):
        write_shapes(target, size=6, test_size=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="has no shapes"):
        write_shapes(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    write_shapes(tmp_path / "empty", size=5, test_size=2)
    assert (tmp_path / "empty" / "shapes.json").is_file()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 11
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "world", size=5, test_size=2, progress=stop)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"has no shapes\.json"):
        check_shapes(tmp_path / "world")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size and test_size must be at least 1"),
        ({"seed": 2**30}, "seed must be from 0 to 2"),
        ({"distribution": "anti", "caption_noise": 0.5}, 'caption_noise is a switch of "train"'),
        ({"image_size": 8}, "image_size must be from 32"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(
    tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shapes(tmp_path / "world", **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "shapes", "--out", str(tmp_path / "world"), "--size", "6", "--image-size", "32"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["split", *SPLITS]
    assert main([*arguments, "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["splits"]["train"] == {"distribution": "train", "seed": 0, "size": 6}
    assert main([*arguments[:3], str(tmp_path / "other"), "--distribution", "even"]) == 1
    assert "unknown distribution 'even'" in capsys.readouterr().err
    assert main([*arguments, "--seed", "1"]) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("reader", MASK_READERS)
def test_run_lengths_are_those_of_the_readers(reader: str) -> None:
    reference = pytest.importorskip(reader)
    for sample in ShapesWorld("balanced", 31, 40):
        for o in sample.objects:
            expected = reference.encode(np.asfortranarray(o.mask.astype(np.uint8)))
            assert encode_rle(o.mask)["size"] == list(expected["size"])
            assert encode_rle(o.mask)["counts"].encode() == expected["counts"]


def odd_masks() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    masks = [generator.random((height, width)) < share for height, width, share in ODD for _ in range(5)]
    return [
        *masks,
        np.ones((3, 4), dtype=bool),
        np.pad(np.zeros((1, 1), dtype=bool), 3, constant_values=True),
    ]


ODD = [(7, 9, 0.5), (12, 5, 0.8), (20, 20, 0.3), (1, 6, 0.5), (300, 3, 0.02), (40, 200, 0.97)]


def test_run_lengths_come_back() -> None:
    for mask in [*odd_masks(), np.zeros((5, 4), dtype=bool)]:
        assert np.array_equal(decode_rle(encode_rle(mask)), mask)
    with pytest.raises(ValueError, match="do not fill"):
        decode_rle({"size": [4, 4], "counts": encode_rle(np.ones((5, 5), dtype=bool))["counts"]})


@pytest.mark.parametrize("reader", MASK_READERS)
def test_polygons_of_ragged_masks_with_holes_are_the_masks(reader: str) -> None:
    reference = pytest.importorskip(reader)
    for mask in odd_masks():
        polygons = trace_polygons(mask)
        if not mask.any():
            assert polygons == []
            continue
        runs = reference.frPyObjects([[float(side) for side in p] for p in polygons], *mask.shape)
        assert np.array_equal(reference.decode(reference.merge(runs)).astype(bool), mask)
