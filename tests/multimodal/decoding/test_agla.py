"""AGLA: the mask, the relevance it comes from, and what the released code does instead."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval

from tests.multimodal.decoding.restated import FAMILIES, Inputs, answer, single
from tests.multimodal.runs import apart, run, tiny
from tests.multimodal.tiny import make_inputs
from visionsel.multimodal.decoding.agla import AGLA, image_relevance, masked, relevant

NEW = 5


def black(given: Inputs) -> Inputs:
    """Half of the pixels gone."""
    pixels = given["pixel_values"].clone()
    pixels[..., pixels.shape[-1] // 2 :] = 0
    return given | {"pixel_values": pixels}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_samples_read_anew_for_every_token(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with AGLA(view=black)(model):
        found = run(model, inputs, NEW)
    for row in range(2):
        one = single(name, inputs, row)
        tokens, z, y, _ = answer(model, one, black(one), lambda z, y, t: z + 2 * y, 0.5, NEW)
        assert tokens == found.tokens[row, -NEW:].tolist()
        assert apart(found.logits[::2, row], z) < 1e-10
        assert apart(found.logits[1::2, row], y) < 1e-10


def test_in_the_released_code_the_second_view_becomes_the_main_one_after_a_token() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    options = {"do_sample": False, "output_scores": True, "output_logits": True}
    options |= {"return_dict_in_generate": True, "max_new_tokens": NEW}
    found = {}
    for fidelity in ("paper", "code"):
        with AGLA(beta=0, view=black, fidelity=fidelity)(model):
            found[fidelity] = model.generate(**inputs, **options)
    paper, code = found["paper"], found["code"]
    assert torch.equal(code.scores[0], paper.scores[0])
    for number in range(1, NEW):
        assert apart(code.scores[number], 3 * code.logits[number]) < 1e-5, "temperature 1/3"
        assert apart(paper.scores[number], 3 * paper.logits[number]) > 1e-2


def test_alpha_0_changes_nothing_and_defaults_are_the_published_ones() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    expected = run(model, inputs, 3)
    with AGLA(0.0, view=black)(model):
        assert torch.equal(run(model, inputs, 3).logits, expected.logits)
    assert AGLA() == AGLA(alpha=2.0, beta=0.5, view=None, fidelity="paper")


def test_without_a_view_it_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match=r"pass view=matching_view\(model, processor, matcher\)"):
        AGLA()(tiny("llava")).__enter__()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"alpha": -1}, "alpha must be 0 or more"),
        ({"beta": 2}, "from 0"),
        ({"fidelity": "best"}, "got 'best'"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AGLA(**values)


# the mask


def test_the_mask_by_hand() -> None:
    relevance = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.2, 0.8, 0.4, 0.7]])
    # rank int(8 * (1 - 0.5 / 2)) = 6 from 0: the seventh largest, 0.2
    assert relevant(relevance, 0.5).tolist() == [[False, True, True, True], [True, True, True, True]]
    # rank int(8 * 0.5) = 4: the fifth largest, 0.4
    assert relevant(relevance, 1.0).tolist() == [[False, True, True, False], [False, True, True, True]]
    assert relevant(relevance, 0.0).all(), "all stay without a match"
    assert relevant(relevance, -1.0).all()


def test_a_masked_picture_keeps_what_is_relevant() -> None:
    relevance = torch.zeros(4, 4)
    relevance[:2] = 1
    picture = torch.full((3, 32, 40), 7, dtype=torch.uint8)
    found = masked(picture, relevance, 1.0)
    assert found.dtype == torch.uint8
    assert bool((found[:, :14] == 7).all())
    assert bool((found[:, 18:] == 0).all())
    image = masked(Image.new("RGB", (40, 32), (7, 7, 7)), relevance, 1.0)
    assert image.size == (40, 32)
    assert image.getpixel((3, 3)) == (7, 7, 7)
    assert image.getpixel((3, 30)) == (0, 0, 0)


# relevance


def tiny_blip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 60, "encoder_hidden_size": 32, "projection_dim": 16}
    text |= {"bos_token_id": 5, "sep_token_id": 6}
    config = BlipConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        image_text_hidden_size=16,
    )
    model: Any = BlipForImageTextRetrieval(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    return model


class Nudge(nn.Module):
    """Where attention weights pass by, one of them is made larger."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.by = (0, 0, 0, 0), 0.0
        self.weights = torch.empty(0)

    def forward(self, weights: Tensor) -> Tensor:
        self.weights = weights.detach()
        weights = weights.clone()
        weights[self.place] += self.by
        return weights


def test_relevance_is_attention_times_what_the_match_gains_by_it() -> None:
    model = tiny_blip()
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    ids = torch.tensor([[5, 11, 12, 13, 6]])
    mask = torch.ones_like(ids)
    found, match = image_relevance(model, pixels, ids, mask, layer=0)

    attention = model.text_encoder.encoder.layer[0].crossattention.self
    stock, attention.dropout = attention.dropout, Nudge()
    nudge = attention.dropout

    def score() -> float:
        with torch.no_grad():
            return float(model(pixel_values=pixels, input_ids=ids, attention_mask=mask).itm_score[0, 1])

    expected = torch.zeros(4, dtype=torch.float64)
    for head in range(2):
        for word in (1, 2, 3):  # the first and the last token are no words
            for patch in range(4):
                nudge.place = (0, head, word, patch + 1)  # behind the class token
                nudge.by = 1e-5
                gain = score()
                nudge.by = -1e-5
                gain = (gain - score()) / 2e-5
                expected[patch] += float(nudge.weights[nudge.place]) * max(gain, 0.0) / 2 / 3
    attention.dropout = stock
    assert found.shape == (1, 2, 2)
    assert apart(found.flatten(), expected) < 1e-6
    assert float(found.max()) > 1e-4
    with torch.no_grad():
        cosine = model(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_itm_head=False).itm_score
    assert match.tolist() == pytest.approx(cosine[0].tolist())


def test_relevance_of_a_padded_batch_is_that_of_its_samples_and_leaves_the_model_alone() -> None:
    model = tiny_blip()
    model.requires_grad_(False)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ids = torch.tensor([[5, 11, 12, 13, 6], [5, 14, 6, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        both, match = image_relevance(model, pixels, ids, mask, layer=0)
        for row, length in enumerate((5, 3)):
            one = slice(row, row + 1)
            alone, cosine = image_relevance(
                model, pixels[one], ids[one, :length], mask[one, :length], layer=0
            )
            assert apart(alone[0], both[row]) < 1e-10
            assert apart(cosine[0], match[row]) < 1e-10
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
