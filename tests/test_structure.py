"""The floors, the public names and the cost of the import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import visionsel

PACKAGE = Path(visionsel.__file__).parent
FLOORS = {"ops": 1, "data": 1, "layers": 2, "models": 3, "multimodal": 4, "embedded": 5, "integrations": 6}
# inside multimodal/; floor 2 is one thing in several files
MULTIMODAL = {
    "timm_tower": 0,
    "prompts": 0,
    "shipped": 0,
    "families": 1,
    **dict.fromkeys(
        (
            "attention",
            "cache",
            "scope",
            "session",
            "tower",
            "dropping",
            "intervention",
            "sinks",
            "head_presets",
        ),
        2,
    ),
    **dict.fromkeys(("pruning", "modulation", "decoding", "evaluation", "grounding"), 3),
}
# of pruning/, what is no method
PRUNING = {"checks", "pruner", "visual_tokens", "report", "picture", "measure", "budget"}
# heavier than importing timm: only inside functions, and only where an extra is named when they are missing
HEAVY = {
    "transformers",
    "lightning",
    "sklearn",
    "matplotlib",
    "gradio",
    "open_clip",
    "natten",
    "torchmetrics",
    "segment_anything",
    "tokenizers",
    "optuna",
    "lmms_eval",
    "vlmeval",
    "webdataset",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "segmentation_models_pytorch",
}
# folders of an extra: their __init__ names it when it is missing
OF_AN_EXTRA = {"multimodal": {"transformers"}}


def imports(path: Path) -> list[tuple[ast.stmt, str]]:
    """Every module that a file imports, with the statement."""
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; name the package"
            found.append((node, node.module or ""))
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def place(path: Path) -> tuple[str, str]:
    """The floor and the room of a file of the package: `("ops", "halo")`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return (parts[0], parts[1]) if len(parts) > 1 else ("", parts[0])


def rooms() -> set[tuple[str, str]]:
    return {place(path) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down_the_floors_and_never_sideways_between_methods(path: Path) -> None:
    floor, room = place(path)
    if floor not in FLOORS or room == "__init__":
        return
    shared = {
        ("ops", "checks"),
        ("ops", "choice"),
        ("ops", "chunks"),
        ("ops", "compilation"),
        ("ops", "depthwise"),
        ("ops", "flexible"),
        ("ops", "gpu"),
        ("ops", "linear"),
        ("ops", "plans"),
        ("data", "folders"),
        ("data", "coco"),
        ("layers", "convolution"),
        ("models", "pyramid"),
    }
    shared |= {("integrations", "conversations"), ("data", "shapes")}
    for _, module in imports(path):
        parts = module.split(".")
        if parts[0] != "visionsel" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        target = (parts[1], parts[2] if len(parts) > 2 else "__init__")
        below = FLOORS[target[0]] < FLOORS[floor]
        same_room = target == (floor, room)
        own_floor = target[0] == floor and (target in shared or floor in ("embedded", "multimodal"))
        assert below or same_room or own_floor, f"{floor}/{room} imports {module}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "multimodal").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_multimodal_has_floors_of_its_own_and_methods_that_do_not_know_each_other(path: Path) -> None:
    room, *inner = path.relative_to(PACKAGE / "multimodal").with_suffix("").parts
    if room == "__init__":
        return
    for _, module in imports(path):
        parts = module.split(".")
        if parts[:2] != ["visionsel", "multimodal"] or len(parts) < 3:
            continue
        below, here = MULTIMODAL[parts[2]], MULTIMODAL[room]
        assert below < here or parts[2] == room or below == here == 2, f"{room} imports {module}"
        if room == parts[2] == "pruning" and len(parts) > 3 and inner[0] not in {"__init__", *PRUNING}:
            method = inner[0].partition("_")[0]
            assert parts[3] in PRUNING or parts[3].partition("_")[0] == method, f"{inner[0]} imports {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_imports_an_extra_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path == PACKAGE / "multimodal" / "__init__.py":
        assert "pip install" in path.read_text()
        return
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        heavy = {name.split(".")[0] for name in names} & HEAVY - OF_AN_EXTRA.get(place(path)[0], set())
        assert not heavy, f"{path.name} imports {heavy} for everyone"


def test_public_names_are_these() -> None:
    assert sorted(visionsel.__all__) == ["__version__", "accelerate", "models", "ops"]
    assert sorted(visionsel.ops.__all__) == [
        "backends",
        "bilevel_routing_attention",
        "focal_modulation",
        "halo_attention",
        "neighborhood_attention",
    ]
    for module in (visionsel, visionsel.ops, visionsel.models):
        for name in module.__all__:
            assert getattr(module, name) is not None


def run_fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout


def test_importing_visionsel_loads_no_extra() -> None:
    loaded = json.loads(
        run_fresh(
            "import json, sys, visionsel; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
        )
    )
    assert not set(loaded) & HEAVY


def test_registering_overwrites_no_timm_name() -> None:
    code = """
import json, warnings
warnings.simplefilter("error")
import timm
before = {n: timm.model_entrypoint(n).__module__ for n in timm.list_models()}
tags = set(timm.list_models(include_tags=True))
files = {m: set(timm.list_models(module=m)) for m in ("focalnet", "byoanet", "swin_transformer")}
import visionsel
after = {n: timm.model_entrypoint(n).__module__ for n in timm.list_models()}
print(json.dumps({
    "changed": [n for n in before if after.get(n) != before[n]],
    "lost_tags": sorted(tags - set(timm.list_models(include_tags=True))),
    "mixed": [m for m, names in files.items() if set(timm.list_models(module=m)) != names],
    "new": sorted(set(after) - set(before)),
}))
"""
    result = json.loads(run_fresh(code))
    assert result["changed"] == []
    assert result["lost_tags"] == []
    assert result["mixed"] == []
    assert result["new"] == sorted(EXPECTED_NAMES)


EXPECTED_NAMES = """
biformer_tiny biformer_small biformer_base biformer_stl
nat_mini nat_tiny nat_small nat_base
dinat_mini dinat_tiny dinat_small dinat_base dinat_large
dinat_s_tiny dinat_s_small dinat_s_base dinat_s_large
halonet_h0_256 halonet_h1_256 halonet_h2_256 halonet_h3_320
halonet_h4_384 halonet_h5_448 halonet_h6_512 halonet_h7_600
focalnet_tiny_iso_16 focalnet_small_iso_16 focalnet_base_iso_16
selectformer_nano selectformer_micro selectformer_tiny selectformer_pico
""".split()
