"""Train the small CLIP of the shapes world: an image tower of ours and a text transformer, through open_clip.

    python -m train.clip fit --config configs/shapes/clip.yaml
    python -m train.clip fit --config runs/shapes/clip/config.yaml \\
        --ckpt_path runs/shapes/clip/checkpoints/last.ckpt                            # continue exactly
    python -m train.clip validate --config runs/shapes/clip/config.yaml \\
        --ckpt_path runs/shapes/clip/checkpoints/best.ckpt

- the contrastive loss of CLIP (Radford et al. 2021) between images and captions of fresh scenes;
- a caption with one wrong word for each image (NegCLIP, Yuksekgonul et al. 2023, from known words);
- phrases of one object ("a red star"), with the truth about every image of the batch;
- one linear head names the coloured shapes of a scene from the feature of its image and from that of its
  caption: without it both towers stay where all features are alike;
- dense targets, without which a small backbone hardly starts: shape, colour and size at points of a grid.

`export_clip` writes what `visionsel.embedded.clip.load_clip` reads.
"""

import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, pixel_shuffle

from train.cli import EndlessCLI, below, brief, read_checkpoint, run_cli
from train.clip_data import CLASSES, ClipData, pairs_present, truth_of_phrases
from train.recipe import average_of_weights, check, check_optimization, count_updates, with_rate
from visionsel.data.resumable import seed_generators
from visionsel.data.shapes import COLORS, SHAPES
from visionsel.embedded.clip import build_clip, clip_config, save_clip
from visionsel.embedded.clip_quality import quality

__all__ = ["ClipTraining", "export_clip", "main", "phrase_loss"]

_MAX_LOGIT_SCALE = math.log(100)  # CLIP's (Radford et al. 2021)


