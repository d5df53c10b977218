"""The small SAM: `segment_anything`'s own modules (Kirillov et al. 2023) at the size of the shapes world.

It is a `Sam` like any other: `SamPredictor(load_segmenter())` and every tool for SAM take it. What is ours is
the sizes, the files, and `decode_prompts`: SAM's decoder repeats one image's embedding for all prompts, ours
decodes the prompts of many images at once.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionsel.embedded.files import WEIGHTS, read_weights, write_weights

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

__all__ = ["SamConfig", "build_sam", "decode_prompts", "load_segmenter", "save_segmenter"]

CONFIG, MODEL = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """Sizes of a SAM; the defaults are 0.6 million parameters.

    Attributes:
        image_size: pixels a side of what the encoder sees; `SamPredictor` resizes to it.
        patch_size: pixels a side of a patch. Masks have four pixels a side for each patch.
        encoder_dim, encoder_depth, encoder_heads, encoder_mlp_ratio: of the ViT.
        window_size: patches a side of the windows of the layers that are not in `global_layers`.
        global_layers: layers of the encoder with attention over the whole image.
        rel_pos: the encoder's attention has SAM's relative positions; they cost 40% of its time.
        embed_dim: channels of the image's embedding and of the decoder.
        decoder_depth, decoder_heads, decoder_mlp_dim: of the two-way transformer.
        mask_channels: hidden channels of the mask prompt.
        iou_depth, iou_dim: layers and width of the head that predicts a mask's quality.

    Raises:
        ValueError: for a size that is not positive, or one that another does not divide.
    """

    image_size: int = 64
    patch_size: int = 4
    encoder_dim: int = 96
    encoder_depth: int = 4
    encoder_heads: int = 4
    encoder_mlp_ratio: float = 3.0
    window_size: int = 8
    global_layers: tuple[int, ...] = (1, 3)
    rel_pos: bool = False
    embed_dim: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    decoder_mlp_dim: int = 128
    mask_channels: int = 8
    iou_depth: int = 2
    iou_dim: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_layers", tuple(self.global_layers))  # JSON and YAML give lists
        for name, value in asdict(self).items():
            if name in ("global_layers", "rel_pos"):
                continue
            kinds = (int, float) if name == "encoder_mlp_ratio" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name, divisor in (
            ("image_size", self.patch_size),
            ("encoder_dim", self.encoder_heads),
            ("embed_dim", 8),  # of the finest masks
            ("embed_dim", 2 * self.decoder_heads),  # its attention has half of the channels
            ("mask_channels", 4),
        ):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(self, name)}")
        wrong = [layer for layer in self.global_layers if not 0 <= layer < self.encoder_depth]
        if wrong:
            raise ValueError(f"global_layers are from 0 to {self.encoder_depth - 1}, got {wrong[0]}")


def build_sam(config: SamConfig | Mapping[str, Any] | None = None) -> "Sam":
    """An untrained SAM with the pixel mean and deviation of the released ones.

    Args:
        config: sizes; a mapping gives those that differ from the defaults of `SamConfig`.

    Raises:
        ImportError: without the extra "multimodal".
        ValueError: for a size that is unknown or does not fit.
    """
    try:
        from segment_anything import modeling
    except ImportError as error:
        raise ImportError(
            'the segmenter needs segment_anything: pip install "visionsel[multimodal]"'
        ) from error
    sizes = config if isinstance(config, SamConfig) else _read_config(config or {})
    side = sizes.image_size // sizes.patch_size
    return modeling.Sam(
        modeling.ImageEncoderViT(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.encoder_dim,
            depth=sizes.encoder_depth,
            num_heads=sizes.encoder_heads,
            mlp_ratio=sizes.encoder_mlp_ratio,
            out_chans=sizes.embed_dim,
            use_rel_pos=sizes.rel_pos,
            window_size=sizes.window_size,
            global_attn_indexes=sizes.global_layers,
        ),
        modeling.PromptEncoder(
            embed_dim=sizes.embed_dim,
            image_embedding_size=(side, side),
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=sizes.mask_channels,
        ),
        modeling.MaskDecoder(
            transformer_dim=sizes.embed_dim,
            transformer=modeling.TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.embed_dim,
                num_heads=sizes.decoder_heads,
                mlp_dim=sizes.decoder_mlp_dim,
            ),
            iou_head_depth=sizes.iou_depth,
            iou_head_hidden_dim=sizes.iou_dim,
        ),
    )


def decode_prompts(
    sam: nn.Module,
    embeddings: Tensor,
    owners: Tensor,
    *,
    points: tuple[Tensor, Tensor] | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masks for the prompts of many images at once; at least one kind of prompt must be given.

    Args:
        sam: a `Sam`.
        embeddings: of the images, `[B, C, h, w]`.
        owners: the image that each prompt is about, `[P]`.
        points: pixels (x, y) `[P, N, 2]` and labels `[P, N]`, 1 for inside and 0 for outside.
        boxes: (x0, y0, x1, y1) `[P, 4]`.
        masks: logits of an earlier answer, `[P, 1, 4h, 4w]`.

    Returns:
        Logits `[P, 4, 4h, 4w]` and predicted IoUs `[P, 4]`: first the single mask, then the three of
        `multimask_output=True`.
    """
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)  # type: ignore[operator]
    decoder: Any = sam.mask_decoder
    positions = sam.prompt_encoder.get_dense_pe().expand(len(owners), -1, -1, -1)  # type: ignore[union-attr, operator]
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(owners), -1, -1)
    source = embeddings[owners] + dense
    tokens, source = decoder.transformer(source, positions, torch.cat([outputs, sparse], 1))
    fine = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, embeddings.shape[-2:]))
    kernels = [mlp(tokens[:, 1 + index]) for index, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = (torch.stack(kernels, 1) @ fine.flatten(2)).unflatten(2, fine.shape[-2:])
    return logits, decoder.iou_prediction_head(tokens[:, 0])


def save_segmenter(sam: nn.Module, config: SamConfig | Mapping[str, Any] | None, folder: str | Path) -> Path:
    """Write weights and configuration into a folder that `load_segmenter` reads; returns the folder.

    Raises:
        ValueError: when `config` has an unknown size, or is not that of `sam`.
    """
    sizes = config if isinstance(config, SamConfig) else _read_config(config or {})
    state = sam.state_dict()
    expected = {key: value.shape for key, value in build_sam(sizes).state_dict().items()}
    if {key: value.shape for key, value in state.items()} != expected:
        raise ValueError("config is not that of this SAM; give the one that it was built from")
    folder = Path(folder)
    write_weights(state, folder / MODEL)
    partial = folder / f".{CONFIG}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(asdict(sizes), indent=2) + "\n")
        partial.rename(folder / CONFIG)
    finally:
        partial.unlink(missing_ok=True)
    return folder


def load_segmenter(folder: str | Path | None = None) -> "Sam":
    """The small SAM that ships with the package, or one that `save_segmenter` wrote, in eval mode.

    Args:
        folder: holds `config.json` and `model.safetensors`; default the package's own.

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when a file is missing.
        ValueError: for a file that is broken, or a configuration that does not fit the weights.

    Examples:
        >>> import numpy as np
        >>> from segment_anything import SamPredictor
        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.embedded import load_segmenter
        >>> scene = ShapesWorld("balanced", seed=1)[0]
        >>> predictor = SamPredictor(load_segmenter())
        >>> predictor.set_image(np.array(scene.image))
        >>> heart = scene.objects[0]
        >>> masks, scores, logits = predictor.predict(box=np.array(heart.box), multimask_output=False)
        >>> overlap = (masks[0] & heart.mask).sum() / (masks[0] | heart.mask).sum()
        >>> bool(overlap > 0.8)
        True
    """
    folder = WEIGHTS / "segmenter" if folder is None else Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"no segmenter in {folder}: {CONFIG} is missing; "
            "reinstall visionsel, or name a folder that save_segmenter wrote"
        )
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
        sam = build_sam(config)
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f"{path} is not the configuration of a segmenter: {error}") from error
    state = read_weights(folder / MODEL)
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"{path} does not fit {folder / MODEL}: {' '.join(lines[1:2]).strip()}") from error
    return sam.eval()


def _read_config(config: Mapping[str, Any]) -> SamConfig:
    known = SamConfig.__dataclass_fields__
    unknown = [name for name in config if name not in known]
    if unknown:
        raise ValueError(f"unknown size {unknown[0]!r}; a segmenter has {', '.join(known)}")
    return SamConfig(**config)
