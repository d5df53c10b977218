"""`build_segmenter`: a segmenter from a name or from a model."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from visionsel.multimodal.grounding.segmenters.hf_sam import HFSamSegmenter
from visionsel.multimodal.grounding.segmenters.sam import SamSegmenter
from visionsel.multimodal.grounding.segmenters.sam2 import Sam2Segmenter
from visionsel.multimodal.grounding.segmenters.sam3 import Sam3Segmenter
from visionsel.multimodal.grounding.segmenters.segmenter import Segmenter
from visionsel.multimodal.shipped import shipped

__all__ = ["build_segmenter"]

SPECS = (
    '"embedded", "sam:vit_b" with checkpoint=, "hf:" and a folder or a name such as '
    '"hf:facebook/sam2.1-hiera-tiny", or a model'
)
# classes of transformers, by name, for older versions do not have them all
OF_TRANSFORMERS: dict[str, type[Segmenter]] = {
    "SamModel": HFSamSegmenter,
    "SamHQModel": HFSamSegmenter,
    "Sam2Model": Sam2Segmenter,
    "Sam3TrackerModel": Sam3Segmenter,
}
SAM_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder", "preprocess")


def build_segmenter(
    spec: str | nn.Module,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    cache: int = 8,
    *,
    chunk: int = 16,
    checkpoint: str | Path | None = None,
) -> Segmenter:
    """A segmenter for prompts.

        build_segmenter("embedded")                        # the small SAM of the shapes world that ships
        build_segmenter("sam:vit_b", checkpoint="sam_vit_b_01ec64.pth")
        build_segmenter("hf:facebook/sam2.1-hiera-tiny")   # any SAM, SAM-HQ, SAM 2, SAM 3 of transformers
        build_segmenter(model)                             # one that is there already

    Args:
        spec: a name as above, a `segment_anything` `Sam`, or a `SamModel`, `SamHQModel`, `Sam2Model` or
            `Sam3TrackerModel` of transformers.
        device: default: cuda if there is one, else cpu; for a model, where it is. A model is moved.
        dtype: see `Segmenter`.
        cache: see `Segmenter`.
        chunk: see `Segmenter`.
        checkpoint: the released file of a `"sam:..."`.

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when there is no such checkpoint.
        OSError: when transformers finds no such model.
        TypeError, ValueError: for a spec that is not known, a checkpoint that is missing, not wanted, broken
            or of another model, and values that a `Segmenter` does not take.
        NotImplementedError: for a model that takes no points and boxes, or none that the installed
            transformers has.

    Examples:
        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.multimodal import build_segmenter
        >>> scene = ShapesWorld("balanced", seed=1)[0]
        >>> segmenter = build_segmenter("embedded").set_image(scene.image)
        >>> masks = segmenter.predict(boxes=[item.box for item in scene.objects])
        >>> masks.iou.shape, masks.best().shape
        (torch.Size([3, 3]), torch.Size([3, 64, 64]))
    """
    kind, _, name = spec.partition(":") if isinstance(spec, str) else ("model", "", "")
    if checkpoint is not None and kind != "sam":
        raise ValueError(f'checkpoint= goes with "sam:vit_b" and its sisters; {spec!r} has its own weights')
    if not isinstance(spec, str):
        model, adapter = spec, _adapter(spec)
    elif spec == "embedded":
        model, adapter = shipped("load_segmenter"), SamSegmenter
    elif kind == "sam" and name:
        model, adapter = _load_sam(name, checkpoint), SamSegmenter
    elif kind == "hf" and name:
        model = _load_transformers(name)
        adapter = _adapter(model)
    else:
        raise ValueError(f"no segmenter {spec!r}; expected {SPECS}")
    if device is None and isinstance(spec, str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    segmenter = adapter(model, dtype=dtype, cache=cache, chunk=chunk)
    if device is not None:
        model.to(device)
    return segmenter


def _adapter(model: Any) -> type[Segmenter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is no segmenter; expected {SPECS}")
    for base in type(model).__mro__:
        if base.__name__ in OF_TRANSFORMERS and base.__module__.startswith("transformers."):
            return OF_TRANSFORMERS[base.__name__]
    if all(hasattr(model, part) for part in SAM_PARTS):
        return SamSegmenter
    known = ", ".join(OF_TRANSFORMERS)
    hint = "; SAM 3 takes points and boxes as Sam3TrackerModel" if "Sam3" in type(model).__name__ else ""
    raise NotImplementedError(
        f"{type(model).__name__} is not used as a segmenter; a segment_anything Sam is, and of transformers "
        f"{known}{hint}"
    )


def _load_sam(name: str, checkpoint: str | Path | None) -> nn.Module:
    try:
        from segment_anything import sam_model_registry
    except ImportError as error:
        raise ImportError(
            f'"sam:{name}" needs segment_anything: pip install "visionsel[multimodal]"'
        ) from error
    if name not in sam_model_registry:
        raise ValueError(f"no SAM {name!r}; there are vit_b, vit_l and vit_h")
    if checkpoint is None:
        raise ValueError(
            f'"sam:{name}" needs checkpoint=, the path of its released file (sam_{name}_*.pth, from '
            "https://github.com/facebookresearch/segment-anything#model-checkpoints); nothing is downloaded"
        )
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a file of weights, or is cut off: {error}") from error
    model: nn.Module = sam_model_registry[name]()
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else lines[0]
        raise ValueError(f"{path} is not the checkpoint of {name}: {reason[:200]}") from error
    return model.eval()


def _load_transformers(name: str) -> nn.Module:
    import transformers
    from transformers import AutoConfig, AutoModelForMaskGeneration

    config = AutoConfig.from_pretrained(name)
    if type(config) not in AutoModelForMaskGeneration._model_mapping:
        sam3 = config.model_type == "sam3"
        hint = "; save the tracker of SAM 3, Sam3TrackerModel, by itself" if sam3 else ""
        raise NotImplementedError(
            f"{name} is a {config.model_type!r}, for which transformers {transformers.__version__} has no "
            f"model that takes points and boxes{hint}"
        )
    # by its own class: the configuration of videos may give the decoder wrong defaults (transformers 5.17);
    # in float32 whatever the file holds: precision is up to autocast
    of_images: Any = AutoModelForMaskGeneration._model_mapping[type(config)]
    model, found = of_images.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; without "
            "them they would be random"
        )
    return model.eval()
