"""What the recipes share: checks of their arguments, the average of the weights, rates over a run."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from timm.optim import list_optimizers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train.cli import WeightEMA

__all__ = [
    "average_of_weights",
    "check",
    "check_optimization",
    "count_updates",
    "near",
    "peak_lr",
    "with_cosine",
    "with_rate",
]


def check(holds: bool, message: str) -> None:
    """Refuse what does not hold.

    Raises:
        ValueError: with the message.
    """
    if not holds:
        raise ValueError(message)


def check_optimization(given: Mapping[str, Any]) -> None:
    """Refuse `lr`, `lr_batch_size` where there is one, `ema_decay` and `optimizer` that cannot be.

    Raises:
        ValueError: naming the argument.
    """
    lr, batch, decay = given["lr"], given.get("lr_batch_size"), given["ema_decay"]
    check(lr > 0, f"lr must be above 0, got {lr}")
    check(batch is None or batch > 0, f"lr_batch_size must be above 0, got {batch}")
    check(decay is None or 0 < decay < 1, f"ema_decay must be between 0 and 1, got {decay}")
    name, known = given["optimizer"], [str(each) for each in list_optimizers()]
    check(name in known, f"unknown optimizer {name!r}{near(name, known)}; see timm.optim.list_optimizers()")


def near(name: str, names: Sequence[str]) -> str:
    """A part of a message: the names that resemble `name`, if any do."""
    found = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"; near it are {', '.join(found)}" if found else ""


def average_of_weights(module: LightningModule) -> list[WeightEMA]:
    """What `configure_callbacks` returns: the average of the weights in training, if `ema_decay` wants it."""
    decay = module.hparams["ema_decay"]
    return [WeightEMA(decay=decay)] if decay and module.trainer.state.fn == "fit" else []


def peak_lr(module: LightningModule) -> float:
    """`lr`, scaled from `lr_batch_size`, if there is one, to the batch of an update."""
    hparams, trainer = module.hparams, module.trainer
    if hparams["lr_batch_size"] is None:
        return hparams["lr"]
    batch = hparams["batch_size"] * trainer.world_size * trainer.accumulate_grad_batches
    return hparams["lr"] * batch / hparams["lr_batch_size"]


def count_updates(trainer: Trainer, warmup: int = 0) -> int:
    """The updates of a run.

    Raises:
        ValueError: for a run without an end, or one that the warmup fills.
    """
    updates = trainer.estimated_stepping_batches
    if not math.isfinite(updates):
        raise ValueError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    check(warmup < updates, f"warmup_steps {warmup} leave none of the {updates} updates of this run")
    return int(updates)


def with_rate(optimizer: Optimizer, rate: Callable[[int], float]) -> dict[str, Any]:
    """What `configure_optimizers` returns: shares of the peak rate by the updates done, a step an update."""
    schedule = {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def with_cosine(optimizer: Optimizer, trainer: Trainer, warmup: int) -> dict[str, Any]:
    """What `configure_optimizers` returns: a linear warmup from 0, then a cosine to 0, a step an update.

    Args:
        optimizer: at its peak rate.
        trainer: of the run, which knows its length.
        warmup: updates before the peak.

    Raises:
        ValueError: for a run without an end, or one that the warmup fills.
    """
    updates = count_updates(trainer, warmup)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (updates - warmup))

    return with_rate(optimizer, rate)
