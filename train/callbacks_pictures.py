"""Pictures of what a network looks at and predicts, drawn while a run validates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from train.backbone_weights import flat
from train.callbacks_drawing import enlarged, keep_picture, pictures_folder, sheet, to_images
from train.callbacks_maps import OPERATORS, attention, feature_colors, modulation, routed_boxes, spatial
from train.segmentation_pictures import draw_labels
from visionsel.layers.bilevel_routing_attention import BilevelRoutingAttention
from visionsel.layers.neighborhood_attention import NeighborhoodAttention
from visionsel.viz import OKABE_ITO, draw_boxes, draw_points, overlay_heatmap

__all__ = ["FeaturePictures", "PredictionPictures"]


class FeaturePictures(Callback):
    """Draws what layers look at in the first validation images, after each validation.

    Neighborhood attention and bilevel routing: the attention of one position, and the windows that it is
    routed to. Focal modulation (timm's too): the norm of the modulator and the gate of each level. The stages
    of a timm model, and any other layer: its channels as colours (three principal components).

    Args:
        images: how many.
        layers: names of the layers to draw, as `named_modules` of the training module has them; default, of
            those that draw attention or modulators, the last one at each size of map, and the stages.
        query: the position whose attention is drawn, as shares of height and width.
        every_n_epochs: draw in every n-th epoch.
        folder: for the PNGs; default `pictures` beside the logs.

    Raises:
        ValueError: for arguments out of range; when training starts, for an unknown layer, a compiled model,
            or a run that keeps no logs and has no `folder`; on drawing, for a layer that gives no map.
    """

    def __init__(
        self,
        images: int = 2,
        layers: list[str] | None = None,
        query: tuple[float, float] = (0.5, 0.5),
        every_n_epochs: int = 1,
        folder: str | None = None,
    ) -> None:
        if images < 1 or every_n_epochs < 1:
            raise ValueError(
                f"images and every_n_epochs must be at least 1, got {images} and {every_n_epochs}"
            )
        if not all(0 <= share <= 1 for share in query):
            raise ValueError(f"query is two shares from 0 to 1, got {tuple(query)}")
        self.images = images
        self.layers = layers
        self.query = (query[0], query[1])
        self.every_n_epochs = every_n_epochs
        self.folder = folder
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        pictures_folder(trainer, self.folder)
        if any(getattr(m, "_compiled_call_impl", None) is not None for m in pl_module.modules()):
            raise ValueError("FeaturePictures cannot look into a compiled model: set compile to false")
        modules = dict(pl_module.named_modules())
        self._owner, stages = _stages(modules)
        if self.layers is None:
            operators = [name for name, module in modules.items() if isinstance(module, OPERATORS)]
            self._chosen = [*operators, *stages]
        else:
            unknown = [name for name in self.layers if name not in modules]
            if unknown:
                raise ValueError(f"the model has no layers {unknown}; named_modules() has their names")
            self._chosen = list(self.layers)
        if not self._chosen:
            raise ValueError(
                "the model has neither stages nor our operators: give FeaturePictures its layers"
            )

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen to the layers during the first batch."""
        wanted = trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero
        if not wanted or batch_idx or dataloader_idx or trainer.current_epoch % self.every_n_epochs:
            return
        self._seen = {}
        modules = dict(pl_module.named_modules())
        for name in self._chosen:
            module = modules[name]
            if isinstance(module, OPERATORS):
                self._handles.append(module.register_forward_pre_hook(self._keep_input(name)))
            else:
                self._handles.append(module.register_forward_hook(self._keep_output(name)))
        if self._owner is not None:
            self._handles.append(modules[self._owner].register_forward_pre_hook(self._keep_input("")))

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if name not in self._seen:  # of several calls, by windows or views, the first
                self._seen[name] = inputs[0][: self.images].detach().clone()

        return hook

    def _keep_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            while isinstance(output, list | tuple) and output:
                output = output[0]
            if name not in self._seen and isinstance(output, Tensor):
                self._seen[name] = output[: self.images].detach().clone()

        return hook

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw what was heard."""
        if not self._handles:
            return
        self._quiet()
        pixels = self._seen.pop("", None)
        if pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3:
            pixels = _images_of(batch)[: self.images]
        images = to_images(pixels, getattr(getattr(trainer, "datamodule", None), "preprocessing", None))
        folder = pictures_folder(trainer, self.folder)
        modules = dict(pl_module.named_modules())
        for name, seen in self._drawn(modules).items():
            picture = self._draw(name, modules[name], seen.float(), images)
            keep_picture(trainer, picture, folder, name)
        self._seen = {}

    def _drawn(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Unless layers were named: of the operators the last one at each size of map."""
        if self.layers is not None:
            return self._seen
        last = {
            tuple(seen.shape[1:]): name
            for name, seen in self._seen.items()
            if isinstance(modules[name], OPERATORS)
        }
        kept = set(last.values())
        return {k: v for k, v in self._seen.items() if k in kept or not isinstance(modules[k], OPERATORS)}

    def _draw(self, name: str, module: nn.Module, seen: Tensor, images: list[Image.Image]) -> Image.Image:
        large = [enlarged(image) for image in images]
        rows: list[list[Image.Image]] = [[image] for image in large]
        if isinstance(module, NeighborhoodAttention | BilevelRoutingAttention):
            titles = ["image", "attention of the point"]
            for row, weights in zip(rows, attention(module, seen, self.query), strict=True):
                heat = _heat(row[0], weights)
                row.append(draw_points(heat, [_point(self.query, seen.shape[1:3], heat)], [1]))
            if isinstance(module, BilevelRoutingAttention):
                titles.append("routed windows")
                window, routed = routed_boxes(module, seen, self.query)
                for row, boxes in zip(rows, routed, strict=True):
                    colors = [OKABE_ITO["sky blue"]] * len(boxes) + [OKABE_ITO["vermilion"]]
                    row.append(
                        draw_boxes(row[0], [_box(b, row[0]) for b in (*boxes, window)], colors, width=2)
                    )
        elif isinstance(module, OPERATORS):
            magnitude, gates = modulation(module, seen)
            levels = [f"gate {level + 1}" for level in range(gates.shape[1] - 1)]
            titles = ["image", "modulator", *levels, "gate of the mean"]
            for row, norm, gate in zip(rows, magnitude, gates, strict=True):
                row += [_heat(row[0], part) for part in (norm, *gate)]
        else:
            titles = ["image", "features"]
            try:
                maps = spatial(seen, (images[0].height, images[0].width))
            except ValueError as error:
                raise ValueError(f"layer {name} {error}; name others for FeaturePictures") from error
            for row, colors in zip(rows, feature_colors(maps), strict=True):
                array = (255 * colors).round().to(torch.uint8).permute(1, 2, 0).numpy()
                row.append(Image.fromarray(array).resize(row[0].size, Image.Resampling.NEAREST))
        return sheet(rows, titles)

    def _quiet(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._quiet()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._quiet()


def _stages(modules: dict[str, nn.Module]) -> tuple[str | None, list[str]]:
    """The first timm model in a module, and those of its layers whose maps timm gives as features."""
    for owner, module in modules.items():
        info: Any = getattr(module, "feature_info", None)
        entries = info if isinstance(info, list) else info.get_dicts() if hasattr(info, "get_dicts") else []
        names = [str(entry["module"]) for entry in entries if "module" in entry]
        if not names:
            continue
        inside = {
            flat(name.removeprefix(f"{owner}.")): name for name in modules if name.startswith(f"{owner}.")
        }
        found = [inside.get(flat(name)) for name in names]
        if all(found):
            return owner, [name for name in found if name]
    return None, []


def _images_of(batch: Any) -> Tensor:
    """The first tensor of a batch that looks like images."""
    parts = (
        batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    )
    for part in parts:
        if isinstance(part, Tensor) and part.ndim == 4 and part.shape[1] == 3 and part.is_floating_point():
            return part
    raise ValueError("FeaturePictures finds no images [B, 3, H, W] in a batch of this program")


def _heat(image: Image.Image, values: Tensor) -> Image.Image:
    """A map over an image, each of its positions a block."""
    size = image.height, image.width
    grown = interpolate(values[None, None].float().cpu(), size=size, mode="nearest")[0, 0]
    return overlay_heatmap(image, grown.numpy(), legend=False)


def _point(query: tuple[float, float], size: Any, image: Image.Image) -> tuple[float, float]:
    """The pixel in the middle of a query's position."""
    row, column = (min(n - 1, int(share * n)) for share, n in zip(query, size, strict=True))
    return (column + 0.5) / size[1] * image.width, (row + 0.5) / size[0] * image.height


def _box(box: tuple[float, ...], image: Image.Image) -> tuple[float, ...]:
    x0, y0, x1, y1 = box
    left, top = round(x0 * image.width), round(y0 * image.height)
    return left, top, max(left + 1, round(x1 * image.width)), max(top + 1, round(y1 * image.height))


class PredictionPictures(Callback):
    """Draws the first validation images of a segmentation run with their true and their predicted labels.

    Args:
        images: how many.
        every_n_epochs: draw in every n-th epoch.
        folder: for the PNGs; default `pictures` beside the logs.

    Raises:
        ValueError: for arguments out of range, a program whose validation returns no label maps, or a run
            that keeps no logs and has no `folder`.
    """

    def __init__(self, images: int = 4, every_n_epochs: int = 1, folder: str | None = None) -> None:
        if images < 1 or every_n_epochs < 1:
            raise ValueError(
                f"images and every_n_epochs must be at least 1, got {images} and {every_n_epochs}"
            )
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.folder = folder
        self._rows: list[list[Image.Image]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without a place for pictures."""
        pictures_folder(trainer, self.folder)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a row for each image."""
        wanted = trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero
        if not wanted or len(self._rows) >= self.images or trainer.current_epoch % self.every_n_epochs:
            return
        if not isinstance(outputs, Tensor) or outputs.ndim != 3:
            raise ValueError(
                "PredictionPictures needs a program whose validation_step returns labels [B, H, W]"
            )
        images, labels = batch[:2]
        preprocessing, names = pl_module.hparams["preprocessing"], pl_module.hparams["class_names"]
        for image, true, found in zip(to_images(images, preprocessing), labels, outputs, strict=True):
            if len(self._rows) < self.images:
                image = image.resize((true.shape[1], true.shape[0]), Image.Resampling.BILINEAR)
                scale = enlarged(image).width // image.width
                maps = [np.kron(part.cpu().numpy(), np.ones((scale, scale), int)) for part in (true, found)]
                drawn = [draw_labels(enlarged(image), part, names) for part in maps]
                self._rows.append([enlarged(image), *drawn])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the sheet."""
        if self._rows:
            picture = sheet(self._rows, ["image", "truth", "prediction"])
            keep_picture(trainer, picture, pictures_folder(trainer, self.folder), "predictions")
        self._rows = []
