"""The tables of docs/methods.md: `python -m benchmarks.method_table` prints them, `--write` rewrites it.

Names and layers come from the classes; what is written below is of the papers and the methods' own files.
"""

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from benchmarks.model_table import rewrite
from visionsel.multimodal.decoding import DECODERS
from visionsel.multimodal.grounding.heatmaps import HEATMAPS
from visionsel.multimodal.intervention import method_name
from visionsel.multimodal.modulation import MODULATORS
from visionsel.multimodal.pruning import PRUNERS, ExplainPrune, SparseVLM, Yopo
from visionsel.multimodal.pruning.pruner import Pruner

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- python -m benchmarks.method_table --write -->\n", "<!-- end of the tables -->"


@dataclass(frozen=True)
class About:
    """What a class does not say of itself.

    Attributes:
        paper: authors and year; "" for a method without a paper.
        arxiv: number of the paper.
        needs: what it reads, and what must be given, found or trained before.
        cost: what it computes beside the model.
        code: licence of the authors' code, which is not used here.
    """

    paper: str
    arxiv: str
    needs: str
    cost: str
    code: str = "-"


CLASS_ROW = "attention of the class token in the tower"
SECOND = "the second view: a prefill, and a step for each token"
SECOND_TEXT = "the second view, without images: a prefill, and a step for each token"
ABOUT = {
    "random": About("", "", "a seed", "nothing"),
    "uniform": About("", "", "the token grid", "nothing"),
    "pool": About("", "", "the token grid", "averages"),
    "fastv": About(
        "Chen et al. 2024", "2403.06764", "one row of attention: the last token's", "that row", "no licence"
    ),
    "pyramiddrop": About(
        "Xing et al. 2024",
        "2410.17247",
        "the last token's attention, one row a stage",
        "queries and keys at each stage",
        "MIT",
    ),
    "sparsevlm": About(
        "Zhang et al. 2024",
        "2410.04417",
        "attention of the text that looks at the image; text after the image",
        "rows of the raters, clustering",
        "Apache-2.0",
    ),
    "divprune": About(
        "Alvar et al. 2025",
        "2503.02175",
        "distances between features",
        "N x N distances; tokens are chosen one after the other",
        "CC-BY-NC",
    ),
    "visionzip": About(
        "Yang et al. 2024", "2412.04467", f"{CLASS_ROW}, and its keys", "merging", "Apache-2.0"
    ),
    "vispruner": About(
        "Zhang et al. 2024",
        "2412.01818",
        f"{CLASS_ROW}; features",
        "rounds of comparing the rest",
        "Apache-2.0",
    ),
    "prumerge": About(
        "Shang et al. 2024",
        "2403.15388",
        f"{CLASS_ROW}, and its keys; no `keep`, the image decides",
        "merging",
        "Apache-2.0",
    ),
    "dart": About(
        "Wen et al. 2025",
        "2502.11494",
        "keys and hidden states, no attention",
        "similarity to eight pivots",
    ),
    "cdpruner": About(
        "Zhang et al. 2025",
        "2506.10967",
        "relevance to the text: of embeddings, or a CLIP (`ClipRelevance`)",
        "a greedy determinantal point process; the CLIP, if there is one",
        "Apache-2.0",
    ),
    "holov": About(
        "Zou et al. 2025",
        "2510.02912",
        f"{CLASS_ROW}; features",
        "similarity within 16 chunks",
        "Apache-2.0",
    ),
    "vflowopt": About(
        "Yang et al. 2025",
        "2508.05211",
        "all attention of a tower layer; a schedule, which `vflowopt_search.calibrate` finds on samples",
        "merging; 300 trials for a schedule",
        "CC-BY-NC",
    ),
    "explainprune": About(
        "after Lei et al. 2025",
        "2506.01097",
        "a net trained for the model (`train.explainprune`)",
        "queries and keys of the first layer, the net",
        "not released",
    ),
    "yopo": About(
        "Zhang et al. 2024",
        "2410.06169",
        "for `inactive` heads `yopo.calibrate`; no flash kernel with `window`",
        "masks; only `layer_stop` and `mlp_ratio` save time",
        "MIT",
    ),
    "promptdistill": About(
        "Jin et al. 2025",
        "2503.23274",
        "queries and keys of the last token at each stage",
        "those products",
        "no licence",
    ),
    "vhr": About(
        "He et al. 2024",
        "2412.13949",
        "outputs of the heads with and without the image",
        "the prompt without its image, beside the first forward",
        "not found",
    ),
    "var": About(
        "Kang et al. 2025",
        "2503.03321",
        "sink dimensions: published, or found on one token (`discover_sink_dims`)",
        "attention of the text's rows once more",
        "Apache-2.0",
    ),
    "act": About(
        "Yu et al. 2024",
        "2406.15765",
        "the attention over the prompt; better with `heads` chosen for the model",
        "attention of the changed layers once more",
        "no licence file",
    ),
    "pai": About("Liu et al. 2024", "2407.21771", "nothing", "one row of attention a layer and token", "MIT"),
    "paint": About(
        "Arif et al. 2025",
        "2501.12206",
        "attention of two tower layers",
        "one row of attention a layer and token",
        "Apache-2.0",
    ),
    "grounding_heads": About(
        "ours",
        "",
        "heads: `GroundingHeads.calibrate` on annotated images, a preset or your own",
        "a product; the calibration",
    ),
    "vcd": About("Leng et al. 2024", "2311.16922", "pixels, which it noises", SECOND, "Apache-2.0"),
    "icd": About("Wang et al. 2024", "2403.18715", "the tokenizer", SECOND, "Apache-2.0"),
    "m3id": About("Favero et al. 2024", "2403.14003", "nothing", SECOND_TEXT, "not released"),
    "ritual": About(
        "Woo et al. 2024",
        "2405.17821",
        "pixels, which it transforms; `plus=True` the processor",
        f"{SECOND}; `plus=True` one more answer",
        "MIT",
    ),
    "agla": About(
        "An et al. 2024",
        "2406.12718",
        "a view, which BLIP or a CLIP makes (`matching_view`); there is no default",
        f"{SECOND}; the matcher once, with gradients",
        "no licence",
    ),
    "pai_guidance": About("Liu et al. 2024", "2407.21771", "nothing", SECOND_TEXT, "MIT"),
    "glc": About(
        "Shu et al. 2025",
        "2506.05551",
        "attention of all layers over the prompt; text after the image",
        "that attention, some rows at a time",
        "no licence",
    ),
    "vl_sam": About(
        "Lin et al. 2024",
        "2410.05963",
        "attention of all layers and tokens",
        "their products",
        "not released",
    ),
    "localization_heads": About(
        "Kang et al. 2025",
        "2503.06287",
        "three heads: `HeadSelector.fit` on images with texts, a preset, or chosen for each prompt",
        "one row of three heads",
        "MIT",
    ),
    "v_max": About(
        "Han et al. 2026",
        "2510.19592",
        "attention of the upper half of the layers; a prompt about the background",
        "their products; a second forward",
    ),
    "mean": About("", "", "rows of attention of the middle layers", "those rows"),
    "relative": About(
        "Zhang et al. 2025",
        "2502.17422",
        "rows of attention; a general prompt",
        "a second forward",
    ),
    "tam": About(
        "Li et al. 2025",
        "2506.23270",
        "the model's head, unquantised; no attention",
        "logits of image tokens for the words of the answer",
        "no licence",
    ),
}


