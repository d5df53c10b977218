import csv
import faulthandler
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from train.classification import main

SMALL = {
    "model": "biformer_tiny",
    "model_args": {
        "embed_dims": [32, 32, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_windows": [2, 2, 2, 1],
        "topks": [1, 2, 4, -1],
        "drop_path_rate": 0.2,
    },
}
"""A BiFormer of 100 thousand parameters, with stochastic depth."""

TRAINER = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}
"""Lightning's arguments of a run of seconds."""


@pytest.fixture(autouse=True)
def _one_thread(_one_seed_and_the_workers_share_of_threads: None) -> None:
    torch.set_num_threads(1)  # the tensors here are too small for more


def clean_processes() -> Any:
    """Processes that know the training programs, but not what ran here: threads do not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.classification"])
    return context


def run_in_two(program: Callable[[list[str]], int], lines: list[list[str]], folder: Path) -> None:
    """Give command lines, one after the other, to two processes that share each, as torchrun starts them.

    Args:
        program: takes a line and returns its exit status; by its name in a module.
        lines: that must succeed.
        folder: for what the processes say.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = clean_processes()
    arguments = [(rank, port, program, lines, folder) for rank in range(2)]
    processes = [context.Process(target=_one_of_two, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    statuses = [json.loads(path.read_text()) for path in sorted(folder.glob("statuses*.json"))]
    said = [path.read_text() for path in sorted(folder.glob("said*.txt"))]
    assert statuses == [[0] * len(lines)] * 2, said


def _one_of_two(
    rank: int, port: int, program: Callable[[list[str]], int], lines: list[list[str]], folder: Path
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    # line by line, and where it stands while there is still time: of a process that waits for ever
    with (folder / f"said{rank}.txt").open("w", buffering=1) as said, redirect_stderr(said):
        faulthandler.dump_traceback_later(200, file=said)
        statuses = [program(line) for line in lines]
        faulthandler.cancel_dump_traceback_later()
    (folder / f"statuses{rank}.json").write_text(json.dumps(statuses))


def record_losses(monkeypatch: pytest.MonkeyPatch, kind: type) -> dict[tuple[int, int], float]:
    """Loss of every batch (epoch, index) that modules of a class train on; empty it before a run."""
    seen: dict[tuple[int, int], float] = {}
    step: Any = kind.training_step  # type: ignore[attr-defined]

    def recorded(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        assert (self.current_epoch, batch_idx) not in seen
        seen[self.current_epoch, batch_idx] = loss.item()
        return loss

    monkeypatch.setattr(kind, "training_step", recorded)
    return seen


def rows(run: Path, column: str) -> list[float]:
    """What a run logged under a name, in order."""
    with (run / "logs" / "version_0" / "metrics.csv").open() as stream:
        return [float(row[column]) for row in csv.DictReader(stream) if row[column]]


def merged(config: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """A configuration with others merged into its parts."""
    config = dict(config)
    for part, values in parts.items():
        config[part] = {**config.get(part, {}), **values} if isinstance(values, dict) else values
    return config


def run_writer(folder: Path, **common: Any) -> Callable[..., Path]:
    """A function that writes `FOLDER/NAME.yaml`, the configuration of a short run into `FOLDER/NAME`.

    Its keyword arguments are merged into the parts of the configuration, as those of this one are.
    """

    def write(name: str = "run", **parts: Any) -> Path:
        config = merged({"output": str(folder / name), "trainer": TRAINER}, common)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(config, parts)))
        return path

    return write


def make_image_folder(root: Path) -> Path:
    """Three classes of noise around three grey levels: 24 images to train on, 9 to validate, 9 to test."""
    generator = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 3, "test": 3}.items():
        for label, name in enumerate(["ant", "bee", "cat"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(80 * label, 80 * label + 90, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def make_config(path: Path, images: Path, **parts: Any) -> Path:
    """Write a configuration over an image folder; keyword arguments are merged into its parts."""
    config: dict[str, Any] = {
        "output": str(path.parent / "run"),
        "trainer": TRAINER,
        "model": {**SMALL, "lr": 1e-3},
        "data": {"root": str(images), "image_size": 32, "batch_size": 4},
    }
    path.write_text(yaml.safe_dump(merged(config, parts)))
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images")


@pytest.fixture
def write_config(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:
    def write(name: str = "config.yaml", **parts: Any) -> Path:
        return make_config(tmp_path / name, image_folder, **parts)

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, to read only."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_config(folder / "config.yaml", make_image_folder(folder / "images"))
    assert main(["fit", "--config", str(config)]) == 0
    return folder / "run"
