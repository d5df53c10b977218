"""The families of vision-language models that visionsel knows; one file each."""

from torch import nn

from visionsel.multimodal.families.family import Family
from visionsel.multimodal.families.gemma3 import Gemma3
from visionsel.multimodal.families.idefics3 import Idefics3
from visionsel.multimodal.families.internvl import InternVL
from visionsel.multimodal.families.llava import Llava
from visionsel.multimodal.families.llava_next import LlavaNext
from visionsel.multimodal.families.llava_onevision import LlavaOnevision
from visionsel.multimodal.families.paligemma import PaliGemma
from visionsel.multimodal.families.qwen2_5_vl import Qwen25VL
from visionsel.multimodal.families.qwen2_vl import Qwen2VL
from visionsel.multimodal.families.qwen3_vl import Qwen3VL

__all__ = ["FAMILIES", "find_family"]

FAMILIES: list[Family] = [
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    InternVL(),
    Idefics3(),
    Gemma3(),
    PaliGemma(),
]


def find_family(model: nn.Module) -> Family:
    """What is known of a model's family.

    Args:
        model: a vision-language model of transformers with its head (`...ForConditionalGeneration`).

    Raises:
        ValueError: when it is none, or of no supported family.
        NotImplementedError: for a LLaVA with a vision tower that is not supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found = [family for family in FAMILIES if kind in family.model_types]
    if not found:
        reason = "it has no transformers config" if kind is None else f"its config.model_type is {kind!r}"
    elif hasattr(model, "get_base_model"):
        reason = "it is a wrapper of peft; pass model.get_base_model(), which has the adapter too"
    elif not hasattr(model, "model") or not hasattr(model, "generate"):
        reason = "it has no language-modelling head; pass the ...ForConditionalGeneration model"
    else:
        # the tower of a LLaVA can be of several kinds
        return found[0].for_model(model) if isinstance(found[0], Llava) else found[0]
    supported = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise ValueError(
        f"{type(model).__name__} is no supported vision-language model: {reason}; supported are {supported}"
    )
