"""`Grounder` on the small models of the package: what it does is what its parts do, and it finds things."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from tests.multimodal.families.ramps import tokenizer
from tests.multimodal.families.test_internvl import image_processor
from tests.multimodal.tiny import make_model
from visionsel.data.shapes import SHAPES, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal import AttentionRecorder, Grounder, TokenGrid, build_segmenter
from visionsel.multimodal.grounding.detect import ask_questions, quarters, suppress
from visionsel.multimodal.grounding.heatmaps import Mean
from visionsel.multimodal.grounding.mask_head import MaskHead, MaskHeadConfig, describe_model
from visionsel.multimodal.grounding.promac import fade, nearest_to_mean, promac
from visionsel.multimodal.grounding.prompts import sample_prompt
from visionsel.multimodal.grounding.reading import open_upright
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.prompts import chat_inputs, user_turn

DESCRIBE = "describe the image."


@pytest.fixture(scope="module")
def lvlm() -> Any:
    return load_lvlm()


@pytest.fixture(scope="module")
def segmenter() -> Any:
    return build_segmenter("embedded")


@pytest.fixture
def predictions(segmenter: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many prompts each call of the segmenter had."""
    seen: list[int] = []
    predict = segmenter.predict

    def counted(**given: Any) -> Any:
        answer = predict(**given)
        seen.append(len(answer))
        return answer

    monkeypatch.setattr(segmenter, "predict", counted)
    return seen


def scene(index: int = 1) -> Any:
    return ShapesWorld("balanced", 5, 10)[index]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def test_a_word_has_the_attention_of_its_tokens_and_the_mask_of_its_peak(
    lvlm, segmenter, predictions
) -> None:
    model, processor = lvlm
    image = scene().image
    grounder = Grounder(model, processor, segmenter, Mean(layers=(2,)), refine=(), names=SHAPES)
    result = grounder.ask(image, DESCRIBE)
    assert predictions == []  # nothing is segmented before it is asked for

    inputs = chat_inputs(processor, [[user_turn(DESCRIBE)]], [[image]])
    with AttentionRecorder(model, layers=[2]) as recorder, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        logits = model(**inputs | {"input_ids": out, "attention_mask": torch.ones_like(out)}).logits
    said = out[:, inputs["input_ids"].shape[1] :]
    assert result.answer == processor.batch_decode(said, skip_special_tokens=True)[0]
    grid = TokenGrid.from_inputs(model, processor, inputs, image_size=(64, 64))
    maps = grid.rasterize(recorder.attentions[0, 0].mean(0)).numpy()
    probs = logits[0, inputs["input_ids"].shape[1] - 1 : -1].softmax(-1).gather(1, said[0][:, None])[:, 0]
    assert len(result.words) == said.shape[1] - 1  # a token is a word here, and the last ends the answer
    for number, word in enumerate(result.words):
        assert result.answer[slice(*word.span)] == word.text
        assert word.prob == pytest.approx(float(probs[number]), abs=1e-5)
        np.testing.assert_allclose(word.heatmap, maps[number], atol=1e-6)

    assert [word.text for word in result.objects] == [word.text for word in result.words if word.name]
    assert {word.name for word in result.objects} <= set(SHAPES)
    first = result.objects[0]
    prompt = sample_prompt(first.heatmap)
    assert prompt is not None
    best = segmenter.set_image(image).predict(points=prompt.points[None], labels=prompt.labels[None])
    assert (first.mask == best.best()[0].numpy()).all()
    assert first.points.tolist() == prompt.points.tolist()
    assert first.score == pytest.approx(float(best.iou.max()) * first.prob, abs=1e-5)
    assert all(word.mask.shape == (64, 64) for word in result.words)
    others = len(result.words) - len(result.objects)
    assert sorted(predictions) == sorted([1, len(result.objects), others])  # one for each kind, and ours


