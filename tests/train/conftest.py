import multiprocessing
from collections.abc import Callable
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


@pytest.fixture(autouse=True)
def _one_thread(_one_seed_and_the_workers_share_of_threads: None) -> None:
    torch.set_num_threads(1)  # the tensors here are too small for more


def clean_processes() -> Any:
    """Processes that know the training programs, but not what ran here: threads do not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.classification"])
    return context


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
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
        },
        "model": {**SMALL, "lr": 1e-3},
        "data": {"root": str(images), "image_size": 32, "batch_size": 4},
    }
    for part, values in parts.items():
        config[part] = {**config[part], **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(config))
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
