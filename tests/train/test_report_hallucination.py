"""The hallucination of the report: inventions counted by hand, attention as the eager kernel has it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.train.pages import Reader
from train import report_hallucination
from train.report import fresh_scenes
from train.report_attention import act_looks, draw_looks, heads_looks, record
from train.report_hallucination import hallucination_section, invents, remedies
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import encode_prompts, generate_answers


@pytest.fixture(scope="module")
def lvlm():
    return load_lvlm()


def _row(captions, samples) -> list[str]:
    """The cells of a method, counted word by word."""
    said = [[w for w in caption.split() if w in SHAPES] for caption in captions]
    there = [{o.shape for o in sample.objects} for sample in samples]
    wrong = [sum(w not in true for w in words) for words, true in zip(said, there, strict=True)]
    right = sum(len(true & set(words)) for words, true in zip(said, there, strict=True))
    mentions = sum(map(len, said))
    return [
        f"{sum(wrong) / mentions:.1%}",
        f"{sum(wrong)} of {mentions}",
        f"{np.mean([n > 0 for n in wrong]):.0%}",
        f"{right / sum(map(len, there)):.1%}",
        f"{np.mean([len(caption.split()) for caption in captions]):.1f}",
    ]


def test_the_table_and_the_marks_are_those_of_the_captions(lvlm) -> None:
    samples = fresh_scenes("anti", 3, 6)
    page = Reader(hallucination_section(*lvlm, samples).body)
    images, shown = [s.image for s in samples], []
    plain = generate_answers(*lvlm, images, [CAPTION_PROMPT] * 6)
    for row, (name, method) in zip(page.rows[1:], remedies(*lvlm).items(), strict=True):
        captions = plain
        if method is not None:
            with method(lvlm[0]):
                captions = generate_answers(*lvlm, images, [CAPTION_PROMPT] * 6)
        assert row == [name, *_row(captions, samples)]
        shown.append(captions)
    tempted = [i for i, s in enumerate(samples) if invents(plain[i], s)]
    assert 0 < len(tempted) <= 4
    assert page.texts["said"] == [captions[i] for i in tempted for captions in shown[:3]]
    marked = [
        word
        for i in tempted
        for captions in shown[:3]
        for word in captions[i].split()
        if word in set(SHAPES) - {o.shape for o in samples[i].objects}
    ]
    assert [mark.split()[-1] for mark in page.texts["invented"][1:]] == marked
    assert page.texts["figcaption"][0].startswith("without")
    assert page.texts["figcaption"][1].startswith("with ")


def test_scenes_without_inventions_and_none_cured_are_told(lvlm, monkeypatch) -> None:
    samples = fresh_scenes("anti", 3, 2)
    true = [s.captions[0] for s in samples]
    false = ["a red ring and a red moon and a red arrow and a red bar"] * 2
    for said, expected in (
        (true, "Scene 1 is the first;"),
        (false, "Scene 1 is the first with an invention;"),
    ):
        monkeypatch.setattr(report_hallucination, "generate_answers", lambda *_, said=said: said)
        section = hallucination_section(*lvlm, samples)
        assert expected in section.body
        assert Reader(section.body).rows[1][1] == _row(said, samples)[0]
    assert (
        section.figure
        == f"{_row(false, samples)[0].split('.')[0]}% → {_row(false, samples)[0].split('.')[0]}%"
    )


@torch.inference_mode()
def _eager(lvlm, sample, method, step: int) -> torch.Tensor:
    """Attention `[layers, heads, 64]` to the image of the row of a new token, by the eager kernel."""
    model, processor = lvlm
    inputs = encode_prompts(processor, [sample.image], [CAPTION_PROMPT])
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    options = {"do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation("eager")
    try:
        with method(model):
            steps = model.generate(**inputs, max_new_tokens=step + 1, **options).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return torch.stack(steps[step])[:, 0, :, -1, image]


def _patches(pixels: np.ndarray) -> np.ndarray:
    """One value a patch of 8 x 8 pixels."""
    assert (pixels.reshape(8, 8, 8, 8) == pixels[::8, ::8][:, None, :, None]).all()
    return pixels[::8, ::8].flatten()


@pytest.mark.parametrize("step", [0, 4])
def test_attention_under_the_methods_is_what_the_eager_kernel_has(lvlm, step: int) -> None:
    sample = fresh_scenes("anti", 3, 2)[1]
    methods = remedies(*lvlm)
    heads, act = methods["GroundingHeads"], methods["ACT"]
    plain = record(*lvlm, sample)
    before = _eager(lvlm, sample, nullcontext, step)
    for method, looks in ((heads, heads_looks), (act, act_looks)):
        seen = record(*lvlm, sample, method)
        found = looks(plain, seen, method, step)
        rows = _eager(lvlm, sample, method, step)
        if method is heads:
            weights = torch.ones(4, 4, 1)
            for layer, chosen in heads.heads.items():
                weights[layer, chosen] = 1.6
            first, after = before.mean((0, 1)), (rows * weights).sum((0, 1)) / weights.sum()
        else:
            cut = {layer: seen.handle.sinks[layer][0].any(1) for layer in (1, 2)}
            assert any(bool(mask.any()) for mask in cut.values())
            first, after = (
                torch.cat([attention[layer, mask] for layer, mask in cut.items()]).mean(0)
                for attention in (before, rows)
            )
        np.testing.assert_allclose(_patches(found.before), first, atol=1e-5)
        np.testing.assert_allclose(_patches(found.after), after, atol=1e-5)
        assert found.shares == pytest.approx((float(first.sum()), float(after.sum())), abs=1e-4)
        assert not np.allclose(found.before, found.after, atol=1e-4)


def test_a_colour_means_the_same_in_both_pictures_of_a_pair(lvlm) -> None:
    sample = fresh_scenes("anti", 3, 2)[1]
    heads = remedies(*lvlm)["GroundingHeads"]
    looks = heads_looks(record(*lvlm, sample), record(*lvlm, sample, heads), heads, 4)
    flat = type(looks)(looks.before, np.full_like(looks.before, looks.before.max()), looks.shares)
    first, second = draw_looks(sample.image.convert("L").point(lambda _: 128), flat)
    y, x = np.unravel_index(looks.before.argmax(), looks.before.shape)
    peak = first.getpixel((4 * int(x) + 1, 4 * int(y) + 1))
    assert {second.getpixel((1, 1)), second.getpixel((200, 90))} == {peak}
    assert first.size == second.size == (256, 256)
