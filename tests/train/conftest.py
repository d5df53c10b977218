from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

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


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three classes of noise around three grey levels: 24 images to train on, 9 to validate, 9 to test."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 3, "test": 3}.items():
        for label, name in enumerate(["ant", "bee", "cat"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(80 * label, 80 * label + 90, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def write_config(tmp_path: Path, image_folder: Path):
    """Write a configuration over `image_folder`; keyword arguments are merged into its parts."""

    def write(name: str = "config.yaml", **parts: dict) -> Path:
        config = {
            "output": str(tmp_path / "run"),
            "trainer": {
                "max_epochs": 2,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
            },
            "model": {**SMALL, "lr": 1e-3},
            "data": {"root": str(image_folder), "image_size": 32, "batch_size": 4},
        }
        for part, values in parts.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write
