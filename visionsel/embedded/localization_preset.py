"""The heads of `HeadSelector.preset("embedded")`: `python -m visionsel.embedded.localization_preset`.

They are counted over questions about one object of scenes of the shapes world, what colour it has and where
it is. The model has 16 heads, of which 3 a sample are counted. Run it again when the model was trained again;
it takes a minute.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from visionsel.data.shapes import ShapesWorld

__all__ = ["find_preset", "main"]

DISTRIBUTION = "balanced"
SEED, SIZE = 2**28 - 1, 200  # below the scenes of training, above all that methods are measured on
KINDS = ("color", "where")
TOP = 3
COMMAND = "python -m visionsel.embedded.localization_preset"


def find_preset(output: str | Path | None = None, size: int = SIZE) -> Path:
    """Count the heads of the model of the package and write them; returns the path of the file.

    Args:
        output: file to write; None: the one in the package.
        size: number of scenes.
    """
    from visionsel.embedded import load_lvlm
    from visionsel.multimodal.grounding.heatmaps.head_selector import PRESETS, HeadSelector

    asked = [
        (scene.image, question.text)
        for scene in ShapesWorld(DISTRIBUTION, SEED, size)
        for question in scene.questions
        if question.kind in KINDS
    ]
    images, texts = zip(*asked, strict=True)
    found = HeadSelector.fit(*load_lvlm(), images, texts, top=TOP, batch_size=50)
    made = {
        "command": COMMAND,
        "distribution": DISTRIBUTION,
        "seed": SEED,
        "size": size,
        "questions": list(KINDS),
    }
    return replace(found, made=made).save(output or PRESETS / "embedded.json")


def main() -> None:
    """Write the file and show what is in it."""
    from visionsel.multimodal.grounding.heatmaps.head_selector import HeadSelector

    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Count the heads that LocalizationHeads reads in the model of the package.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the preset of the package")
    path = find_preset(parser.parse_args().output)
    found = HeadSelector.load(path)
    for layer, head, count in found.counts:
        print(f"layer {layer} head {head}: in {count} of {found.samples}")
    print(path)


if __name__ == "__main__":
    main()
