"""Train the models that visionsel ships again, measure them, and say how they compare with the shipped ones.

    python -m train.embedded --output runs/embedded                       # seed 0: `make embedded`
    python -m train.embedded --output runs/embedded --seeds 0 1 2 --ship  # what a release does
    python -m train.embedded --seeds 1 2 --jobs 8 --accelerator gpu --workers 3   # on a machine with a GPU

Each model is trained by its program and its configuration in configs/shapes, on one thread, two at a time. A
run that was stopped goes on where it was; what is there is not trained again. Written are, for each seed,
`seedN/weights/` (what the loaders of `visionsel.embedded` read), `seedN/metrics.json` and the runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.cli import run_cli
from train.embedded_cards import write_cards
from visionsel.embedded.evaluation import GOALS, MODELS, Goal, check_goals, evaluate_embedded, lookup
from visionsel.embedded.files import WEIGHTS
from visionsel.files import write_json

__all__ = ["JOBS", "Job", "main"]

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Job:
    """A model, the program that trains it and its configuration.

    Attributes:
        needs: other models, which it is trained for; their names are the options that take their folders.
    """

    model: str
    program: str
    config: str
    needs: tuple[str, ...] = ()


JOBS = (  # the longest first, so that two lanes end together
    Job("lvlm", "train.lvlm", "lvlm"),
    Job("clip", "train.clip", "clip"),
    Job("segmenter", "train.segmenter", "segmenter"),
    *(
        Job(f"classifier_{name}", "train.shapes_classifier", name)
        for name in ("selectformer", "nat", "biformer")
    ),
    Job("mask_head", "train.grounding", "mask_head", needs=("lvlm", "segmenter")),
    Job("explainprune", "train.explainprune", "explainprune", needs=("lvlm",)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 when a goal is missed."""
    return run_cli("train.embedded", train_embedded, arguments)


