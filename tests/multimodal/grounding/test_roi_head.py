"""SD-RPN: copies compute what the model computes, targets and regions follow the paper's rules."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from tests.multimodal.runs import tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import END, FAMILIES, IMAGE, START, make_inputs, make_model
from visionsel.embedded import load_lvlm
from visionsel.multimodal import FastV
from visionsel.multimodal.families import find_family
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.roi_head import RoIHead, read_prompt
from visionsel.multimodal.grounding.roi_labels import (
    IGNORED,
    AttentionSinks,
    answer_attention,
    attention_labels,
    pseudo_labels,
    roi_loss,
)
from visionsel.multimodal.grounding.roi_regions import (
    crop_regions,
    find_regions,
    propose_regions,
    requery,
)
from visionsel.multimodal.prompts import chat_inputs, user_turn

TOLERANCE = 1e-10  # float64: sums in another order
FIRST = {"qwen3_vl": 2}  # below, image features are added
SUPPORTED = [name for name in FAMILIES if name != "gemma3"]


def inputs_of(name: str) -> dict[str, Any]:
    """Left padded, the first sample with two images."""
    return make_inputs(name, images=(2, 1))


def states_of(model: Any, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """The hidden states `[B, L, C]` that enter each decoder layer, of the prompt alone."""
    seen: dict[int, Tensor] = {}
    layers = find_family(model).decoder(model).layers
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen.update(
                {number: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad():
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        positions = positions + (model.config.model_type == "paligemma")  # as its generate() does
        model.model(**inputs, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_untrained_copy_computes_what_the_models_own_layers_compute(name: str) -> None:
    model, inputs = tiny(name), inputs_of(name)
    start = FIRST.get(name, 1)
    number = 4 - start
    expected = states_of(model, inputs)
    before = everything_on(model)
    head = RoIHead(model, start, number)
    replay = read_prompt(model, inputs)
    ran: list[int] = []
    layers = find_family(model).decoder(model).layers
    handle = layers[start].mlp.register_forward_hook(lambda *_: ran.append(start))
    hidden, arguments = head.enter(replay)
    handle.remove()
    assert not ran  # the frozen model stops below the layers that are copied
    assert everything_on(model) == before
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[:, :length][real], expected[start][real], rtol=0, atol=TOLERANCE)
    hidden, arguments = head.go_on(hidden, arguments)
    torch.testing.assert_close(hidden[:, :length][real], expected[3][real], rtol=0, atol=TOLERANCE)

    # without positions, queries and keys are plain projections, and the map is their mean product
    layer: Any = layers[3]
    with torch.no_grad():
        inner = layer.input_layernorm(expected[3])
        query = layer.self_attn.q_proj(inner).unflatten(-1, (4, -1))
        key = layer.self_attn.k_proj(inner).unflatten(-1, (2, -1))
        if name == "qwen3_vl":
            query, key = layer.self_attn.q_norm(query), layer.self_attn.k_norm(key)
        logits = head(replay)
    key = key.repeat_interleave(2, 2)
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE).nonzero()[:, 0]
        wanted = torch.einsum("hd,nhd->nh", query[row, -1], key[row, places]).mean(1)
        wanted = wanted * query.shape[-1] ** -0.5
        atol = 1e-5 * float(wanted.abs().max())  # the head gives float32
        torch.testing.assert_close(logits[row, : len(places)].double(), wanted, rtol=1e-5, atol=atol)
        assert not logits[row, len(places) :].any()


def test_with_positions_the_last_copy_asks_as_the_models_layer_does() -> None:
    model, inputs = tiny("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    head, seen = RoIHead(model, 1, 3), []
    replay = read_prompt(model, inputs)
    replay.run({3: seen.append})
    query, key, scale = head.queries_and_keys(*head.go_on(*head.enter(replay)), positions=True)
    real = replay.scope.real
    for own, wanted in ((query, seen[0].query), (key, seen[0].key)):
        own, wanted = own.transpose(1, 2)[real], wanted.transpose(1, 2)[real]
        torch.testing.assert_close(own, wanted, rtol=0, atol=TOLERANCE)
    assert scale == seen[0].scale


def test_the_head_learns_and_the_model_does_not(tmp_path: Any) -> None:
    model, inputs = make_model("llava", dtype=torch.float32), make_inputs("llava", dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    head = RoIHead(model, 1, 2)
    logits = head(read_prompt(model, inputs))
    assert logits.shape == (2, 16)
    roi_loss(logits, torch.tensor([[1, 0] * 8, [IGNORED] * 16])).backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
    frozen = {name for name, p in head.named_parameters() if not p.requires_grad}
    assert frozen == {"attention.v_proj.weight", "attention.o_proj.weight"}
    torch.optim.SGD([p for p in head.parameters() if p.requires_grad], 0.1).step()
    trained = head(read_prompt(model, inputs)).detach()
    assert not torch.allclose(trained, logits.detach(), atol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    head.save(tmp_path / "head")
    again = RoIHead.load(tmp_path / "head", model)
    assert not again.training
    assert torch.equal(again(read_prompt(model, inputs)), trained)
    content = json.loads((tmp_path / "head" / "config.json").read_text())
    assert content["copied"] == ["model.language_model.layers.1", "model.language_model.layers.2"]
    with pytest.raises(ValueError, match=r"was made of llava .* this is llava_next "):
        RoIHead.load(tmp_path / "head", tiny("llava_next"))
    with pytest.raises(ValueError, match="this head was made of llava "):
        head(read_prompt(tiny("llava_next"), make_inputs("llava_next")))
    (tmp_path / "head" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no RoIHead"):
        RoIHead.load(tmp_path / "head", model)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        RoIHead.load(tmp_path / "nowhere", model)


def test_a_half_precision_model_and_another_kernel_get_a_head_that_follows() -> None:
    model, inputs = make_model("llava", dtype=torch.bfloat16), make_inputs("llava", dtype=torch.bfloat16)
    head = RoIHead(model, 1, 2).float()
    first = head(read_prompt(model, inputs))
    model.set_attn_implementation("eager")
    assert head.layers[0].self_attn.config is model.model.language_model.layers[1].self_attn.config
    torch.testing.assert_close(head(read_prompt(model, inputs)), first, rtol=0, atol=0.1)  # of bfloat16


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="full_attention, sliding_attention"):
        RoIHead(tiny("gemma3"), 1, 2)
    with pytest.raises(NotImplementedError, match="choose start from 2 up"):
        RoIHead(tiny("qwen3_vl"), 1, 2)
    model = tiny("llava")
    with pytest.raises(ValueError, match="layers 0 to 3"):
        RoIHead(model, 2, 3)
    with pytest.raises(ValueError, match="number must be in 1 to 4"):
        RoIHead(model, 0, 5)
    head = RoIHead(model)
    assert (head.start, head.number) == (1, 3)
    with FastV(keep=0.5, layer=1)(model), pytest.raises(ValueError, match="a context is open"):
        RoIHead(model)
    inputs = make_inputs("llava")
    with pytest.raises(NotImplementedError, match="several answers"):
        head(Replay(model, inputs, torch.ones(4, 1, dtype=torch.long) * 5))


def test_labels_are_those_of_a_map_worked_out_by_hand() -> None:
    attention = torch.tensor(
        [
            [0.00, 0.00, 0.00, 0.00, 0.05, 0.00],
            [0.00, 1.00, 0.15, 0.00, 0.00, 0.00],
            [0.00, 0.20, 0.00, 0.00, 0.00, 0.30],
            [0.00, 0.00, 0.00, 0.00, 0.12, 0.00],
            [0.00, 0.00, 0.00, 0.00, 0.10, 0.00],
            [9.00, 0.00, 0.00, 0.00, 0.00, 0.00],
        ]
    )
    sinks = torch.zeros(6, 6, dtype=torch.bool)
    sinks[5, 0] = sinks[2, 5] = True
    x = IGNORED
    # foreground: 1.00 and 0.20; its box, one cell wider, is rows 0-3 and columns 0-2
    expected = [
        [x, x, x, 0, 0, 0],
        [x, 1, x, 0, 0, 0],
        [x, 1, x, 0, 0, 0],
        [x, x, x, 0, x, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert pseudo_labels(attention, sinks).tolist() == expected
    # with its sinks, the map has its peak at 9, and nothing else reaches a fifth of it
    found = pseudo_labels(attention)
    assert found[5, 0] == 1
    assert (found == 1).sum() == 1
    assert found[1, 1] == x  # between a tenth and a fifth
    both = pseudo_labels(torch.stack([attention, torch.zeros(6, 6)]), torch.stack([sinks, sinks]))
    assert both[0].tolist() == expected
    assert (both[1] == x).all()  # nothing is looked at
    assert (pseudo_labels(attention, sinks, largest=12 / 36) == x).all()
    with pytest.raises(ValueError, match="below foreground"):
        pseudo_labels(attention, sinks, foreground=0.1)
    with pytest.raises(ValueError, match="sinks like it"):
        pseudo_labels(attention, sinks[:5])


def test_labels_of_prompts_are_those_of_the_mean_of_their_heads() -> None:
    model, inputs = tiny("llava", "eager"), make_inputs("llava", dtype=torch.float32)
    replay = Replay(model, inputs, torch.tensor([[11, 12, 13], [14, 15, 0]]))
    with torch.no_grad():
        maps = model.model(
            input_ids=replay.sequences,
            attention_mask=torch.cat((inputs["attention_mask"], replay.valid.long()), 1),
            pixel_values=inputs["pixel_values"],
            use_cache=False,
            output_attentions=True,
        ).attentions
    heads, length = [(1, 3), (2, 0), (2, 1)], inputs["input_ids"].shape[1]
    for row, shift in (("predict", -1), ("token", 0)):
        found = answer_attention(replay, heads, row)
        for b, answered in enumerate((3, 2)):
            columns = replay.image[b]
            rows = torch.arange(length, length + answered) + shift
            wanted = sum(maps[layer][b, head][rows][:, columns].mean(0) for layer, head in heads) / 3
            torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-6)
    sinks = AttentionSinks({0: (1,)}, threshold=0.04)
    columns = answer_attention(replay, [(0, 1)]) >= 0.04
    assert 0 < columns.sum() < columns.numel()
    labels = attention_labels(replay, heads, sinks, foreground=0.6, background=0.3, largest=2)
    maps4 = answer_attention(replay, heads).view(2, 4, 4)
    assert torch.equal(labels.view(2, 4, 4), pseudo_labels(maps4, columns.view(2, 4, 4), 0.6, 0.3, 2))
    assert (labels == 1).any()
    with pytest.raises(ValueError, match="no heads"):
        answer_attention(replay, [])
    with pytest.raises(ValueError, match="heads must name"):
        AttentionSinks({})


def test_the_loss_leaves_out_what_is_not_known() -> None:
    logits = torch.tensor([[2.0, -1.0, 7.0]], requires_grad=True)
    loss = roi_loss(logits, torch.tensor([[1, 0, IGNORED]]))
    terms = [torch.tensor(2.0).sigmoid().log(), torch.tensor(1.0).sigmoid().log()]
    torch.testing.assert_close(loss, -(terms[0] + terms[1]) / 2)
    nothing = roi_loss(logits, torch.full((1, 3), IGNORED))
    nothing.backward()
    assert nothing == 0
    assert not logits.grad.any()


def test_regions_are_those_of_a_map_worked_out_by_hand() -> None:
    # the weights of the blur along an axis are 0.274, 0.452, 0.274; at the border 0.623, 0.377
    likely = torch.zeros(9, 12)
    likely[2:4, 1:4] = 1.0  # 0.53 and 0.73 after the blur, and 0.27 at most outside
    assert find_regions(likely, 0.45) == [(1, 2, 4, 4)]
    likely[7:9, 9:11] = 0.9  # at least 0.47
    assert find_regions(likely, 0.45) == [(1, 2, 4, 4), (9, 7, 11, 9)]
    assert find_regions(likely, 0.45, union=True) == [(1, 2, 11, 9)]
    # above 0.6 each block has two cells left: 3 x 3 cells, which begin where there is room
    assert find_regions(likely, 0.6) == [(1, 2, 4, 5), (9, 6, 12, 9)]
    single = torch.zeros(9, 12)
    single[6, 3] = 1.0  # 0.20 in the middle, 0.12 beside it
    assert find_regions(single, 0.15) == []  # noise
    assert find_regions(single, 0.5, relative=True) == [(2, 5, 5, 8)]
    assert find_regions(torch.zeros(4, 4)) == []
    with pytest.raises(ValueError, match="threshold"):
        find_regions(likely, 1.0)
    with pytest.raises(ValueError, match="must be \\[h, w\\]"):
        find_regions(likely[0])


def test_a_crop_is_magnified_to_the_side_of_the_image() -> None:
    pixels = torch.arange(40 * 20 * 3).view(20, 40, 3).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    crop, point = crop_regions(image, [(10.5, 5, 20, 9.2), (3, 3, 3, 3)])
    assert crop.size == (40, 20)  # 10 x 5 pixels
    assert crop.tobytes() == image.crop((10, 5, 20, 10)).resize((40, 20), Image.Resampling.BILINEAR).tobytes()
    assert point.size == (40, 40)
    assert crop_regions(image, [(10.5, 5, 20, 9.2)], stretch=True)[0].size == (40, 40)


def test_a_question_is_asked_again_with_a_closer_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_lvlm()
    head = RoIHead(model)
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (40, 10, 60, 30))
    wanted = torch.full((1, 64), -9.0)
    wanted[0, [18, 19, 26, 27]] = 9.0  # rows 2 and 3, columns 2 and 3
    monkeypatch.setattr(RoIHead, "forward", lambda self, replay: wanted)
    regions = propose_regions(model, processor, image, "what is in the center?", head, threshold=0.5)
    # the processor shows the middle 50 x 50 pixels: a cell has 6.25, from pixel 25 on
    assert regions.boxes == ((37.5, 12.5, 50.0, 25.0),)
    seen: list[dict[str, Any]] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given) or generate(**given))
    for crop, images in (("beside", 2), ("instead", 1)):
        found = requery(
            model,
            processor,
            image,
            "what color is the square?",
            head,
            crop=crop,
            threshold=0.5,
            max_new_tokens=3,
        )
        assert found.regions.boxes == regions.boxes
        assert [crop.size for crop in found.crops] == [(100, 100)]
        assert seen[-1]["pixel_values"].shape[0] == images
        assert (seen[-1]["input_ids"] == model.config.image_token_id).sum() == 64 * images
        assert found.answer
    wanted.fill_(-9.0)
    assert requery(model, processor, image, "is there a star?", head, max_new_tokens=1).crops == ()
    with pytest.raises(ValueError, match="beside, instead"):
        requery(model, processor, image, "is there a star?", head, crop="both")


class _QwenProcessor:
    """Images of any size, between tokens of start and end, then the user's text in three tokens."""

    chat_template = "images, text"
    tokenizer = SimpleNamespace(bos_token=None)
    image_processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )

    def apply_chat_template(self, turns: Any, add_generation_prompt: bool) -> str:
        return "".join(part.get("text", "I") for part in turns[0]["content"])

    def __call__(self, text: list[str], images: Any, **options: Any) -> Any:
        pixels = self.image_processor(images=images[0], return_tensors="pt")
        ids = [5]
        for grid in pixels["image_grid_thw"]:
            ids += [START, *[IMAGE] * (int(grid.prod()) // 4), END]
        row = torch.tensor([[*ids, 6, 7, 8]])
        types = (row == IMAGE).int()
        return BatchFeature(
            {**pixels, "input_ids": row, "attention_mask": torch.ones_like(row), "mm_token_type_ids": types}
        )

    def batch_decode(self, tokens: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in tokens]


def test_a_model_of_images_of_any_size_looks_closer_at_pixels_of_the_image() -> None:
    model = make_model("qwen2_5_vl", dtype=torch.float32)
    head = RoIHead(model, 1, 2).eval()
    image = Image.effect_noise((100, 60), 90).convert("RGB")
    found = requery(
        model, _QwenProcessor(), image, "?", head, threshold=0.7, relative=True, union=True, max_new_tokens=2
    )
    assert found.regions.map.shape == (6, 10)  # 48 x 80 pixels
    [cells] = find_regions(found.regions.map, 0.7, relative=True, union=True)
    assert found.regions.boxes == (tuple(10.0 * side for side in cells),)
    [crop] = found.crops
    x0, y0, x1, y1 = cells
    assert max(crop.size) == 100
    assert crop.width * (y1 - y0) == pytest.approx(crop.height * (x1 - x0), abs=y1 - y0 + x1 - x0)
    # two images in one prompt, with the positions that the model gives them
    inputs = chat_inputs(_QwenProcessor(), [[user_turn("?", 2)]], [[image, crop]])
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -2:]
    assert found.answer == " ".join(map(str, tokens.tolist()))
