"""The heads of `GroundingHeads.preset("embedded")`: `python -m visionsel.embedded.grounding_preset`.

They are calibrated on scenes of the shapes world in which the usual companion is absent, at the default
strength. What they and the control give on the half of the scenes that they were not chosen on stands in the
file, which is written into the package, or where `--output` says. Run it again when the model was trained
again; it takes a minute or two.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from visionsel.data.shapes import ShapesWorld

__all__ = ["calibrate_preset", "main"]

DISTRIBUTION = "anti"
SEED, SIZE = 2**28 - 1, 400  # below the scenes of training, above all that methods are measured on
COMMAND = "python -m visionsel.embedded.grounding_preset"


def calibrate_preset(output: str | Path | None = None) -> Path:
    """Find the heads of the model of the package and write them; returns the path of the file.

    Args:
        output: file to write; None: the one in the package.

    Raises:
        ValueError: when no head helps.
    """
    from visionsel.embedded import load_lvlm
    from visionsel.multimodal.modulation.grounding_heads import PRESETS, GroundingHeads

    scenes = list(ShapesWorld(DISTRIBUTION, SEED, SIZE))
    heads = GroundingHeads.calibrate(*load_lvlm(), scenes)
    assert heads.report is not None
    made = {"command": COMMAND, "distribution": DISTRIBUTION, "seed": SEED, "size": SIZE}
    return replace(heads, report={"made": made, **heads.report}).save(output or PRESETS / "embedded.json")


def main() -> None:
    """Write the file and show what is in it."""
    from visionsel.multimodal.modulation.grounding_heads import GroundingHeads

    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Calibrate the heads that GroundingHeads strengthens in the model of the package.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the preset of the package")
    path = calibrate_preset(parser.parse_args().output)
    print(GroundingHeads.load(path).table())
    print(path)


if __name__ == "__main__":
    main()
