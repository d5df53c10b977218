"""The model for VLMEvalKit and its launcher, against the real base class where there is a clone.

VLMEvalKit imports all its models at once, so only its file of the base class is loaded, with the two modules
that it imports from replaced by small ones. The stand-in has what is used of that class.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.multimodal.modulation import VHR

OURS = "visionsel.integrations.vlmeval"


class BaseModel:
    """As `vlmeval.vlm.base.BaseModel`."""

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        return self.chat_inner(messages, dataset)  # type: ignore[attr-defined]


def real_base(found: Any) -> Any:
    """The real class out of its own file."""
    dataset, smp = ModuleType("vlmeval.dataset"), ModuleType("vlmeval.smp")
    dataset.DATASET_TYPE = lambda name: None  # type: ignore[attr-defined]
    smp.concat_images_vlmeval = smp.encode_image_to_base64 = smp.listinstr = None  # type: ignore[attr-defined]

    def parse_file(text: str) -> tuple[str | None, str]:
        return ("image/png", text) if text.endswith(".png") else (None, text)

    smp.parse_file = parse_file  # type: ignore[attr-defined]
    sys.modules.update({"vlmeval.dataset": dataset, "vlmeval.smp": smp})
    spec = importlib.util.spec_from_file_location(
        "vlmeval.vlm.base", Path(found.origin).parent / "vlm" / "base.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BaseModel


@pytest.fixture(params=["stand-in", "real"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Our file, imported beside one of the two."""
    names = ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.config", "vlmeval.dataset", "vlmeval.smp")
    before = {name: sys.modules.pop(name) for name in (*names, OURS) if name in sys.modules}
    found = importlib.util.find_spec("vlmeval")
    if request.param == "real" and (found is None or found.origin is None):
        pytest.skip("VLMEvalKit is not installed (git clone, pip install -e VLMEvalKit)")
    modules = {name: ModuleType(name) for name in names[:4]}
    modules["vlmeval"].__file__ = str(tmp_path / "kit" / "vlmeval" / "__init__.py")
    modules["vlmeval.config"].supported_VLM = {}  # type: ignore[attr-defined]
    try:
        sys.modules.update(modules)
        base = BaseModel if request.param == "stand-in" else real_base(found)
        modules["vlmeval.vlm.base"].BaseModel = base  # type: ignore[attr-defined]
        yield importlib.import_module(OURS)
    finally:
        for name in (*names, OURS):
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    ShapesWorld("balanced", 3, 1)[0].image.save(path)
    return path


def expected(scene: Path, prompt: str) -> str:
    model, processor = load_lvlm()
    with Image.open(scene) as image, VHR(3.0)(model):
        return generate_answers(model, processor, [image.convert("RGB")], [prompt], max_new_tokens=8)[
            0
        ].strip()


def test_messages_and_turns_are_answered_with_the_methods(module: Any, scene: Path) -> None:
    model = module.VisionSel(modulate=["vhr:alpha=3.0"], device="cpu", max_new_tokens=8)
    image, text = {"type": "image", "value": str(scene)}, {"type": "text", "value": CAPTION_PROMPT}
    answer = expected(scene, CAPTION_PROMPT)
    assert model.generate([dict(image), dict(text)], dataset="POPE") == answer
    assert model.chat([{"role": "user", "content": [dict(image), dict(text)]}]) == answer
    again = [
        {"role": "user", "content": [dict(image), dict(text)]},
        {"role": "assistant", "content": [{"type": "text", "value": answer}]},
        {"role": "user", "content": [{"type": "text", "value": "is there a star in the image?"}]},
    ]
    plain = module.VisionSel(device="cpu", max_new_tokens=8)
    assert plain.chat(again).split()[0] in ("yes", "no")
    with pytest.raises(NotImplementedError, match="images and text, got video"):
        model.generate_inner([{"type": "video", "value": "film.mp4"}])
    with pytest.raises(ValueError, match="leave out --use-vllm"):
        module.VisionSel(use_vllm=True)


def test_the_launcher_registers_the_model_and_runs_run_py(module: Any, scene: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "kit" / "run.py", tmp_path / "out.json"
    run.parent.mkdir()
    run.write_text(f"""
import json, sys
from vlmeval.config import supported_VLM
if __name__ == "__main__":
    model = supported_VLM[sys.argv[2]](use_vllm=False)
    message = [dict(type="image", value={str(scene)!r}), dict(type="text", value={CAPTION_PROMPT!r})]
    with open({str(out)!r}, "w") as file:
        json.dump([sys.argv, model.generate(message, dataset="POPE")], file)
""")
    before = list(sys.argv)
    ours = ["--model", "embedded", "--modulate", "vhr:alpha=3.0", "--device", "cpu", "--max-new-tokens", "8"]
    module.main([*ours, "--", "--data", "POPE", "--mode", "infer"])
    arguments, answer = json.loads(out.read_text())
    assert arguments == [str(run), "--model", "embedded+vhr-alpha-3.0", "--data", "POPE", "--mode", "infer"]
    assert answer == expected(scene, CAPTION_PROMPT)
    assert sys.argv == before
    with pytest.raises(
        ValueError, match=r"has a model called embedded\+vhr-alpha-3\.0; choose another --name"
    ):
        module.main(ours)
    run.unlink()
    with pytest.raises(FileNotFoundError, match=r"no run\.py of VLMEvalKit at .*pip install -e VLMEvalKit"):
        module.main([*ours, "--name", "other"])


def test_results_have_names_that_files_can_have(module: Any) -> None:
    name = module.result_name("llava-hf/llava-1.5-7b-hf/", ["fastv:keep=0.25,layer=2", "vcd:alpha=1"])
    assert name == "llava-1.5-7b-hf+fastv-keep-0.25-layer-2+vcd-alpha-1"


def test_without_vlmevalkit_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, None)
    sys.modules.pop(OURS, None)
    with pytest.raises(ImportError, match="needs VLMEvalKit: git clone"):
        importlib.import_module(OURS)
