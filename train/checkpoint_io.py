"""Checkpoints that are whole or not there."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from visionsel.files import whole_file

__all__ = ["WholeCheckpointIO", "remove_partial"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints on a disk, written beside the one before them, which they replace when they are complete.

    Lightning writes into the folder for temporary files and moves the file from there, which is a copy where
    that folder is on another disk; a full disk then leaves half a file in the place of the last one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: when it could not be written; the one before it is untouched.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with whole_file(path) as partial:
                torch.save(checkpoint, partial)
        except (OSError, RuntimeError) as error:  # torch's writer has RuntimeError for a full disk
            raise OSError(f"{path} could not be written, the one before it is untouched: {error}") from error


def remove_partial(folder: str | Path) -> None:
    """Remove what a killed run left of a checkpoint that it was writing."""
    for path in Path(folder).glob(".*.ckpt"):
        path.unlink(missing_ok=True)
