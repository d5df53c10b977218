"""Every family is found by its models, and what is none is refused with the reason."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.multimodal import tiny
from tests.multimodal.families.tracing import encode
from visionsel.multimodal.families import FAMILIES, find_family
from visionsel.multimodal.families.family import Encoded

LLAMA = tf.LlamaConfig(**tiny.TEXT | {"num_hidden_layers": 1})


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_model_is_found_by_its_type(name: str) -> None:
    model = tiny.make_model(name)
    family = find_family(model)
    assert model.config.model_type in family.model_types
    decoder: Any = family.decoder(model)
    assert len(decoder.layers) == tiny.LAYERS
    assert decoder.config.hidden_size == tiny.TEXT["hidden_size"]
    assert isinstance(decoder.norm, nn.Module)
    assert family.token_ids(model)["image"] == tiny.IMAGE
    assert ("video" in family.token_ids(model)) == (name in tiny.WITH_VIDEO)
    layers = family.tower_layers(model)
    assert len(layers) == 3
    assert 0 <= family.feature_layer(model) < 3
    assert isinstance(family.tower_attention(layers[0]), nn.Module)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_tower_starts_with_a_class_token_where_the_family_says_so(name: str) -> None:
    model, inputs = tiny.make_model(name), tiny.make_inputs(name)
    family, lengths = find_family(model), []
    hook = family.tower_layers(model)[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[-2])
    )
    model(**inputs)
    hook.remove()
    patches = {"llava": 16, "llava_next": 16, "internvl": 64}
    assert family.has_cls == (name in patches)
    assert lengths == [patches[name] + 1] if family.has_cls else lengths[0] % 4 == 0


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_projector_makes_the_tokens_one_by_one(name: str) -> None:
    model, inputs = tiny.make_model(name), tiny.make_inputs(name)
    family, seen = find_family(model), []
    projector = family.projector(model)
    if projector is None:
        return
    hook = projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    names = set(inputs) - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    encoded = Encoded("image", {name: inputs[name] for name in names}, {})
    tokens = encode(model, encoded)
    hook.remove()
    source = torch.cat([layout.source() for layout in family.layouts(model, encoded)])
    with torch.no_grad():
        rows = projector(seen[0].flatten(0, -2))
    torch.testing.assert_close(rows[source[source >= 0]], tokens[source >= 0])


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_families_that_project_single_tokens_say_so(name: str) -> None:
    model = tiny.make_model(name)
    assert find_family(model).projector(model) is model.model.multi_modal_projector


def test_a_projector_that_class_tokens_pass_through_is_not_used() -> None:
    model = tiny.make_model("llava")
    model.config.vision_feature_select_strategy = "full"
    assert find_family(model).projector(model) is None


def test_no_two_families_claim_a_type() -> None:
    types = [kind for family in FAMILIES for kind in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_a_model_without_its_head_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"Model is no supported .*: it has no language-modelling head; pass the"
    ):
        find_family(tiny.make_model(name).model)


def test_a_text_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM is .*: its config.model_type is 'llama'; supported are"
    ):
        find_family(tf.LlamaForCausalLM(LLAMA))


def test_the_tower_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its config.model_type is 'clip_vision_model'"):
        find_family(tiny.make_model("llava").model.vision_tower)


def test_a_module_that_is_none_of_transformers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Linear is no supported vision-language model: it has no transformers"
    ):
        find_family(nn.Linear(2, 2))


def test_the_message_names_the_supported_types() -> None:
    with pytest.raises(ValueError, match=r"supported are llava, vipllava, llava_next, .*qwen3_vl.*paligemma"):
        find_family(nn.Identity())
