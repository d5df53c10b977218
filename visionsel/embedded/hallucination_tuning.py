"""What is tried of each method against invention when it is tuned on the shipped vision-language model.

Each grid holds the published settings, weaker and stronger ones, and other parts of the decoder where a
method chooses layers. It is small enough for all methods to be tuned in some minutes on one core.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["grid_of"]

Grid = dict[str, tuple[Any, ...]]
_STRENGTHS: dict[str, Grid] = {
    "vhr": {"alpha": (2.0, 1.25, 1.5, 2.5, 3.0, 4.0)},
    "var": {"p": (0.6, 0.3, 0.9), "rho": (0.5, 0.2, 0.8), "tau": (2.0, 1.5, 2.5)},
    "act": {"beta": (0.4, 0.0, 0.2, 0.7), "threshold": (0.1, 0.05, 0.2)},
    "pai": {"alpha": (0.2, 0.05, 0.1, 0.5, 1.0)},
    "paint": {"alpha": (0.7, 0.1, 0.3, 0.5), "beta": (0.4, 0.1, 0.2)},
    "grounding_heads": {"strength": (1.6, 1.2, 1.4, 2.0, 2.5, 3.0)},
    "vcd": {"alpha": (1.0, 0.5, 2.0), "beta": (0.1, 0.5)},
    "icd": {"alpha": (1.0, 0.5, 2.0), "beta": (0.1, 0.5)},
    "m3id": {"decay": (0.02, 0.005, 0.1), "beta": (0.1, 0.5)},
    "ritual": {"alpha": (3.0, 0.5, 1.0), "beta": (0.1, 0.5)},
    "agla": {"alpha": (2.0, 0.5, 1.0), "beta": (0.5, 0.1)},
    "pai_guidance": {"gamma": (1.1, 1.5, 2.0), "beta": (0.1, 0.5)},
    "glc": {"w": (0.1, 0.2, 0.4), "stable": (0.5, 0.0)},
}
_LAYERED = ("vhr", "pai")
NOISE_STEPS = (500, 700, 999)


def grid_of(name: str, model: Any, processor: Any, given: Mapping[str, Any]) -> Grid:
    """Values to try for the hyperparameters of a method; none where there is no grid for it.

    Args:
        name: of the method.
        model, processor: of `load_lvlm`.
        given: its hyperparameters when it is not tuned, whose `layers` come first.
    """
    grid = dict(_STRENGTHS.get(name, {}))
    if name in _LAYERED:
        depth = model.config.get_text_config().num_hidden_layers
        half = depth // 2
        parts = (tuple(range(half)), tuple(range(half, depth)), tuple(range(depth)))
        grid["layers"] = tuple(dict.fromkeys([tuple(given["layers"]), *parts]))
    if name in ("vcd", "ritual"):
        from visionsel.multimodal.decoding import DiffusionNoise, RandomTransform

        if name == "vcd":
            grid["view"] = tuple(DiffusionNoise(step) for step in NOISE_STEPS)
        else:
            mild = RandomTransform.of(model, kinds=("blur", "crop"), processor=processor)
            grid["view"] = (given["view"], mild)
    return grid