def train_embedded(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, compare and, if wanted, ship.

    Raises:
        ValueError: naming the goals that are missed, or the program that failed.
    """
    parser = argparse.ArgumentParser(prog="train.embedded", description="Train the embedded models again.")
    parser.add_argument("--output", type=Path, default=Path("runs/embedded"), help="folder [runs/embedded]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one set of models each [0]")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which [all]")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at once, one thread each [2]")
    parser.add_argument(
        "--accelerator", default="auto", help="cpu, gpu, ...: what Lightning trains on [auto]"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that draw scenes, for each model; a GPU needs 3 [0]"
    )
    parser.add_argument(
        "--size", type=int, default=400, help="scenes of each distribution to measure on [400]"
    )
    parser.add_argument(
        "--ship",
        action="store_true",
        help="put the first seed's models and all seeds' numbers into the package",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {options.jobs}")
    if options.workers < 0:
        raise ValueError(f"workers must be at least 0, got {options.workers}")
    if options.ship and set(options.models) != set(MODELS):
        raise ValueError("--ship needs all models; leave out --models")

    start = time.perf_counter()
    work = [
        (job, options.output / f"seed{seed}", seed)
        for seed in options.seeds
        for job in JOBS
        if job.model in options.models
    ]
    further = ["--trainer.accelerator", options.accelerator, "--data.num_workers", str(options.workers)]
    with ThreadPoolExecutor(options.jobs) as lanes:
        futures: dict[tuple[str, int], Future[None]] = {}
        for job, folder, seed in work:
            # what is needed stands before in the queue, so that it runs or has run
            before = [futures[need, seed] for need in job.needs if (need, seed) in futures]
            futures[job.model, seed] = lanes.submit(_train_after, before, job, folder, seed, further)
        try:
            for future in futures.values():
                future.result()
        except BaseException:
            lanes.shutdown(cancel_futures=True)
            raise
    results = {}
    for seed in options.seeds:
        folder = options.output / f"seed{seed}"
        print(f"seed {seed}: measuring", flush=True)
        results[seed] = evaluate_embedded(folder / "weights", options.models, options.size)
        times = {model: _read(folder / model / "time.json") for model in options.models}
        known = _read(folder / "metrics.json")
        write_json(known | results[seed] | {"times": known.get("times", {}) | times}, folder / "metrics.json")
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{len(options.seeds)} seed(s) in {minutes:.0f} minutes\n")
    print_comparison(results, _shipped())
    if options.ship:
        first = options.seeds[0]
        numbers = {int(p.parent.name[4:]): _read(p) for p in options.output.glob("seed*/metrics.json")}
        order = sorted(numbers, key=lambda seed: (seed != first, seed))
        ship(options.output / f"seed{first}" / "weights", {n: numbers[n] for n in order}, options.size)
    missed = [
        f"seed {seed}: {goal.measure} {value:.3f}, not {goal}"
        for seed, result in results.items()
        for goal, value, reached in check_goals(result)
        if not reached
    ]
    if missed:
        raise ValueError("missed: " + "; ".join(missed))


def _train_after(before: "list[Future[None]]", job: Job, folder: Path, seed: int, options: list[str]) -> None:
    for future in before:
        future.result()
    train_one(job, folder, seed, options)


def train_one(job: Job, folder: Path, seed: int, options: Sequence[str] = ()) -> None:
    """Train a model, or go on with it, and put what its loader reads into `folder/weights`.

    Args:
        job: what to train.
        folder: of this seed.
        seed: of the run.
        options: further arguments of the program.

    Raises:
        ValueError: when the program fails, with its last line and the file that holds the rest.
    """
    target = folder / "weights" / job.model
    run = folder / job.model
    if target.is_dir():
        print(f"seed {seed}: {job.model} is there", flush=True)
        return
    if not (run / "export").is_dir():
        command = [sys.executable, "-m", job.program, "fit"]
        command += ["--config", str(ROOT / "configs" / "shapes" / f"{job.config}.yaml")]
        command += ["--output", str(run), "--seed_everything", str(seed)]
        command += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        for need in job.needs:
            command += [f"--model.{need}", str((folder / "weights" / need).resolve())]
        command += options
        last, spent = run / "checkpoints" / "last.ckpt", {"seconds": 0.0, "cpu_seconds": 0.0}
        if last.is_file():
            command += ["--ckpt_path", str(last)]
            spent |= _read(run / "time.json")
        else:
            shutil.rmtree(run, ignore_errors=True)
        print(f"seed {seed}: {job.model} {'goes on' if last.is_file() else 'starts'}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{job.model}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        with log.open("a") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        spent["seconds"] += time.perf_counter() - start
        spent["cpu_seconds"] += usage.ru_utime + usage.ru_stime
        if run.is_dir():
            write_json({key: round(value, 1) for key, value in spent.items()}, run / "time.json")
        if process.returncode:
            lines = log.read_text().strip().splitlines() or ["no output"]
            raise ValueError(f"{job.model}: {lines[-1]} (the rest is in {log})")
        print(f"seed {seed}: {job.model} done in {spent['seconds'] / 60:.1f} minutes", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copytree(run / "export", partial, dirs_exist_ok=True)
    partial.rename(target)


def print_comparison(results: dict[int, dict[str, Any]], shipped: dict[str, Any]) -> None:
    """A line for each goal: what must be reached, what the shipped models have, and each seed."""
    seeds = list(results)
    print(f"{'measure':44s}{'goal':>12s}{'shipped':>10s}" + "".join(f"{f'seed {s}':>10s}" for s in seeds))
    for goal in GOALS:
        values = [lookup(results[seed], goal.measure) for seed in seeds]
        if all(value is None for value in values):
            continue
        cells = [_cell(goal, value) for value in (lookup(shipped, goal.measure), *values)]
        print(f"{goal.measure:44s}{goal!s:>12s}{''.join(cells)}")


def _cell(goal: Goal, value: float | None) -> str:
    """Ten characters; an exclamation mark where the goal is missed."""
    if value is None:
        return f"{'-':>9s} "
    return f"{value:9.3f}{' ' if goal.holds(value) else '!'}"


def ship(weights: Path, results: dict[int, dict[str, Any]], size: int) -> None:
    """Replace the package's models by these, with the numbers of all seeds and their cards."""
    for model in MODELS:
        shutil.rmtree(WEIGHTS / model, ignore_errors=True)
        shutil.copytree(weights / model, WEIGHTS / model)
    write_json(
        {"scenes": size, "seeds": {str(seed): result for seed, result in results.items()}},
        WEIGHTS / "metrics.json",
    )
    write_cards(WEIGHTS, results, size)
    print(f"shipped to {WEIGHTS}")


def _shipped() -> dict[str, Any]:
    """Measures of the shipped models, those of the first seed; empty where none are shipped."""
    return next(iter(_read(WEIGHTS / "metrics.json").get("seeds", {}).values()), {})


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON; empty where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
