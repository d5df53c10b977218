"""The tables of docs/models.md: `python -m benchmarks.model_table` prints them, `--write` rewrites the page.

Parameters and multiply-adds are counted here, on torch's meta device, which computes nothing. Multiply-adds
are what papers call FLOPs: half of what torch's counter says of the convolutions, linear layers and matrix
products for one image at the input of the release, through the plain `reference` of each operator. What is
published is written down below with its source.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visionsel
from visionsel.files import whole_file
from visionsel.models import registered_names
from visionsel.models.acceleration import AcceleratedFocalModulation, AcceleratedHaloAttn

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- python -m benchmarks.model_table --write -->\n", "<!-- end of the tables -->"


@dataclass(frozen=True)
class Published:
    """What a source says of a release; digits as printed, None where it says nothing.

    Attributes:
        top1: on ImageNet-1k, percent.
        parameters: in millions.
        flops: in G.
    """

    top1: str | None = None
    parameters: str | None = None
    flops: str | None = None


@dataclass(frozen=True)
class Family:
    """Models with one source.

    Attributes:
        title: of the table.
        pattern: of their names; a release belongs to the first family that it matches.
        source: of what is published, in Markdown.
        published: by release; a name without a tag stands for its releases that are not named.
    """

    title: str
    pattern: str
    source: str
    published: dict[str, Published]


NAT_README = "github.com/SHI-Labs/Neighborhood-Attention-Transformer"
FAMILIES = (
    Family(
        "BiFormer",
        "biformer_*",
        "Zhu et al. 2023, [arXiv:2303.08810](https://arxiv.org/abs/2303.08810); numbers of the table in the "
        "authors' README, github.com/rayleizhu/BiFormer",
        {
            "biformer_tiny": Published("81.4", "13.1", "2.2"),
            "biformer_small": Published("83.8", "25.5", "4.5"),
            "biformer_base": Published("84.3", "56.8", "9.8"),
            "biformer_stl": Published("82.7", "28.4", "4.6"),
        },
    ),
    Family(
        "NAT",
        "nat_*",
        "Hassani et al. 2023, [arXiv:2204.07143](https://arxiv.org/abs/2204.07143); numbers of the authors' "
        f"NAT.md, {NAT_README}",
        {
            "nat_mini": Published("81.8", "20", "2.7"),
            "nat_tiny": Published("83.2", "28", "4.3"),
            "nat_small": Published("83.7", "51", "7.8"),
            "nat_base": Published("84.3", "90", "13.7"),
        },
    ),
    Family(
        "DiNAT_s",
        "dinat_s_*",
        "Hassani and Shi 2022, [arXiv:2209.15001](https://arxiv.org/abs/2209.15001), Swin's layout; numbers "
        f"of the authors' DiNAT.md at commit d334f5b, {NAT_README}",
        {
            "dinat_s_tiny": Published("81.8", "28", "4.5"),
            "dinat_s_small": Published("83.5", "50", "8.7"),
            "dinat_s_base": Published("83.8", "88", "15.4"),
            "dinat_s_large.in22k_ft_in1k": Published("86.5", "197", "34.5"),
            "dinat_s_large.in22k_ft_in1k_384": Published("87.4", "197", "101.5"),
        },
    ),
    Family(
        "DiNAT",
        "dinat_*",
        "Hassani and Shi 2022, [arXiv:2209.15001](https://arxiv.org/abs/2209.15001); numbers of the authors' "
        f"DiNAT.md at commit d334f5b, {NAT_README}",
        {
            "dinat_mini": Published("81.8", "20", "2.7"),
            "dinat_tiny": Published("82.7", "28", "4.3"),
            "dinat_small": Published("83.8", "51", "7.8"),
            "dinat_base": Published("84.4", "90", "13.7"),
            "dinat_large.in22k_ft_in1k": Published("86.6", "200", "30.6"),
            "dinat_large.in22k_ft_in1k_384": Published("87.4", "200", "89.7"),
            "dinat_large.in22k_ft_in1k_384_11x11": Published("87.5", None, "92.4"),
        },
    ),
    Family(
        "HaloNet",
        "halonet_*",
        "Vaswani et al. 2021, [arXiv:2103.12731](https://arxiv.org/abs/2103.12731); numbers of the "
        "paper as github.com/leondgarse/keras_cv_attention_models lists them; the authors released neither "
        "code nor weights",
        {
            "halonet_h0_256": Published("77.9", "5.5"),
            "halonet_h1_256": Published("79.9", "8.1"),
            "halonet_h2_256": Published("80.4", "9.4"),
            "halonet_h3_320": Published("81.9", "11.8"),
            "halonet_h4_384": Published("83.3", "19.1"),
            "halonet_h5_448": Published("84.0", "30.7"),
            "halonet_h6_512": Published("84.4", "43.4"),
            "halonet_h7_600": Published("84.9", "67.4"),
        },
    ),
    Family(
        "FocalNet, isotropic",
        "focalnet_*_iso_16",
        "Yang et al. 2022, [arXiv:2203.11926](https://arxiv.org/abs/2203.11926); numbers of the table in the "
        "authors' README, github.com/microsoft/FocalNet",
        {
            "focalnet_tiny_iso_16": Published("74.1", "5.9", "1.1"),
            "focalnet_small_iso_16": Published("80.9", "22.4", "4.3"),
            "focalnet_base_iso_16": Published("82.4", "87.2", "16.9"),
        },
    ),
    Family("SelectFormer", "selectformer_*", "ours; trained on nothing large yet", {}),
)


def releases() -> Iterator[str]:
    """All models, with the tags of their releases."""
    for name in registered_names():
        yield from timm.list_models(f"{name}.*", include_tags=True) or [name]


def published(release: str) -> Published:
    """What is written down above; of a release without classes of ImageNet-1k no accuracy."""
    known = {name: value for family in FAMILIES for name, value in family.published.items()}
    return known.get(release) or known.get(release.partition(".")[0]) or Published()


def family_of(release: str) -> Family:
    """The first one with a pattern that fits.

    Raises:
        ValueError: when there is none.
    """
    for family in FAMILIES:
        if fnmatch(release.partition(".")[0], family.pattern):
            return family
    raise ValueError(f"no family here has {release}; add one to FAMILIES")


def parameters(model: nn.Module) -> int:
    """How many."""
    return sum(parameter.numel() for parameter in model.parameters())


def build(release: str) -> nn.Module:
    """The model on the meta device, its operators plain."""
    return on_meta(release, backend="reference").eval()


def on_meta(name: str, **options: Any) -> nn.Module:
    """A model without numbers."""
    # there is nothing to fill with them, and trying to takes four fifths of the time
    with mock.patch("timm.layers.weight_init._trunc_normal_"):
        model: nn.Module = timm.create_model(name, device="meta", **options)
    return model


def multiply_adds(model: nn.Module) -> int:
    """Of one image, see above."""
    config: Any = model.pretrained_cfg
    image = torch.empty(1, *config["input_size"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return int(counter.get_total_flops()) // 2


def tables() -> str:
    """All of them, as Markdown."""
    found: dict[str, list[tuple[int, int, str]]] = {family.title: [] for family in FAMILIES}
    for release in releases():
        family, model = family_of(release), build(release)
        found[family.title].append((parameters(model), multiply_adds(model), release))
    parts = [_family_table(family, sorted(found[family.title])) for family in FAMILIES]
    return "\n\n".join([*parts, _accelerated_table()]) + "\n"


def _family_table(family: Family, rows: Sequence[tuple[int, int, str]]) -> str:
    head = "| model | parameters | multiply-adds | input | top-1 | weights |\n|---|---|---|---|---|---|"
    lines = [head, *(_line(release, size, adds) for size, adds, release in rows)]
    return f"### {family.title}\n\nSource: {family.source}.\n\n" + "\n".join(lines)


def _line(release: str, size: int, adds: int) -> str:
    cfg = timm.get_pretrained_cfg(release)
    assert cfg is not None  # every model of ours has one
    link = "none"
    if cfg.url:
        link = f"[file]({cfg.url})" if "onedrive" not in cfg.url else "a file that you have"
    cells = [
        f"`{release.removesuffix('.untrained')}`",
        millions(size),
        f"{adds / 1e9:.2f} G",
        str(cfg.input_size[-1]),
        published(release).top1 or "-",
        link,
    ]
    return f"| {' | '.join(cells)} |"


def millions(size: int) -> str:
    """As the tables have it."""
    return f"{size / 1e6:.1f} M"


def _accelerated_table() -> str:
    """timm's models in which `visionsel.accelerate` finds something to do, and the operator that does it."""
    rows = ["| model of timm | operator | parameters |", "|---|---|---|"]
    operators = {AcceleratedHaloAttn: "halo", AcceleratedFocalModulation: "focal modulation"}
    for name in sorted({*timm.list_models("*halo*"), *timm.list_models("focalnet*")} - {*registered_names()}):
        model = visionsel.accelerate(on_meta(name))
        kinds = {operators[type(module)] for module in model.modules() if type(module) in operators}
        if kinds:
            rows.append(f"| `{name}` | {', '.join(kinds)} | {millions(parameters(model))} |")
    return "### timm's own, through `visionsel.accelerate`\n\n" + "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    options = parser.parse_args(arguments)
    if not options.write:
        print(tables())
        return
    rewrite(PAGE, BEGIN, END, tables())


def rewrite(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page.

    Raises:
        ValueError: when the page has not both.
    """
    before, first, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{page} needs the lines {begin.strip()!r} and {end!r}")
    with whole_file(page) as partial:
        partial.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
