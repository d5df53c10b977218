"""F-LMM's mask head: its features, its U-Net, its refiner, its files and what it finds."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from segment_anything import SamPredictor
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, interpolate, max_pool2d

from tests.multimodal.grounding.heatmaps.eager import NEW, TOLERANCE, case
from visionsel.boxes import mask_boxes
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm, load_mask_head, load_segmenter
from visionsel.embedded.mask_head import caption_spans, measure_mask_head, word_tokens
from visionsel.multimodal.families.family import View
from visionsel.multimodal.grounding import Replay, TokenGrid
from visionsel.multimodal.grounding.flmm_checkpoint import flmm_names, load_flmm_checkpoint
from visionsel.multimodal.grounding.mask_head import MaskHead, MaskHeadConfig, describe_model, to_pixels
from visionsel.multimodal.grounding.sam_refiner import SAMRefiner
from visionsel.multimodal.grounding.unet import UNet
from visionsel.multimodal.grounding.word_features import answer_replay, grid_maps, read_words, refer_replay
from visionsel.multimodal.prompts import chat_texts

SMALL = {"base": 4, "stages": 3, "min_side": 16}


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return load_lvlm()


def small_head(model: nn.Module, sam: nn.Module | None = None, **more: Any) -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(MaskHeadConfig(**describe_model(model), **{**SMALL, **more}), sam)


@pytest.mark.parametrize("row", ["token", "predict"])
def test_features_are_eager_attentions_and_hidden_states_gathered_plainly(lvlm, row) -> None:
    model, processor = lvlm
    scenes = list(ShapesWorld("balanced", seed=5, size=2))
    prompts, answers = (
        [CAPTION_PROMPT, "what color is the star?"],
        [scenes[0].captions[0], "a small red ring"],
    )
    images = [scene.image for scene in scenes]
    replay, _ = answer_replay(model, processor, images, prompts, answers)
    words = [[[0], [3, 1, 2]], [[2, 3]]]
    found = read_words(replay, words, row, hidden=True)
    merged = read_words(replay, words, row, merge="max")
    texts = chat_texts(processor, prompts, answers)
    model.set_attn_implementation("eager")
    try:
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            inputs = processor(images=image, text=text, return_tensors="pt")
            out = model(**inputs, output_attentions=True, output_hidden_states=True)
            ids = inputs["input_ids"][0].tolist()
            columns = [place for place, token in enumerate(ids) if token == model.config.image_token_id]
            begin = len(ids) - 1 - len(answers[number].split())  # the last token ends the answer
            for place, word in enumerate(words[number]):
                rows = [begin + token - int(row == "predict") for token in word]
                each = torch.cat([layer[0][:, rows][..., columns] for layer in out.attentions])
                same: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6}
                torch.testing.assert_close(found.attention[number][place], each.mean(1), **same)
                torch.testing.assert_close(merged.attention[number][place], each.amax(1), **same)
                states = torch.stack([state[0, rows] for state in out.hidden_states[1:]], 1)
                torch.testing.assert_close(found.hidden[number][place], states, rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation("sdpa")


def test_several_answers_of_a_sample_have_features_of_their_own() -> None:
    one = case("qwen2_5_vl")
    tokens = torch.randperm(80, generator=torch.Generator().manual_seed(4))[: 4 * NEW].view(4, NEW) + 2
    words = [[[0, 2]], [[1]], [], [[2], [0]]]
    found = read_words(Replay(one.model, one.inputs, tokens), words, hidden=True)
    for copy in (0, 1):
        alone = read_words(Replay(one.model, one.inputs, tokens[copy::2]), words[copy::2], hidden=True)
        for a, b in zip(found.attention[copy::2], alone.attention, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
        for mine, its in zip(found.hidden[copy::2], alone.hidden, strict=True):
            for a, b in zip(mine, its, strict=True):
                torch.testing.assert_close(a, b, **TOLERANCE)


def test_the_u_net_is_its_plain_restatement_on_a_grid_that_does_not_divide() -> None:
    torch.manual_seed(0)
    net = UNet(3, base=4, stages=2, convolutions=1, groups=2)
    maps = torch.rand(2, 3, 5, 7)
    state = {key: torch.rand_like(value) - 0.3 for key, value in net.state_dict().items()}
    net.load_state_dict(state)

    def block(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.0.weight"]
        x = conv2d(x, weight, padding=weight.shape[-1] // 2)
        return group_norm(x, 2, state[f"{name}.1.weight"], state[f"{name}.1.bias"]).relu()

    padded = torch.zeros(2, 3, 6, 8)
    padded[..., :5, :7] = maps
    fine = block(padded, "down.0.0")
    below = block(max_pool2d(fine, 2), "down.1.0")
    above = block(interpolate(below, (6, 8), mode="bilinear", align_corners=False), "up.0.enlarge")
    expected = block(torch.cat([fine, above], 1), "up.0.merge.0")[..., :5, :7]
    torch.testing.assert_close(net(maps), expected)


@pytest.mark.parametrize("size", [(1, 1), (5, 13), (24, 24), (70, 3)])
def test_masks_of_odd_grids_have_the_least_side_and_every_parameter_a_gradient(size) -> None:
    head = MaskHead(MaskHeadConfig(layers=2, heads=3, hidden=8, base=4))
    logits = head(torch.rand(2, 6, *size))
    scale = max(1, 64 / max(size))
    assert logits.shape == (2, *(round(side * scale) for side in size))
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_how_much_attention_the_image_gets_does_not_matter_map_by_map() -> None:
    head = MaskHead(MaskHeadConfig(layers=2, heads=3, hidden=8, **SMALL))
    maps = torch.rand(1, 6, 8, 8)
    factors = torch.tensor([1e-6, 0.1, 1, 3, 100, 1e4])[:, None, None]
    torch.testing.assert_close(head(maps * factors), head(maps), rtol=1e-4, atol=1e-5)
    maps[:, 2] = 0
    assert head(maps).isfinite().all()


def test_tiles_become_one_grid_and_the_coarse_one_is_enlarged_to_it() -> None:
    right = View("tile", torch.tensor([[4, 5], [6, 7]]), torch.empty(0), (4.0, 0.0, 8.0, 4.0))
    left = View("tile", torch.tensor([[0, 1], [2, 3]]), torch.empty(0), (0.0, 0.0, 4.0, 4.0))
    whole = View("thumbnail", torch.tensor([[8, 9]]), torch.empty(0), (0.0, 0.0, 8.0, 4.0))
    grid = TokenGrid(10, (4, 8), (right, left, whole), 0, 3)
    attention = torch.rand(2, 5, 13)
    own = attention[..., 3:]
    fine = own[..., [[0, 1, 4, 5], [2, 3, 6, 7]]]
    torch.testing.assert_close(grid_maps(attention, grid), fine)
    coarse = interpolate(own[..., 8:].view(2, 5, 1, 2), (2, 4), mode="bilinear")
    torch.testing.assert_close(grid_maps(attention, grid, views=2), torch.cat([coarse, fine], 1))
    with pytest.raises(ValueError, match="there is attention to 12 only"):
        grid_maps(attention[..., :12], grid)
    lost = TokenGrid(10, (4, 8), (right, View("tile", left.index, left.source, (0.0, 1.0, 4.0, 5.0))))
    with pytest.raises(NotImplementedError, match="do not lie in rows and columns"):
        grid_maps(attention, lost)


def test_logits_are_laid_on_the_pixels_and_what_is_not_shown_is_outside() -> None:
    index = torch.arange(4).view(2, 2)
    same = TokenGrid(4, (6, 6), (View("image", index, index, (0.0, 0.0, 6.0, 6.0)),))
    logits = torch.randn(3, 6, 6)
    torch.testing.assert_close(to_pixels(logits, same), logits)
    cropped = TokenGrid(4, (6, 10), (View("image", index, index, (2.0, 0.0, 8.0, 6.0)),))
    logits[0] = 3.0
    laid = to_pixels(logits, cropped)
    torch.testing.assert_close(laid[..., 2:8], logits)
    for outside in (laid[..., :2], laid[..., 8:]):
        floor = logits.amin((1, 2)).clamp(max=-1)[:, None, None]
        torch.testing.assert_close(outside, floor.expand_as(outside))


def test_the_refiner_without_words_of_its_own_is_the_single_mask_of_sam(lvlm) -> None:
    sam = load_segmenter()
    scenes = list(ShapesWorld("balanced", seed=5, size=2))
    refiner = SAMRefiner(sam, layers=2, hidden=8)
    embeddings, canvases = refiner.encode([scene.image for scene in scenes])
    assert canvases[0].inside == (64, 64)
    predictor = SamPredictor(sam)
    owners, boxes = torch.tensor([1, 0, 1]), torch.tensor([[3, 4, 20, 30], [8.0, 2, 50, 40], [0, 0, 64, 64]])
    masks = torch.randn(3, 64, 64)
    text = [torch.randn(2, 2, 8), torch.randn(1, 2, 8), torch.randn(2, 2, 8)]
    with torch.no_grad():
        refiner.text_layer_weights.copy_(torch.tensor([0.3, -1.0]))
        found = refiner(embeddings, owners, masks, boxes, text)
        shares = torch.tensor([0.3, -1.0]).softmax(0)
        for number, owner in enumerate(owners.tolist()):
            predictor.set_image(scenes[owner].pixels)
            part = slice(number, number + 1)
            sparse, dense = sam.prompt_encoder(points=None, boxes=boxes[part], masks=masks[part, None])
            mixed = shares[0] * text[number][:, 0] + shares[1] * text[number][:, 1]
            said = mixed @ refiner.text_proj.weight.T + refiner.text_proj.bias
            expected, _ = sam.mask_decoder(
                image_embeddings=predictor.features,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=torch.cat([sparse, said[None]], 1),
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            torch.testing.assert_close(found[part], expected[0], rtol=1e-4, atol=1e-4)


def test_boxes_hold_their_masks_and_an_empty_mask_has_the_whole_image() -> None:
    masks = torch.zeros(2, 6, 9, dtype=torch.bool)
    masks[0, 2:5, 3] = True
    assert mask_boxes(masks).tolist() == [[3, 2, 4, 5], [0, 0, 9, 6]]


def authors_state(channels: int, base: int, stages: int, sam: nn.Module, layers: int, hidden: int) -> dict:
    """Random weights under the names of mmsegmentation's UNet and of F-LMM, with their shapes."""
    shapes: dict[str, list[int]] = {}

    def module(name: str, inner: int, outer: int, side: int) -> None:
        shapes[f"{name}.conv.weight"] = [outer, inner, side, side]
        shapes[f"{name}.gn.weight"] = shapes[f"{name}.gn.bias"] = [outer]

    for stage in range(stages):
        width = base * 2**stage
        first = channels if stage == 0 else width // 2
        place = f"mask_head.encoder.{stage}.{0 if stage == 0 else 1}"
        module(f"{place}.convs.0", first, width, 3)
        module(f"{place}.convs.1", width, width, 3)
        if stage < stages - 1:
            module(f"mask_head.decoder.{stage}.upsample.interp_upsample.1", 2 * width, width, 1)
            module(f"mask_head.decoder.{stage}.conv_block.convs.0", 2 * width, width, 3)
            module(f"mask_head.decoder.{stage}.conv_block.convs.1", width, width, 3)
    shapes |= {"mask_head.conv_seg.weight": [1, base, 1, 1], "mask_head.conv_seg.bias": [1]}
    shapes |= {"text_proj.weight": [64, hidden], "text_proj.bias": [64], "text_layer_weights": [layers]}
    for part in ("prompt_encoder", "mask_decoder"):
        for key, value in getattr(sam, part).state_dict().items():
            shapes[f"sam.model.{part}.{key}"] = list(value.shape)
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def test_the_authors_layout_is_read_to_the_last_weight_and_nothing_else_is(lvlm, tmp_path) -> None:
    sam = load_segmenter()
    head = small_head(lvlm[0], sam)
    state = authors_state(16, 4, 3, sam, 4, 128)
    path = tmp_path / "flmm.pth"
    torch.save({"state_dict": state}, path)
    load_flmm_checkpoint(head, path)
    own = head.state_dict()
    assert len(own) == len(state)
    for key, name in (flmm_names(head) | {"out.weight": "mask_head.conv_seg.weight"}).items():
        assert torch.equal(own[key], state[name]), key
    assert torch.equal(own["unet.down.1.0.1.bias"], state["mask_head.encoder.1.1.convs.0.gn.bias"])
    place = "mask_head.decoder.1.upsample.interp_upsample.1.conv.weight"
    assert torch.equal(own["unet.up.1.enlarge.0.weight"], state[place])

    buffer = next(name for name in state if name.endswith("positional_encoding_gaussian_matrix"))
    load_flmm_checkpoint(head, {name: value for name, value in state.items() if name != buffer})
    wrong: list[tuple[Callable[[dict], Any], str]] = [
        (lambda s: s.update({"llm.layers.0.weight": torch.zeros(1)}), "has 1 weights that this head lacks"),
        (lambda s: s.update({"mask_head.extra.weight": torch.zeros(1)}), "this head lacks"),
        (lambda s: s.pop("text_proj.bias"), "lacks 1 weights, such as text_proj.bias"),
        (lambda s: s.pop("mask_head.conv_seg.bias"), "lacks 1 weights"),
        (lambda s: s.update({"text_layer_weights": torch.zeros(3)}), "another language model"),
    ]
    for change, message in wrong:
        changed = dict(state)
        change(changed)
        with pytest.raises(ValueError, match=message):
            load_flmm_checkpoint(head, changed)
        assert all(torch.equal(value, own[key]) for key, value in head.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_flmm_checkpoint(head, tmp_path / "nothing.pth")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no file of weights"):
        load_flmm_checkpoint(head, path)


def test_a_saved_head_is_the_same_with_and_without_its_refiner(lvlm, tmp_path) -> None:
    sam = load_segmenter()
    head = small_head(lvlm[0], sam, row="predict", merge="max")
    head.save_pretrained(tmp_path)
    loaded = MaskHead.from_pretrained(tmp_path, sam)
    assert loaded.config == head.config
    for key, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    alone = MaskHead.from_pretrained(tmp_path)
    assert alone.refiner is None
    maps = torch.rand(1, 16, 8, 8)
    assert torch.equal(alone(maps), head(maps))
    head.save_pretrained(tmp_path / "half", half=True)
    torch.testing.assert_close(
        MaskHead.from_pretrained(tmp_path / "half")(maps), head(maps), rtol=0.1, atol=0.1
    )

    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="no refiner, so it takes no sam"):
        MaskHead.from_pretrained(tmp_path / "alone", sam)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change in ({"base": 8}, {"width": 3}, {"row": "last"}):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match="holds no mask head that fits"):
            MaskHead.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        MaskHead.from_pretrained(tmp_path / "nowhere")


