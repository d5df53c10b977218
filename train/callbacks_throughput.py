"""How fast a run trains and how much memory it takes."""

import resource
import sys
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs, for each epoch, images trained on a second and the peak of memory.

    - `throughput/images_per_second`: of all devices together, without validation and without the first `skip`
      batches after a start;
    - `memory/peak_gib`: of a CUDA device what PyTorch allocated at most since the epoch before, else the
      largest resident size of the main process so far; of several devices the largest.

    Args:
        skip: batches that start the machinery and are not measured. An epoch that has no more is not logged.

    Raises:
        ValueError: for a negative `skip`.
    """

    def __init__(self, skip: int = 2) -> None:
        if skip < 0:
            raise ValueError(f"skip must be at least 0, got {skip}")
        self.skip = skip

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._batches = self._images = 0
        self._paused = 0.0
        self._since: float | None = None
        if self.skip == 0:
            self._since = _clock(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self._batches += 1
        if self._since is not None:
            self._images += _length(batch)
        elif self._batches == self.skip:
            self._since = _clock(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stopped = _clock(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._paused += _clock(pl_module) - self._stopped if self._since is not None else 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        if self._since is not None and self._images:
            seconds = max(1e-9, _clock(pl_module) - self._since - self._paused)
            rate = self._images / seconds
            pl_module.log("throughput/images_per_second", rate, sync_dist=True, reduce_fx="sum")
        pl_module.log("memory/peak_gib", _peak(pl_module.device), sync_dist=True, reduce_fx="max")


def _clock(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def _length(batch: Any) -> int:
    """Samples of a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, dict) else batch
    return next((_length(part) for part in parts if isinstance(part, Tensor | list | tuple | dict)), 0)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
