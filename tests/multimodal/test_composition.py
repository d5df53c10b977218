"""Interventions of all kinds at once equal everything done plainly at once; what conflicts is refused.

What two of them do together is tested where each method is (`test_with_others`, `test_vhr`, ...).
"""

import itertools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.decoding.test_with_others import Say
from tests.multimodal.modulation.literal import Row, Rule, literal, wide
from tests.multimodal.modulation.plainly import best_heads, forward, without_images
from tests.multimodal.modulation.test_var import SINKS, mark_of, rule_of
from tests.multimodal.oracle import visual_tokens
from tests.multimodal.runs import apart, run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import LAYERS, alone, grow, make_inputs
from visionsel.multimodal.decoding import M3ID, VCD, DiffusionNoise, PAIGuidance, Ritual
from visionsel.multimodal.intervention import Intervention, Stack
from visionsel.multimodal.modulation import ACT, PAI, VAR, VHR, GroundingHeads, Paint
from visionsel.multimodal.pruning import DivPrune, FastV, PyramidDrop, VisPruner, Yopo, divprune

NEW = 4
TOLERANCE = 1e-9  # float64, as in the tests of the parts
VIEW = DiffusionNoise(700)
SLOWER = pytest.param("qwen2_5_vl", marks=pytest.mark.slow)
HEADS = VHR(alpha=2.0, layers=(0, 1, 2, 3))
ROWS = VAR(p=0.6, rho=0.6, min_image_attention=0.2, layers=(1, 2, 3), **SINKS)
CASES = {"llava": DivPrune(keep=0.5), "qwen2_5_vl": FastV(keep=0.5, layer=2)}


class View:
    """One view of one sample: pruner, heads and rows at once, on matrices, with nothing cached.

    Args:
        model: to run.
        sample: its inputs.
        pruner: that chooses.
        rows: whether attention is redistributed.
    """

    def __init__(self, model: Any, sample: dict[str, Any], pruner: DivPrune | FastV, rows: bool) -> None:
        self.model, self.sample, self.rows = model, sample, rows
        self.keep: dict[int, Tensor] = {}
        self.heads: dict[int, list[int]] = {}
        stage = pruner.layer if isinstance(pruner, FastV) else 0
        for layer in range(LAYERS):
            if layer == stage:
                self.keep[layer] = self._kept(pruner)
            _, seeing = self._forward(sample, layer)
            _, blind = forward(model, without_images(sample), self.heads, HEADS.alpha, layer)
            assert seeing is not None
            assert blind is not None
            self.heads[layer] = best_heads(seeing, blind)

    def logits(self, tokens: Tensor) -> Tensor:
        """`[vocabulary]`: of the token after these `[1, T]`."""
        return self._forward(grow(self.sample, tokens))[0]

    def _forward(self, sample: dict[str, Any], watched: int = -1) -> tuple[Tensor, Tensor | None]:
        with self._attention(rule_of(ROWS) if self.rows else lambda logits, row, *_: row):
            return forward(self.model, sample, self.heads, HEADS.alpha, watched, self.keep or None)

    def _attention(self, rule: Rule) -> AbstractContextManager[Any]:
        away: set[int] = set()
        for mask in self.keep.values():
            away = set((~mask[0]).nonzero()[:, 0].tolist())
        gone = dict.fromkeys(range(min(self.keep, default=LAYERS), LAYERS), away)
        assert ROWS.layers is not None
        mark = mark_of(ROWS, self.sample["input_ids"].shape[1])
        return literal(self.model, self.sample, ROWS.layers, rule, mark, gone)

    def _kept(self, pruner: DivPrune | FastV) -> Tensor:
        """bool `[1, L]`: all but the dropped tokens."""
        visual = visual_tokens(self.sample)
        places = visual[0].nonzero()[:, 0]
        if isinstance(pruner, DivPrune):
            stays = divprune.select(self._embedded()[:, places], pruner.keep)[0]
        else:
            [*weights] = self._rows_of_last(pruner.layer - 1)
            score = [sum(row[place] for row in weights) for place in places.tolist()]
            ranked = sorted(range(len(score)), key=lambda i: (-score[i], i))
            stays = torch.zeros(len(places), dtype=torch.bool)
            stays[ranked[: max(1, round(pruner.keep * len(score)))]] = True
        keep = torch.ones_like(visual)
        keep[0, places] = stays
        return keep

    def _embedded(self) -> Tensor:
        """`[1, L, C]`: what enters the first layer."""
        seen: list[Tensor] = []
        layer = self.model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            self.model(**self.sample)
        hook.remove()
        return seen[0]

    def _rows_of_last(self, layer: int) -> list[Row]:
        """Of each head, what the last token attends to before attention is redistributed."""
        assert ROWS.layers is not None
        assert layer == ROWS.layers[0], "the first rows that a rule gets are of this layer"
        plain = rule_of(ROWS) if self.rows else None
        seen: list[Row] = []

        def watch(logits: Row, row: Row, place: int, *more: Any) -> Row:
            if place == len(row) - 1:
                seen.append(row)
            return row if plain is None else plain(logits, row, place, *more)

        with self._attention(watch):
            forward(self.model, self.sample, self.heads, HEADS.alpha)
        return seen[:4]


