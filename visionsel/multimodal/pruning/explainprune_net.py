"""The net of ExplainPrune, from attention maps to the relevance of image tokens; its loss and its files."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["RelevancePredictor", "relevance_loss"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Grids = Sequence[Sequence[Tensor]]


class RelevancePredictor(nn.Module):
    """A few convolutions from attention maps to the relevance of each token.

    Args:
        heads: of the decoder.
        width: channels between the convolutions.
        depth: convolutions, at least 2.
        kernel: their side, odd.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(self, heads: int, width: int = 16, depth: int = 4, kernel: int = 3) -> None:
        super().__init__()
        self.config = {"heads": heads, "width": width, "depth": depth, "kernel": kernel}
        for name, least in (("heads", 1), ("width", 1), ("depth", 2), ("kernel", 1)):
            value = self.config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        sizes = [2 * heads + 1, *[width] * (depth - 1), 1]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(sizes):
            layers += [nn.Conv2d(inner, outer, kernel, padding=kernel // 2), nn.GELU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, maps: Tensor, grids: Grids, valid: Tensor) -> Tensor:
        """Relevance before the softmax.

        Args:
            maps: `[B, 2 * heads, N]`: for each head what the text attends to each token, means and maxima.
            grids: for each sample its grids, int64 `[h, w]`: numbers of tokens. Others are grids of one.
            valid: bool `[B, N]`: which tokens there are.

        Returns:
            `[B, N]` on the device of `maps`, in float32; 0 where not valid.

        Raises:
            ValueError: for maps of another number of heads.
        """
        if maps.shape[1] != 2 * self.config["heads"]:
            raise ValueError(
                f"this predictor was made for {self.config['heads']} heads, but the model has "
                f"{maps.shape[1] // 2}; train one for this model"
            )
        weight: Tensor = self.net[0].weight  # type: ignore[assignment]
        # against the mean of the image: how much of the attention the image gets does not matter
        mean = maps.sum(2, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None].to(maps.dtype)
        scaled = (maps / mean.clamp(min=1e-12)).clamp(min=1e-3).log().to(weight)
        inside = torch.ones_like(scaled[:, :1])  # tells the border of a grid, where convolutions see 0
        scaled = torch.cat([scaled, inside], 1)
        logits = scaled.new_zeros(scaled.shape[0], scaled.shape[2])
        for (height, width), (rows, index) in _by_size(grids, valid).items():
            rows, index = rows.to(weight.device), index.to(weight.device)
            cells = scaled[rows[:, None], :, index].transpose(1, 2)  # [n, channels, h * w]
            found = self.net(cells.unflatten(2, (height, width))).flatten(1)
            logits = logits.index_put((rows[:, None], index), found)
        return logits.float().to(maps.device)

    def save(self, folder: str | Path) -> Path:
        """Write weights and configuration into a folder that `load` reads; returns the folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = [folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG)]
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        try:
            save_file(state, partial[0], metadata={"format": "pt"})
            partial[0].chmod(0o644)  # safetensors makes it private
            partial[1].write_text(json.dumps(self.config, indent=2) + "\n")
            for path, name in zip(partial, (WEIGHTS, CONFIG), strict=True):
                path.rename(folder / name)
        finally:
            for path in partial:
                path.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The net that `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: for a file that is broken, or a configuration that does not fit the weights.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no {name} in {folder}: not a predictor's folder; train one with train.explainprune"
                )
        try:
            predictor = cls(**json.loads((folder / CONFIG).read_text()))
            predictor.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no predictor, or its files do not fit: {error}") from error
        return predictor.eval()


def _by_size(grids: Grids, valid: Tensor) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """The grids of a batch by their size: samples `[n]` and token numbers `[n, h * w]`; the rest in ones."""
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    index: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    left = valid.cpu().clone()
    for sample, views in enumerate(grids):
        for view in views:
            size = (view.shape[0], view.shape[1])
            rows[size].append(sample)
            index[size].append(view.flatten())
            left[sample, view.flatten()] = False
    for sample, token in left.nonzero().tolist():
        rows[1, 1].append(sample)
        index[1, 1].append(torch.tensor([token]))
    return {size: (torch.tensor(rows[size]), torch.stack(index[size])) for size in rows}


def relevance_loss(logits: Tensor, relevance: Tensor, valid: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of `logits` from normalised relevance.

    Args:
        logits: `[B, N]`, of a predictor.
        relevance: `[B, N]`, 0 or more; a sample without any counts as evenly relevant.
        valid: bool `[B, N]`.

    Returns:
        the mean over the samples that have tokens.
    """
    there = valid.any(1)
    logits, relevance, valid = logits[there], relevance[there].to(logits), valid[there]
    target = relevance.masked_fill(~valid, 0)
    target = torch.where((target.sum(1) > 0)[:, None], target, valid.to(target))
    target = target / target.sum(1, keepdim=True)
    foreseen = logits.masked_fill(~valid, -torch.inf).log_softmax(1).masked_fill(~valid, 0)
    return (torch.xlogy(target, target) - target * foreseen).sum(1).mean()
