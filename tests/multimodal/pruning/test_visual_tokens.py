"""What pruners see of a prompt, on every family."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.tiny import FAMILIES, make_inputs, make_model
from visionsel.multimodal.families import find_family
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens


@dataclass(frozen=True)
class Look(Pruner):
    """Keeps everything and runs a function on the tokens while they are there."""

    look: Any
    layer: int = 0
    reads: str | None = None
    tower: bool = False
    seen: list[Any] = field(default_factory=list)

    def stages(self, layers: int) -> list[Stage]:
        return [Stage(self.layer, self._select, self.reads, self.tower)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        self.seen.append(self.look(tokens))
        return tokens.valid


def look_at(name: str, look: Any, *, inputs: dict[str, Any] | None = None, **options: Any) -> Any:
    pruner = Look(look, **options)
    model = make_model(name)
    with torch.no_grad(), pruner(model):
        model(**(inputs or make_inputs(name)))
    [seen] = pruner.seen
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_features_at_the_input_are_what_the_tower_gave(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    embedded: list[Tensor] = []
    layer = find_family(model).decoder(model).layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    features, valid, index, total = look_at(name, lambda t: (t.features, t.valid, t.index, t.total))
    visual = inputs["input_ids"] == find_family(model).token_ids(model)["image"]
    for b in range(2):
        expected = embedded[0][b, visual[b]]
        assert int(total[b]) == len(expected)
        assert torch.equal(features[b, valid[b]], expected)
        assert index[b, valid[b]].tolist() == list(range(len(expected)))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_merged_before_the_projector_reaches_the_decoder_through_it(name: str) -> None:
    def look(tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        before, project = tokens.mergeable()
        swapped = before.clone()
        swapped[:, [0, 1]] = before[:, [1, 0]]  # the first token gets what the second was
        return tokens.features, project(before), project(swapped), tokens.newline

    features, same, swapped, newline = look_at(name, look, tower=True)
    assert torch.equal(same, features)
    assert not newline[:, :2].any()
    assert torch.allclose(swapped[:, 0], features[:, 1], rtol=0, atol=1e-10)
    assert torch.allclose(swapped[:, 1], features[:, 0], rtol=0, atol=1e-10)
    assert torch.equal(swapped[:, 2:], features[:, 2:])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_patches_get_in_the_tower_adds_up_over_the_tokens(name: str) -> None:
    def look(tokens: VisualTokens) -> tuple[Tensor, Tensor, int]:
        received = tokens.tower_attention()
        crops = tokens.tower_crops()
        return received, tokens.pool_tower(lambda crop: torch.ones(crop.patches).double()), len(crops)

    received, ones, crops = look_at(name, look, tower=True)
    assert crops >= 2
    assert (received >= 0).all()
    patch = look_at(name, lambda tokens: tokens.valid & ~tokens.newline, tower=True)
    # the mean of ones is one at every token that has a patch
    assert torch.equal(ones, patch.double())


def test_a_stage_reads_only_what_it_asked_for() -> None:
    for look, sentence in (
        (lambda tokens: tokens.attention(), "did not ask for queries and keys"),
        (lambda tokens: tokens.tower_attention(), "did not ask for the vision tower"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            look_at("llava", look)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (lambda tokens: tokens.valid.long(), "a selection is bool"),
        (lambda tokens: tokens.valid[:, :-1], "a selection is bool"),
        (lambda tokens: torch.zeros_like(tokens.valid), "keeps no token of a sample"),
        (lambda tokens: (tokens.valid, tokens.features[:, :-1]), "features must be"),
        (lambda tokens: (tokens.valid, tokens.features * float("nan")), "merged features has NaN"),
    ],
)
def test_what_is_no_choice_among_the_tokens_is_refused(choice: Any, sentence: str) -> None:
    @dataclass(frozen=True)
    class Wrong(Pruner):
        def stages(self, layers: int) -> list[Stage]:
            return [Stage(0, choice)]

    model = make_model("llava")
    with torch.no_grad(), pytest.raises(ValueError, match=sentence), Wrong()(model):
        model(**make_inputs("llava"))
