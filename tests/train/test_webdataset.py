"""Shards give each sample once, in an order of seed and epoch, and go on exactly where a run stopped."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from tests.train.conftest import record_losses
from tests.train.test_resume import checkpoints
from train.classification import ClassificationCLI, ImageClassifier, main
from train.image_data import ImageFolderData
from visionsel.data.shards import ShardLoader, Shards, ShardStream, buffer_order, find_shards, index_shards

SIZES = {"train": (7, 5, 9, 6), "val": (2, 3)}
TRAIN, VAL = "train-{000..003}.tar", "val-{000..001}.tar"
CLASSES = ["ant", "bee", "cat"]


def write_shard(path: Path, numbers: range, size: int = 1, **parts: bytes | None) -> None:
    """Samples whose images are grey as their number."""
    with TarWriter(str(path)) as writer:
        for number in numbers:
            content = io.BytesIO()
            Image.new("L", (size, size), number * 8).save(content, "png")
            sample = {"png": content.getvalue(), "cls": str(number % 3).encode(), **parts}
            sample = {key: value for key, value in sample.items() if value is not None}
            writer.write({"__key__": f"{number:05d}", **sample})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for split, sizes in SIZES.items():
        ends = np.cumsum(sizes)
        for shard, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            write_shard(folder / f"{split}-{shard:03d}.tar", range(end - size, end), size=32)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    for split in (TRAIN, VAL):
        index_shards(str(folder), split)
    return folder


def number(image: Image.Image, label: int, epoch: int, position: int) -> int:
    found = image.getpixel((0, 0))[0] // 8
    assert label == found % 3
    return found


def loader(shards: Shards, workers: int = 0, **options) -> ShardLoader:
    options = {"make": number, "classes": 3, "batch_size": 3, "shuffle": 4, "seed": 5} | options
    return ShardLoader(ShardStream(shards, **options), workers)


def epoch(source: ShardLoader, which: int = 0) -> list[list[int]]:
    source.set_epoch(which)
    return [batch.tolist() for batch in source]


@pytest.mark.parametrize(("devices", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_devices_and_workers_share_an_epoch_without_losing_or_doubling_a_sample(
    root, devices, workers
) -> None:
    shards = find_shards(str(root), TRAIN)
    parts = [epoch(loader(shards, workers, num_replicas=devices, rank=rank)) for rank in range(devices)]
    batches = 27 // devices // 3
    assert [[len(batch) for batch in part] for part in parts] == [[3] * batches] * devices
    seen = [sample for part in parts for batch in part for sample in batch]
    # the only ones left out are those that do not fill a batch on every device
    assert len(set(seen)) == len(seen) == batches * 3 * devices


@pytest.mark.parametrize(("devices", "workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_evaluation_sees_each_sample_once_and_fills_up_the_last_batches(root, devices, workers) -> None:
    shards = find_shards(str(root), TRAIN)
    options = {"shuffle": None, "padding": -100, "num_replicas": devices}
    loaders = [loader(shards, workers, rank=rank, **options) for rank in range(devices)]
    parts = [epoch(source) for source in loaders]
    assert [len(part) for part in parts] == [len(loaders[0])] * devices
    seen = [sample for part in parts for batch in part for sample in batch]
    assert sorted(sample for sample in seen if sample != -100) == list(range(27))


def test_order_depends_on_seed_and_epoch_and_on_nothing_that_ran_before(root) -> None:
    shards = find_shards(str(root), TRAIN)
    first, other = epoch(loader(shards), 1), loader(shards)
    assert epoch(other, 0) != first
    assert epoch(other, 1) == first
    assert epoch(loader(shards, seed=6), 1) != first
    assert first != sorted(first)


def test_a_shuffle_buffer_gives_each_position_once_and_none_before_it_was_read() -> None:
    order = buffer_order(100, 10, np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    assert all(position < turn + 10 for turn, position in enumerate(order))
    assert sum(abs(position - turn) for turn, position in enumerate(order)) > 200
    assert buffer_order(5, 1, np.random.default_rng(0)) == [0, 1, 2, 3, 4]
    assert buffer_order(0, 3, np.random.default_rng(0)) == []


@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, 9)), (2, [3])])
def test_a_loader_continues_where_another_stopped(root, workers, stops) -> None:
    shards = find_shards(str(root), TRAIN)
    whole = epoch(loader(shards, workers), 2)
    stopped = loader(shards, workers)
    stopped.set_epoch(2)
    given = iter(stopped)
    for done in range(1, max(stops) + 1):
        assert next(given).tolist() == whole[done - 1]
        if done in stops:
            resumed = loader(shards, workers)
            resumed.load_state_dict(stopped.state_dict())
            assert epoch(resumed, 2) == whole[done:]
            assert resumed.state_dict() == {**stopped.state_dict(), "batches": 9, "finished": True}
            if done == 3:
                assert epoch(resumed, 3) == epoch(loader(shards, workers), 3)


def test_what_an_interrupted_epoch_depends_on_cannot_change(root) -> None:
    shards = find_shards(str(root), TRAIN)
    stopped = loader(shards)
    next(iter(stopped))
    for options in ({"batch_size": 2}, {"shuffle": 5}, {"num_replicas": 2}):
        with pytest.raises(ValueError, match="middle of an epoch"):
            loader(shards, **options).load_state_dict(stopped.state_dict())
    epoch(stopped)
    resumed = loader(shards, batch_size=2)
    resumed.load_state_dict(stopped.state_dict())
    assert epoch(resumed) == []  # all of it was given
    assert epoch(resumed, 1) == epoch(loader(shards, batch_size=2), 1)


def test_shards_are_counted_once_and_the_index_is_one_of_timm(root) -> None:
    index = json.loads((root / "_info.json").read_text())["splits"]
    assert index[TRAIN]["shard_lengths"] == list(SIZES["train"])
    assert index[TRAIN]["num_samples"] == 27
    assert find_shards(str(root), VAL).sizes == SIZES["val"]
    stamp = (root / "_info.json").stat().st_mtime_ns
    index_shards(str(root), TRAIN)
    assert (root / "_info.json").stat().st_mtime_ns == stamp
    index["train"] = index.pop(TRAIN)  # as in the data sets that timm has on the hub
    (root / "timm.json").write_text(json.dumps({"splits": index}))
    assert find_shards(str(root), "train", root / "timm.json") == find_shards(str(root), TRAIN)


def test_shards_behind_a_command_are_read_too_as_far_as_they_are_wanted(root) -> None:
    names = [f"pipe:cat {root}/train-{shard:03d}.tar" for shard in range(4)]
    index = {"train": {"filenames": names, "shard_lengths": SIZES["train"]}}
    (root / "pipes.json").write_text(json.dumps({"splits": index}))
    shards = find_shards("", "train", root / "pipes.json")
    options = {"num_replicas": 3, "rank": 0}
    assert epoch(loader(shards, **options)) == epoch(loader(find_shards(str(root), TRAIN), **options))


def test_what_is_wrong_with_shards_is_named(root) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-009\.tar"):
        find_shards(str(root), "train-009.tar")
    with pytest.raises(ValueError, match="shard_index"):
        find_shards("https://host", TRAIN)
    with pytest.raises(ValueError, match=r"does not say .* train-000\.tar holds and 3 more"):
        find_shards("https://host", TRAIN, root / "none.json")
    (root / "none.json").write_text("[]")
    with pytest.raises(ValueError, match=r"none\.json is not an index"):
        find_shards(str(root), TRAIN, root / "none.json")
    (root / "bad.tar").write_text("not a tar file" * 100)
    with pytest.raises(ValueError, match=r"bad\.tar is not a tar shard"):
        index_shards(str(root), "bad.tar")

    shards = find_shards(str(root), TRAIN)
    for sizes, message in (((7, 5, 9, 7), "holds 6 samples, its index says 7"), ((7, 5, 9, 5), "holds 6")):
        with pytest.raises(ValueError, match=message):
            epoch(loader(Shards(shards.urls, sizes), shuffle=None, padding=-1))
    path = root / "train-000.tar"
    for parts, message in (
        ({"cls": b"3"}, "00000 .*class 3 of 3"),
        ({"cls": None}, "00000 has png; expected"),
        ({"png": b"no image"}, "00000 is not an image"),
    ):
        write_shard(path, range(7), **parts)
        with pytest.raises(ValueError, match=f"train-000.tar: {message}"):
            epoch(loader(shards, shuffle=None))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"train-000\.tar is not a tar shard"):
        epoch(loader(shards, shuffle=None))


@pytest.fixture
def data(root) -> dict:
    return {
        "dataset": "shards",
        "root": str(root),
        "train_split": TRAIN,
        "val_split": VAL,
        "classes": str(root / "classes.txt"),
        "shuffle_buffer": 5,
        "auto_augment": "rand-m9-mstd0.5",
    }


@pytest.mark.slow
def test_a_resumed_run_over_shards_has_the_losses_of_an_uninterrupted_one(
    tmp_path, write_config, data, monkeypatch
) -> None:
    losses = record_losses(monkeypatch, ImageClassifier)
    folder = tmp_path / "checkpoints"
    trainer = {"callbacks": checkpoints(folder)[:1]}
    whole = write_config(data=data, trainer=trainer)
    assert main(["fit", "--config", str(whole)]) == 0
    expected = dict(losses)
    assert list(expected) == [(epoch, batch) for epoch in range(2) for batch in range(6)]
    for step in (6, 2):  # in this order, so that none starts from what one before it wrote
        losses.clear()
        output = str(tmp_path / f"{step}")
        config = write_config(f"{step}.yaml", data=data, trainer=trainer, output=output)
        assert main(["fit", "--config", str(config), "--ckpt_path", str(folder / f"step{step}.ckpt")]) == 0
        assert list(losses) == list(expected)[step:]
        assert list(losses.values()) == pytest.approx(list(expected.values())[step:], abs=1e-6)


@pytest.mark.slow
def test_shards_are_validated_whole(write_config, data, tmp_path) -> None:
    config = write_config(data=data)
    cli = ClassificationCLI(["fit", "--config", str(config), "--trainer.max_epochs", "1"])
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["hyper_parameters"]["class_names"] == CLASSES
    assert cli.trainer.num_training_batches == 6
    assert cli.trainer.num_val_batches == [2]
    loaders = cli.datamodule.val_dataloader()
    images, labels = (torch.cat(parts) for parts in zip(*loaders, strict=True))
    assert labels.tolist() == [0, 1, 2, 0, 1]
    logits = cli.model.eval()(images)
    top1 = cli.trainer.callback_metrics["val/top1"].item()
    assert top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_what_shards_cannot_do_is_said(data) -> None:
    for wrong, message in (
        ({"repeats": 3}, "repeats 3"),
        ({"verify": True}, "verify"),
        ({"classes": None}, "need classes"),
        ({"classes": "imagenet-1q"}, "imagenet-1q is neither"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolderData(**data | wrong)
    with pytest.raises(ValueError, match="27 images, fewer than batch_size 32"):
        ImageFolderData(**data, batch_size=32).setup("fit")
    with pytest.raises(ValueError, match="predict_folder"):
        _ = ImageFolderData(**data).predict_files