@pytest.mark.parametrize("heatmap", ["vl_sam", "mean"])
def test_expressions_are_found_far_more_often_than_by_chance(lvlm, segmenter, heatmap: str) -> None:
    pairs = [(s, e) for s in (scene(n) for n in range(6)) for e in s.expressions[:3]]
    truth = [s.objects[e.object].mask for s, e in pairs]
    grounder = Grounder(*lvlm, segmenter, heatmap)
    words = grounder.refer_many([s.image for s, _ in pairs], [e.text for _, e in pairs])
    assert np.mean([iou(word.mask, mask) for word, mask in zip(words, truth, strict=True)]) >= 0.6
    rng, random = np.random.default_rng(0), []
    for (s, _), mask in zip(pairs, truth, strict=True):
        segmenter.set_image(s.image)
        guesses = segmenter.predict(points=rng.uniform(0, 64, (8, 1, 2)), labels=np.ones((8, 1))).best()
        random.append(np.mean([iou(guess, mask) for guess in guesses.numpy()]))
    assert np.mean(random) < 0.3
    alone = grounder.refer(pairs[4][0].image, pairs[4][1].text)
    assert iou(alone.mask, words[4].mask) > 0.99  # sums in another order
    assert alone.prob == pytest.approx(words[4].prob, abs=1e-4)


def test_an_expression_can_be_read_as_an_answer_instead_of_asked_about(lvlm) -> None:
    model, processor = lvlm
    image, texts = scene().image, ["the small red heart", "a ring"]
    method = Mean(layers=(0, 1), row="token")
    grounder = Grounder(model, processor, None, method, refer_prompt=None, merge="max")
    found = grounder.refer_many([image, image], texts)
    for word, text in zip(found, texts, strict=True):
        inputs = chat_inputs(processor, [[user_turn(DESCRIBE)]], [[image]])
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        replay = Replay(model, inputs, ids)
        grid = TokenGrid.from_inputs(model, processor, inputs, image_size=(64, 64))
        expected = grid.rasterize(method(replay)[0].amax(0)).numpy()
        np.testing.assert_allclose(word.heatmap, expected, atol=1e-6)
        logits = replay.run(logits=True).logits
        assert logits is not None
        chosen = logits[0].log_softmax(-1).gather(1, ids[0][:, None])
        assert word.prob == pytest.approx(float(chosen.mean().exp()), abs=1e-5)


def test_refinement_asks_the_segmenter_with_its_own_mask_and_inside_of_it(
    lvlm, segmenter, predictions
) -> None:
    sample = scene()
    text = sample.expressions[0].text
    plain = Grounder(*lvlm, segmenter, "mean", refine=()).refer(sample.image, text)
    assert plain.proposal is not None
    assert predictions == [1]
    rounds = Grounder(*lvlm, segmenter, "mean").refer(sample.image, text)
    assert rounds.proposal is not None
    assert predictions == [1, 1, 1, 1]
    assert rounds.proposal.iou >= plain.proposal.iou  # the best of three, of which this is the first


def test_the_whole_scene_is_detected_and_nothing_twice(lvlm, segmenter) -> None:
    sample = scene(0)
    grounder = Grounder(*lvlm, segmenter, "mean", names=SHAPES)
    result = grounder.detect(sample.image, DESCRIBE)
    found = {word.name for word in result.words if word.score > 0.5}
    assert len(found & {o.shape for o in sample.objects}) >= len({o.shape for o in sample.objects}) - 1
    scores = [word.score for word in result.words]
    assert scores == sorted(scores, reverse=True)
    assert suppress(result.words, grounder.nms) == result.words
    assert len(result.to_coco(3, {name: n for n, name in enumerate(SHAPES)})) == len(result.words)
    only = grounder.detect(sample.image, [DESCRIBE], crops=False)
    assert all(word.window == (0, 0, 64, 64) for word in only.words)


def test_quarters_cover_the_image_and_small_ones_are_left_out() -> None:
    assert quarters(65, 40) == [(0, 0, 33, 20), (32, 0, 65, 20), (0, 20, 33, 40), (32, 20, 65, 40)]
    assert quarters(200, 30) == []


def test_the_model_can_write_the_questions() -> None:
    class Said:
        answer = '1. What is there?\n2) "Which animals are here?"\n- What is there?\nno question\nWhy?'

    assert ask_questions(lambda images, prompts: [Said()], scene().image) == [  # type: ignore[list-item]
        "What is there?",
        "Which animals are here?",
    ]
    Said.answer = "a dog"
    with pytest.raises(ValueError, match="the model wrote no questions but 'a dog'"):
        ask_questions(lambda images, prompts: [Said()], scene().image)  # type: ignore[list-item]


