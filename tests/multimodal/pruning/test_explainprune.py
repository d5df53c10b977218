"""ExplainPrune: the rule, the net and its files, and what it is shown of a prompt."""

import copy
import dataclasses
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny
from visionsel.multimodal.pruning.explainprune import ExplainPrune, first_layer_maps, select
from visionsel.multimodal.pruning.explainprune_net import RelevancePredictor, relevance_loss


@lru_cache
def model_of(name: str) -> Any:
    return tiny.make_model(name)


def predictor_of(heads: int = 4, **options: Any) -> RelevancePredictor:
    torch.manual_seed(3)
    return RelevancePredictor(heads, **options).eval()


def prompt_mask(model: Any, inputs: dict[str, Any], pruner: ExplainPrune) -> Tensor:
    """bool `[B, L]`: what a forward lets through."""
    with torch.no_grad(), pruner(model) as pruned:
        model(**inputs)
    [(layer, kept)] = pruned.kept
    assert layer == 0
    return kept


def alone(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """Sample b of a batch of one image each, without padding."""
    real = inputs["attention_mask"][b].bool()
    ids = {key: inputs[key][b : b + 1, real] for key in ("input_ids", "attention_mask")}
    return ids | {key: value[b : b + 1] for key, value in inputs.items() if key not in ids}


def test_the_most_relevant_tokens_are_kept_and_ties_go_to_the_lower_index() -> None:
    relevance = torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.2], [0.3, 0.9, 0.1, 7.0, math.nan]])
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert select(relevance=relevance, keep=2, valid=valid).tolist() == [
        [False, True, True, False, False],
        [True, True, False, False, False],
    ]
    assert select(relevance[:1], keep=0.8).sum() == 4
    with pytest.raises(ValueError, match="NaN"):
        select(relevance, keep=2)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_the_maps_are_those_of_the_first_layer_of_an_eager_model(name: str) -> None:
    eager = copy.deepcopy(model_of(name)).float()
    eager.set_attn_implementation("eager")
    inputs = tiny.make_inputs(name)
    single = inputs | {"pixel_values": inputs["pixel_values"].float()}
    with torch.no_grad():
        attention = eager(**single, output_attentions=True).attentions[0]
    maps, grids, valid = first_layer_maps(model_of(name), inputs)
    for b in range(2):
        image = inputs["input_ids"][b] == tiny.IMAGE
        last = int(image.nonzero()[-1])
        rows = attention[b, :, last + 1 :, image].double()
        expected = torch.cat([rows.mean(1), rows.amax(1)])
        number = int(image.sum())
        torch.testing.assert_close(maps[b, :, :number], expected, rtol=1e-3, atol=1e-6)
        assert not maps[b, :, number:].any()
        assert valid[b].tolist() == [i < number for i in range(valid.shape[1])]
        [grid] = grids[b]
        assert torch.equal(grid.flatten(), torch.arange(number))


def test_the_forward_for_the_maps_ends_at_the_first_layer_and_leaves_no_trace() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava")
    with torch.no_grad():
        logits = model(**inputs).logits
    ran: list[int] = []
    layers = model.model.language_model.layers
    handles = [
        layer.mlp.register_forward_hook(lambda m, i, o, n=n: ran.append(n)) for n, layer in enumerate(layers)
    ]
    first_layer_maps(model, inputs)
    assert ran == []
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(ValueError, match="no image tokens"):
        first_layer_maps(model, tiny.make_inputs("llava", images=0))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_is_pruned_to_the_number_asked_for_and_restored(name: str) -> None:
    model, inputs = model_of(name), tiny.make_inputs(name)
    pruner = ExplainPrune(keep=0.3, predictor=predictor_of())
    with torch.no_grad():
        before = model(**inputs).logits
    kept = prompt_mask(model, inputs, pruner)
    visual = inputs["input_ids"] == tiny.IMAGE
    assert torch.equal(kept & ~visual, inputs["attention_mask"].bool() & ~visual)
    expected = [max(1, round(0.3 * n)) for n in visual.sum(1).tolist()]
    assert (kept & visual).sum(1).tolist() == expected
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_the_choice_is_the_top_of_what_the_net_makes_of_the_maps() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava")
    predictor = predictor_of()
    maps, grids, valid = first_layer_maps(model, inputs)
    logits = predictor(maps, grids, valid)
    kept = prompt_mask(model, inputs, ExplainPrune(keep=5, predictor=predictor))
    for b in range(2):
        image = inputs["input_ids"][b] == tiny.IMAGE
        assert kept[b][image].nonzero()[:, 0].tolist() == sorted(logits[b].topk(5).indices.tolist())


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_the_choice_for_a_sample_does_not_depend_on_padding_batch_or_beams(name: str) -> None:
    model, inputs = model_of(name), tiny.make_inputs(name)
    pruner = ExplainPrune(keep=0.4, predictor=predictor_of())
    together = prompt_mask(model, inputs, pruner)
    for b in range(2):
        single = prompt_mask(model, alone(inputs, b), pruner)
        assert torch.equal(together[b][inputs["attention_mask"][b].bool()], single[0])
    with torch.no_grad(), pruner(model) as pruned:
        model.generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False)
    [(_, beams)] = pruned.kept
    assert torch.equal(beams, together.repeat_interleave(3, 0))


