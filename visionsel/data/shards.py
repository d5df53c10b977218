"""Labelled images in tar shards of WebDataset's layout, streamed in an order fixed by seed and epoch.

A shard holds `<key>.jpg` (or another image) and `<key>.cls`, the class index, and is read from front to back;
it may lie wherever `webdataset.gopen` reads: a disk, a web server, behind a command (`pipe:...`). What each
process reads and in which order it gives it out is planned from the sizes of the shards alone:

- the shards are shuffled by seed and epoch and stand in a row;
- devices, and the worker processes of each, take adjoining stretches of the row, cut between samples, not
  between shards, so that none is lost or read twice;
- a worker gives its stretch out in the order of a shuffle buffer.

A run that goes on in the middle of an epoch makes the same plan and reads from where the rest of it starts.
The sizes stand in an index, in timm's format: `_info.json` with `splits`, their `filenames` and
`shard_lengths`.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from visionsel.files import write_json

__all__ = ["IMAGES", "ShardLoader", "ShardStream", "Shards", "buffer_order", "find_shards", "index_shards"]

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
"""Endings of the image of a sample."""


@dataclass(frozen=True)
class Shards:
    """The shards of a split.

    Attributes:
        urls: where they are.
        sizes: samples of each.
    """

    urls: tuple[str, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.sizes)


def find_shards(root: str, split: str, index: str | Path | None = None) -> Shards:
    """The shards of a split and their sizes.

    Args:
        root: folder or address before the names of the shards.
        split: names with ranges in braces, `train-{000..146}.tar`, or the name of a split of the index.
            Names with a scheme (`https://`, `pipe:`) stand alone, without `root`.
        index: JSON with the sizes; default `_info.json` in `root`.

    Raises:
        FileNotFoundError: naming a shard that is not there.
        ValueError: naming the shard whose size the index does not say, or the index that is none.
    """
    index = _index(root, index)
    splits = _read_index(index)
    sizes = _sizes(splits)
    names = _names(root, split, splits)
    unknown = [name for name in names if name not in sizes]
    if unknown:
        raise ValueError(
            f"{index} does not say how many samples {unknown[0]} holds"
            f"{f' and {len(unknown) - 1} more shards' if len(unknown) > 1 else ''}; shards on a disk are "
            "counted when training starts, those elsewhere need an index (docs/training.md)"
        )
    return Shards(tuple(_url(root, name) for name in names), tuple(sizes[name] for name in names))


def index_shards(root: str, split: str, index: str | Path | None = None) -> None:
    """Count the shards on a disk whose size the index does not say, and write it.

    Args:
        root, split, index: as for `find_shards`.

    Raises:
        FileNotFoundError: naming a shard that is not there.
        ValueError: naming the shard that cannot be read, or the index that is none.
        OSError: when the index cannot be written; name another in a folder that can.
    """
    index = _index(root, index)
    splits = _read_index(index)
    names = _names(root, split, splits)
    sizes = _sizes(splits)
    local = [name for name in names if name not in sizes and not _remote(_url(root, name))]
    if not local:
        return
    sizes |= {name: _count(_url(root, name)) for name in local}
    if any(name not in sizes for name in names):
        return  # `find_shards` names them
    lengths = [sizes[name] for name in names]
    splits[split] = {
        "name": split,
        "num_samples": sum(lengths),
        "filenames": names,
        "shard_lengths": lengths,
    }
    write_json({"splits": splits}, index)


def buffer_order(count: int, size: int, generator: np.random.Generator) -> list[int]:
    """The order in which a shuffle buffer of `size` gives out positions 0 to `count - 1` of a stream."""
    buffer = list(range(min(max(size, 1), count)))
    order = []
    slots = generator.integers(len(buffer), size=count - len(buffer)) if count else np.zeros(0)
    for position, slot in zip(range(len(buffer), count), slots.tolist(), strict=True):
        order.append(buffer[slot])
        buffer[slot] = position
    return order + [buffer[i] for i in generator.permutation(len(buffer))]


class ShardStream(IterableDataset[Any]):
    """One device's samples of an epoch.

    Args:
        shards: of the split.
        make: gives the sample of an image, its class, the epoch, and a position that no other sample of the
            epoch has.
        classes: how many there are.
        batch_size: of the loader; each worker gives whole batches.
        shuffle: samples in the buffer of each worker; None leaves all in the order of the shards.
        seed: of the shuffle.
        num_replicas, rank: the devices and which one this is.
        padding: for evaluation, the sample that fills up the devices with fewer samples, so that all have
            equally many batches. None, for training, leaves out the samples that do not fill a batch on
            every device.
    """

    def __init__(
        self,
        shards: Shards,
        make: Callable[[Image.Image, int, int, int], Any],
        classes: int,
        batch_size: int,
        shuffle: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        padding: Any = None,
    ) -> None:
        self.shards = shards
        self.make = make
        self.classes = classes
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.padding = padding
        if padding is None:
            self.batches = len(shards) // num_replicas // batch_size
            self.share = len(shards) // num_replicas
        else:
            self.share = -(-len(shards) // num_replicas)
            self.batches = -(-self.share // batch_size)
        # epoch, and the batches of it to leave out; shared, because worker processes outlive an epoch
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, done = self.place.tolist()
        # the loader takes its batches from worker 0, 1, ... in turn, and the first is batch `done`
        lane = (number + done) % workers
        batches = [len(range(i, self.batches, workers)) for i in range(workers)]
        first = sum(batches[:lane]) * self.batch_size
        last = first + batches[lane] * self.batch_size
        offset = self.rank * self.share
        start, stop = offset + first, offset + min(last, self.share)
        skip = len(range(lane, done, workers)) * self.batch_size
        yield from self._stretch(epoch, start, stop, skip)

    def _stretch(self, epoch: int, start: int, stop: int, skip: int) -> Iterator[Any]:
        """Samples `start` to `stop` of the row of an epoch, the first `skip` that are given out left out."""
        row = list(range(len(self.shards.urls)))
        there = max(0, min(stop, len(self.shards)) - start)
        order = list(range(there))
        if self.shuffle is not None:
            row = np.random.default_rng((self.seed, epoch)).permutation(len(row)).tolist()
            order = buffer_order(there, self.shuffle, np.random.default_rng((self.seed, epoch, start)))
        left = [start + position for position in order[skip:]]
        if left:
            wanted = set(left)
            samples = self._read(row, min(left), max(left) + 1)
            held: dict[int, tuple[dict[str, Any], str]] = {}
            for position in left:
                while position not in held:
                    found, sample = next(samples)
                    if found in wanted:
                        held[found] = sample
                image, label = _decode(*held.pop(position), self.classes)
                yield self.make(image, label, epoch, position)
            next(samples, None)  # to the end of a shard that ends here, where its size is checked
        for _ in range(stop - start - max(there, skip)):
            yield self.padding

    def _read(self, row: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Where in the row each sample from `start` to `stop` stands, its contents and where they are."""
        position = 0
        for shard in row:
            url, size = self.shards.urls[shard], self.shards.sizes[shard]
            if start < position + size and position < stop:
                number = -1
                for number, sample in enumerate(_open(url)):
                    if start <= position + number < stop and number < size:
                        yield position + number, (sample, url)
                    if position + number + 1 == stop and number + 1 < size:
                        return
                if number + 1 != size:
                    raise ValueError(
                        f"{url} holds {number + 1} samples, its index says {size}; delete the index to have "
                        "it written again"
                    )
            position += size


