"""Two-view decoding with other interventions: each view is what it is alone, given the chosen tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from tests.multimodal.pruning.test_methods import MERGING, METHODS
from tests.multimodal.runs import ByAttention, ByScore, apart, run, tiny
from tests.multimodal.tiny import make_inputs
from visionsel.multimodal.decoding import VCD, DiffusionNoise
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.modulation.var import VAR
from visionsel.multimodal.modulation.vhr import VHR

NEW = 5
VIEW = DiffusionNoise(700)
PRUNER = ByAttention(0.5, 2)
HEADS = VHR(alpha=2.0, layers=(1, 2, 3))
ROWS = VAR(layers=(1, 2, 3), sink_dims=(3, 17), tau=1.5, min_image_attention=0.0, rho=0.3)
CASES = {  # what is open, and what of it acts on the second view
    "a pruner": ([PRUNER], [PRUNER]),
    "reinforced heads": ([HEADS], [HEADS]),
    "redistributed attention": ([ROWS], []),
    "all": ([PRUNER, HEADS, ROWS], [PRUNER, HEADS]),
}


class Say(LogitsProcessor):
    """Makes generate() choose given tokens `[B, new]`."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.number = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.tokens[:, self.number, None], 0.0)
        self.number += 1
        return forced


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_each_view_is_what_it_is_alone(name: str, case: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    main, second = CASES[case]
    with Stack(*main, VCD(view=VIEW))(model):
        found = run(model, inputs, NEW)
    tokens = found.tokens[:, -NEW:]

    def alone(interventions: list[Any], given: dict[str, Any]) -> Tensor:
        with Stack(*interventions)(model):
            return run(model, given, NEW, logits_processor=[Say(tokens)]).logits

    expected = alone(main, inputs)
    assert apart(found.logits[::2], expected) < 1e-10
    assert apart(found.logits[1::2], alone(second, VIEW(inputs))) < 1e-10
    assert apart(expected, alone([], inputs)) > 1e-3, "they do something"


@pytest.mark.parametrize("pruner", [*METHODS, *MERGING])
def test_every_pruner_drops_tokens_in_both_views_and_tells_of_the_main_one(pruner: str) -> None:
    model, inputs, method = tiny("llava"), make_inputs("llava"), (METHODS | MERGING)[pruner]
    with Stack(method, VCD(view=VIEW))(model) as (pruned, _):
        found = run(model, inputs, 3)
    tokens = found.tokens[:, -3:]
    with method(model) as alone:
        main = run(model, inputs, 3, logits_processor=[Say(tokens)])
        expected = alone.kept, alone.report().to_dict()
        second = run(model, VIEW(inputs), 3, logits_processor=[Say(tokens)])
    assert apart(found.logits[::2], main.logits) < 1e-10
    assert apart(found.logits[1::2], second.logits) < 1e-10
    assert pruned.report().to_dict() == expected[1]
    for (layer, mask), (at, kept) in zip(pruned.kept, expected[0], strict=True):
        assert layer == at
        assert torch.equal(mask, kept)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_pruned_beams_have_their_second_view(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    with Stack(ByScore({0: (0.6,), 2: (0.5,)}), HEADS, VCD(view=VIEW))(model):
        both = model.generate(**inputs, **options)
        for row in range(2):
            # the same samples in another order: every row has its own prompt, heads and dropped tokens
            again = model.generate(**_swapped(name, inputs), **options)
            assert torch.equal(again[row, -NEW:], both[1 - row, -NEW:])


def _swapped(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    swapped = {key: value.flip(0) for key, value in inputs.items()}
    if "image_grid_thw" in inputs:
        parts = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
        swapped["pixel_values"] = torch.cat(parts[::-1])
    return swapped
