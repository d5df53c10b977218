"""Pruning on a GPU: the same choices, the same equalities, with the kernels that run there."""

from typing import Any

import pytest
import torch

from tests.multimodal.oracle import MaskOracle, chosen
from tests.multimodal.pruning.test_methods import MERGING, METHODS
from tests.multimodal.runs import ByScore, apart, run, tiny
from tests.multimodal.tiny import FAMILIES, make_inputs, make_model

pytestmark = pytest.mark.gpu

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,  # logits reach 10; other kernels for other masks
    torch.bfloat16: 0.5,  # eight bits: a step at 10 is 0.06, over four layers
}


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
    assert apart(fast.logits.cpu(), slow.logits) <= 1e-8
