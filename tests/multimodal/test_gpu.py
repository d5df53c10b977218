"""On a GPU: the same choices, the same words, the same attention, with the kernels that run there."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multimodal.grounding.test_recorder import record
from tests.multimodal.oracle import MaskOracle, chosen
from tests.multimodal.pruning.test_methods import MERGING, METHODS
from tests.multimodal.runs import ByScore, apart, run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import FAMILIES, make_inputs, make_model
from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal.decoding import (
    AGLA,
    DECODERS,
    GLC,
    ICD,
    M3ID,
    VCD,
    DiffusionNoise,
    Disturbance,
    PAIGuidance,
    Ritual,
)
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation import (
    ACT,
    MODULATORS,
    PAI,
    VAR,
    VHR,
    GroundingHeads,
    Paint,
    head_importance,
)
from visionsel.multimodal.modulation.pointing import pointing

pytestmark = pytest.mark.gpu

TOLERANCE = {
    torch.float64: 1e-5,  # norms and rotations are in float32 whatever the model is in
    torch.float32: 1e-3,  # logits reach 10; other kernels for other masks
    torch.bfloat16: 0.5,  # eight bits: a step at 10 is 0.06, over four layers
}
F32, BF16 = torch.float32, torch.bfloat16
TWO = ("llava", "qwen2_5_vl")
SEED = 2  # of inputs on which each method does something
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
SETTINGS: dict[type[Intervention], Intervention] = {  # with which they act on models as small as these
    VHR: VHR(),
    VAR: VAR(layers=(1, 2, 3), sink_dims=(3, 17), tau=1.5, min_image_attention=0.0, rho=0.3),
    ACT: ACT(layers=(1, 2, 3), threshold=0.05),
    PAI: PAI(alpha=0.5, layers=(1, 2, 3)),
    Paint: Paint(layers=(1, 2, 3)),
    GroundingHeads: GroundingHeads({1: [0], 3: [1, 2]}),
    VCD: VCD(view=DiffusionNoise(700)),
    ICD: ICD(view=Disturbance((11, 12, 13))),
    M3ID: M3ID(decay=0.3),
    Ritual: Ritual(),
    AGLA: AGLA(view=DiffusionNoise(300)),
    PAIGuidance: PAIGuidance(gamma=1.5),
    GLC: GLC(w=0.4, keep=12, stable=0.6),
}
EVERY = [*(SETTINGS[kind] for kind in (*MODULATORS, *DECODERS)), GLC(w=0.4, keep=12, fidelity="code")]
every_method = pytest.mark.parametrize("method", EVERY, ids=[str(one).partition("(")[0] for one in EVERY])


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # products have no TF32 by default
        yield


@lru_cache
def on_card(name: str, dtype: torch.dtype) -> Any:
    """A model; tests share it, so whoever changes it puts it back."""
    model = make_model(name, dtype=dtype).cuda()
    run(model, on_gpu(make_inputs(name, dtype=dtype)), 2)  # transformers puts hooks of its own on
    return model


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cuda() for key, value in inputs.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_tokens_are_as_masked_ones(name: str, dtype: torch.dtype) -> None:
    model, inputs = make_model(name, "sdpa", dtype).cuda(), on_gpu(make_inputs(name, dtype=dtype))
    ratios = {0: (0.7, 0.9), 2: (0.5,)}
    with ByScore(ratios)(model) as pruned:
        found = run(model, inputs)
    assert pruned.kept[0][1].device.type == "cuda"
    cpu = {key: value.cpu() for key, value in inputs.items()}
    with MaskOracle(model, {layer: mask.cuda() for layer, mask in chosen(cpu, ratios).items()}):
        expected = run(model, inputs)
    with ByScore(dict.fromkeys(ratios, (1.0,)))(model):
        untouched = run(model, inputs)
    whole = run(model, inputs)
    assert torch.equal(untouched.logits, whole.logits)
    assert apart(found.logits[0].float(), expected.logits[0].float()) <= TOLERANCE[dtype]
    assert apart(found.logits[0].float(), whole.logits[0].float()) > TOLERANCE[dtype]
    if dtype != torch.bfloat16:  # where a token is a matter of rounding the rest differs
        assert torch.equal(found.tokens, expected.tokens)
        assert apart(found.logits, expected.logits) <= TOLERANCE[dtype]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS | MERGING)
def test_methods_choose_what_they_choose_on_the_cpu(method: str, family: str) -> None:
    pruner, inputs = (METHODS | MERGING)[method], make_inputs(family)
    with pruner(tiny(family)) as expected:
        slow = run(tiny(family), inputs, new=3)
    model = make_model(family).cuda()
    with pruner(model) as found:
        fast = run(model, on_gpu(inputs), new=3)
    for (layer, mask), (other, there) in zip(found.kept, expected.kept, strict=True):
        assert layer == other
        assert torch.equal(mask.cpu(), there)
    assert apart(fast.logits.cpu(), slow.logits) <= 1e-4  # norms and rotations are in float32


@pytest.mark.parametrize("family", TWO)
@every_method
def test_with_each_method_the_model_says_what_it_says_on_the_cpu(method: Any, family: str) -> None:
    slow, fast = tiny(family, "sdpa", F32), on_card(family, F32)
    inputs = make_inputs(family, seed=SEED, dtype=F32)
    assert (inputs["attention_mask"] == 0).any()
    plain, before = run(fast, on_gpu(inputs), 5), everything_on(fast)
    with method(slow):
        expected = run(slow, inputs, 5)
    with method(fast):
        found = run(fast, on_gpu(inputs), 5)
    assert everything_on(fast) == before
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    assert apart(found.logits.cpu(), expected.logits) <= 1e-4
    two_views = len(found.logits) > len(plain.logits)
    assert two_views or apart(found.logits, plain.logits) > 1e-2, "it does something"


@pytest.mark.parametrize("family", TWO)
@every_method
def test_with_each_method_beams_are_those_of_the_cpu(method: Any, family: str) -> None:
    slow, fast, inputs = tiny(family), on_card(family, torch.float64), make_inputs(family, seed=SEED)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True} | GREEDY
    with method(slow):
        expected = slow.generate(**inputs, **options)
    with method(fast):
        found = fast.generate(**on_gpu(inputs), **options)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert apart(found.sequences_scores.cpu(), expected.sequences_scores) <= 1e-5  # float32


@pytest.mark.parametrize("family", TWO)
@every_method
def test_each_method_runs_in_bfloat16(method: Any, family: str) -> None:
    model, inputs = on_card(family, BF16), on_gpu(make_inputs(family, seed=SEED, dtype=BF16))
    plain = run(model, inputs, 5)
    with method(model):
        found = run(model, inputs, 5)
    assert found.logits.dtype == BF16
    assert found.logits.isfinite().all()
    assert found.tokens.shape == plain.tokens.shape
    assert torch.equal(run(model, inputs, 5).logits, plain.logits)


@pytest.mark.parametrize("mode", ["replay", "online"])
@pytest.mark.parametrize("family", TWO)
def test_recorded_attention_is_that_of_the_cpu(family: str, mode: str) -> None:
    inputs = make_inputs(family, images=(2, 1), dtype=F32)
    expected = record(tiny(family, "sdpa", F32), inputs, mode)
    found = record(on_card(family, F32), on_gpu(inputs), mode)
    assert found.attentions.device.type == "cpu"
    assert torch.equal(found.positions.cpu(), expected.positions)
    assert apart(found.attentions, expected.attentions) <= 1e-5
    assert float(expected.attentions.amax()) > 0.1


def said(capsys: pytest.CaptureFixture[str], command: Sequence[str]) -> Any:
    """What a command prints as JSON; by itself it runs on the card."""
    before = _allocations()
    assert main([*command, "--json"]) == 0
    assert (_allocations() > before) == ("--device" not in command)
    return json.loads(capsys.readouterr().out)


def _allocations() -> int:
    """How often memory of the card was taken so far."""
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


@pytest.mark.parametrize(
    "decode", ["vcd", "icd", "m3id", "ritual", "ritual:plus=True", "agla", "pai_guidance", "glc:keep=14"]
)
def test_generate_runs_on_the_card_and_says_the_same(
    decode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = tmp_path / "scene.png"
    ShapesWorld("anti", 3, 1)[0].image.save(scene)
    command = ["generate", str(scene), CAPTION_PROMPT, "--prune", "fastv:keep=0.5,layer=2"]
    command += ["--decode", decode, "--modulate", "vhr:alpha=1.2,layers=(1,)", "pai:layers=(2,3)"]
    found = said(capsys, command)
    assert found["answer"]
    assert found == said(capsys, [*command, "--device", "cpu"])


def test_methods_are_measured_on_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["vhr", "vcd", "agla", "glc"]
    command = ["evaluate", "hallucination", "--size", "4", "--methods", *methods]
    found, expected = said(capsys, command), said(capsys, [*command, "--device", "cpu"])
    assert [row["method"] for row in found if row["kind"] != "baseline"] == methods
    for one, other in zip(found, expected, strict=True):
        assert one["method"] == other["method"]
        if not one["method"].startswith("sampling"):  # a card draws other numbers
            assert one == other


def test_a_schedule_is_searched_on_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    command = ["evaluate", "pruning", "--size", "2", "--methods", "vflowopt", "--keep", "0.5"]
    rows = said(capsys, command)
    assert [row["method"] for row in rows] == ["none", "vflowopt", "vflowopt+"]
    assert all(row["equivalent_tokens"] < 40 for row in rows[1:])


def test_heads_are_measured_as_on_the_cpu() -> None:
    samples = [ShapesWorld("balanced", 5, 4)[number] for number in range(4)]
    (slow, processor), fast = load_lvlm(), load_lvlm()[0].cuda()
    expected, found = (pointing(model, processor, samples) for model in (slow, fast))
    assert torch.equal(found.hits, expected.hits)
    assert found.chance == expected.chance
    tables = [torch.tensor(head_importance(model, processor, samples).sensitivity) for model in (slow, fast)]
    assert apart(*tables) <= 1e-4
