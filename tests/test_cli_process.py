"""The `visionsel` command as a process: what a shell sees, where it cannot be seen from inside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.data.shapes.masks import encode_rle

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "visionsel"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# each line of stdin is a folder and a command, run in a process of its own that need not import torch again
FORKS = """
import gc, json, os, sys, tempfile
from visionsel.cli import main
import visionsel.generation, visionsel.multimodal.evaluation, visionsel.multimodal.grounding.grounder
gc.freeze()
for line in sys.stdin:
    folder, *command = json.loads(line)
    said = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(said[0].fileno(), 1)
        os.dup2(said[1].fileno(), 2)
        sys.exit(main(command))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in said:
        file.seek(0)
    print(json.dumps([status, *(file.read() for file in said)]), flush=True)
os._exit(0)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*arguments: Any, **named: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ALONE, timeout=300, **named
    )


@pytest.fixture(scope="module")
def forked() -> Iterator[Run]:
    """As `run`, from a process that has imported already what most commands want."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ALONE
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        commands, answers = running.stdin, running.stdout

        def start(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
            command = [str(cwd), *map(str, arguments)]
            print(json.dumps(command), file=commands, flush=True)
            return subprocess.CompletedProcess(command, *json.loads(answers.readline()))

        yield start


def save_checkpoint(path: Path) -> nn.Module:
    """A small classifier of two classes with random weights, as `train.classification` writes it."""
    torch.manual_seed(0)
    model = timm.create_model("focalnet_tiny_iso_16", num_classes=2, depth=1)
    recipe = {
        "model": "focalnet_tiny_iso_16",
        "model_args": {"depth": 1},
        "class_names": ["circle", "star"],
        "preprocessing": {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0},
    }
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": recipe}, path)
    return model.eval()


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_classes_of_images_come_out_though_one_of_them_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.ckpt")
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


def test_what_is_grounded_is_what_the_grounder_says(tmp_path: Path) -> None:
    from visionsel.embedded import load_lvlm
    from visionsel.multimodal import Grounder

    torch.set_num_threads(1)
    ShapesWorld("balanced", 7, 1, 384)[0].image.save(tmp_path / "scene.png")
    command = ["ground", "scene.png", CAPTION_PROMPT, "-o", "new/x.png", "--json", "--device", "cpu"]
    done = run(*command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    said = Grounder(*load_lvlm(), "embedded").ask(tmp_path / "scene.png", CAPTION_PROMPT)
    found = json.loads(done.stdout)
    assert (found["answer"], found["image"]) == (said.answer, {"width": 384, "height": 384})
    assert len(said.objects) >= 2
    for record, word in zip(found["words"], said.words, strict=True):
        mask = None if word.box is None else encode_rle(word.mask)
        assert record == {
            "text": word.text,
            "name": word.name,
            "span": list(word.span),
            "prob": pytest.approx(word.prob, rel=1e-5),
            "points": word.points.tolist(),
            "labels": word.labels.tolist(),
            "box": None if word.box is None else list(word.box),
            "score": pytest.approx(word.score, rel=1e-5),
            "segmentation": mask,
        }
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.size == (384, 384)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(said.plot()))
    assert files_of(tmp_path) == ["new", "new/x.png", "scene.png"]


@pytest.mark.parametrize(
    ("image", "question", "out", "status", "message"),
    [
        ("text.png", CAPTION_PROMPT, "new/x.png", 1, "text.png is not an image that Pillow can read: "),
        ("scene.png", "", "new/x.png", 1, "the question is ''; expected a text"),
        ("scene.png", CAPTION_PROMPT, "folder", 2, "error: argument -o/--out: folder is a folder; name a"),
    ],
)
def test_what_cannot_be_grounded_is_one_line_and_no_file(
    forked: Run, tmp_path: Path, image: str, question: str, out: str, status: int, message: str
) -> None:
    ShapesWorld("balanced", 7, 1)[0].image.save(tmp_path / "scene.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder").mkdir()
    before = files_of(tmp_path)
    done = forked("ground", image, question, "-o", out, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    *usage, line = done.stderr.splitlines()
    assert line.startswith(f"visionsel ground: {message}")
    assert bool(usage) == (status == 2)  # wrong arguments come with what there is
    assert all(one.startswith(("usage: ", "      ")) for one in usage)
    assert files_of(tmp_path) == before


def test_a_program_is_written_that_gives_the_logits(forked: Run, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "last.ckpt")
    command = ["export", "--checkpoint", "last.ckpt", "--to", "program", "-o", "new/small.pt2", "--json"]
    done = forked(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["path"], found["shapes"]) == ("new/small.pt2", [[1, 3, 64, 64], [3, 3, 96, 128]])
    assert files_of(tmp_path) == ["last.ckpt", "new", "new/small.pt2"]
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        logits = torch.export.load(tmp_path / "new" / "small.pt2").module()(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)


def test_answers_that_a_file_has_are_not_asked_for_again(forked: Run, tmp_path: Path) -> None:
    command = ["evaluate", "pope", "--data", "shapes", "--limit", 2, "--out", "pope.jsonl"]
    first = forked(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[1].startswith("greedy")
    out = tmp_path / "pope.jsonl"
    *lines, last = out.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    row["answer"] = {"yes": "no", "no": "yes"}[row["answer"]]  # which the model would not say
    lines[0] = f"{json.dumps(row)}\n"
    out.write_text("".join([*lines, last[:9]]))  # as a process leaves it that was killed
    second = forked(*command, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert f"{len(lines)} of {len(lines) + 1} were there already" in second.stderr
    assert out.read_text() == "".join([*lines, last])
    assert second.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert second.stdout != first.stdout
    assert files_of(tmp_path) == ["pope.jsonl", "pope.jsonl.settings.json"]


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