def test_promac_fades_what_is_outside_and_takes_the_mask_nearest_to_the_mean(lvlm, segmenter) -> None:
    sample, seen = scene(), []
    plain = Grounder(*lvlm, segmenter, "mean", refine=())

    def refer(shown: Image.Image, text: str, image: Image.Image) -> Any:
        seen.append(np.asarray(shown, dtype=float))
        assert image is sample.image or np.array_equal(np.asarray(image), sample.pixels)
        return plain.refer(shown, text)

    text = sample.expressions[0].text
    word = promac(refer, sample.image, text, rounds=2)
    first = plain.refer(sample.image, text)
    soft = 1 / (1 + np.exp(-first.proposal.logits()))  # type: ignore[union-attr]
    original = sample.pixels.astype(float)
    assert np.abs(seen[1] - (0.3 * original * soft[..., None] + 0.7 * original)).max() <= 0.51
    assert fade(np.full((1, 1, 3), 10.0), np.full((1, 1, 3), 20.0), np.full((1, 1), 0.5))[0, 0, 0] == 15.5
    assert nearest_to_mean([np.zeros(3), np.full(3, 0.4), np.ones(3)]) == 1
    assert iou(word.mask, sample.objects[sample.expressions[0].object].mask) > 0.6
    cycle = Grounder(*lvlm, segmenter, "mean", refine="promac")
    assert iou(cycle.refer(sample.image, text).mask, word.mask) > 0.6
    with pytest.raises(NotImplementedError, match="use it with refer, not with ask"):
        cycle.ask(sample.image, DESCRIBE)


def turned(image: Image.Image) -> Image.Image:
    """The image lying on its side, with EXIF data that say so."""
    side = image.transpose(Image.Transpose.ROTATE_90)
    side.getexif()[0x0112] = 6
    return side


def test_images_of_every_kind_are_upright_rgb(tmp_path) -> None:
    image = scene().image.crop((0, 0, 60, 40))
    turned(image).save(tmp_path / "side.png", exif=turned(image).getexif())
    assert open_upright(tmp_path / "side.png").size == (60, 40)
    for other in (turned(image), np.asarray(image), str(tmp_path / "side.png")):
        assert (np.asarray(open_upright(other)) == np.asarray(image)).all()
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(open_upright(clear)) == 255).all()
    for mode in ("L", "1", "P", "LA", "CMYK"):
        assert open_upright(image.convert(mode)).mode == "RGB"
    for bad, error, message in (
        (image.convert("I"), TypeError, "more than 8 bits"),
        (3, TypeError, "the image is a int; expected a file"),
        (np.zeros((2, 2, 3)), TypeError, "array of float64"),
        (np.zeros((2, 2, 5), dtype=np.uint8), ValueError, r"shape \[2, 2, 5\]"),
        (tmp_path / "none.png", FileNotFoundError, "there is no image"),
    ):
        with pytest.raises(error, match=message):
            open_upright(bad)


def test_odd_images_give_results_of_their_size_or_say_what_is_wrong(lvlm, segmenter) -> None:
    grounder = Grounder(*lvlm, segmenter, "mean", names=SHAPES)
    for image in (
        Image.new("RGB", (1, 1), "red"),
        Image.new("L", (3, 2), 100),
        scene().image.convert("RGBA").resize((40, 90)),
    ):
        result = grounder.ask(image, DESCRIBE, max_new_tokens=4)
        assert result.words
        for word in result.words:
            assert word.heatmap.shape == word.mask.shape == image.size[::-1]
            assert 0 <= word.score <= 1
    assert len(grounder.detect(Image.new("RGB", (1, 1)), DESCRIBE, max_new_tokens=4).words) < 3
    thin = grounder.ask(Image.new("RGB", (8000, 50), "blue"), DESCRIBE, max_new_tokens=2).words[0]
    assert thin.heatmap.shape == (50, 8000)
    with pytest.raises(ValueError, match="crop it to a shape of at most 128 to 1"):
        _ = thin.mask


def test_an_answer_without_objects_or_words_is_no_error(lvlm, segmenter) -> None:
    grounder = Grounder(*lvlm, segmenter, "mean")
    absent = next(shape for shape in SHAPES if shape not in {o.shape for o in scene().objects})
    result = grounder.ask(scene().image, f"is there a {absent} in the image?")
    assert result.answer in ("yes", "no")
    assert result.objects == []
    assert result.to_coco() == []
    assert result.words[0].heatmap.max() > 0
    end = lvlm[1].tokenizer.eos_token_id
    nothing = grounder.ask(scene().image, DESCRIBE, max_new_tokens=1, forced_eos_token_id=end)
    assert (nothing.answer, nothing.words) == ("", [])
    word = grounder.refer(scene().image, "the star", max_new_tokens=1, forced_eos_token_id=end)
    assert (word.box, word.score, word.prob) == (None, 0, 0)


