"""Train three small backbones on real scanned digits and show, on one page, all that the package does.

    python -m train.quickstart --output quickstart

Each model is trained by its configuration in configs/digits, as `train.classification fit` would, for a fixed
number of epochs. The weights at the end are tested on the held-out split, which training never sees.
Then the models that ship with visionsel caption, ground, prune and hallucinate less on fresh scenes
(`train.report`). Written are `results.json`, `confusion.png`, `predictions.png`, the runs themselves and
`report.html`, which holds the pictures and needs no other file; its path is the last line of the output.
"""

import argparse
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.classification import ClassificationCLI, ImageClassifier
from train.cli import run_cli
from train.image_data import ImageFolderData
from train.report import PAGE, load_models, write_report
from train.report_digits import Digits
from visionsel.data.imagefolder import open_image
from visionsel.files import whole_file, write_json
from visionsel.viz import OKABE_ITO

MODELS = ("biformer", "nat", "selectformer")
GOAL = 0.97
FILES = ("results.json", "confusion.png", "predictions.png", PAGE)
PAGES = (PAGE, "shapes.html")  # the second is one that it wrote before
CONFIGS = Path(__file__).parent.parent / "configs" / "digits"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quickstart; returns the exit status, 1 when a model is not above 97 %."""
    return run_cli("train.quickstart", quickstart, arguments)


def quickstart(arguments: Sequence[str] | None = None) -> None:
    """Train, test, print, draw.

    Raises:
        ImportError: without the extra "multimodal", before anything is trained.
        FileNotFoundError: when the embedded models are not there, before anything is trained.
        ValueError: naming the models whose test accuracy is not above 97 %.
    """
    parser = argparse.ArgumentParser(
        prog="train.quickstart", description="Train small backbones on real digits."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder to write [quickstart]"
    )
    parser.add_argument(
        "--models", nargs="+", default=MODELS, choices=_configs(), help="configurations to train"
    )
    parser.add_argument("--epochs", type=int, help="train shorter or longer than the configurations say")
    options = parser.parse_args(arguments)
    output: Path = options.output
    _clear(output)
    embedded = load_models()  # what is missing is told now, not after the training
    for name in ("lightning.pytorch", "lightning.fabric"):  # keep the progress bars, drop the hints
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The .*dataloader.* does not have many workers")

    results = []
    for number, name in enumerate(options.models, 1):
        print(f"\n[{number}/{len(options.models)}] {name}: {CONFIGS / name}.yaml", flush=True)
        results.append(_train_and_test(name, output, options.epochs))
    rows = [row for row, _ in results]
    write_json(rows, output / "results.json")
    data = results[0][1]["data"]
    digits = Digits(rows, output / "confusion.png", output / "predictions.png")
    _draw_confusion(results, data.class_names, digits.confusion)
    _draw_predictions(results, data, digits.predictions)
    print("\nwhat the embedded models do on fresh scenes", flush=True)
    page = write_report(output, *embedded, digits)

    print(f"\n{rows[0]['test_images']} held-out digits, {torch.get_num_threads()} threads\n")
    print(f"{'model':14s}{'parameters':>12s}{'test accuracy':>15s}{'images/s':>10s}{'training s':>12s}")
    for row in rows:
        print(
            f"{row['name']:14s}{row['parameters']:>12,}{row['test_top1']:>15.2%}"
            f"{row['images_per_second']:>10.0f}{row['training_seconds']:>12.0f}"
        )
    print(f"\nwritten: {', '.join(str(output / name) for name in FILES)}")
    print("open the report in a browser:")
    print(page)
    short = [f"{row['name']} {row['test_top1']:.2%}" for row in rows if row["test_top1"] <= GOAL]
    if short:
        raise ValueError(f"test accuracy not above {GOAL:.0%}: {', '.join(short)}")


def _configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _clear(output: Path) -> None:
    """Make way for a new quickstart; touch no folder that is not one."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.exists() and (not output.is_dir() or not (names <= set(PAGES) or (output / "digits").is_dir())):
        raise FileExistsError(f"{output} exists and was not written by the quickstart; name another --output")
    shutil.rmtree(output / "runs", ignore_errors=True)
    for name in {*FILES, *PAGES}:
        (output / name).unlink(missing_ok=True)


