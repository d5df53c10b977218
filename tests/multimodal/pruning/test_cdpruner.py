"""CDPruner: against determinants computed here; where it finds what is relevant."""

from functools import cache
from string import ascii_lowercase
from typing import Any

import open_clip
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import prune, signals
from visionsel.multimodal.pruning import cdpruner
from visionsel.multimodal.pruning.cdpruner import CDPruner, ClipRelevance

NAN = float("nan")


def draw(*numbers: int, channels: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance, features and which tokens are valid; NaN in the padding."""
    valid = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    relevance = torch.rand(len(numbers), max(numbers), dtype=torch.float64)
    features = torch.randn(len(numbers), max(numbers), channels, dtype=torch.float64)
    return relevance.masked_fill(~valid, NAN), features.masked_fill(~valid[..., None], NAN), valid


def by_determinants(relevance: Tensor, features: Tensor, keep: int) -> list[int]:
    """Greedy: the token comes next with which the kernel of all chosen has the largest determinant."""
    n = len(features)
    kernel = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            kernel[i, j] = (
                relevance[i] * relevance[j] * torch.cosine_similarity(features[i], features[j], dim=0)
            )
    chosen: list[int] = []
    while len(chosen) < keep:
        best, best_det = -1, -1.0
        for j in (j for j in range(n) if j not in chosen):
            rows = torch.tensor([*chosen, j])
            det = torch.linalg.det(kernel[rows][:, rows]).item()
            # what is left of a dependent row is rounding; equal determinants go to the lower index
            det = 0.0 if det < 1e-13 * kernel[rows, rows].prod() else det
            if det > best_det * (1 + 1e-12):
                best, best_det = j, det
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize("keep", [1, 4, 9, 12])
def test_it_is_greedy_maximisation_of_the_determinant(keep: int) -> None:
    relevance, features, _ = draw(12, 12, 12)
    mask = cdpruner.select(relevance, features, keep)
    for b in range(3):
        assert mask[b].nonzero().flatten().tolist() == by_determinants(relevance[b], features[b], keep)


@pytest.mark.parametrize("keep", [0.5, 1.0, 0.01, 7])
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    numbers = (5, 14, 1, 9)
    relevance, features, valid = draw(*numbers)
    mask = cdpruner.select(relevance, features, keep, valid)
    assert not (mask & ~valid).any()
    for b, n in enumerate(numbers):
        number = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
        expected = by_determinants(relevance[b, :n], features[b, :n], number)
        assert mask[b].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("keep", [2, 4, 7])
def test_more_tokens_than_dimensions_fill_up_by_index(keep: int) -> None:
    relevance, features, _ = draw(9, 9, channels=3)
    mask = cdpruner.select(relevance, features, keep)
    for b in range(2):
        assert mask[b].nonzero().flatten().tolist() == by_determinants(relevance[b], features[b], keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_a_kept_token_come_last(dtype: torch.dtype) -> None:
    different = torch.randn(4, 50).to(dtype)
    features = different[torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])][None]
    mask = cdpruner.select(torch.ones(1, 8, dtype=dtype), features, keep=4)
    assert mask[0].nonzero().flatten().tolist() == [0, 3, 5, 6]
    mask = cdpruner.select(torch.ones(1, 8, dtype=dtype), features, keep=6)
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6]


def test_tokens_that_are_all_alike_are_taken_by_relevance_then_by_index() -> None:
    features = torch.ones(2, 6, 5)
    relevance = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.9, 0.9, 0.2]])
    mask = cdpruner.select(relevance, features, keep=3)
    assert mask[0].tolist() == [True, True, True, False, False, False]
    assert mask[1].tolist() == [True, True, False, True, False, False]


def test_tokens_without_relevance_come_last() -> None:
    mask = cdpruner.select(torch.tensor([[0.0, 1.0, 0.0, 0.5]]), torch.randn(1, 4, 8), keep=3)
    assert mask[0].tolist() == [True, True, False, True]


def test_half_precision_is_computed_in_float32() -> None:
    relevance, features, _ = (x.bfloat16() if x.is_floating_point() else x for x in draw(20))
    mask = cdpruner.select(relevance, features, 0.4)
    assert torch.equal(mask, cdpruner.select(relevance.float(), features.float(), 0.4))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_refused_by_name(which: int) -> None:
    tensors = list(draw(6)[:2])
    tensors[which][0, 1] = NAN
    with pytest.raises(ValueError, match=("relevance", "features")[which] + " has NaN"):
        cdpruner.select(*tensors, keep=3)


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": True}, {"relevance": nn.Parameter(torch.ones(3))}])
def test_values_out_of_range_are_refused_at_construction(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CDPruner(**wrong)


def test_the_relevance_of_text_is_the_mean_cosine() -> None:
    features, text = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    there = torch.tensor([[True, True, False], [False, False, False]])
    found = cdpruner.text_relevance(features, text, there)
    for i in range(5):
        cosines = [torch.cosine_similarity(features[0, i], text[0, t], dim=0) for t in range(2)]
        assert torch.allclose(found[0, i], sum(cosines) / 2)
    assert torch.equal(found[1], torch.zeros(5, dtype=torch.float64))


def scaled(relevance: Tensor) -> Tensor:
    return (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)


def test_in_a_model_the_text_after_the_image_says_what_is_relevant() -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen = signals(model, inputs)
    mask, features = prune(model, inputs, CDPruner(keep=6))
    for b in range(2):
        image, text = seen.hidden[0][b][seen.image[b]], seen.hidden[0][b][seen.text[b]]
        relevance = torch.stack([torch.cosine_similarity(token[None], text).mean() for token in image])
        expected = by_determinants(scaled(relevance), image, 6)
        assert mask[b].nonzero().flatten().tolist() == expected
        assert torch.allclose(features[b], image[expected])


def test_the_choice_for_a_sample_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    scores = torch.rand(2, 16, dtype=torch.float64)
    scores[1] *= 100  # the minimum and maximum of the batch would be those of this sample
    mask, _ = prune(model, inputs, CDPruner(keep=6, relevance=lambda tokens: scores))
    alone = {k: v[:1] for k, v in inputs.items()}
    single, _ = prune(model, alone, CDPruner(keep=6, relevance=lambda tokens: scores[:1]))
    assert torch.equal(mask[:1], single)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(torch.rand(2, 5), r"relevance must be \[2, 16\]"), (torch.full((2, 16), NAN), "relevance has NaN")],
)
def test_a_function_that_gives_something_else_is_refused(scores: Tensor, message: str) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    with pytest.raises(ValueError, match=message):
        prune(model, inputs, CDPruner(relevance=lambda tokens: scores))


# a CLIP beside the model


@cache
def clip_tokenizer() -> Any:
    """Letters are tokens; a text is cut into windows of five, with two marks around."""
    letters = [letter + end for letter in ascii_lowercase for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return tf.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


@cache
def transformers_clip(patch: int = 4) -> Any:
    torch.manual_seed(3)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 54, "max_position_embeddings": 7, "eos_token_id": 53}
    vision = tiny.TOWER | {"image_size": 16, "patch_size": patch}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    return tf.CLIPModel(config).double().eval()


@cache
def open_clip_model() -> nn.Module:
    torch.manual_seed(4)
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 24, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=20, vision_cfg=vision, text_cfg=text).double().eval()


def ids_of(texts: list[str]) -> Tensor:
    """In the manner of open_clip's tokenizers: eight ids, cut off; the highest marks the end."""
    return torch.tensor([([ord(letter) - 32 for letter in text[:7]] + [99] + [0] * 8)[:8] for text in texts])


def by_hand(patches: Tensor, texts: Tensor) -> Tensor:
    """`[crops, patches]` of `[crops, patches, D]` and `[pieces, D]`."""
    return -torch.stack([torch.cosine_similarity(patches, text, dim=-1) for text in texts]).mean(0)


def of_transformers(model: Any, pixels: Tensor, text: str) -> Tensor:
    """By the layers themselves: the output of the last but one."""
    vision = model.vision_model
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers[:-1]:
        out = layer(x, attention_mask=None)
        x = out if isinstance(out, Tensor) else out[0]
    patches = model.visual_projection(vision.post_layernorm(x[:, 1:]))
    ids = clip_tokenizer()(text, add_special_tokens=False)["input_ids"]
    texts = []
    for start in range(0, len(ids), 5):
        window = torch.tensor([[52, *ids[start : start + 5], 53]])
        texts.append(model.text_projection(model.text_model(input_ids=window).pooler_output)[0])
    return by_hand(patches, torch.stack(texts))


def of_open_clip(model: Any, pixels: Tensor, text: str) -> Tensor:
    """By a hook on the last block but one."""
    seen: list[Tensor] = []
    handle = model.visual.transformer.resblocks[-2].register_forward_hook(lambda m, i, out: seen.append(out))
    model.encode_image(pixels)
    handle.remove()
    return by_hand(
        model.visual.ln_post(seen[0][:, 1:]) @ model.visual.proj, model.encode_text(ids_of([text]))
    )


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
@pytest.mark.parametrize("texts", ["is it red", ["a dog", "how many stars"]])
@torch.no_grad()
def test_a_clip_says_what_is_relevant(library: str, texts: str | list[str]) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen = signals(model, inputs)
    if library == "transformers":
        clip, tokenizer, expected_of = transformers_clip(), clip_tokenizer(), of_transformers
    else:
        clip, tokenizer, expected_of = open_clip_model(), ids_of, of_open_clip
    mask, _ = prune(model, inputs, CDPruner(keep=6, relevance=ClipRelevance(clip, tokenizer, texts)))
    for b in range(2):
        text = texts if isinstance(texts, str) else texts[b]
        relevance = expected_of(clip, inputs["pixel_values"], text)[b]
        expected = by_determinants(scaled(relevance), seen.hidden[0][b][seen.image[b]], 6)
        assert mask[b].nonzero().flatten().tolist() == expected


@torch.no_grad()
def test_beams_of_a_sample_are_asked_its_own_text() -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    relevance = ClipRelevance(transformers_clip(), clip_tokenizer(), ["a dog", "how many stars"])
    with CDPruner(keep=6, relevance=relevance)(model) as pruned:
        model.generate(**inputs, num_beams=2, max_new_tokens=1)
        [(_, beams)] = pruned.kept
        model(**inputs)
        [(_, rows)] = pruned.kept
    assert torch.equal(beams, rows.repeat_interleave(len(beams) // 2, 0))


def test_a_clip_that_cannot_be_used_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="text is empty"):
        ClipRelevance(transformers_clip(), clip_tokenizer(), "")
    with pytest.raises(NotImplementedError, match="a CLIP of type Linear"):
        ClipRelevance(nn.Linear(2, 2), clip_tokenizer(), "a dog")
    with pytest.raises(ValueError, match="use ClipRelevance"):
        CDPruner(relevance=transformers_clip())


@pytest.mark.parametrize(
    ("family", "patch", "texts", "error", "message"),
    [
        ("llava", 4, ["a", "b", "c"], ValueError, "3 texts for a batch of 2"),
        ("llava", 8, "a", NotImplementedError, "into 4 patches, the model's tower into 16"),
        ("qwen2_5_vl", 4, "a", NotImplementedError, "reads pixel values"),
    ],
)
def test_a_clip_that_does_not_fit_the_model_is_refused(
    family: str, patch: int, texts: Any, error: type[Exception], message: str
) -> None:
    model, inputs = tiny.make_model(family), tiny.make_inputs(family)
    relevance = ClipRelevance(transformers_clip(patch), clip_tokenizer(), texts)
    with torch.no_grad(), CDPruner(relevance=relevance)(model), pytest.raises(error, match=message):
        model(**inputs)
