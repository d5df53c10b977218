"""What a report counts, against a count by hand with hooks on every linear module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.multimodal.tiny import LAYERS, make_inputs, make_model
from visionsel.multimodal.families import find_family
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.pruning.measure import measure, measure_in_turn
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens
from visionsel.multimodal.pruning.report import Report, Times


@dataclass(frozen=True)
class First(Pruner):
    """Keeps the first tokens: `numbers[b]` of sample b (cyclically) at each of some layers."""

    layers: tuple[int, ...] = (0,)
    numbers: tuple[tuple[int, ...], ...] = ((4,),)
    reads: str | None = None
    forget: bool = False

    def stages(self, layers: int) -> list[Stage]:
        return [
            Stage(layer, self._select(numbers), self.reads, truncate_earlier=self.forget)
            for layer, numbers in zip(self.layers, self.numbers, strict=True)
        ]

    def _select(self, numbers: tuple[int, ...]) -> Callable[[VisualTokens], Tensor]:
        def select(tokens: VisualTokens) -> Tensor:
            if self.reads:
                tokens.attention()
            order = tokens.valid.cumsum(1)
            number = torch.tensor([numbers[b % len(numbers)] for b in range(len(order))])
            return tokens.valid & (order <= number[:, None])

        return select


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Counts what the linear modules and the attention of the decoder layers compute."""
    total = {"flops": 0}
    decoder: Any = find_family(model).decoder(model)
    hooks = []

    def linear(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        total["flops"] += 2 * args[0].numel() * module.out_features

    def layer(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        batch, length, _ = output.shape
        attention = module.self_attn
        for query in range(length):
            seen = query + 1
            width = attention.head_dim * attention.config.num_attention_heads
            total["flops"] += batch * 2 * 2 * seen * width

    for one in decoder.layers:
        hooks.append(one.register_forward_hook(layer))
        hooks += [m.register_forward_hook(linear) for m in one.modules() if isinstance(m, nn.Linear)]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def read(model: Any, pruner: Any, inputs: dict[str, Any], **arguments: Any) -> tuple[Report, int, Any]:
    """The report of one forward, the FLOPs counted by hand, and the output."""
    with pruner(model) as pruned, torch.no_grad(), counted(model) as total:
        output = model(**inputs, **arguments)
    return pruned.report(), total["flops"], output


def cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.fixture(scope="module")
def llava() -> Any:
    return make_model("llava")


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen3_vl", "gemma3", "idefics3"])
def test_tokens_flops_and_bytes_are_those_of_a_count_by_hand(name: str) -> None:
    model = make_model(name)
    inputs = make_inputs(name)  # left-padded
    visual = [int((row == model.config.image_token_id).sum()) for row in inputs["input_ids"]]
    with torch.no_grad(), counted(model) as total:
        full_bytes = cache_bytes(model(**inputs).past_key_values)
    pruner = First(layers=(1, 3), numbers=((5, 3), (2, 3)))
    report, flops, output = read(model, pruner, inputs)
    assert report.full_tokens == sum(visual) / 2
    assert report.visual_tokens == (sum(visual) / 2, 4, 4, 2.5)
    assert report.equivalent_tokens == pytest.approx((sum(visual) / 2 + 4 + 4 + 2.5) / LAYERS)
    assert report.flops == flops
    assert report.full_flops == total["flops"]
    assert report.cache_bytes == cache_bytes(output.past_key_values)
    assert report.full_cache_bytes == full_bytes
    assert report.flops_ratio == flops / total["flops"] < 1
    assert report.cache_ratio == report.cache_bytes / full_bytes < 1


@pytest.mark.parametrize("reads", [None, "previous", "own"])
def test_queries_and_keys_made_for_a_selection_count_as_computed(reads: str | None, llava: Any) -> None:
    model, inputs = llava, make_inputs("llava", batch=3)
    pruner = First(layers=(1, 2), numbers=((6,), (3,)), reads=reads)
    report, flops, _ = read(model, pruner, inputs)
    assert report.flops == flops
    plain, *_ = read(model, First(layers=(1, 2), numbers=((6,), (3,))), inputs)
    assert (report.flops > plain.flops) == (reads == "own")
    # a later prompt does not inherit what an earlier one computed
    with pruner(model) as pruned, torch.no_grad():
        model(**make_inputs("llava", batch=1, seed=3))
        model(**inputs)
        assert pruned.report() == report
    assert pruned.report() == report


def test_the_batch_is_counted_as_computed_with_padding_and_fillers(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava", batch=2, before=(3, 3), after=(4, 4))
    everything, flops, _ = read(
        model, First(numbers=((16, 2),)), inputs
    )  # the first sample keeps all of its own
    assert everything.flops == flops > everything.full_flops * 0.99
    ragged, flops, _ = read(model, First(numbers=((9, 2),)), inputs)
    equal, *_ = read(model, First(numbers=((9, 9),)), inputs)
    assert ragged.flops == flops == equal.flops
    assert ragged.visual_tokens == (5.5,) * LAYERS
    assert equal.visual_tokens == (9,) * LAYERS


def test_two_pruners_on_a_model_have_one_report(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava")
    pruner = Stack(First(layers=(0,), numbers=((8,),)), First(layers=(2,), numbers=((3,),)))
    with pruner(model) as (one, other), torch.no_grad():
        model(**inputs)
    assert one.report() == other.report()
    assert one.report().visual_tokens == (8, 8, 3, 3)


def test_layers_that_forget_save_bytes_and_not_tokens(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava")
    report, flops, output = read(model, First(layers=(2,), numbers=((4,),), forget=True), inputs)
    plain, *_ = read(model, First(layers=(2,), numbers=((4,),)), inputs)
    assert report.visual_tokens == plain.visual_tokens == (16, 16, 4, 4)
    assert report.flops == plain.flops == flops
    assert report.cache_bytes == cache_bytes(output.past_key_values) < plain.cache_bytes
    assert report.full_cache_bytes == plain.full_cache_bytes


def test_a_prompt_without_images_costs_what_it_costs(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava", images=0)
    report, flops, _ = read(model, First(), inputs)
    assert report.visual_tokens == (0,) * LAYERS
    assert report.equivalent_tokens == report.full_tokens == 0
    assert report.flops_ratio == report.cache_ratio == 1
    assert report.flops == flops
    assert "image tokens (mean of 4 layers)" in str(report)


def test_without_a_cache_there_are_no_bytes(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava")
    report, *_ = read(model, First(), inputs, use_cache=False)
    assert report.cache_bytes is report.full_cache_bytes is report.cache_ratio is None
    assert report.to_dict()["cache_ratio"] is None
    assert "cache" not in str(report)


def test_there_is_no_report_before_a_prompt_and_the_last_one_after(llava: Any) -> None:
    model = llava
    with First()(model) as pruned, torch.no_grad():
        with pytest.raises(RuntimeError, match="no prompt yet"):
            pruned.report()
        model.generate(**make_inputs("llava"), max_new_tokens=3)
        assert pruned.report().full_tokens == 16
        model.generate(**make_inputs("llava", images=2), max_new_tokens=3)
    assert pruned.report().full_tokens == 32


def test_a_report_reads_as_numbers_and_as_a_table() -> None:
    report = Report((64.0, 16.0, 16.0, 16.0), 64.0, 61_370_000, 126_200_000, 143_360, 290_816)
    values = report.to_dict()
    assert values["visual_tokens"] == [64.0, 16.0, 16.0, 16.0]
    assert values["equivalent_tokens"] == 28
    assert values["flops_ratio"] == pytest.approx(0.4863, abs=1e-4)
    assert values["cache_ratio"] == pytest.approx(0.4930, abs=1e-4)
    assert "seconds" not in values
    lines = str(report).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["full", "pruned", "ratio"],
        ["image", "tokens", "(mean", "of", "4", "layers)", "64.0", "28.0", "0.438"],
        ["prefill", "of", "the", "decoder", "126.2", "MFLOPs", "61.37", "MFLOPs", "0.486"],
        ["cache", "of", "the", "prompt", "284", "KiB", "140", "KiB", "0.493"],
    ]
    assert lines[-1] == "image tokens of each layer: 64 (0), 16 (1-3)"


def test_times_are_medians_and_their_ratio_that_of_the_rounds() -> None:
    times = Times.of([2.0, 4.0, 10.0], [1.0, 3.0, 2.0])
    assert (times.full, times.pruned, times.ratio) == (4.0, 2.0, 0.5)


def test_measuring_times_both_and_leaves_the_model_as_it_was(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava")
    decoder = find_family(model).decoder(model)
    with torch.no_grad():
        before = model(**inputs).logits
    report = measure(model, First(), inputs, rounds=2, new_tokens=3)
    for name in ("seconds", "decoder_seconds", "token_seconds"):
        wall, cpu = getattr(report, name), getattr(report, name.replace("seconds", "cpu_seconds"))
        assert wall.full > 0
        assert wall.pruned > 0
        assert cpu.full >= 0
    assert report.decoder_seconds.full < report.seconds.full
    assert report.visual_tokens == (4,) * LAYERS
    values = report.to_dict()
    assert values["seconds"] == report.seconds.pruned
    assert values["full_token_cpu_seconds"] == report.token_cpu_seconds.full
    assert values["decoder_cpu_ratio"] == report.decoder_cpu_seconds.ratio
    assert "each later token, CPU" in str(report)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert not decoder._forward_hooks
    assert not decoder._forward_pre_hooks


def test_several_pruners_share_the_runs_without_one(llava: Any) -> None:
    model, inputs = llava, make_inputs("llava")
    reports = measure_in_turn(model, {"four": First(), "six": First(numbers=((6,),))}, inputs, rounds=1)
    assert reports["four"].seconds.full == reports["six"].seconds.full
    assert reports["four"].token_seconds is None
    assert [reports[name].full_flops for name in reports] == [reports["four"].full_flops] * 2
    assert reports["four"].flops < reports["six"].flops
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        measure(model, First(), inputs, rounds=0)