def contrasted(main: Tensor, other: Tensor) -> Tensor:
    """Equations of VCD at its defaults, of logits `[vocabulary]`."""
    return torch.where(main < main.max() + math.log(0.1), -torch.inf, 2 * main - other)


@pytest.mark.parametrize("name", CASES)
def test_a_pruner_heads_rows_and_a_second_view_equal_all_of_it_done_plainly(name: str) -> None:
    model, inputs, pruner = wide(name), make_inputs(name), CASES[name]
    length = inputs["input_ids"].shape[1]
    with Stack(pruner, HEADS, ROWS, VCD(view=VIEW))(model) as (pruned, reinforced, moved, _):
        found = run(model, inputs, NEW)
    assert sum(moved.changed.values()) > 0
    for row in range(2):
        sample = alone(inputs, row)
        main, other = (
            View(model, given, pruner, rows) for given, rows in ((sample, True), (VIEW(sample), False))
        )
        start = length - sample["input_ids"].shape[1]
        for layer, keep in main.keep.items():
            assert torch.equal(dict(pruned.kept)[layer][row, start:], keep[0])
            assert not torch.equal(keep, other.keep[layer]), "each view drops its own"
        assert {layer: mask[row].nonzero()[:, 0].tolist() for layer, mask in reinforced.heads.items()} == (
            main.heads
        )
        tokens = found.tokens[row : row + 1, length:]
        for number in range(NEW):
            z, y = main.logits(tokens[:, :number]), other.logits(tokens[:, :number])
            assert apart(found.logits[2 * number, row], z) < TOLERANCE
            assert apart(found.logits[2 * number + 1, row], y) < TOLERANCE
            assert int(contrasted(z, y).argmax()) == int(tokens[0, number])


FULL = (
    PyramidDrop(layers=(1, 3), keep=(0.7, 0.4)),
    VHR(),
    VAR(layers=(1, 2), p=0.6, rho=0.6, min_image_attention=0.2, **SINKS),
    Paint(layers=(3,)),
    GroundingHeads({1: [0], 3: [1, 2]}, strength=1.5),
)


@pytest.mark.parametrize(("name", "decoder"), [("llava", VCD(view=VIEW)), ("qwen2_5_vl", PAIGuidance(1.5))])
def test_a_padded_batch_is_its_samples_under_all_of_it_with_beams_too(name: str, decoder: Any) -> None:
    model, inputs = tiny(name), make_inputs(name)
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with Stack(*FULL, decoder)(model):
        both = run(model, inputs, NEW)
        beams = model.generate(**inputs, **options)
        for row in range(2):
            one = run(model, alone(inputs, row), NEW)
            assert torch.equal(one.tokens[0, -NEW:], both.tokens[row, -NEW:])
            assert apart(one.logits[:, 0], both.logits[:, row]) < TOLERANCE
            best = model.generate(**alone(inputs, row), **options)
            assert torch.equal(best.sequences[0, -NEW:], beams.sequences[row, -NEW:])
            assert apart(best.sequences_scores[0], beams.sequences_scores[row]) < 1e-5, (
                "float32 by generate()"
            )


@pytest.mark.parametrize("name", ["llava", SLOWER])
def test_the_order_of_a_stack_does_not_matter(name: str) -> None:
    """VHR measures heads before others scale them, pruners read attention before others change it."""
    model, inputs = tiny(name), make_inputs(name)
    ways = [*FULL, VCD(view=VIEW)]
    with Stack(*ways)(model):
        expected = run(model, inputs, NEW)
    for order in ([5, 4, 3, 2, 1, 0], [2, 4, 0, 5, 3, 1], [4, 1, 5, 2, 0, 3]):
        with Stack(*(ways[i] for i in order))(model):
            found = run(model, inputs, NEW)
        assert apart(found.logits, expected.logits) < TOLERANCE
    # nested contexts and stacks in stacks are the same
    with Stack(*ways[:2])(model), Stack(ways[2], Stack(*ways[3:]))(model):
        assert apart(run(model, inputs, NEW).logits, expected.logits) < TOLERANCE


YOPO = Yopo(window=3, inactive={1: (0, 1), 2: (1,), 3: (2, 3)}, mlp_ratio=2.0)


@pytest.mark.parametrize(
    "other", [ROWS, ACT(layers=(1, 2, 3), threshold=0.05), PAI(0.5), Paint(), VHR()], ids=repr
)
def test_yopo_blinds_heads_to_what_others_made_them_attend_in_either_order(other: Intervention) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with YOPO(model):
        alone_ = run(model, inputs, NEW)
    found = []
    for both in ((YOPO, other), (other, YOPO)):
        with Stack(*both)(model):
            found.append(run(model, inputs, NEW).logits)
    assert apart(*found) < TOLERANCE
    assert apart(found[0], alone_.logits) > 1e-2


