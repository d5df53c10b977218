"""The command line, as a shell would call it: help, `models`, `predict`, and what all verbs share."""

import argparse
import errno
import io
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from visionsel.cli import DESCRIPTION, _parser, main
from visionsel.cli_text import Progress, report_error, table, writing


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs of a parser."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its verbs."""
    yield parser
    for verb in subparsers(parser).values():
        yield from walk(verb)


PARSER = _parser()
every_verb = pytest.mark.parametrize("verb", list(walk(PARSER)), ids=lambda verb: verb.prog)


@every_verb
def test_every_verb_has_help_with_examples_that_parse(verb: argparse.ArgumentParser) -> None:
    examples = re.findall(r"visionsel (.*)", (verb.epilog or "").partition("\n\n")[0])
    assert examples
    if verb is not PARSER and not subparsers(verb):
        assert any(f"visionsel {example} ".startswith(f"{verb.prog} ") for example in examples)
    for example in examples:
        line = re.split(r"\s{3,}", example)[0]  # behind it stands what it does
        options = PARSER.parse_args(shlex.split(line, comments=True))
        assert callable(options.run)
    assert "".join(verb.epilog.split()) in "".join(verb.format_help().split())


@every_verb
def test_help_says_what_each_option_does_and_its_default(verb: argparse.ArgumentParser) -> None:
    for action in verb._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, action.dest
        silent = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        assert silent or "default" in action.help, f"{action.dest} is {action.default!r}"


def test_the_help_of_the_command_names_each_verb_once() -> None:
    listed = re.findall(r"^  (\w+)  ", DESCRIPTION, flags=re.MULTILINE)
    assert sorted(listed) == sorted(subparsers(PARSER))


