import os

import pytest
import torch

from visionsel.embedded.files import read_weights, write_weights


def test_weights_come_back_rounded_to_half_precision_and_integers_as_they_are(tmp_path) -> None:
    state = {"a": torch.randn(3, 4).t(), "b": torch.arange(5)}
    path = write_weights(state, tmp_path / "new" / "model.safetensors")
    read = read_weights(path)
    assert torch.equal(read["a"], state["a"].half().float())
    assert read["a"].dtype == torch.float32
    assert torch.equal(read["b"], state["b"])
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_a_missing_or_damaged_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="make embedded"):
        read_weights(tmp_path / "model.safetensors")
    path = write_weights({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file, or is cut off"):
        read_weights(path)


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = write_weights({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(AttributeError):
        write_weights({"a": "not a tensor"}, path)  # type: ignore[dict-item]
    assert torch.equal(read_weights(path)["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["model.safetensors"]
