"""LLaVA and ViP-LLaVA: towers, layers, class tokens, and boxes of three kinds of image processors."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.multimodal.families.ramps import MEAN, STD, check_boxes, ramp
from tests.multimodal.families.tracing import changed, each_patch, encode
from tests.multimodal.tiny import IMAGE, TEXT, TOWER, make_inputs, make_model
from visionsel.embedded.lvlm import build_processor
from visionsel.multimodal import TimmTowerConfig
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded

# renamed in transformers 5.24
VIP_LAYER = "vision_feature_layer" + "s" * (not hasattr(tf.VipLlavaConfig(), "vision_feature_layer"))
SIZES = [(300, 460), (211, 97), (64, 64)]  # height, width
TIMM = {"embed_dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "dilations": [1, 1, 1, 1]}


def clip() -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=4, projection_dim=32)


def siglip() -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False)


def timm() -> TimmTowerConfig:
    return TimmTowerConfig("selectformer_nano", TIMM, hidden_size=32, image_size=32)


def wide() -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**TOWER, image_size=48, patch_size=4, projection_dim=32)


def build(tower: Any, strategy: str = "default", layer: Any = -2) -> Any:
    config = tf.LlavaConfig(
        vision_config=tower,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return tf.LlavaForConditionalGeneration(config).double().eval()


def vip(layer: Any) -> Any:
    config = tf.VipLlavaConfig(
        vision_config=clip(),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        **{VIP_LAYER: layer},
    )
    return tf.VipLlavaForConditionalGeneration(config).double().eval()


def blind(model: Any) -> None:
    for layer in find_family(model).tower_layers(model):
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)


def call(images: int = 2, side: int = 16) -> Encoded:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(images, 3, side, side, generator=generator, dtype=torch.float64)
    return Encoded("image", {"pixel_values": pixels}, {})


@pytest.mark.parametrize("kind", ["clip", "clip with its class token", "siglip", "vipllava"])
def test_a_token_depends_on_the_patch_that_its_layout_names(kind: str) -> None:
    if kind == "vipllava":
        model = vip((-2, 1))
    elif kind == "siglip":
        model = build(siglip(), "full")
    else:
        model = build(clip(), "default" if kind == "clip" else "full")
    before = int(kind == "clip with its class token")
    family, encoded = find_family(model), call()
    blind(model)
    features = encode(model, encoded)
    layouts = family.layouts(model, encoded)
    assert [layout.n for layout in layouts] == [16 + before] * 2
    source = torch.cat([layout.source() for layout in layouts])
    assert len(source) == len(features)
    assert (source < 0).sum() == 2 * before
    for (image, row, column), other in each_patch(encoded):
        patch = 16 * image + 4 * row + column
        (token,) = changed(features, encode(model, other))
        assert source[token] == patch
        (view,) = layouts[image].views
        assert view.source[row, column] == patch
        assert view.index[row, column] + image * (16 + before) == token


def test_maps_of_a_timm_tower_are_read_rows_first() -> None:
    model = build(timm(), "full", -1)
    family, encoded = find_family(model), call(side=32)
    assert not family.has_cls
    features = encode(model, encoded)
    with torch.no_grad():
        (maps,) = model.model.vision_tower.backbone.forward_intermediates(
            encoded.arguments["pixel_values"], indices=[1], stop_early=True, intermediates_only=True
        )
        tower = model.model.vision_tower
        for number, layout in enumerate(family.layouts(model, encoded)):
            (view,) = layout.views
            for row, column in ((0, 0), (0, 3), (2, 1)):
                place = view.source[row, column] - 16 * number
                patch = tower.proj(tower.norm(maps[number, :, row, column])) + tower.position[0, place]
                expected = model.model.multi_modal_projector(patch)
                torch.testing.assert_close(features[view.index[row, column] + 16 * number], expected)
    values = torch.randn(32, 2)
    assert torch.equal(family.pool(model, values, encoded), values)


def test_the_attention_of_a_timm_tower_cannot_be_read() -> None:
    model = build(timm(), "full", -1)
    family = find_family(model)
    for method in (family.tower_layers, family.feature_layer):
        with pytest.raises(
            NotImplementedError, match="selectformer_nano of timm, whose attention cannot be read"
        ):
            method(model)


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 3, [-3, 1], [-2, 1]])
@pytest.mark.parametrize("kind", ["clip", "siglip", "vipllava"])
def test_the_feature_layer_is_the_last_that_the_features_depend_on(kind: str, layer: Any) -> None:
    if kind == "vipllava":
        model = vip(layer)
    else:
        model = build(clip() if kind == "clip" else siglip(), "default" if kind == "clip" else "full", layer)
    family, encoded = find_family(model), call(1)
    layers = family.tower_layers(model)
    features = encode(model, encoded)
    depends = []
    for number, tower_layer in enumerate(layers):
        nn.init.normal_(tower_layer.mlp.fc2.bias)
        if changed(features, other := encode(model, encoded)):
            depends.append(number)
        features = other
    assert family.feature_layer(model) == max(depends, default=0)
    assert isinstance(family.tower_attention(layers[0]), nn.Module)


def processors() -> dict[str, Any]:
    common = {"image_mean": MEAN, "image_std": STD}
    crop = common | {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    return {
        "crop": tf.CLIPImageProcessor(**crop),
        "crop by LLaVA": tf.LlavaImageProcessor(**crop),
        "pad": tf.LlavaImageProcessor(**crop | {"do_pad": True, "do_center_crop": False}),
        "pad and crop": tf.LlavaImageProcessor(**crop | {"do_pad": True, "size": {"shortest_edge": 60}}),
        "stretch": tf.SiglipImageProcessor(**common, size={"height": 48, "width": 48}),
    }


@pytest.mark.parametrize("name", processors())
def test_boxes_lie_where_the_image_processor_takes_the_pixels(name: str) -> None:
    model, processor = build(wide()), processors()[name]
    family = find_family(model)
    images = [ramp(*size) for size in SIZES]
    encoded = Encoded("image", dict(processor(images, return_tensors="pt")), {})
    layouts = family.layouts(model, encoded, processor, SIZES)
    assert check_boxes(family, model, encoded, layouts, SIZES) >= 200
    x0, y0, x1, y1 = layouts[1].views[0].box
    box = {"pad": (-57, 0, 154, 211), "stretch": (0, 0, 97, 211)}.get(name, (0, 56.5, 97, 153.5))
    if name != "pad and crop":
        assert (x0, y0, x1, y1) == pytest.approx(box, abs=97 / 48)  # the crop is in whole resized pixels


def test_boxes_are_left_out_without_processor_or_sizes() -> None:
    model = make_model("llava")
    family, processor = find_family(model), processors()["crop"]
    for arguments in ((), (processor,), (None, [(16, 16)] * 2)):
        layouts = family.layouts(model, call(), *arguments)
        assert all(view.box is None for layout in layouts for view in layout.views)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_processor_makes_as_many_placeholders_as_the_layout_has_tokens(class_token: bool) -> None:
    processor = build_processor(32, 8, class_token)
    tower = tf.CLIPVisionConfig(**TOWER, image_size=32, patch_size=8, projection_dim=32)
    model = build(tower, "default") if class_token else build(timm(), "full", -1)
    images = [ramp(*size) for size in SIZES]
    inputs = processor(
        images=images, text=["<image> <image> red", "<image>"], padding=True, return_tensors="pt"
    )
    layouts = find_family(model).layouts(
        model, Encoded("image", {"pixel_values": inputs["pixel_values"]}, {}), processor, SIZES
    )
    count = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert count == [layouts[0].n + layouts[1].n, layouts[2].n]


def test_dropping_the_first_patch_as_a_class_token_is_refused() -> None:
    model = build(siglip(), "default")
    with pytest.raises(
        ValueError, match='drops the first patch of a tower without a class token; set it to "full"'
    ):
        find_family(model).layouts(model, call())


def test_the_strategy_of_the_call_wins_over_the_config() -> None:
    model = build(siglip(), "default")
    encoded = call()
    arguments = encoded.arguments | {"vision_feature_select_strategy": "full"}
    assert find_family(model).layouts(model, Encoded("image", arguments, {}))[0].n == 16


def test_a_processor_or_sizes_of_other_images_are_refused() -> None:
    model = make_model("llava")
    family, encoded = find_family(model), Encoded("image", make_inputs("llava"), {})
    with pytest.raises(ValueError, match="1 sizes for 2 images"):
        family.layouts(model, encoded, processors()["crop"], SIZES[:1])
    larger = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with pytest.raises(
        ValueError, match="makes 32 x 32 pixels of an image of 300 x 460, but the tower got 16 x 16"
    ):
        family.layouts(model, encoded, larger, SIZES[:2])


def test_an_unknown_tower_is_refused() -> None:
    tower = tf.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    with pytest.raises(
        NotImplementedError, match="LLaVA with a pixtral tower; towers can be clip_vision_model"
    ):
        find_family(build(tower, "full", -1))
