"""The pruning of the report: costs counted by hand, and what counts as right."""

import pytest
import torch

from tests.train.pages import Reader
from train.report import fresh_scenes
from train.report_pruning import as_right, measure_budget, pruning_section
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import encode_prompts, generate_answers


def _flops(tokens: int) -> int:
    """Of a decoder layer of width 128 and four heads, whose MLP has three matrices of 128 x 384."""
    weights = 4 * 128 * 128 + 3 * 128 * 384
    return 2 * tokens * weights + 4 * 128 * tokens * (tokens + 1) // 2


def test_tokens_flops_and_cache_are_those_of_the_prompt() -> None:
    model, processor = load_lvlm()
    sample = fresh_scenes("balanced", 2, 1)[0]
    length = encode_prompts(processor, [sample.image], [CAPTION_PROMPT])["input_ids"].shape[1]
    whole = 4 * _flops(length)
    for method, layers in (("DivPrune", [16] * 4), ("FastV", [64, 16, 16, 16])):
        lengths = [length - 64 + kept for kept in layers]
        one = measure_budget(model, processor, [sample], method, 0.25)
        assert one.report.equivalent_tokens == sum(layers) / 4
        assert one.report.flops_ratio == pytest.approx(sum(map(_flops, lengths)) / whole)
        assert one.report.cache_bytes == sum(2 * 128 * 4 * tokens for tokens in lengths)
        assert one.captions == [one.answer]
        assert one.picture.width > 384


def test_the_section_shows_every_budget_and_all_tokens_change_nothing() -> None:
    model, processor = load_lvlm()
    samples = fresh_scenes("balanced", 2, 2)
    page = Reader(pruning_section(model, processor, samples).body)
    full = generate_answers(model, processor, [s.image for s in samples], [CAPTION_PROMPT] * 2)
    rows = page.rows[1:]
    assert [row[:2] for row in rows] == [
        [m, k] for m in ("FastV", "DivPrune") for k in ("1", "0.5", "0.25", "0.1")
    ]
    for row in (rows[0], rows[4]):
        assert row[2:7] == ["64.0", "100%", row[4], "2 of 2", "2 of 2"]
    for row in (rows[3], rows[6]):
        one = measure_budget(model, processor, samples, row[0], float(row[1]))
        assert row[5] == f"{sum(as_right(one.captions, full, samples))} of 2"
        assert row[6] == f"{sum(a == b for a, b in zip(one.captions, full, strict=True))} of 2"
        assert one.answer in page.texts["said"]
    assert full[0] in page.texts["said"]
    assert len(page.pictures) == 1 + 6
    assert len({picture.tobytes() for picture in page.pictures[1:]}) == 6


def test_as_right_minds_shapes_and_colours_and_nothing_else() -> None:
    sample = next(
        s for s in ShapesWorld("balanced", 3) if len({o.shape for o in s.objects}) == len(s.objects) == 2
    )
    one, two = sample.objects
    absent = next(s for s in ("ring", "cross", "bar") if s not in (one.shape, two.shape))
    wrong = next(c for c in ("red", "green", "blue") if c not in (one.color, two.color))
    full = f"a large {one.color} {one.shape} and a {two.color} {two.shape} on a plain background"
    same = f"a {two.color} {two.shape} and a small {one.color} {one.shape} on a striped background"
    fewer = f"a {one.color} {one.shape}"
    more = f"{full} and a red {absent}"
    painted = f"a {wrong} {one.shape} and a {two.color} {two.shape}"
    said = [full, same, fewer, more, painted]
    assert as_right(said, [full] * 5, [sample] * 5) == [True, True, False, False, False]
    assert as_right([full, fewer], [fewer, more], [sample] * 2) == [True, False]


def test_the_model_is_left_as_it_was() -> None:
    model, processor = load_lvlm()
    sample = fresh_scenes("balanced", 2, 1)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = encode_prompts(processor, [sample.image], [CAPTION_PROMPT])
    with torch.inference_mode():
        logits = model(**inputs).logits
        measure_budget(model, processor, [sample], "FastV", 0.1)
        assert torch.equal(model(**inputs).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