def test_bad_input_is_named(lvlm) -> None:
    model, processor = lvlm
    [scene] = ShapesWorld("balanced", seed=5, size=1)
    head = small_head(model)
    replay, grids = answer_replay(model, processor, [scene.image], [CAPTION_PROMPT], ["a red ring"])
    for words, message in (
        ([[]], "no answer has a word"),
        ([[[0]], [[0]]], "words for 2 answers"),
        ([[[]]], "a word without tokens"),
        ([[[7]]], "has 4 tokens, 0 to 3; a word has token 7"),
    ):
        with pytest.raises(ValueError, match=message):
            head.predict(replay, words, grids)
    with pytest.raises(ValueError, match="this head has no refiner"):
        head.predict(replay, [[[0]]], grids, [scene.image])
    with pytest.raises(ValueError, match="0 grids for 1 answers"):
        head.predict(replay, [[[0]]], [])
    with pytest.raises(ValueError, match="made for a model with 4 layers of 4 heads"):
        head(torch.rand(1, 12, 8, 8))
    with pytest.raises(ValueError, match="answer 0 has no tokens"):
        answer_replay(model, processor, [scene.image], [CAPTION_PROMPT], [""])
    with pytest.raises(ValueError, match="expression 0 is empty"):
        refer_replay(model, processor, [scene.image], [" "], "locate {}.")
    blind = Replay(model, processor.tokenizer("<s><user>is there", return_tensors="pt"), torch.tensor([[20]]))
    with pytest.raises(ValueError, match="no tokens of images"):
        head.predict(blind, [[[0]]], grids)


