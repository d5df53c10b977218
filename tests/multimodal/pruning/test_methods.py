"""What holds for every method, on real prompts: one table drives all tests."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.oracle import MaskOracle
from tests.multimodal.runs import apart, run, tiny
from tests.multimodal.tiny import LAYERS, TEXT, alone, make_inputs
from visionsel.multimodal import (
    DART,
    PRUNERS,
    CDPruner,
    DivPrune,
    ExplainPrune,
    FastV,
    HoloV,
    PoolPrune,
    PromptDistill,
    PruMerge,
    PyramidDrop,
    RandomPrune,
    SparseVLM,
    UniformPrune,
    VFlowOpt,
    VisionZip,
    VisPruner,
    Yopo,
)
from visionsel.multimodal.intervention import method_name, parse
from visionsel.multimodal.pruning.explainprune import RelevancePredictor
from visionsel.multimodal.pruning.pruner import Pruner


def predictor() -> RelevancePredictor:
    torch.manual_seed(0)
    return RelevancePredictor(heads=TEXT["num_attention_heads"])


METHODS: dict[str, Pruner] = {
    "random": RandomPrune(keep=0.4),
    "random at a layer": RandomPrune(keep=5, layer=2),
    "uniform": UniformPrune(keep=0.4),
    "fastv": FastV(keep=0.4, layer=2),
    "pyramiddrop": PyramidDrop(layers=(1, 2, 3), keep=(0.7, 0.5, 0.2)),
    "sparsevlm": SparseVLM(keep=(0.7, 0.4), layers=(1, 3), recycle=False),
    "divprune": DivPrune(keep=0.4),
    "vispruner": VisPruner(keep=0.4),
    "dart": DART(keep=0.9, layer=2, pivots=(1, 1)),
    "cdpruner": CDPruner(keep=0.4),
    "holov": HoloV(keep=0.4, chunks=4),
    "explainprune": ExplainPrune(keep=0.4, predictor=predictor()),
    "promptdistill": PromptDistill(layers=(0, 2), keep=(0.6, 0.3), pool=3),
}
MERGING: dict[str, Pruner] = {
    "pool": PoolPrune(window=2),
    "sparsevlm recycles": SparseVLM(keep=(0.7, 0.3), layers=(1, 3)),
    "visionzip": VisionZip(dominant=4, contextual=3),
    "prumerge": PruMerge(plus=True, neighbours=3),
    "vflowopt": VFlowOpt(keep=0.5),
}
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
KEEP_ALL = {
    "random": RandomPrune(keep=1.0),
    "uniform": UniformPrune(keep=1.0),
    "pool": PoolPrune(keep=1.0),
    "fastv": FastV(keep=1.0),
    "pyramiddrop": PyramidDrop(layers=(1, 2, 3), keep=(1.0, 1.0, 1.0)),
    "sparsevlm": SparseVLM(keep=(1.0, 1.0), layers=(1, 3)),
    "divprune": DivPrune(keep=1.0),
    "visionzip": VisionZip(dominant=1.0, contextual=0),
    "vispruner": VisPruner(keep=1.0),
    "dart": DART(keep=1.0),
    "cdpruner": CDPruner(keep=1.0),
    "holov": HoloV(keep=1.0),
    "vflowopt": VFlowOpt(keep=1.0),
    "explainprune": ExplainPrune(keep=1.0, predictor=predictor()),
    "promptdistill": PromptDistill(layers=(0, 2), keep=(1.0, 1.0)),
    "yopo": Yopo(window=None),
}


def visual(kept: list[tuple[int, Tensor]], inputs: dict[str, Any], row: int) -> list[tuple[int, list[bool]]]:
    """For each stage which image tokens of a row stay."""
    images = inputs["input_ids"][row] == 99
    return [(layer, mask[row][images].tolist()) for layer, mask in kept]


def count_hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_every_method_is_in_the_tables() -> None:
    methods = {type(pruner) for pruner in (*METHODS.values(), *MERGING.values(), KEEP_ALL["yopo"])}
    assert methods == set(PRUNERS)
    assert {type(pruner) for pruner in KEEP_ALL.values()} == set(PRUNERS) - {PruMerge}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_pruned_equals_masked_over_the_prompt_and_six_steps(method: str, family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    with METHODS[method](model) as pruned:
        found = run(model, inputs)
    assert pruned.report().equivalent_tokens < pruned.report().full_tokens
    padding = inputs["attention_mask"] == 0
    with MaskOracle(model, {layer: mask | padding for layer, mask in pruned.kept}):
        expected = run(model, inputs)
    assert torch.equal(found.tokens, expected.tokens)
    assert apart(found.logits, expected.logits) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS | MERGING)
def test_what_is_kept_of_a_sample_depends_on_neither_batch_nor_beams(method: str, family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    pruner = (METHODS | MERGING)[method]
    with pruner(model) as pruned:
        together = run(model, inputs, new=3)
    batch = [visual(pruned.kept, inputs, row) for row in range(2)]
    for row in range(2):
        one = alone(inputs, row)
        with pruner(model) as pruned:
            by_itself = run(model, one, new=3)
        assert visual(pruned.kept, one, 0) == batch[row]
        assert apart(by_itself.logits, together.logits[:, row : row + 1]) <= 1e-9
        assert torch.equal(by_itself.tokens[0, -3:], together.tokens[row, -3:])
    with pruner(model) as pruned:
        run(model, inputs, new=3, num_beams=3)
    beams = {key: value.repeat_interleave(3, 0) for key, value in inputs.items() if key == "input_ids"}
    assert [visual(pruned.kept, beams, row) for row in range(6)] == [batch[0]] * 3 + [batch[1]] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", KEEP_ALL)
def test_keeping_everything_changes_no_bit(method: str, family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    expected = run(model, inputs, new=3)
    with KEEP_ALL[method](model) as pruned:
        found = run(model, inputs, new=3)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.tokens, expected.tokens)
    assert pruned.report().equivalent_tokens == pruned.report().full_tokens


@pytest.mark.parametrize("method", METHODS | MERGING)
def test_afterwards_the_model_computes_what_it_did(method: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    before, hooks = run(model, inputs, new=3), count_hooks(model)
    with (METHODS | MERGING)[method](model):
        run(model, inputs, new=3)
    after = run(model, inputs, new=3)
    assert torch.equal(before.logits, after.logits)
    assert count_hooks(model) == hooks


@pytest.mark.parametrize("method", METHODS | MERGING)
def test_half_precision_runs(method: str) -> None:
    model = tiny("llava", "sdpa", torch.bfloat16)
    with (METHODS | MERGING)[method](model) as pruned:
        found = run(model, make_inputs("llava", dtype=torch.bfloat16), new=3)
    assert found.logits.isfinite().all()
    assert pruned.report().flops_ratio < 1


@pytest.mark.parametrize(
    "pruner",
    [
        RandomPrune(keep=0.5, layer=LAYERS),
        FastV(layer=LAYERS),
        PyramidDrop(),
        SparseVLM(),
        DART(layer=LAYERS),
        PromptDistill(layers=LAYERS - 1),
        Yopo(layer_stop=LAYERS + 1),
    ],
    ids=lambda pruner: method_name(type(pruner)),
)
def test_a_layer_that_does_not_exist_is_refused_at_entry(pruner: Pruner) -> None:
    model = tiny("llava")
    hooks = count_hooks(model)
    with pytest.raises(ValueError, match="layer"), pruner(model):
        pass
    assert count_hooks(model) == hooks


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, True, float("nan"), "half"])
@pytest.mark.parametrize(
    "kind", [k for k in PRUNERS if "keep" in k.__dataclass_fields__], ids=lambda k: method_name(k)
)
def test_a_keep_that_is_no_ratio_and_no_number_is_refused(kind: type[Pruner], keep: Any) -> None:
    options = {"predictor": predictor()} if kind is ExplainPrune else {}
    with pytest.raises(ValueError, match="keep"):
        kind(keep=keep, **options)


def test_methods_are_made_from_text() -> None:
    assert parse("fastv:keep=0.25,layer=2", PRUNERS) == FastV(keep=0.25, layer=2)
    assert parse("random:keep=7", PRUNERS) == RandomPrune(keep=7)
    assert parse("pyramiddrop:layers=(1,2),keep=(0.5,0.25)", PRUNERS) == PyramidDrop((1, 2), (0.5, 0.25))
    assert parse("yopo", PRUNERS) == Yopo()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fastvv", "no method is called 'fastvv'; there are random, uniform"),
        ("fastv:kep=1", "write fastv:NAME=VALUE,... with keep, layer"),
        ("fastv:keep", "write fastv:NAME=VALUE"),
        ("fastv:keep=__import__('os')", "write fastv:NAME=VALUE"),
        ("fastv:keep=2.0", "keep must be a ratio"),
        ("random", "cannot make random"),
    ],
)
def test_text_that_names_no_method_is_refused_with_what_there_is(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace("*", r"\*")):
        parse(text, PRUNERS)
