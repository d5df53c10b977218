"""The `visionsel` command as a process: what a shell sees, where it cannot be seen from inside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "visionsel"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: Any, **named: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ALONE, timeout=300, **named
    )


def test_classes_of_images_come_out_though_one_of_them_is_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1, 1)}
    model = timm.create_model("selectformer_nano", num_classes=2, **small)
    recipe = {
        "model": "selectformer_nano",
        "model_args": small,
        "class_names": ["circle", "star"],
        "preprocessing": {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0},
    }
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": recipe}, tmp_path / "last.ckpt")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    done = run("predict", "b.png", "a.png", "--checkpoint", "last.ckpt", "--json", cwd=tmp_path)
    assert done.returncode == 1
    (result,) = json.loads(done.stdout)
    assert result["image"] == "a.png"
    assert {entry["label"] for entry in result["classes"]} == {"circle", "star"}
    assert sum(entry["probability"] for entry in result["classes"]) == pytest.approx(1, abs=1e-5)
    (line,) = done.stderr.splitlines()
    assert line.startswith("visionsel predict: b.png is not an image that Pillow can read")


def test_an_answer_and_its_picture_come_out_and_nothing_else(tmp_path: Path) -> None:
    ShapesWorld("balanced", 3, 1)[0].image.save(tmp_path / "scene.png")
    command = ["generate", "scene.png", CAPTION_PROMPT, "--prune", "fastv:keep=0.5,layer=1"]
    done = run(*command, "-o", "new/kept.png", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["report"]["visual_tokens"] == [64, 32, 32, 32]
    with Image.open(tmp_path / "new" / "kept.png") as picture:
        assert picture.width > 128
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["kept.png", "scene.png"]


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    with subprocess.Popen(
        [*COMMAND, "models", "nat_mini"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ALONE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=300) == 141


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell lets programs in its background ignore Ctrl-C, and they their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_command_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [*COMMAND, "data", "shapes", "--out", str(tmp_path / "world"), "--size", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ALONE) as running:
        while not any(tmp_path.rglob("*.png")) and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=300)
    assert (running.returncode, said) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_each_verb_that_needs_it_names_the_extra(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    commands = [
        ["generate", "a.png", "hello"],
        ["ground", "a.png", "hello"],
        ["evaluate", "pope", "--data", "shapes"],
        ["evaluate", "refcoco", "--data", "a", "--images", "b"],
        ["evaluate", "embedded"],
        ["evaluate", "pruning"],
        ["bench", "pruning"],
        ["bench", "grounding"],
    ]
    program = f"""
import sys
sys.modules["transformers"] = None  # as where it is not installed
from visionsel.cli import main
assert main(["bench", "--explain", "--json"]) == 0
sys.exit(sum(main(command) for command in {commands!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ALONE, cwd=tmp_path, timeout=300
    )
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (len(commands), len(commands)), done.stderr
    for command, line in zip(commands, lines, strict=True):
        verbs = " ".join(command[: 2 if command[0] in ("evaluate", "bench") else 1])
        assert line.startswith(f"visionsel {verbs}: ")
        assert 'pip install "visionsel[multimodal]"' in line
    found = json.loads(done.stdout)
    assert {call["operator"] for call in found["calls"]} == {
        "neighborhood",
        "bilevel_routing",
        "halo",
        "focal_modulation",
    }
