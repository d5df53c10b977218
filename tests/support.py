"""Golden fixtures: numbers from the authors' code, with weights and inputs regenerated from a formula.

A fixture (`tests/fixtures/NAME.json.gz`) stores key names, shapes and outputs, never weights. A weight or an
input is `wave(key)`, a deterministic sequence seeded by its name, scaled by a rule on its name and shape.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"

# last name components of tables of positional biases and queries, filled at half scale
TABLES = frozenset(
    "rpb rpb1 rpb2 height_rel width_rel rel_height rel_width relative_pos_bias_local learnable_tokens "
    "query_embedding relative_position_bias_table".split()
)


@cache
def load_fixture(name: str) -> dict[str, Any]:
    with gzip.open(FIXTURES / f"{name}.json.gz", "rt") as file:
        return json.load(file)


_BEND = 0.0031 * np.arange(1009.0) ** 2
_CHUNK = 1009 * 32


def wave(key: str, count: int) -> np.ndarray:
    """`sin(0.7 i + 0.0031 (i % 1009)^2 + phase of the key)`, float64 `[count]`."""
    phase = (zlib.crc32(key.encode()) % 1000) / 159.0
    out = np.empty(count)
    bend = np.resize(_BEND, min(count, _CHUNK))
    for start in range(0, count, _CHUNK):  # what stays in the cache: the largest models have 200 M weights
        part = out[start : start + _CHUNK]
        part[:] = 0.7 * np.arange(start, start + len(part), dtype=np.float64) + bend[: len(part)]
        part += phase
        np.sin(part, out=part)
    return out


def fill(key: str, shape: tuple[int, ...]) -> Tensor | None:
    """The float32 value of a state-dict entry; None for a counter, which stays as built."""
    count = math.prod(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return None
    values = wave(key, count)
    if last == "running_mean" or last == "beta":
        values = 0.02 * values
    elif last == "running_var":
        values = 1 + 0.1 * values
    elif last.startswith("gamma"):
        values = 0.5 + 0.1 * values
    elif last in TABLES:
        values = 0.5 * values
    elif len(shape) <= 1:
        values = 1 + 0.1 * values if last == "weight" else 0.02 * values
    elif count == shape[0]:  # a per-channel scale stored as [C, 1, 1, 1]
        values = 0.5 + 0.1 * values
    else:
        values = values / np.sqrt(count / shape[0])
        if len(shape) == 4 and shape[1] == 1:  # depthwise kernels
            values = 0.3 * values
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def fill_state_dict(entries: list[list]) -> dict[str, Tensor]:
    """The authors' state dict of a fixture: `[[key, shape, ...], ...]` -> tensors, float32."""
    state = {}
    for key, shape, *_ in entries:
        value = fill(key, tuple(shape))
        state[key] = torch.zeros(shape, dtype=torch.int64) if value is None else value
    return state


def input_image(height: int, width: int, channels: int = 3) -> Tensor:
    """The image `[1, channels, H, W]`, float32, on which the fixtures' models were run."""
    h = np.arange(height, dtype=np.float64)[:, None]
    w = np.arange(width, dtype=np.float64)[None, :]
    planes = [
        np.sin(0.05 * h * k) * np.cos(0.03 * w * k) + 0.1 * np.sin(0.9 * (h * width + w))
        for k in range(1, channels + 1)
    ]
    return torch.from_numpy(np.stack(planes)[None].astype(np.float32))


def input_tensor(key: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """The float32 operator input that a fixture names."""
    return torch.from_numpy((scale * wave(key, math.prod(shape))).reshape(shape).astype(np.float32))


def sample_features(feature: Tensor, count: int = 64) -> Tensor:
    """The values that a fixture stores of a feature map: `count` of them, evenly spread over the flat map."""
    flat = feature.flatten()
    return flat[[(j * (flat.numel() - 1)) // (count - 1) for j in range(count)]]


def check_model_fixture(
    model: torch.nn.Module,
    fixture: dict[str, Any],
    filter_fn: Callable[[dict[str, Tensor], torch.nn.Module], dict],
) -> None:
    """Load the authors' state dict through `filter_fn`, strictly, and compare every output that is stored.

    float64: atol 1e-9. float32: atol 2e-5 + 10 x the float32 error of the authors' own code.
    """
    model.load_state_dict(filter_fn(fill_state_dict(fixture["state_dict"]), model), strict=True)
    assert sum(p.numel() for p in model.parameters()) == fixture["n_params"]
    model.eval()
    runs = [("", tuple(fixture["input_size"][1:]))]
    for name, key in (("_alt", "alt_size"), ("_alt2", "alt_size2")):
        if key in fixture:
            runs.append((name, tuple(fixture[key])))
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        suffix = "_f64" if dtype == torch.float64 else ""
        for name, size in runs:
            if f"logits{name}{suffix}" not in fixture:
                continue
            image = input_image(*size).to(dtype)
            error = fixture.get(f"maxdiff{name}_f32_f64", fixture["maxdiff_f32_f64"])
            atol = 1e-9 if dtype == torch.float64 else 2e-5 + 10 * error
            indices, samples = fixture.get("feature_indices"), fixture.get("feature_shapes") and not name
            with torch.no_grad():
                if samples:
                    final, features = model.forward_intermediates(image, indices=indices)
                # in float64, the slow one, both are of one forward
                shared = samples and dtype == torch.float64
                logits = (model.forward_head(final) if shared else model(image))[0]
            expected = torch.tensor(fixture[f"logits{name}{suffix}"], dtype=torch.float64)
            torch.testing.assert_close(logits.double(), expected, rtol=0, atol=atol)
            if not samples:
                continue
            assert [list(f.shape) for f in features] == fixture["feature_shapes"]
            for feature, sample in zip(features, fixture[f"features_sample{suffix}"], strict=True):
                expected = torch.tensor(sample, dtype=torch.float64)
                rtol = 1e-9 if dtype == torch.float64 else 1e-4
                scale = expected.abs().max().item()
                torch.testing.assert_close(
                    sample_features(feature).double(), expected, rtol=0, atol=rtol * max(scale, 1.0)
                )


__all__ = [
    "check_model_fixture",
    "fill",
    "fill_state_dict",
    "input_image",
    "input_tensor",
    "load_fixture",
    "sample_features",
    "wave",
]