# the processor of transformers 5.17 under numpy 2
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_tiles_batches_and_beams_of_another_family_are_grounded(segmenter) -> None:
    words = [f"w{number}" for number in range(94)]
    special = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    processor = tf.InternVLProcessor(
        image_processor(),
        tokenizer(words, **special),
        tf.InternVLVideoProcessor(),
        image_seq_length=16,
        chat_template=None,
    )
    model = make_model("internvl").float()
    grounder = Grounder(model, processor, segmenter, "vl_sam", names=words)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, size, dtype=np.uint8) for size in ((50, 120, 3), (70, 40, 3))]
    found = grounder.refer_many(images, ["w3", "w4 w5"], max_new_tokens=3, num_beams=2)
    assert [word.heatmap.shape for word in found] == [(50, 120), (70, 40)]
    assert [word.mask.shape for word in found] == [(50, 120), (70, 40)]
    alone = grounder.refer(images[1], "w4 w5", max_new_tokens=3, num_beams=2)
    np.testing.assert_allclose(found[1].heatmap, alone.heatmap, rtol=1e-3, atol=1e-7)


def test_a_mask_head_makes_the_masks_by_itself(lvlm) -> None:
    model, processor = lvlm
    torch.manual_seed(0)
    head = MaskHead(MaskHeadConfig(**describe_model(model), base=4, min_side=16)).eval()
    grounder = Grounder(model, processor, None, head)
    word = grounder.refer(scene().image, "the star")
    reading = grounder._read([scene().image], ["locate the star."], max_new_tokens=32)[0]
    logits = head.predict(reading.batch.replay, [[reading.written]], [reading.grid])[0][0]
    assert (word.mask == (logits > 0).numpy()).all()
    np.testing.assert_allclose(word.heatmap, logits.sigmoid().numpy(), atol=1e-6)
    result = grounder.ask(scene().image, DESCRIBE, max_new_tokens=6)
    assert [word.mask.shape for word in result.words] == [(64, 64)] * len(result.words)
    with pytest.raises(ValueError, match="a mask head has its own"):
        Grounder(model, processor, None, head, refine="mask")


def test_what_cannot_be_is_refused(lvlm, segmenter) -> None:
    for more, message in (
        ({"heatmap": "means"}, "no method is called 'means'"),
        ({"refine": "twice"}, "refine knows mask, resample, promac; got 'twice'"),
        ({"threshold": 2}, 'threshold is "otsu" or a share'),
        ({"prompts": "point"}, "prompts must be one of points, box"),
        ({"merge": "sum"}, "merge must be one of mean, max"),
        ({"prob": "max"}, "the product or the mean of its tokens'"),
        ({"refer_prompt": "where is it?"}, "refer_prompt needs {} where the expression goes"),
        ({"nms": 2}, "nms is an IoU from 0 to 1"),
        ({"batch_size": 0}, "batch_size is 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Grounder(*lvlm, segmenter, **{"heatmap": "mean", **more})
    with pytest.raises(TypeError, match="call it first to make one"):
        Grounder(*lvlm, segmenter, Mean)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="segmenter is a int"):
        Grounder(*lvlm, 3, "mean")  # type: ignore[arg-type]
    grounder = Grounder(*lvlm, None, "mean")
    word = grounder.refer(scene().image, "the star")
    assert word.heatmap.max() > 0
    with pytest.raises(RuntimeError, match="no segmenter, so it has heatmaps but no masks"):
        _ = word.mask
    with pytest.raises(ValueError, match="the expression is ' '"):
        grounder.refer(scene().image, " ")
    with pytest.raises(ValueError, match="the question is ''"):
        grounder.ask(scene().image, "")
    with pytest.raises(ValueError, match="one expression for each image, got 1 images"):
        grounder.refer_many([scene().image], ["a", "b"])
    with pytest.raises(ValueError, match="num_return_sequences=2: one answer is read"):
        grounder.ask(scene().image, DESCRIBE, num_return_sequences=2, num_beams=2)
    with pytest.raises(ValueError, match="detect needs at least one question"):
        grounder.detect(scene().image, [])