def _train_and_test(name: str, output: Path, epochs: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row of the table, and what the pictures need."""
    run = output / "runs" / name
    options = [
        "--config",
        str(CONFIGS / f"{name}.yaml"),
        "--output",
        str(run),
        "--data.root",
        str(output / "digits"),
    ]
    options += ["--trainer.enable_model_summary", "false"]
    if epochs is not None:
        options += ["--trainer.max_epochs", str(epochs)]
    start = time.perf_counter()
    ClassificationCLI(["fit", *options])
    seconds = time.perf_counter() - start
    last = run / "checkpoints" / "last.ckpt"
    test = ClassificationCLI(["test", *options, "--ckpt_path", str(last), "--verbose", "false"])
    logits, labels = _apply(test.model, test.datamodule)
    top1 = (logits.argmax(1) == labels).double().mean().item()
    reported = test.trainer.callback_metrics["test/top1"].item()
    if abs(top1 - reported) > 1e-6:
        raise RuntimeError(f"{name}: the pictures show {top1:.4f}, the trainer measured {reported:.4f}")
    row = {
        "name": name,
        "model": test.model.hparams["model"],
        "model_args": test.model.hparams["model_args"],
        "parameters": sum(p.numel() for p in test.model.net.parameters()),
        "test_images": len(labels),
        "test_top1": top1,
        "images_per_second": _throughput(test.model),
        "training_seconds": round(seconds, 1),
        "epochs": test.trainer.max_epochs,
        "checkpoint": str(last),
    }
    return row, {"data": test.datamodule, "logits": logits, "labels": labels}


def _apply(model: ImageClassifier, data: ImageFolderData) -> tuple[Tensor, Tensor]:
    """Logits `[N, classes]` and labels `[N]` of the test split, in the order of its files."""
    model.eval()
    with torch.inference_mode():
        parts = [
            (model(images.to(model.device)).float().cpu(), labels)
            for images, labels in data.test_dataloader()
        ]
    return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])


def _throughput(model: ImageClassifier, batch: int = 64, seconds: float = 2.0) -> float:
    """Images per second at inference, data loading aside; the best of several rounds."""
    images = torch.randn(batch, *model.hparams["preprocessing"]["input_size"], device=model.device)
    best = 0.0
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        model(images)
        while time.perf_counter() < end:
            start = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            best = max(best, batch / (time.perf_counter() - start))
    return round(best, 1)


def _draw_confusion(results: list[Any], names: list[str], path: Path) -> None:
    """One matrix a model: rows are the true digits, columns what was seen."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.6 * len(results), 4.9), squeeze=False, layout="constrained"
    )
    for axis, (row, shown) in zip(axes[0], results, strict=True):
        predicted = shown["logits"].argmax(1)
        counts = torch.zeros(len(names), len(names), dtype=torch.long)
        counts.index_put_((shown["labels"], predicted), torch.ones_like(predicted), accumulate=True)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        axis.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=1)
        for i in range(len(names)):
            for j in range(len(names)):
                if counts[i, j]:
                    colour = "black" if share[i, j] > 0.5 else "white"
                    axis.text(j, i, int(counts[i, j]), ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        wrong = int(counts.sum() - counts.diagonal().sum())
        axis.set_title(
            f"{row['name']}: {row['test_top1']:.1%}, {wrong} of {row['test_images']} wrong", fontsize=11
        )
    _save(figure, path)


def _draw_predictions(results: list[Any], data: ImageFolderData, path: Path, columns: int = 12) -> None:
    """Two rows a model: its mistakes and least certain digits first, then digits picked at even distances."""
    plt = _pyplot()
    files = [Path(file) for file, _ in data.test_dataloader().dataset.samples]
    figure = plt.figure(figsize=(1.05 * columns, 3.3 * len(results)), layout="constrained")
    parts = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for part, (row, shown) in zip(parts, results, strict=True):
        probability, predicted = shown["logits"].softmax(1).max(1)
        right = predicted == shown["labels"]
        doubt = (probability + right.float()).argsort()[:columns].tolist()
        even = torch.linspace(0, len(files) - 1, columns).long().tolist()
        part.suptitle(
            f"{row['name']}: mistakes (boxed) and the least certain above, "
            f"every {len(files) // columns}th test digit below",
            fontsize=11,
        )
        axes = part.subplots(2, columns)
        for axis, index in zip(axes.flat, doubt + even, strict=True):
            axis.imshow(open_image(files[index]))
            axis.set_xticks([])
            axis.set_yticks([])
            wrong = not right[index]
            name = data.class_names[int(predicted[index])]
            truth = data.class_names[int(shown["labels"][index])]
            label = f"{name}, not {truth}" if wrong else name
            axis.set_title(
                f"{label}\n{probability[index]:.0%}", fontsize=9, color=_WRONG if wrong else "black"
            )
            for spine in axis.spines.values():
                spine.set(visible=wrong, color=_WRONG, linewidth=3)
    _save(figure, path)


_WRONG = OKABE_ITO["blue"]  # not vermilion, which marks on the same page what a model invents


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "visionsel[train]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
    _pyplot().close(figure)


if __name__ == "__main__":
    sys.exit(main())
