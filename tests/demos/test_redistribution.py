"""Where attention goes under a remedy, against attention weights that eager kernels tell."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.multimodal import PAI, GroundingHeads
from visionsel.multimodal.prompts import chat_inputs, user_turn

pytest.importorskip("gradio", reason='the demos need Gradio: pip install "visionsel[demo]"')

from demos.examples import scenes
from demos.hallucination import Remedied, answer_with, redistributed
from demos.models import Models, load_models
from demos.redistribution import Gaze, draw_gazes, measure_gaze

IMAGE = scenes()[3].image


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models(device="cpu")


@pytest.fixture(scope="module")
def plain(models: Models) -> Remedied:
    return answer_with(models, IMAGE, CAPTION_PROMPT, None)


@pytest.fixture(scope="module")
def prompt(models: Models) -> Any:
    return chat_inputs(models.processor, [[user_turn(CAPTION_PROMPT)]], [[IMAGE]])


@pytest.fixture
def eager(models: Models) -> Iterator[Any]:
    """The model with a kernel that tells its weights."""
    before = models.model.config._attn_implementation
    models.model.set_attn_implementation("eager")
    yield models.model
    models.model.set_attn_implementation(before)


def weights(model: Any, prompt: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`[layers, heads, T, image tokens]`, of one forward over prompt and answer."""
    ids = torch.cat([prompt["input_ids"], tokens], 1)
    new = tokens.shape[1]
    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=prompt["pixel_values"],
            logits_to_keep=new + 1,  # so that a remedy knows which tokens are the answer
            output_attentions=True,
            use_cache=False,
        )
    seen = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    return torch.stack([layer[0, :, -new - 1 : -1][..., seen] for layer in out.attentions])


def test_it_is_the_mean_of_the_weights_and_remedies_have_changed_them(
    models: Models, plain: Remedied, prompt: Any, eager: Any
) -> None:
    gazes = []
    for remedy in (None, PAI(layers=(1, 2, 3))):
        gazes.append(measure_gaze(models, IMAGE, prompt, plain.tokens, remedy))
        if remedy is None:
            expected = weights(eager, prompt, plain.tokens)
        else:
            with remedy(eager):
                expected = weights(eager, prompt, plain.tokens)
        assert (gazes[-1].tokens - expected.double().mean((0, 1, 2))).abs().max() < 1e-6
        assert abs(gazes[-1].share - float(expected.sum(-1).mean())) < 1e-5
    assert gazes[1].share > gazes[0].share + 0.01  # what PAI is for


def test_heads_count_as_much_as_they_are_strengthened(
    models: Models, plain: Remedied, prompt: Any, eager: Any
) -> None:
    remedy = GroundingHeads({0: [1], 2: [0, 3]}, strength=3.0)
    with remedy(eager):
        every = weights(eager, prompt, plain.tokens).double()
    strength = torch.ones(every.shape[:2], dtype=torch.float64)
    for layer, heads in remedy.heads.items():
        strength[layer, list(heads)] = 3.0
    expected = torch.einsum("lhtn,lh->ln", every, strength) / strength.sum(1, keepdim=True) / every.shape[2]
    found = measure_gaze(models, IMAGE, prompt, plain.tokens, remedy)
    assert (found.tokens - expected.mean(0)).abs().max() < 1e-6
    again = measure_gaze(models, IMAGE, prompt, plain.tokens)
    assert (again.tokens - every.mean((0, 1, 2))).abs().max() > 1e-4  # and it is gone afterwards


def test_each_remedy_has_three_pictures_with_a_text_and_one_that_chooses_words_has_none(
    models: Models, plain: Remedied
) -> None:
    drawn = redistributed(models, IMAGE, CAPTION_PROMPT, plain, ["pai", "vcd", "vhr"])
    assert re.findall("<h3>(.*?)</h3>", drawn) == ["PAI", "VHR"]
    assert len(set(re.findall('src="(.*?)"', drawn))) == 5  # the one without any remedy comes twice
    texts = re.findall('alt="(.*?)"', drawn)
    assert len(texts) == 6
    assert all(texts)
    assert "VCD: changes which word is chosen, not where the model looks." in drawn
    assert "<img" not in redistributed(models, IMAGE, CAPTION_PROMPT, plain, ["vcd"])
    assert redistributed(models, IMAGE, CAPTION_PROMPT, plain, []) == ""


def test_a_remedy_that_moves_nothing_is_drawn_without_a_change(
    models: Models, plain: Remedied, prompt: Any
) -> None:
    gaze = measure_gaze(models, IMAGE, prompt, plain.tokens)
    drawn = draw_gazes(IMAGE, gaze, {"<none>": Gaze(gaze.tokens, gaze.grid)})
    assert "change: none" in drawn
    assert "<none>" not in drawn
    assert "&lt;none&gt;" in drawn