class ClipTraining(LightningModule):
    """A CLIP with its recipe.

    Args:
        name: of the model configuration, see `visionsel.embedded.clip.clip_config`.
        vision_args, text_args: what differs from the configuration, in open_clip's words, such as
            `{timm_model_name: selectformer_nano}`.
        embed_dim: of the common space; None takes the configuration's.
        image_size: pixels a side, linked to the data's.
        grid: of the dense targets, linked to the data's.
        hard_weight: of telling the caption from the one with a wrong word.
        phrase_weight: of finding the images of which a phrase is true, and the phrase that is true of an
            image.
        presence_weight: of naming the pairs of colour and shape from either feature.
        dense_weight: of the dense cross entropies; 0 switches them off.
        dense_stage: the stage of the image tower whose map predicts them, counted from 0.
        background_weight: of the background in the dense cross entropies.
        optimizer: timm's name.
        optimizer_args: its further arguments.
        lr: the peak learning rate.
        weight_decay: not applied to biases, norms and what the model's `no_weight_decay` names.
        warmup: share of the updates in which `lr` grows linearly; a cosine to `min_lr` follows.
        min_lr: where the schedule ends.
        ema_decay: validate and save the exponential average of the weights with this decay.
        seed: of what is random in the model.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        name: str = "visionsel_shapes",
        vision_args: dict[str, Any] | None = None,
        text_args: dict[str, Any] | None = None,
        embed_dim: int | None = None,
        image_size: int = 64,
        grid: int = 16,
        hard_weight: float = 1.0,
        phrase_weight: float = 1.0,
        presence_weight: float = 1.0,
        dense_weight: float = 1.0,
        dense_stage: int = 1,
        background_weight: float = 0.2,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        min_lr: float = 0.0,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_optimization(self.hparams)
        for argument in ("hard_weight", "phrase_weight", "presence_weight", "dense_weight"):
            value = self.hparams[argument]
            check(value >= 0, f"{argument} must be at least 0, got {value}")
        check(
            0 < background_weight <= 1,
            f"background_weight must be above 0 and at most 1, got {background_weight}",
        )
        check(0 <= warmup < 1, f"warmup must be at least 0 and below 1, got {warmup}")
        config = clip_config(name)
        config["vision_cfg"] |= {**(vision_args or {}), "image_size": image_size}
        config["text_cfg"] |= text_args or {}
        config["embed_dim"] = embed_dim or config["embed_dim"]
        self.config = config
        # in the hyperparameters too, so that a checkpoint can be read when the shipped file has changed
        self.hparams["config"] = deepcopy(config)
        self.net = build_clip(config)
        if dense_weight:
            # a part of the net, so that one optimizer and one average serve both
            self.net.add_module("dense", self._dense_head())
        if presence_weight:
            pairs = len(COLORS) * len(SHAPES)
            self.net.add_module("presence", nn.Linear(config["embed_dim"], pairs))
        weight = torch.ones(max(CLASSES))
        weight[0] = background_weight
        self.register_buffer("dense_class_weights", weight, persistent=False)
        self.features: dict[int, list[dict[str, Tensor]]] = {}

    def _dense_head(self) -> nn.Module:
        """A projection of each position to the grid points that lie in it."""
        stage, grid, size = (self.hparams[name] for name in ("dense_stage", "grid", "image_size"))
        if stage < 0:
            raise ValueError(f"dense_stage counts from 0, got {stage}")
        try:
            with torch.no_grad():
                (maps,) = self.net.visual.eval().forward_intermediates(  # type: ignore[union-attr, operator]
                    torch.zeros(1, 3, size, size), indices=[stage], intermediates_only=True
                )["image_intermediates"]
        except (AssertionError, IndexError, RuntimeError, ValueError, AttributeError) as error:
            tower = self.config["vision_cfg"].get("timm_model_name")
            raise ValueError(f"{tower} has no map {stage} for dense_stage: {brief(error)}") from error
        self.net.train()
        channels, side = maps.shape[1], maps.shape[2]
        if grid % side:
            raise ValueError(f"grid must be a multiple of the {side} positions of stage {stage}, got {grid}")
        self.shuffle = grid // side
        return nn.Conv2d(channels, sum(CLASSES) * self.shuffle**2, 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)
        with torch.no_grad():
            self.net.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)  # type: ignore[operator]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The weighted sum of the losses."""
        hparams, count = self.hparams, len(batch["image"])
        images, maps = self._encode_images(batch["image"])
        captions = ["right", "caption_wrong"] if hparams["hard_weight"] else ["right"]
        texts = self._encode_texts(batch["texts"], captions)
        if hparams["phrase_weight"]:
            texts |= self._encode_texts(batch["texts"], ["phrase", "wrong"])
        scale = self.net.logit_scale.exp()  # type: ignore[operator]

        losses = {"contrastive": self._contrast()(images, texts["right"], scale)}
        loss = losses["contrastive"]
        if hparams["hard_weight"]:
            losses["hard"] = _choice_loss(images, texts["right"], texts["caption_wrong"], scale)
            loss = loss + hparams["hard_weight"] * losses["hard"]
        if hparams["phrase_weight"]:
            phrases = torch.cat([texts["phrase"], texts["wrong"]])
            truth = truth_of_phrases(batch["phrases"].transpose(0, 1).flatten(0, 1), batch["objects"])
            losses["phrase"] = phrase_loss(scale * phrases @ images.T, truth)
            losses["phrase"] = losses["phrase"] + _choice_loss(images, texts["phrase"], texts["wrong"], scale)
            loss = loss + hparams["phrase_weight"] * losses["phrase"]
        if hparams["presence_weight"]:
            features = torch.cat([images, texts["right"]])
            losses["presence"] = self._presence_loss(features, pairs_present(batch["objects"]))
            loss = loss + hparams["presence_weight"] * losses["presence"]
        if maps is not None:
            losses["dense"] = self._dense_loss(maps, batch["dense"])
            loss = loss + hparams["dense_weight"] * losses["dense"]
        common: dict[str, Any] = {"on_step": True, "on_epoch": True, "batch_size": count, "sync_dist": True}
        self.log("train/loss", loss, prog_bar=True, **common)
        self.log_dict({f"train/{name}_loss": value for name, value in losses.items()}, **common)
        self.log("logit_scale", scale.detach(), on_step=True, on_epoch=False)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def _encode_images(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalized float32 features `[B, C]`, and the map for the dense targets if there are any."""
        net: Any = self.net
        if not self.hparams["dense_weight"]:
            return normalize(net.encode_image(images).float(), dim=-1), None
        found = net.visual.forward_intermediates(images, indices=[self.hparams["dense_stage"]])
        return normalize(found["image_features"].float(), dim=-1), found["image_intermediates"][0]

    def _encode_texts(self, texts: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """Normalized float32 features `[B, C]`; the texts are cut where the longest of them ends."""
        net: Any = self.net
        ids = torch.cat([texts[name] for name in names])
        mask = net.text.attn_mask
        if mask is None:  # no causal mask: the paddings take part
            features = net.encode_text(ids)
        else:
            length = int((ids != net.text.pad_id).sum(1).max())
            net.text.attn_mask = mask[:length, :length]
            try:
                features = net.encode_text(ids[:, :length])
            finally:
                net.text.attn_mask = mask
        parts = normalize(features.float(), dim=-1).chunk(len(names))
        return dict(zip(names, parts, strict=True))

    def _contrast(self) -> nn.Module:
        """open_clip's loss, over the images and captions of all processes."""
        from open_clip import ClipLoss

        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def _presence_loss(self, features: Tensor, present: Tensor) -> Tensor:
        """Binary cross entropy, summed over the pairs; features of images and captions `[2 B, C]`."""
        net: Any = self.net
        logits = net.presence(features * features.shape[1] ** 0.5)  # each channel about one
        target = present.float().repeat(2, 1)
        return binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(features)

    def _dense_loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of size, colour and shape; `target` is `[B, 3, grid, grid]`."""
        net: Any = self.net
        logits = pixel_shuffle(net.dense(maps).float(), self.shuffle).split(CLASSES, dim=1)
        weights: Any = self.dense_class_weights
        losses = [
            cross_entropy(part, target[:, i], weight=weights[: part.shape[1]])
            for i, part in enumerate(logits)
        ]
        return torch.stack(losses).mean()

    def on_validation_epoch_start(self) -> None:
        self.features = {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Encode; the measures are taken over all batches."""
        net: Any = self.net
        found = {"image": net.encode_image(batch["image"], normalize=True).float().cpu()}
        for name, ids in batch["texts"].items():
            found[name] = net.encode_text(ids, normalize=True).float().cpu()
        self.features.setdefault(dataloader_idx, []).append(found)

    def on_validation_epoch_end(self) -> None:
        """The measures of `measure_clip` for each world, and `val/score`, the mean of those of captions."""
        scores = []
        for world, parts in self.features.items():
            measured = quality({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            distribution = ("train", "balanced")[world]
            self.log_dict(
                {f"val/{distribution}/{name}": value for name, value in measured.items()}, sync_dist=True
            )
            scores += [value for name, value in measured.items() if name != "phrase"]
        self.log("val/score", sum(scores) / len(scores), prog_bar=True, sync_dist=True)
        self.features = {}

    configure_callbacks = average_of_weights

    def configure_optimizers(self) -> Any:
        """timm's optimizer; linear warmup and a cosine over the whole run, a step for every update."""
        hparams, updates = self.hparams, count_updates(self.trainer)
        optimizer = create_optimizer_v2(
            self.net,
            hparams["optimizer"],
            lr=hparams["lr"],
            weight_decay=hparams["weight_decay"],
            **(hparams["optimizer_args"] or {}),
        )
        warmup = round(hparams["warmup"] * updates)
        least = hparams["min_lr"] / hparams["lr"]

        def factor(update: int) -> float:
            if update < warmup:
                return (update + 1) / warmup
            done = min(1.0, (update - warmup) / max(1, updates - warmup))
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done))

        return with_rate(optimizer, factor)


def phrase_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy over the images, with equal shares for those of which the phrase is true.

    Args:
        logits: `[P, B]`.
        truth: bool `[P, B]`; phrases that are true of none or of all do not count.

    Returns:
        The mean over the phrases that count, 0 if there are none.
    """
    counts = truth.sum(1)
    told = (counts > 0) & (counts < truth.shape[1])
    share = truth / counts.clamp(min=1)[:, None]
    losses = -(share * logits.log_softmax(1)).sum(1)
    return (losses * told).sum() / told.sum().clamp(min=1)


def _choice_loss(images: Tensor, right: Tensor, wrong: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of the choice between two texts for each image; features `[B, C]`."""
    logits = scale * torch.stack([(images * right).sum(1), (images * wrong).sum(1)], dim=1)
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def export_clip(checkpoint: str | Path, folder: str | Path | None = None) -> Path:
    """Write what `load_clip` reads from a checkpoint of this program, without its heads.

    Args:
        checkpoint: of a run; with `ema_decay` the averaged weights are taken.
        folder: where to write; default the one in the package.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it is not one of this program.
    """
    content = read_checkpoint(checkpoint)
    trained = content.get("hyper_parameters") or {}
    if "phrase_weight" not in trained or "state_dict" not in content:
        raise ValueError(f"{checkpoint} is not a checkpoint of train.clip")
    model = build_clip(trained["config"])
    state = {
        key: value
        for key, value in below("net.", content["state_dict"]).items()
        if not key.startswith(("dense.", "presence."))
    }
    model.load_state_dict(state)
    return save_clip(model, trained["config"], folder)


class ClipCLI(EndlessCLI):
    """The command line."""

    monitor = "val/score"
    program = "train.clip"
    fixed = ("config",)

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(ClipTraining, ClipData, arguments)

    def after_fit(self) -> None:
        """Write the last checkpoint as `load_clip` reads it, where the run has our checkpoints."""
        last = self.output / "checkpoints" / "last.ckpt"
        if self.trainer.is_global_zero and last.is_file():
            export_clip(last, self.output / "export")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What model and data share."""
        super().add_arguments_to_parser(parser)
        for name in ("image_size", "grid"):
            parser.link_arguments(f"data.{name}", f"model.{name}")

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another model, and texts that the model does not take."""
        length = self.model.config["text_cfg"]["context_length"]
        if self.datamodule.tokenizer.context_length != length:
            raise ValueError(
                f"data.context_length is {self.datamodule.tokenizer.context_length}, "
                f"that of the model {length}; give both the same"
            )
        super().after_instantiate_classes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.clip", ClipCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