# one has no stages without its net, one none by default, one chooses its raters at a stage that drops nothing
SAID: dict[type[Pruner], str] = {
    ExplainPrune: "input",
    Yopo: "`layer_stop`",
    SparseVLM: "layers 2, 6, 15",
}


def where(kind: type[Pruner]) -> str:
    """At which of 32 decoder layers tokens go by default."""
    if kind in SAID:
        return SAID[kind]
    keep = kind.__dataclass_fields__.get("keep")
    wanted = keep is not None and keep.default in (MISSING, None)
    arguments: dict[str, Any] = {"keep": 0.5} if wanted else {}
    layers = [stage.layer for stage in kind(**arguments).stages(32)]
    later = ", ".join(str(layer) for layer in layers if layer)
    said = [f"layer{'s' if later.count(',') else ''} {later}"] if later else []
    return ", ".join(["input", *said] if 0 in layers else said)


def tables() -> str:
    """All of them, as Markdown."""
    kinds = [*PRUNERS, *MODULATORS, *DECODERS, *HEATMAPS]
    if (names := [method_name(kind) for kind in kinds]) != list(ABOUT):
        raise RuntimeError(f"ABOUT has {list(ABOUT)}, the package {names}; both must be alike")
    parts = []
    for title, option, found in (
        ("Pruners", "--prune", PRUNERS),
        ("Modulators", "--modulate", MODULATORS),
        ("Decoders", "--decode", DECODERS),
        ("Heatmaps", "--heatmap", HEATMAPS),
    ):
        head = ["class", f"`{option}`", "paper", "needs", "costs", "authors' code"]
        if found is PRUNERS:
            head.insert(2, "drops at")
        rows = [head, ["---"] * len(head), *(_row(kind) for kind in found)]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def _row(kind: type[Any]) -> list[str]:
    name = method_name(kind)
    about = ABOUT[name]
    paper = about.paper or "a baseline"
    if about.arxiv:
        paper += f", [{about.arxiv}](https://arxiv.org/abs/{about.arxiv})"
    cells = [f"`{kind.__name__}`", f"`{name}`", paper, about.needs, about.cost, about.code]
    if issubclass(kind, Pruner):
        cells.insert(2, where(kind))
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    if parser.parse_args(arguments).write:
        rewrite(PAGE, BEGIN, END, tables())
    else:
        print(tables())


if __name__ == "__main__":
    main()
