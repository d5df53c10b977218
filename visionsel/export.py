"""Classifiers as files for others, what `visionsel export` does: the hub's layout, `torch.export`, ONNX.

Programs and ONNX files are run after they are written, at two batch and image sizes, and kept only if they
give the model's logits.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.files import whole_file
from visionsel.prediction import Classifier

__all__ = [
    "export_onnx",
    "export_program",
    "model_card",
    "onnx_function",
    "push_to_hub",
    "save_hub_folder",
    "write_onnx",
    "write_program",
]

TOLERANCE = 1e-4
"""How far logits may be apart, in units of the largest one where that is above 1 (float32)."""

_EMBEDDED_BYTES = 2**31 - 2**27  # an ONNX file ends at 2 GiB; above this its weights go beside it


def export_program(model: nn.Module, size: tuple[int, int], dynamic: bool = True) -> Any:
    """The model as a program of `torch.export`, in evaluation mode.

    Args:
        model: that maps images `[B, C, H, W]` to logits.
        size: height and width to trace with, in pixels.
        dynamic: serve every batch and image size; otherwise every batch of this size.

    Raises:
        ValueError: when the model does not take the size, or cannot be traced with free sizes.
    """
    model = model.eval()
    image = torch.randn(2, _channels(model), *size, device=next(model.parameters()).device)
    free = torch.export.Dim.DYNAMIC
    axes = {0: free, 2: free, 3: free} if dynamic else {0: free}
    try:
        with torch.no_grad():
            return torch.export.export(model, (image,), dynamic_shapes=(axes,))
    except Exception as error:  # torch raises many kinds
        what = "free image sizes; try the fixed size" if dynamic else f"images of {size[0]} x {size[1]}"
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{type(model).__name__} cannot be exported with {what}: {reason}") from error


def write_program(
    model: nn.Module, path: str | Path, size: tuple[int, int], dynamic: bool = True
) -> dict[str, Any]:
    """Write the model as `torch.export` saves it (`.pt2`), and run it.

    Returns:
        `{"path", "shapes", "difference"}`: the shapes of the images that it was run with, and the largest
        difference of its logits, in units of the largest one where that is above 1.

    Raises:
        ValueError: see `export_program`; or when the program does not give the model's logits.
    """
    program = export_program(model, size, dynamic)
    with whole_file(path) as partial:
        torch.export.save(program, partial)
        loaded = torch.export.load(partial).module()
        found = _compare(model, loaded, size, dynamic)
    return {"path": str(path), **found}


def export_onnx(program: Any, path: str | Path) -> None:
    """Write a program of `export_program` as ONNX, with the names `image` and `logits`.

    Above 2 GiB the weights stand beside it, in `PATH.data`.

    Raises:
        ImportError: without the extra "export".
    """
    _require_onnx("onnx", "onnxscript")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    torch.onnx.export(
        program,
        (),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamo=True,
        external_data=weights > _EMBEDDED_BYTES,
        verbose=False,
    )


def write_onnx(
    model: nn.Module, path: str | Path, size: tuple[int, int], dynamic: bool = True
) -> dict[str, Any]:
    """Write the model as ONNX, and run it in onnxruntime; arguments and result as of `write_program`.

    Raises:
        ImportError: without the extra "export".
        ValueError: see `export_program`; or when onnxruntime does not give the model's logits.
    """
    _require_onnx("onnx", "onnxscript", "onnxruntime")  # before a minute of tracing
    path = Path(path)
    program = export_program(model, size, dynamic)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        written = Path(folder) / path.name  # under its own name: weights beside it are named after it
        export_onnx(program, written)
        found = _compare(model, onnx_function(written), size, dynamic)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == written):  # itself the last
            file.replace(path.parent / file.name)
    return {"path": str(path), **found}


def onnx_function(path: str | Path) -> Callable[[Tensor], Tensor]:
    """Images `[B, C, H, W]` to logits, by onnxruntime on the CPU.

    Raises:
        ImportError: without the extra "export".
    """
    _require_onnx("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.cpu().numpy()})[0])


def _require_onnx(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f'ONNX needs {", ".join(missing)}: pip install "visionsel[export]"')


@torch.no_grad()
def _compare(
    model: nn.Module, exported: Callable[[Tensor], Tensor], size: tuple[int, int], dynamic: bool
) -> dict[str, Any]:
    """Run both with images of two shapes."""
    device = next(model.parameters()).device
    other = (size[0] + 32, size[1] + 64) if dynamic else size
    shapes = [(1, _channels(model), *size), (3, _channels(model), *other)]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=generator).to(device)
        logits = model(images).float()
        try:
            found = exported(images)
        except Exception as error:  # guards of torch and shapes of onnxruntime have many kinds
            raise ValueError(
                f"the export does not run with images of {list(shape)}, nothing was written; fix the size or "
                f"trace with a larger one: {' '.join(str(error).split())[:300]}"
            ) from error
        difference = (found.to(device).float() - logits).abs().max().item()
        largest = max(largest, difference / max(1.0, logits.abs().max().item()))
        if not largest <= TOLERANCE:
            raise ValueError(
                f"the export gives other logits than the model for images of {list(shape)}: they differ by "
                f"{largest:.1e}, and {TOLERANCE:.0e} is allowed; nothing was written"
            )
    return {"shapes": [list(shape) for shape in shapes], "difference": largest}


def save_hub_folder(classifier: Classifier, folder: str | Path, card: dict[str, Any]) -> Path:
    """Weights (safetensors), `config.json` with the class labels, and a card, as timm lays them out.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, after `import visionsel`.

    Args:
        classifier: of `visionsel.prediction.load_classifier`.
        folder: to make; whole or not at all.
        card: of `model_card`.

    Raises:
        FileExistsError: when the folder is there and not empty.
    """
    from timm.models import save_for_hf
    from timm.models._hub import generate_readme

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; name another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        save_for_hf(
            classifier.model,
            str(partial),
            model_config={"label_names": classifier.labels},
            safe_serialization=True,
        )
        (partial / "README.md").write_text(generate_readme(card, folder.name), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def push_to_hub(classifier: Classifier, repository: str, card: dict[str, Any], private: bool = False) -> str:
    """Upload what `save_hub_folder` writes, by timm's means; returns the address of the commit."""
    from timm.models import push_to_hf_hub

    commit = push_to_hf_hub(
        classifier.model,
        repository,
        commit_message="Add model by visionsel",
        private=private,
        model_config={"label_names": classifier.labels},
        model_card=card,
        safe_serialization=True,
    )
    return str(getattr(commit, "commit_url", commit))


def model_card(classifier: Classifier, name: str, licence: str, source: str) -> dict[str, Any]:
    """What the card says, for timm's `generate_readme`.

    Args:
        classifier: whose numbers it tells.
        name: how users will load it: `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        licence: of the weights, as the hub calls it.
        source: of the weights, in words.
    """
    import sys

    model: Any = classifier.model
    cfg = model.pretrained_cfg
    about = (sys.modules[type(model).__module__].__doc__ or "").strip().split("\n\n")[0]
    usage = f"""```python
import timm
import visionsel  # registers the architecture

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""
    return {
        "license": licence,
        "tags": ["image-classification", "timm", "visionsel"],
        "description": " ".join(about.split()),
        "details": {
            "Architecture": cfg["architecture"],
            "Weights": source,
            "Parameters (M)": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
            "Input": " x ".join(map(str, cfg["input_size"])),
            "Classes": _names(classifier.labels),
        },
        "usage": usage,
    }


def _names(labels: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(labels[:most])
    return f"{len(labels)}: {shown}" + (", ..." if len(labels) > most else "")


def _channels(model: nn.Module) -> int:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return cfg["input_size"][0] if cfg else 3