@pytest.mark.parametrize("command", [[], ["evaluate"], ["data"]], ids=" ".join)
def test_a_command_without_a_verb_shows_the_verbs_and_is_wrong(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    parser = subparsers(PARSER)[command[0]] if command else PARSER
    assert captured.err == parser.format_help()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["modles"], "invalid choice: 'modles'"),
        (["generate", "a.png", "hello", "-o", "kept.doc"], "'kept.doc' must end in one of .png, .jpg, .webp"),
        (["ground", "a.png", "hello", "-o", "/"], "/ is a folder; name a file in it"),
        (["evaluate", "pruning", "--plot", "table.xls"], "must end in one of .png, .pdf, .svg"),
        (["bench", "ops", "--rounds", "0"], "'0' is not a whole number of at least 1"),
        (["bench", "-o", "bench.csv"], "'bench.csv' must end in one of .json, .md"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_runs(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_models_lists_a_release_a_line_with_its_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "dinat_large", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dinat_large.in22k_ft_in1k_384"]["input_size"] == [3, 384, 384]
    assert rows["dinat_large.in22k_ft_in1k_384"]["parameters"] == 200_943_514
    assert rows["dinat_large.in22k_ft_in1k_384_11x11"]["parameters"] == 201_144_250
    assert all(row["license"] == "mit" and row["weights"].startswith("https://") for row in rows.values())
    assert main(["models", "selectformer_n*"]) == 0
    assert "selectformer_nano  3.5 M" in capsys.readouterr().out
    assert main(["models", "selectformer_n*", "--markdown"]) == 0
    head, line, row = capsys.readouterr().out.splitlines()
    assert head == "| model | parameters | input | classes | weights |"
    assert line == "| --- | --- | --- | --- | --- |"
    assert row == "| selectformer_nano | 3.5 M | 3x224x224 | 1000 | - |"
    assert main(["models", "--json", "--markdown"]) == 1
    assert "two forms of one result; choose one" in capsys.readouterr().err


def test_a_pattern_without_a_match_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnet*"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no visionsel model matches 'resnet*'" in captured.err
    assert main(["models", "dinat_lage"]) == 1
    assert "no visionsel model matches 'dinat_lage'; near it are dinat_large, " in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def picture(folder: Path) -> Path:
    path = folder / "picture.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def release(folder: Path) -> Path:
    """A released file: a bare state dict of one variant."""
    path = folder / "halonet.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("halonet_h0_256").state_dict()}, path)
    return path


def test_predict_gives_the_models_own_probabilities(
    picture: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(picture), "--model", "halonet_h0_256", "--checkpoint", str(release), "--json"]
    assert main([*arguments, "--topk", "3", "--device", "cpu"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    model = timm.create_model("halonet_h0_256").eval()
    model.load_state_dict(torch.load(release, weights_only=True)["state_dict"])
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.inference_mode():
        expected = model(transform(Image.open(picture))[None]).softmax(-1)[0].topk(3)
    assert [c["index"] for c in result["classes"]] == expected.indices.tolist()
    assert [c["probability"] for c in result["classes"]] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert result["image"] == str(picture)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A checkpoint of `train.classification`, which names model and classes."""
    small = {"depths": (1, 1, 1, 1)}
    torch.manual_seed(0)
    model = timm.create_model("selectformer_nano", num_classes=2, **small)
    recipe = {
        "model": "selectformer_nano",
        "model_args": small,
        "class_names": ["circle", "star"],
        "preprocessing": {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0},
    }
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": recipe}, folder / "last.ckpt")
    return folder / "last.ckpt"


def test_predict_takes_a_training_checkpoint_that_names_model_and_classes(
    picture: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(picture), "--checkpoint", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "circle" in out
    assert "star" in out
    assert main(["predict", str(picture), "--checkpoint", str(trained), "--model", "nat_mini"]) == 1
    assert "holds a selectformer_nano, not a nat_mini" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "--model", "halonet_h0_256", "--checkpoint", "RELEASE"], "no image at missing.png"),
        (["TEXT", "--model", "halonet_h0_256", "--checkpoint", "RELEASE"], "not an image"),
        (["PICTURE", "--model", "halonet_h0_256", "--checkpoint", "none.pth"], "no checkpoint at none.pth"),
        (["PICTURE", "--model", "halonet_h0_256", "--checkpoint", "TEXT"], "not a readable checkpoint"),
        (["PICTURE", "--model", "halonet_h1_256", "--checkpoint", "RELEASE"], "missing"),
        (["PICTURE", "--model", "selectformer_nano"], "no weights of selectformer_nano were released"),
        (
            ["PICTURE", "--model", "selectformer_nana"],
            "unknown model 'selectformer_nana'; near it are selectformer_nano, ",
        ),
        (
            ["PICTURE", "--model", "nat_mini.in22k"],
            "unknown release 'nat_mini.in22k'; nat_mini has nat_mini.",
        ),
        (["PICTURE"], "name a model"),
        (["PICTURE", "--model", "halonet_h0_256", "--checkpoint", "RELEASE", "--topk", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_one_line(
    arguments: list[str],
    message: str,
    picture: Path,
    release: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    names = {"PICTURE": picture, "RELEASE": release, "TEXT": text}
    assert main(["predict", *(str(names.get(a, a)) for a in arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_broken_image_among_others_takes_nothing_from_them(
    picture: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    images = [str(text), str(picture), str(tmp_path / "missing.png"), str(picture)]
    command = ["predict", *images, "--checkpoint", str(trained), "--topk", "1"]
    assert main([*command, "--json"]) == 1
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [row["image"] for row in results] == [str(picture)] * 2
    assert [line.split(" ")[:2] for line in captured.err.splitlines()] == [["visionsel", "predict:"]] * 2
    assert f"{text} is not an image" in captured.err
    assert f"no image at {tmp_path / 'missing.png'}" in captured.err
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [str(picture)] * 2
    assert (
        lines[1] == f"  {results[0]['classes'][0]['probability']:7.2%}  {results[0]['classes'][0]['label']}"
    )


def test_debug_shows_where_an_error_came_from(
    picture: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "missing.png", str(picture), "--checkpoint", str(trained), "--debug"]) == 1
    captured = capsys.readouterr()
    assert str(picture) in captured.out
    assert "Traceback" in captured.err
    assert "FileNotFoundError: no image at missing.png" in captured.err


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
@pytest.mark.parametrize(
    "command",
    [
        ["predict", "a.png", "--model", "nat_mini"],
        ["generate", "a.png", "hello"],
        ["ground", "a.png", "hello"],
        ["evaluate", "pope", "--data", "shapes"],
        ["bench", "ops"],
        ["bench", "--explain"],
    ],
    ids=lambda command: command[0],
)
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    command: list[str], device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--device", device]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"no device {device!r} on this machine; there is cpu" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(pattern: str) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr("visionsel.cli_models.list_releases", stop)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert main(["models", "nat_mini"]) == 141
    assert capsys.readouterr().err == ""
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr("sys.stdout", full)
            assert main(["models", "nat_mini"]) == 1
        error = capsys.readouterr().err
        assert error == "visionsel models: cannot write what was found: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("name"), "KeyError: 'name'; --debug shows where"),
        (ValueError(), "ValueError: no words; --debug shows where"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"),
            "a.json: No such file or dir",
        ),
        (RuntimeError("weight " * 1000), "weight weight "),
    ],
)
def test_errors_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    report_error(argparse.Namespace(debug=False, verb="evaluate", evaluation="pope"), error)
    said = capsys.readouterr().err
    assert said.startswith(f"visionsel evaluate pope: {line}")
    assert said.count("\n") == 1
    assert len(said) < 1100
    assert ("--debug shows all" in said) == (len(str(error)) > 1000)


def test_what_cannot_be_written_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    wanted = tmp_path / "out.json"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"cannot write .*out\.json: No space left on device"), writing(wanted):
        raise full
    with pytest.raises(OSError, match=r"cannot write .*out\.json: No space"), writing(wanted, alone=False):
        raise full
    below = FileExistsError(errno.EEXIST, "File exists", str(tmp_path))
    with pytest.raises(OSError, match=r"out\.json: .* is no folder"), writing(wanted, alone=False):
        raise below
    with pytest.raises(PermissionError, match=r"a\.jpg"), writing(wanted, alone=False):
        raise PermissionError(errno.EACCES, "Permission denied", "a.jpg")
    other = FileNotFoundError("no image at a.png")
    with pytest.raises(FileNotFoundError, match="no image at"), writing(wanted, alone=False):
        raise other


class Terminal(io.StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True


def work(progress: Progress) -> None:
    """Three steps, one of which is told about before."""
    progress.say("calibrating vhr")
    for number, name in enumerate(("vhr", "pai", "vcd"), 1):
        progress.say(f"[{number}/3] {name}")


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("images") as progress:
        progress.count(0, 2)
        progress.count(2, 2)
    assert capsys.readouterr().err == ""
    with Progress() as progress:
        work(progress)
    assert capsys.readouterr().err == "calibrating vhr\n[1/3] vhr\n[2/3] pai\n[3/3] vcd\n"

    with Progress("vhr", step=True), Progress("pai", step=True, shown=False) as progress:
        work(progress)
    assert capsys.readouterr().err == "vhr\n"

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress("images", shown=False) as progress:
        progress.count(1, 2)
    assert terminal.getvalue() == ""
    with Progress("images") as progress:
        progress.count(1, 2)  # one was there already
        progress.count(2, 2)
    assert "images: 100%" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress() as progress:
        work(progress)
    sent = terminal.getvalue()
    assert "calibrating vhr\n" in sent
    assert re.search(r"pai:  33%.* 1/3", sent)
    assert sent.splitlines()[-1].rpartition("\r")[2].startswith("vcd: 100%")
    assert capsys.readouterr().out == ""


def test_tables_are_aligned_or_of_markdown() -> None:
    assert table(["a", "bc"], [["long", "x"], ["", "|"]]).splitlines() == ["a     bc", "long  x", "      |"]
    assert table(["a"], [["x|y"]], markdown=True).splitlines() == ["| a |", "| --- |", "| x\\|y |"]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("visionsel 0.")