class ShardLoader:
    """Batches of a `ShardStream`; it continues in the middle of an epoch.

    Args:
        stream: of this device.
        num_workers: processes that read; 0 reads in the main process.
        loading: further arguments of the `DataLoader`.
    """

    def __init__(self, stream: ShardStream, num_workers: int = 0, **loading: Any) -> None:
        self.stream = stream
        self.num_workers = min(num_workers, stream.batches)
        loading["persistent_workers"] = self.num_workers > 0
        self.loader = DataLoader(
            stream, batch_size=stream.batch_size, num_workers=self.num_workers, **loading
        )
        self.epoch = 0
        self.given = 0, 0  # epoch and batches of it
        self._resume: tuple[int, int] | None = None

    batch_sampler = None  # Lightning asks for it where there is a sampler

    @property
    def sampler(self) -> "ShardLoader":
        """What Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[Any]:
        # a generator: Lightning makes iterators before it tells the epoch
        resumed = self._resume is not None and self._resume[0] == self.epoch
        done = self._resume[1] if resumed and self._resume else 0
        self._resume = None
        self.given = self.epoch, done
        self.stream.place.copy_(torch.tensor(self.given))
        for batch in self.loader:
            self.given = self.given[0], self.given[1] + 1
            yield batch

    @property
    def layout(self) -> dict[str, int | None]:
        """What the order of an epoch depends on, beside seed and shards."""
        stream = self.stream
        return {
            "devices": stream.num_replicas,
            "num_workers": self.num_workers,
            "batch_size": stream.batch_size,
            "shuffle": stream.shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches were given, whether these were all, and the layout."""
        epoch, done = self.given
        return {"epoch": epoch, "batches": done, "finished": done == len(self), "layout": self.layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave out the batches given, if the next epoch asked for is the one that was interrupted.

        Raises:
            ValueError: when the epoch was interrupted in the middle and the layout is another.
        """
        if state["finished"]:
            self._resume = state["epoch"], len(self)
        elif state["batches"] == 0 or state["layout"] == self.layout:
            self._resume = state["epoch"], state["batches"]
        else:
            raise ValueError(
                f"the checkpoint is from the middle of an epoch with {state['layout']}, not {self.layout}; "
                "go on with the same, or from the end of an epoch"
            )


def _index(root: str, index: str | Path | None) -> Path:
    if index is not None:
        return Path(index)
    if _remote(root):
        raise ValueError(f"shards at {root} need an index: give a JSON file as shard_index")
    return Path(root) / "_info.json"


def _read_index(index: Path) -> dict[str, Any]:
    if not index.exists():
        return {}
    try:
        splits = json.loads(index.read_text())["splits"]
        _sizes(splits)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    return splits


def _sizes(splits: dict[str, Any]) -> dict[str, int]:
    return {
        name: int(size)
        for split in splits.values()
        for name, size in zip(split["filenames"], split["shard_lengths"], strict=True)
    }


def _names(root: str, split: str, splits: dict[str, Any]) -> list[str]:
    """Names of the shards of a split; those on a disk exist."""
    from webdataset.shardlists import expand_urls

    names = list(splits[split]["filenames"]) if split in splits else expand_urls(split)
    for name in names:
        url = _url(root, name)
        if not _remote(url) and not Path(url).is_file():
            raise FileNotFoundError(f"no shard at {url}")
    return names


def _remote(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def _url(root: str, name: str) -> str:
    return name if _remote(name) else f"{root.rstrip('/')}/{name}"


def _count(path: str) -> int:
    """Samples of a shard on a disk, from the headers of the files in it."""
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(path) as tar:
            keys = [base_plus_ext(member.name)[0] for member in tar if member.isreg()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a tar shard that can be read: {error}") from error
    return sum(1 for _ in itertools.groupby(key for key in keys if key is not None))


def _open(url: str) -> Iterator[dict[str, Any]]:
    """Samples of a shard, in order, undecoded."""
    from webdataset.gopen import gopen, set_options
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with gopen(url) as stream:
            try:
                yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
            except GeneratorExit:
                set_options(stream, ignore_errors=True)  # a command that is not heard out ends with one
                raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{url} is not a tar shard that can be read: {error}") from error


def _decode(sample: dict[str, Any], url: str, classes: int) -> tuple[Image.Image, int]:
    where = f"{url}: {sample['__key__']}"
    content = next((sample[ending] for ending in IMAGES if ending in sample), None)
    if content is None or "cls" not in sample:
        endings = ", ".join(key for key in sample if not key.startswith("__"))
        raise ValueError(f"{where} has {endings}; expected an image ({', '.join(IMAGES)}) and cls")
    try:
        label = int(sample["cls"])
        if not 0 <= label < classes:
            raise ValueError(f"class {label} of {classes} classes")
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB"), label
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is not an image with a class: {error}") from error
