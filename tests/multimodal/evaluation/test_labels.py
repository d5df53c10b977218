"""Names and categories: the rule on vectors, the texts, and what happens to names that are equal."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from visionsel.embedded import load_clip
from visionsel.multimodal.evaluation.labels import (
    LabelMatcher,
    encode_texts,
    exact_names,
    load_text_model,
    similar_labels,
)


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    model, _, tokenizer = load_clip()
    return model, tokenizer


def test_weights_are_the_softmax_of_similarities_and_without_temperature_the_best_has_all() -> None:
    names, categories = (normalize(torch.randn(n, 8), dim=1) for n in (4, 6))
    places, weights = similar_labels(names, categories, 0.2, 3)
    best, ones = similar_labels(names, categories)
    for row, name in enumerate(names):
        similar = [sum(a * b for a, b in zip(name.tolist(), one.tolist(), strict=True)) for one in categories]
        shares = [math.exp(one / 0.2) / sum(math.exp(other / 0.2) for other in similar) for one in similar]
        order = sorted(range(6), key=lambda place: -similar[place])
        assert places[row].tolist() == order[:3]
        assert weights[row].tolist() == pytest.approx([shares[place] for place in order[:3]], rel=1e-5)
        assert best[row].tolist() == order[:1]
    assert ones.tolist() == [[1.0]] * 4
    twins = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert similar_labels(twins[1:2], twins)[0].tolist() == [[1]]
    assert similar_labels(twins[1:2], twins, 1.0, 9)[0].tolist() == [[1, 2, 0]]


def test_names_are_compared_as_texts_with_an_article(clip: tuple[Any, Any]) -> None:
    categories = {7: "red_star", 3: "ring", 5: "bar"}
    matcher = LabelMatcher(categories, *clip, temperature=0.1, top=2)
    found = matcher(["Star", "blue  ring", "Star"])
    texts = encode_texts(*clip, ["a star", "a blue ring", "a red star", "a ring", "a bar"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(5))
    places, weights = similar_labels(texts[:2], texts[2:], 0.1, 2)
    ids = [7, 3, 5]
    expected = [
        [(ids[place], pytest.approx(weight, rel=1e-4)) for place, weight in zip(p, w, strict=True)]
        for p, w in zip(places.tolist(), weights.tolist(), strict=True)
    ]
    assert found == [*expected, expected[0]]
    assert LabelMatcher(["ring", "star"], *clip)(["a yellow star", "ring"]) == [
        [("star", 1.0)],
        [("ring", 1.0)],
    ]
    assert matcher([]) == []


def test_any_model_of_open_clip_will_do() -> None:
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    model = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    categories = ["traffic_light", "cat", "dog"]
    matched = LabelMatcher(categories, model, tokenizer, template="a photo of a {}.")(["stop light"])
    with torch.no_grad():
        rows = [
            normalize(model.encode_text(tokenizer([f"a photo of a {name}."])), dim=-1)
            for name in ("stop light", "traffic light", "cat", "dog")
        ]
    similar = [float((rows[0] * row).sum()) for row in rows[1:]]
    assert matched == [[(categories[similar.index(max(similar))], 1.0)]]


def test_equal_names_come_first_and_without_a_model_there_are_no_others(clip: tuple[Any, Any]) -> None:
    categories = {1: "ring", 2: "traffic_light"}
    synonyms = {1: ["band"], 2: ["ring", "stoplight"]}
    assert exact_names(categories, synonyms) == {"ring": 1, "traffic light": 2, "band": 1, "stoplight": 2}
    alone = LabelMatcher(categories, exact=True, synonyms=synonyms)
    found = alone(["Ring", "Traffic light", "stoplight", "star", ""])
    assert found == [[(1, 1.0)], [(2, 1.0)], [(2, 1.0)], [], []]
    found[0].clear()  # a copy
    assert alone(["ring"]) == [[(1, 1.0)]]
    both = LabelMatcher(categories, *clip, exact=True, temperature=1.0)
    assert both(["ring"]) == [[(1, 1.0)]]
    assert len(both(["blue ring"])[0]) == 2


def test_what_cannot_be_is_refused(clip: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="no categories"):
        LabelMatcher([], *clip)
    with pytest.raises(ValueError, match="neither with exact"):
        LabelMatcher(["ring"])
    with pytest.raises(ValueError, match="neither with exact"):
        LabelMatcher(["ring"], clip[0], exact=True)
    with pytest.raises(ValueError, match="where the name stands"):
        LabelMatcher(["ring"], *clip, template="a")
    with pytest.raises(ValueError, match="temperature above 0"):
        LabelMatcher(["ring"], *clip, temperature=0)
    with pytest.raises(ValueError, match="which weights"):
        load_text_model("ViT-B-32")
    model, tokenizer = load_text_model("embedded")
    assert LabelMatcher(["ring", "star"], model, tokenizer)(["ring"]) == [[("ring", 1.0)]]
