"""Interventions leave no trace, get along with each other and other libraries, and say what they cannot."""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.multimodal.oracle import MaskOracle, chosen
from tests.multimodal.runs import ByAttention, ByScore, apart, cache_name, run, tiny
from tests.multimodal.tiny import FAMILIES, IMAGE, make_inputs, make_model
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.pruning.pruner import Pruner, VisualTokens
from visionsel.multimodal.session import _OPEN

TABLES = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
STOCK = ("rope_deltas", "_previous_max_cache_length")  # what transformers itself leaves on a model
HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs"))]


def everything_on(model: Any) -> dict[str, Any]:
    """What must be the same after as before: objects by identity, hooks, configurations, parameters."""
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    return {
        "modules": [(id(module), type(module)) for module in modules],
        "attributes": [
            {name: id(value) for name, value in vars(module).items() if name not in STOCK}
            for module in modules
        ],
        "hooks": [len(getattr(module, name)) for module in modules for name in HOOKS],
        "configurations": {key: copy.deepcopy(vars(config)) for key, config in configs.items()},
        "parameters": [(id(p), p.data_ptr(), p._version) for p in model.parameters()],
        "tables": [[dict(table._global_mapping), dict(table._local_mapping)] for table in TABLES],
        "sessions": dict(_OPEN),
    }


def several(model: Any) -> ExitStack:
    """Pruners that use all there is: input and layers, taps, the tower, merging, probes."""
    stack = ExitStack()
    stack.enter_context(ByScore({0: (0.8,)}, merge=True)(model))
    stack.enter_context(ByAttention(0.8, 1, "previous")(model))
    stack.enter_context(ByAttention(0.8, 2, "own")(model))
    stack.enter_context(ByAttention(0.8, 3, None, tower=True)(model))
    return stack