def test_the_shipped_head_masks_expressions_and_words_of_unseen_scenes(lvlm) -> None:
    model, processor = lvlm
    head = load_mask_head()
    scenes = list(ShapesWorld("balanced", seed=31, size=5))
    measured = measure_mask_head(head, model, processor, scenes)
    assert measured["refer_iou"] > 0.7, measured
    assert measured["refer_iou"] > measured["refer_iou_coarse"] > 0.4, measured
    assert measured["caption_iou"] > 0.6, measured


def test_an_answer_without_words_has_no_masks_and_the_others_have_theirs(lvlm) -> None:
    model, processor = lvlm
    scenes = list(ShapesWorld("balanced", seed=31, size=2))
    images = [scene.image for scene in scenes]
    captions = [scene.captions[0] for scene in scenes]
    replay, grids = answer_replay(model, processor, images, [CAPTION_PROMPT] * 2, captions)
    spans = [[], caption_spans(scenes[1])]
    words = word_tokens(processor, replay, spans)
    assert [[len(word) for word in chosen] for chosen in words] == [[], [3] * len(scenes[1].objects)]
    head = load_mask_head()
    for given in (None, images):
        none, some = head.predict(replay, words, grids, given)
        assert none.shape == (0, 64, 64)
        assert some.shape == (len(scenes[1].objects), 64, 64)
        one, grid = answer_replay(model, processor, images[1:], [CAPTION_PROMPT], captions[1:])
        [alone] = head.predict(one, words[1:], grid, None if given is None else images[1:])
        torch.testing.assert_close(some, alone, rtol=1e-3, atol=1e-3)