def test_the_net_sees_each_grid_by_itself() -> None:
    predictor = predictor_of(2)
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 4, 23, generator=generator)
    order = torch.randperm(23, generator=generator)
    first, second, rest = order[:12].view(3, 4), order[12:18].view(2, 3), order[18:]
    valid = torch.ones(1, 23, dtype=torch.bool)
    whole = predictor(maps, [[first, second]], valid)[0]
    assert torch.equal(whole, predictor(maps, [[second, first]], valid)[0])

    def by_hand(index: Tensor) -> Tensor:
        """Plain convolutions over one grid, with the mean over the whole image."""
        shown = (maps / maps.mean(2, keepdim=True)).clamp(min=1e-3).log()[0][:, index]
        return predictor.net(torch.cat([shown, torch.ones_like(shown[:1])])[None])[0, 0]

    torch.testing.assert_close(whole[first], by_hand(first), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[second], by_hand(second), rtol=1e-5, atol=1e-6)
    for token in rest:  # on no grid: newlines
        torch.testing.assert_close(whole[token], by_hand(token.view(1, 1))[0, 0], rtol=1e-5, atol=1e-6)


def test_the_net_does_not_care_how_much_attention_the_image_gets_or_what_stands_at_padding() -> None:
    predictor = predictor_of()
    maps = torch.rand(2, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[1, :, 6:] = 0
    valid = torch.arange(9) < torch.tensor([[9], [6]])
    grids = [[torch.arange(9).view(3, 3)], [torch.arange(6).view(2, 3)]]
    logits = predictor(maps, grids, valid)
    torch.testing.assert_close(predictor(maps * 0.01, grids, valid), logits)
    torch.testing.assert_close(predictor(maps[1:, :, :6], grids[1:], valid[1:, :6])[0], logits[1, :6])
    assert not logits[1, 6:].any()


def test_larger_grids_than_those_of_training_are_taken() -> None:
    predictor = predictor_of()
    valid = torch.ones(1, 1200, dtype=torch.bool)
    assert predictor(torch.rand(1, 8, 1200), [[torch.arange(1200).view(40, 30)]], valid).isfinite().all()


def test_the_loss_is_the_divergence_of_normalised_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, relevance = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator)
    valid = torch.arange(6) < torch.tensor([6, 4, 3, 0])[:, None]
    relevance[0, 2] = 0
    relevance[2] = 0  # nothing is relevant: all alike
    expected = []
    for b, number in enumerate((6, 4, 3)):
        target = relevance[b, :number].tolist() if b < 2 else [1.0] * 3
        foreseen = [math.exp(x) for x in logits[b, :number].tolist()]
        parts = [
            t / sum(target) * math.log((t / sum(target)) / (f / sum(foreseen)))
            for t, f in zip(target, foreseen, strict=True)
            if t
        ]
        expected.append(sum(parts))
    found = relevance_loss(logits.requires_grad_(), relevance, valid)
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    found.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[~valid].any()
    right = relevance[1:2].log() + 3
    assert relevance_loss(right, relevance[1:2], valid[1:2]).item() == pytest.approx(0, abs=1e-6)


def test_a_net_learns_to_put_first_what_gets_most_attention() -> None:
    predictor = predictor_of()
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    grids, valid = [[torch.arange(16).view(4, 4)]] * 8, torch.ones(8, 16, dtype=torch.bool)
    losses = []
    for _ in range(40):
        maps = torch.rand(8, 8, 16, generator=generator)
        loss = relevance_loss(predictor(maps, grids, valid), maps[:, 2] ** 2, valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_what_was_saved_loads_the_same_and_by_either_way(tmp_path: Path) -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava")
    predictor = predictor_of(width=8, depth=3, kernel=1)
    folder = predictor.save(tmp_path / "some" / "net")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    expected = prompt_mask(model, inputs, ExplainPrune(keep=3, predictor=predictor))
    for pruner in (ExplainPrune.load(folder, keep=3), ExplainPrune(keep=3, predictor=str(folder))):
        assert torch.equal(prompt_mask(model, inputs, pruner), expected)
    assert ExplainPrune.load(folder).keep == 0.5
    again = RelevancePredictor.load(folder)
    assert again.config == predictor.config
    assert not again.training
    assert [f.name for f in dataclasses.fields(ExplainPrune)] == ["keep", "predictor"]


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in"):
        RelevancePredictor.load(tmp_path)
    folder = predictor_of().save(tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    for text in (json.dumps(config | {"width": 8}), json.dumps(config | {"breadth": 8}), "{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="holds no predictor"):
            RelevancePredictor.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="holds no predictor"):
        RelevancePredictor.load(folder)
    with pytest.raises(FileNotFoundError), ExplainPrune(predictor=tmp_path / "none")(model_of("llava")):
        pass


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="needs predictor="):
        ExplainPrune(keep=0.5)
    with pytest.raises(ValueError, match="keep must be"):
        ExplainPrune(keep=0.0, predictor=predictor_of())
    for options in ({"depth": 1}, {"width": 0}, {"heads": 0}, {"kernel": 2}, {"kernel": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            RelevancePredictor(**{"heads": 4, **options})
    with pytest.raises(ValueError, match="made for 3 heads, but the model has 4"):
        prompt_mask(model_of("llava"), tiny.make_inputs("llava"), ExplainPrune(predictor=predictor_of(3)))
