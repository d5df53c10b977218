"""The model for lmms-eval, against its real classes where it is installed, and against a stand-in always.

The stand-in has what `visionsel.integrations.lmms_eval` uses of lmms-eval 0.7.3: the base class, which has no
behaviour of its own in what is used, and the manifest.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.multimodal.decoding import VCD
from visionsel.multimodal.modulation import VHR
from visionsel.multimodal.pruning import FastV

OURS = "visionsel.integrations.lmms_eval"
TASK = {"max_new_tokens": 10, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}  # as POPE


class Lmms:
    """As `lmms_eval.api.model.lmms`."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class Manifest:
    """As `lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def stand_in() -> dict[str, ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    return modules


@pytest.fixture(params=["stand-in", "real"])
def module(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Our file, imported beside one of the two."""
    before = {name: one for name, one in sys.modules.items() if name.split(".")[0] == "lmms_eval"}
    if request.param == "stand-in":
        for name in before:
            del sys.modules[name]
        sys.modules.update(stand_in())
    else:
        pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install lmms_eval)")
    sys.modules.pop(OURS, None)
    try:
        yield importlib.import_module(OURS)
    finally:
        sys.modules.pop(OURS, None)
        if request.param == "stand-in":
            for name in stand_in():
                sys.modules.pop(name, None)
            sys.modules.update(before)


def requests(lm: Any, prompts: list[str], options: dict[str, Any], tmp_path: Path | None = None) -> list[Any]:
    """As its chat tasks make them; one image as a file where there is a folder for it."""
    samples = list(ShapesWorld("balanced", 3, len(prompts)))
    images: list[Any] = [one.image for one in samples]
    if tmp_path is not None:
        images[0].save(tmp_path / "scene.png")
        images[0] = str(tmp_path / "scene.png")
    lm.task_dict["shapes"] = {"test": list(zip(images, prompts, strict=True))}

    def messages(document: Any) -> list[dict[str, Any]]:
        image, text = document
        content = [{"type": "image", "url": image}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    return [
        SimpleNamespace(args=("", messages, dict(options), number, "shapes", "test"))
        for number in range(len(prompts))
    ]


def expected(prompts: list[str], **options: Any) -> list[str]:
    images = [one.image for one in ShapesWorld("balanced", 3, len(prompts))]
    model, processor = load_lvlm()
    with FastV(0.5, 1)(model), VHR(3.0)(model), VCD(2.0)(model):
        answers = generate_answers(model, processor, images, prompts, **options)
    return [answer.strip() for answer in answers]


PROMPTS = [CAPTION_PROMPT, "is there a star in the image?", CAPTION_PROMPT]


def test_requests_are_answered_with_the_methods_in_their_order(module: Any, tmp_path: Path) -> None:
    methods = {"prune": "fastv:keep=0.5,layer=1", "modulate": "vhr:alpha=3.0", "decode": "vcd:alpha=2.0"}
    lm = module.VisionSel(**methods, device="cpu", batch_size="2")
    assert lm.generate_until(requests(lm, PROMPTS, TASK, tmp_path)) == expected(PROMPTS, max_new_tokens=10)
    assert not lm.is_simple
    assert str(lm.device) == "cpu"


def test_settings_of_a_task_are_obeyed_and_unknown_ones_refused(module: Any) -> None:
    lm = module.VisionSel(device="cpu", batch_size=3)
    [whole] = lm.generate_until(requests(lm, PROMPTS[:1], TASK))
    end = f" {whole.split()[2]}"
    [ended] = lm.generate_until(requests(lm, PROMPTS[:1], TASK | {"until": [end, "\n\n"]}))
    assert ended == whole.partition(end)[0]
    [ended] = lm.generate_until(requests(lm, PROMPTS[:1], TASK | {"until": end, "image_aspect_ratio": "pad"}))
    assert ended == whole.partition(end)[0]
    [short] = lm.generate_until(requests(lm, PROMPTS[:1], TASK | {"max_new_tokens": 2}))
    assert short == " ".join(whole.split()[:2])
    drawn = lm.generate_until(requests(lm, PROMPTS[:1] * 3, TASK | {"temperature": 3.0, "do_sample": True}))
    assert drawn[0] != whole
    with pytest.raises(
        ValueError, match=r"unknown generation settings best_of; there are until, max_new_tok"
    ):
        lm.generate_until(requests(lm, PROMPTS[:1], TASK | {"best_of": 3}))
    free = module.VisionSel(device="cpu", obey_until=False, max_new_tokens=3)
    assert free.generate_until(requests(free, PROMPTS[:1], {"until": [end], "do_sample": False})) == [
        " ".join(whole.split()[:3])
    ]


def test_the_manifest_names_the_class(module: Any) -> None:
    manifest = module.manifest()
    assert manifest.model_id == "visionsel"
    place, _, name = manifest.chat_class_path.rpartition(".")
    assert place == OURS
    assert getattr(module, name) is module.VisionSel
    assert manifest.simple_class_path is None


def test_what_it_cannot_do_is_said(module: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown model_args layer; .* in quotes: prune=\"fastv"):
        module.VisionSel(prune="fastv:keep=0.5", layer="2", device="cpu")
    with pytest.raises(ValueError, match="batch_size must be a number above 0, got 'auto'"):
        module.VisionSel(batch_size="auto")
    with pytest.raises(ValueError, match="one method decodes at a time, got vcd, m3id"):
        module.VisionSel(decode="vcd;m3id")
    lm = module.VisionSel(device="cpu")
    with pytest.raises(NotImplementedError, match="generate_until"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        lm.generate_until_multi_round([])
    lm.task_dict["shapes"] = {"test": ["film.mp4"]}
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    with pytest.raises(NotImplementedError, match="images and text, got video"):
        lm.generate_until([SimpleNamespace(args=("", lambda doc: film, TASK, 0, "shapes", "test"))])


def test_the_real_registry_takes_manifest_and_class() -> None:
    registry_v2 = pytest.importorskip(
        "lmms_eval.models.registry_v2", reason="lmms-eval is not installed (pip install lmms_eval)"
    )
    from lmms_eval.api.instance import Instance

    sys.modules.pop(OURS, None)
    registry = registry_v2.ModelRegistryV2()
    registry.register_manifest(importlib.import_module(OURS).manifest())
    methods = 'prune="fastv:keep=0.5,layer=1",modulate=[vhr:alpha=3.0],decode="vcd:alpha=2.0,beta=0.1"'
    lm = registry.get_model_class("visionsel").create_from_arg_string(
        f"pretrained=embedded,{methods}", {"batch_size": "3", "max_batch_size": None, "device": "cpu"}
    )
    instances = [
        Instance("generate_until", one.args, 0, metadata={"task": "shapes", "doc_id": number, "repeats": 1})
        for number, one in enumerate(requests(lm, PROMPTS, TASK))
    ]
    assert lm.generate_until(instances) == expected(PROMPTS, max_new_tokens=10)


def test_without_lmms_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for name in [name for name in sys.modules if name.startswith("lmms_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    sys.modules.pop(OURS, None)
    with pytest.raises(ImportError, match="needs lmms-eval: pip install lmms_eval"):
        importlib.import_module(OURS)
