"""Weights inside the package: half-precision safetensors, written whole or not at all."""

import os
from pathlib import Path

from torch import Tensor

__all__ = ["WEIGHTS", "read_weights", "write_weights"]

WEIGHTS = Path(__file__).parent / "weights"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict in float32, whatever the precision of the file.

    Raises:
        FileNotFoundError: when the file is not there.
        ValueError: when it is not a safetensors file, or is cut off.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; reinstall visionsel, or train them again with 'make embedded'"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut off: {error}") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def write_weights(state: dict[str, Tensor], path: str | Path) -> Path:
    """Write a state dict; float tensors in half precision, which the trained models are evaluated in."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    halved = {
        key: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in state.items()
    }
    try:
        save_file(halved, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes it private
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
