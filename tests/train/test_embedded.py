"""`make embedded` at a small scale: jobs run, go on, are compared and shipped."""

import json
import shutil
from pathlib import Path

import pytest

import train.embedded as embedded
from train.embedded import JOBS, Job, main, ship, train_one
from visionsel.embedded.classifier import load_classifier
from visionsel.embedded.evaluation import GOALS, MODELS, lookup
from visionsel.embedded.files import WEIGHTS

SHORT = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--data.epoch_size", "64"]
SHORT += ["--data.val_size", "20", "--model.warmup_epochs", "1"]


def test_there_is_a_job_for_every_model_and_its_configuration() -> None:
    assert {job.model for job in JOBS} == set(MODELS)
    for job in JOBS:
        config = Path(embedded.__file__).parents[1] / "configs" / "shapes" / f"{job.config}.yaml"
        assert f"{job.program} fit --config configs/shapes/{config.name}" in config.read_text()


@pytest.mark.slow
def test_a_model_is_trained_once_measured_and_compared_and_goes_on_when_it_was_stopped(
    tmp_path, capsys
) -> None:
    arguments = ["--output", str(tmp_path), "--models", "classifier_nat", "--jobs", "1", "--size", "10"]
    job = Job("classifier_nat", "train.shapes_classifier", "nat")
    train_one(job, tmp_path / "seed0", 0, SHORT)
    assert load_classifier("nat", tmp_path / "seed0" / "weights" / "classifier_nat").num_classes == 10
    spent = json.loads((tmp_path / "seed0" / "classifier_nat" / "time.json").read_text())
    assert spent["cpu_seconds"] > 0
    capsys.readouterr()
    assert main(arguments) == 1  # nothing is trained again, and two short epochs are not enough
    out, err = capsys.readouterr()
    assert "classifier_nat is there" in out
    assert "missed: seed 0: classifier_nat.single.top1" in err
    metrics = json.loads((tmp_path / "seed0" / "metrics.json").read_text())
    value = metrics["classifier_nat"]["single"]["top1"]
    assert any(
        line.startswith("classifier_nat.single.top1") and f"{value:.3f}!" in line for line in out.splitlines()
    )
    assert metrics["times"]["classifier_nat"] == spent

    run, weights = tmp_path / "seed0" / "classifier_nat", tmp_path / "seed0" / "weights"
    shutil.rmtree(run / "export")
    shutil.rmtree(weights)
    train_one(job, tmp_path / "seed0", 0, [*SHORT, "--trainer.max_epochs", "3"])
    assert "goes on" in capsys.readouterr().out
    assert json.loads((run / "time.json").read_text())["seconds"] > spent["seconds"]
    assert (weights / "classifier_nat" / "model.safetensors").is_file()


def test_a_program_that_fails_is_named_with_its_last_line(tmp_path) -> None:
    job = Job("classifier_nat", "train.shapes_classifier", "nat")
    with pytest.raises(ValueError, match=r"classifier_nat: .*lr must be above 0.*classifier_nat\.log"):
        train_one(job, tmp_path, 0, ["--model.lr", "-1"])
    assert not (tmp_path / "weights").exists()


def test_shipping_replaces_the_models_and_writes_cards(tmp_path, monkeypatch, capsys) -> None:
    shipped = json.loads((WEIGHTS / "metrics.json").read_text())
    results = {int(seed): result for seed, result in shipped["seeds"].items()}
    target = tmp_path / "package"
    (target / "lvlm").mkdir(parents=True)
    (target / "lvlm" / "old.txt").write_text("old")
    monkeypatch.setattr(embedded, "WEIGHTS", target)
    ship(WEIGHTS, results, shipped["scenes"])
    assert not (target / "lvlm" / "old.txt").exists()
    assert json.loads((target / "metrics.json").read_text()) == shipped
    for model in MODELS:
        assert (target / model / "README.md").read_text() == (WEIGHTS / model / "README.md").read_text()
        assert (target / model / "model.safetensors").is_file()


def test_the_comparison_shows_goal_shipped_and_seeds(capsys) -> None:
    goal = GOALS[0]
    path = goal.measure.split(".")

    def nested(value: float) -> dict:
        result: dict = {}
        place = result
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
        return result

    assert lookup(nested(0.5), goal.measure) == 0.5
    embedded.print_comparison({0: nested(0.99), 3: nested(0.5)}, nested(0.97))
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == [goal.measure, *str(goal).split(), "0.970", "0.990", "0.500!"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--models", "clip", "--ship"], "--ship needs all models"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, capsys, arguments, message) -> None:
    assert main(["--output", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