class Failing(LogitsProcessor):
    """Fails at the third token."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyError("on purpose")
        return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_leaving_the_context_leaves_the_model_as_it_was(name: str, attention: str) -> None:
    model = tiny(name, attention)
    inputs = make_inputs(name, dtype=model.dtype)
    whole = run(model, inputs, 3)
    before = everything_on(model)
    with several(model):
        assert everything_on(model) != before
        pruned = run(model, inputs, 3)
    assert everything_on(model) == before
    again = run(model, inputs, 3)
    assert torch.equal(again.logits, whole.logits)
    assert not torch.equal(pruned.logits, whole.logits)


def fail(*args: Any, **kwargs: Any) -> None:
    raise KeyError("on purpose")


def fail_in(where: str, model: Any, inputs: dict[str, Any], faults: ExitStack) -> None:
    """Run until something fails."""
    options: dict[str, Any] = {}
    if where == "generate":
        options["logits_processor"] = [Failing()]
    elif where == "a layer":
        layer = model.model.language_model.layers[2]
        faults.callback(layer.mlp.register_forward_hook(fail).remove)
    elif where == "the tower":
        tower = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual
        faults.callback(tower.register_forward_hook(fail).remove)
    elif where == "a selection":
        patch = faults.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(VisualTokens, "attention", fail)
    run(model, inputs, 4, **options)
    fail()


@pytest.mark.parametrize("where", ["generate", "a layer", "the tower", "a selection", "the block"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_an_exception_leaves_the_model_as_it_was(name: str, where: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    whole = run(model, inputs, 3)
    before = everything_on(model)
    with ExitStack() as faults, pytest.raises(KeyError, match="on purpose"), several(model):
        fail_in(where, model, inputs, faults)
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, whole.logits)


def test_a_context_goes_on_after_an_exception_inside_it() -> None:
    model, inputs = tiny("qwen3_vl"), make_inputs("qwen3_vl")
    with several(model):
        expected = run(model, inputs, 3)
        with pytest.raises(KeyError):
            run(model, inputs, 4, logits_processor=[Failing()])
        assert torch.equal(run(model, inputs, 3).logits, expected.logits)


def test_an_entry_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny("llava")
    before = everything_on(model)
    for bad in (
        ByScore({0: (0.5,)}, options={"reads": "next"}),
        Stack(ByScore({0: (0.5,)}), ByScore({0: (0.5,)})),
        ByScore({2: (0.5,)}, options={"tower": True, "tower_layer": 7}),
    ):
        with pytest.raises(ValueError), bad(model):  # noqa: PT011
            pass
        assert everything_on(model) == before


# with each other


def test_a_stack_is_what_nesting_is() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    one, two = ByScore({0: (0.7,)}), ByScore({2: (0.4,)})
    with one(model) as outer, two(model) as inner:
        nested = run(model, inputs)
    with Stack(one, two)(model) as (first, second):
        stacked = run(model, inputs)
    with MaskOracle(model, chosen(inputs, {0: (0.7,), 2: (0.4,)})):
        expected = run(model, inputs)
    assert torch.equal(stacked.logits, nested.logits)
    assert apart(stacked.logits, expected.logits) < 1e-10
    layers = [[layer for layer, _ in pruned.kept] for pruned in (outer, inner, first, second)]
    assert layers == [[0, 2]] * 4, "each tells what became of the prompt in all"


def test_contexts_may_close_in_any_order() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    before = everything_on(model)
    one, two = ByScore({0: (0.7,)}), ByAttention(0.4, 2)
    with two(model):
        expected = run(model, inputs)
    outer, inner = one(model), two(model)
    outer.__enter__()
    inner.__enter__()
    run(model, inputs, 2)
    outer.__exit__(None, None, None)
    assert torch.equal(run(model, inputs).logits, expected.logits)
    third = one(model)
    third.__enter__()
    inner.__exit__(None, None, None)
    found = run(model, inputs)
    third.__exit__(None, None, None)
    assert everything_on(model) == before
    with MaskOracle(model, chosen(inputs, {0: (0.7,)})):
        assert apart(found.logits, run(model, inputs).logits) < 1e-10


def test_two_pruners_at_one_layer_are_refused() -> None:
    model, same = tiny("llava"), ByScore({2: (0.4,)})
    message = "two interventions drop tokens before layer 2; give them different layers"
    with same(model):
        with pytest.raises(ValueError, match=message):
            same(model).__enter__()
        run(model, make_inputs("llava"), 2)
    with pytest.raises(ValueError, match=message):
        Stack(same, same)(model).__enter__()


def test_a_stack_takes_interventions_only() -> None:
    with pytest.raises(TypeError, match="got ABCMeta; call it first"):
        Stack(ByScore)  # type: ignore[arg-type]
    assert repr(Stack(ByAttention(0.5, 2))).startswith("Stack(ByAttention(keep=0.5, layer=2")


def test_two_threads_with_a_model_each_do_not_see_each_other() -> None:
    names = ("llava", "qwen2_5_vl")
    models = {name: make_model(name, seed=3) for name in names}
    pruners: dict[str, Pruner] = {"llava": ByAttention(0.4, 2), "qwen2_5_vl": ByAttention(0.3, 1, "own")}
    inputs = {name: make_inputs(name) for name in names}
    for name, model in models.items():
        run(model, inputs[name], 1)  # transformers puts hooks of its own on at first
    before = {name: everything_on(model) for name, model in models.items()}

    def work(name: str) -> torch.Tensor:
        with pruners[name](models[name]):
            return run(models[name], inputs[name], 3).logits

    expected = {name: work(name) for name in names}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    barrier = threading.Barrier(2)

    def loop(name: str) -> None:
        barrier.wait()
        for _ in range(8):
            found[name].append(work(name))

    threads = [threading.Thread(target=loop, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(found[name]) == 8
        assert all(torch.equal(logits, expected[name]) for logits in found[name])
        assert everything_on(models[name]) == before[name]


def test_two_models_with_one_configuration_may_close_in_any_order() -> None:
    first = make_model("llava", seed=3)
    second = type(first)(first.config).double().eval()
    second.load_state_dict(make_model("llava", seed=4).state_dict())
    second.set_attn_implementation("sdpa")
    assert first.model.language_model.config is second.model.language_model.config
    inputs = make_inputs("llava")
    run(first, inputs, 1)
    with ByAttention(0.4, 2)(second):
        expected = run(second, inputs, 3)
    before = everything_on(first)
    one, two = ByAttention(0.4, 2)(first), ByAttention(0.4, 2)(second)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    found = run(second, inputs, 3)
    two.__exit__(None, None, None)
    assert torch.equal(found.logits, expected.logits)
    assert everything_on(first) == before


# with other libraries


@contextmanager
def every_kernel_wrapped() -> Iterator[list[str]]:
    """What kvpress does on import, with a list of the calls; and that it can be undone."""
    calls: list[str] = []

    def wrapped(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: Any, **kwargs: Any
        ) -> Any:
            calls.append(name)
            return kernel(module, query, key, value, attention_mask, dropout, **kwargs)

        return attend

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name, kernel in list(ALL_ATTENTION_FUNCTIONS.items()):
        ALL_ATTENTION_FUNCTIONS[name] = wrapped(name, kernel)
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_wrappers_put_on_all_kernels_before_stay_in_force_and_in_place(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with ByAttention(0.4, 2)(model):
        expected = run(model, inputs, 3)
    with every_kernel_wrapped() as calls:
        run(model, inputs, 3)
        number = len(calls)
        before = everything_on(model)
        with ByAttention(0.4, 2)(model):
            found = run(model, inputs, 3)
        assert len(calls) == 2 * number, "every call of a kernel went through their wrapper, once"
        assert everything_on(model) == before
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_wrappers_put_on_all_kernels_meanwhile_are_left_in_place(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with ByAttention(0.4, 2)(model):
        expected = run(model, inputs, 3)
    standard = set(ALL_ATTENTION_FUNCTIONS)
    before = everything_on(model)
    with ExitStack() as theirs:
        with ByAttention(0.4, 2)(model):
            calls = theirs.enter_context(every_kernel_wrapped())
            wrappers = {key: ALL_ATTENTION_FUNCTIONS[key] for key in standard}
            found = run(model, inputs, 3)
            assert "sdpa" in calls
        assert {key: ALL_ATTENTION_FUNCTIONS[key] for key in ALL_ATTENTION_FUNCTIONS} == wrappers
        assert torch.equal(run(model, inputs, 3).logits, run(model, inputs, 3).logits)
    assert torch.equal(found.logits, expected.logits)
    assert everything_on(model) == before


# what cannot be done


def refused(
    name: str,
    match: str,
    work: Callable[[Any, dict[str, Any]], Any],
    error: type[Exception] = NotImplementedError,
) -> None:
    """The message comes, and nothing is left behind."""
    model, inputs = tiny(name), make_inputs(name)
    with torch.no_grad():
        model(**inputs)
        before = everything_on(model)
        with pytest.raises(error, match=match), ByScore({0: (0.4,)})(model):
            work(model, inputs)
    assert everything_on(model) == before


def test_a_static_cache_is_refused() -> None:
    refused(
        "llava",
        "static cache .* use the default DynamicCache",
        lambda model, inputs: model.generate(**inputs, max_new_tokens=2, cache_implementation="static"),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_refused(name: str) -> None:
    refused(
        name,
        "leave the context for training",
        lambda model, inputs: model(**inputs, labels=inputs["input_ids"]),
    )


def test_embeddings_alone_are_refused() -> None:
    def work(model: Any, inputs: dict[str, Any]) -> None:
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        model.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], max_new_tokens=2)

    refused("llava", "inputs_embeds alone .* pass input_ids and pixel values", work)


def test_a_prepared_mask_is_refused() -> None:
    def work(model: Any, inputs: dict[str, Any]) -> None:
        length = inputs["input_ids"].shape[1]
        model(**inputs | {"attention_mask": torch.ones(2, 1, length, length, dtype=torch.bool).tril()})

    refused("llava", "the 2-D mask of the processor", work)


def with_window(size: int) -> Any:
    """A Gemma3 whose sliding layers see this many tokens."""
    model = copy.deepcopy(tiny("gemma3"))
    config = model.model.language_model.config
    config.sliding_window = size
    for layer in model.model.language_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = size
    return model


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("ways", ["forward", "truncate", "generate"])
def test_a_prompt_longer_than_the_sliding_window_is_refused_at_once(layer: int, ways: str) -> None:
    model, inputs = with_window(16), make_inputs("gemma3")
    pruner = ByScore({layer: (0.4,)}, options={"truncate_earlier": ways == "truncate"})
    match = r"prompt of \d+ tokens does not fit the sliding window of 16"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=match), pruner(model):
        model.generate(**inputs, max_new_tokens=3) if ways == "generate" else model(**inputs)


def test_writing_past_the_sliding_window_is_refused() -> None:
    inputs = make_inputs("gemma3")
    model = with_window(inputs["input_ids"].shape[1] + 3)
    with ByScore({0: (0.4,)})(model):
        found = run(model, inputs, 4)
    with MaskOracle(model, chosen(inputs, {0: (0.4,)})):
        assert apart(found.logits, run(model, inputs, 4).logits) < 1e-10
    with pytest.raises(NotImplementedError, match="the sliding window is full"), ByScore({0: (0.4,)})(model):
        run(model, inputs, 5)


def test_a_window_that_the_pruned_layers_do_not_have_is_no_matter() -> None:
    model, inputs = with_window(16), make_inputs("gemma3")
    with ByScore({3: (0.4,)})(model):
        found = run(model, inputs, 8)
    with MaskOracle(model, chosen(inputs, {3: (0.4,)})):
        expected = run(model, inputs, 8)
    assert apart(found.logits, expected.logits) < 1e-10


def test_a_prefill_in_chunks_that_part_the_image_is_refused() -> None:
    """Before transformers 5.20 the images of such a prompt are lost without a word."""

    def work(model: Any, inputs: dict[str, Any]) -> None:
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)

    refused("llava", "prefill_chunk_size", work)


def test_places_for_images_without_images_are_refused() -> None:
    def work(model: Any, inputs: dict[str, Any]) -> None:
        model(**{key: value for key, value in inputs.items() if key != "pixel_values"})

    refused("llava", "no images come with it; pass the pixel values", work)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_image_on_a_filled_cache_is_refused(name: str) -> None:
    def work(model: Any, inputs: dict[str, Any]) -> None:
        first = run(model, inputs, 1)
        again = {
            key: torch.cat([value, value], 1)
            for key, value in inputs.items()
            if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        }
        if "image_grid_thw" in inputs:  # Qwen wants the old images too, for the positions
            grid = inputs["image_grid_thw"]
            pixels = inputs["pixel_values"].split(grid.prod(1).tolist())
            again["image_grid_thw"] = grid.repeat_interleave(2, 0)
            again["pixel_values"] = torch.cat([pixel for pixel in pixels for _ in range(2)])
        model.generate(**inputs | again, **{cache_name(model): first.cache}, max_new_tokens=2)

    refused(name, "run the whole conversation as one prompt", work)


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_that_would_be_lost_are_refused(name: str, how: str) -> None:
    def work(model: Any, inputs: dict[str, Any]) -> None:
        inputs = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
        model.generate(**inputs, max_new_tokens=2) if how == "generate" else model(**inputs)

    refused(name, "mm_token_type_ids; without them .* Pass all that the processor returns", work, ValueError)


def test_models_that_are_no_vision_language_models_are_refused_at_entry() -> None:
    decoder = tiny("llava").model.language_model
    for model in (nn.Linear(2, 2), decoder, tiny("llava").model):
        with pytest.raises(ValueError, match="no supported vision-language model"):
            ByScore({0: (0.5,)})(model).__enter__()


def test_what_the_tower_saw_cannot_be_read_from_features_made_beforehand() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers takes none")
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True)
        given = {key: value for key, value in inputs.items() if key != "pixel_values"}
        given["mm_encoder_outputs"] = {"image": features}
        with ByScore({0: (0.4,)})(model):
            found = model(**given).logits
            assert torch.equal(found, model(**inputs).logits)
        with ByAttention(0.4, 0, None, tower=True)(model):
            model(**inputs)
            with pytest.raises(NotImplementedError, match="pass the pixel values"):
                model(**given)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_model_below_the_head_may_be_called_in_any_manner(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    names = list(inspect.signature(model.model.forward).parameters)
    given = names[: max(map(names.index, inputs)) + 1]
    with torch.no_grad(), ByScore({0: (0.4,)})(model) as pruned:
        expected = model.model(**inputs).last_hidden_state
        kept = pruned.kept[0][1]
        found = model.model(*(inputs.get(argument) for argument in given)).last_hidden_state
        assert torch.equal(pruned.kept[0][1], kept)
    assert torch.equal(found, expected)


def test_the_decoder_called_by_itself_is_refused() -> None:
    model = tiny("llava")
    ids = torch.tensor([[3, 4, IMAGE]])
    with pytest.raises(NotImplementedError, match="call the model"), ByScore({0: (0.4,)})(model):
        model.model.language_model(input_ids=ids)