def test_heads_that_are_blind_to_the_image_say_the_same_however_they_attend_to_it() -> None:
    """With all heads of the layer inactive, what PAI raises there is lost."""
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    blind = Yopo(window=None, inactive={3: (0, 1, 2, 3)})
    loud: list[Tensor] = []
    for alpha in (0.5, 8.0):
        with Stack(blind, PAI(alpha, (3,)))(model):
            loud.append(run(model, inputs, 1).logits)
    # more attention to the image leaves less to the text, and nothing comes of the image itself
    attended = model.model.language_model.layers[3].self_attn.o_proj
    said: list[Tensor] = []
    hook = attended.register_forward_pre_hook(lambda module, args: said.append(args[0][0, -1]))
    with Stack(PAI(60.0, (3,)), blind)(model):
        run(model, inputs, 1)
    hook.remove()
    assert apart(*loud) > 1e-3
    assert float(said[0].abs().amax()) < 1e-6, "all attention is on the image"


@pytest.mark.parametrize("name", ["llava", SLOWER])
def test_yopo_acts_in_the_second_view_as_it_does_alone(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with Stack(YOPO, VCD(view=VIEW))(model):
        found = run(model, inputs, NEW)
    say = found.tokens[:, -NEW:]
    with YOPO(model):
        main = run(model, inputs, NEW, logits_processor=[Say(say)]).logits
        other = run(model, VIEW(inputs), NEW, logits_processor=[Say(say)]).logits
    assert apart(found.logits[::2], main) < TOLERANCE
    assert apart(found.logits[1::2], other) < TOLERANCE


@pytest.mark.parametrize("pruner", [FastV(keep=1.0), VisPruner(keep=1.0)], ids=repr)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_all_kept_and_neutral_others_is_plain_generation(name: str, pruner: Intervention) -> None:
    model, inputs = tiny(name), make_inputs(name)
    neutral = Stack(
        pruner,
        VHR(alpha=1.0),
        VAR(p=0.0, **SINKS),
        PAI(alpha=0.0),
        Paint(alpha=0.0, beta=0.0),
        ACT(beta=1.0),
        PAIGuidance(gamma=1.0),
    )
    for options in ({}, {"num_beams": 2}):
        expected = run(model, inputs, NEW, **options)
        with neutral(model):
            found = run(model, inputs, NEW, **options)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.logits, expected.logits), "not one bit"


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("on purpose")


@pytest.mark.parametrize("name", ["llava", SLOWER])
def test_the_model_is_left_as_it_was_also_by_a_failure_in_the_second_view(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    plain = run(model, inputs, 3)
    before = everything_on(model)
    with Stack(*FULL, VCD(view=VIEW))(model):
        run(model, inputs, 3)
    assert everything_on(model) == before
    with pytest.raises(KeyError, match="on purpose"), Stack(VCD(view=fail), *FULL)(model):
        run(model, inputs, 3)
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, plain.logits)


CONFLICTS: Mapping[str, tuple[tuple[Intervention, ...], str]] = {
    "rows: VAR and PAI": ((VAR(layers=(1, 2), **SINKS), PAI()), r"VAR and PAI both .* layers \[2\]"),
    "rows: PAI and Paint": ((PAI(), Paint()), r"PAI and Paint both change the attention of layers \[2, 3\]"),
    "rows: ACT and VAR": ((ACT(), VAR(**SINKS)), r"ACT and VAR both change the attention of layers \[2\]"),
    "rows: Paint twice": ((Paint(), Paint(alpha=0.3)), r"Paint and Paint both .* layers \[2, 3\]"),
    "two second views": ((VCD(view=VIEW), PAIGuidance()), "two decoding methods at once: TwoView"),
    "the same second view": ((Ritual(), Ritual()), "two decoding methods at once: TwoView"),
    "a view without the image": ((M3ID(), PAIGuidance()), "two decoding methods at once: TwoView"),
    "heads measured twice": ((VHR(), VHR(layers=(2,))), "VHR is on this model already"),
    "selections at the input": (
        (DivPrune(0.5), VisPruner(0.5)),
        "two interventions drop tokens before layer 0",
    ),
    "the same selection": ((FastV(0.5), FastV(0.25)), "two interventions drop tokens before layer 2"),
    "stages that meet": (
        (FastV(0.5, layer=3), PyramidDrop(layers=(1, 3), keep=(0.5, 0.25))),
        "two interventions drop tokens before layer 3",
    ),
    "less computed twice": ((YOPO, Yopo(window=1)), "this model has a Yopo already"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_stacks_that_conflict_are_refused_at_entry_in_either_order(case: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    ways, match = CONFLICTS[case]
    before = everything_on(model)
    with pytest.raises(ValueError, match=match):
        Stack(GroundingHeads({0: [0]}), *ways)(model).__enter__()
    assert everything_on(model) == before
    for one, two in itertools.permutations(ways):
        with one(model), pytest.raises(ValueError, match=r"both change|at once|already|two interventions"):
            two(model).__enter__()
        assert everything_on(model) == before
    with ways[0](model):  # what was refused has left nothing behind
        run(model, inputs, 1)
