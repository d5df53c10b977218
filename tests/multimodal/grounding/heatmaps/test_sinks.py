"""Sinks are the columns that a plain reading of the rules gives, and 0 in the maps of all methods."""

from statistics import median
from typing import Any

import pytest
import torch

from tests.multimodal.grounding.heatmaps.eager import HEADS, NAMES, TOLERANCE, Case, case
from visionsel.multimodal import VHR
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.heatmaps.localization_heads import LocalizationHeads
from visionsel.multimodal.grounding.heatmaps.mean import Mean
from visionsel.multimodal.grounding.heatmaps.relative import Relative
from visionsel.multimodal.grounding.heatmaps.sinks import (
    BorderSinks,
    HiddenSinks,
    MedianSinks,
    above_median,
    on_border,
    sink_columns,
    without_sinks,
)

HIDDEN = HiddenSinks(tau=2.2, dims=(3, 9, 20))
MEDIAN = MedianSinks(times=1.5, share=0.4)


def by_hidden_states(one: Case, layers: list[int]) -> list[list[bool]]:
    found = []
    for b, columns in enumerate(one.columns):
        row = []
        for place in columns:
            votes = 0
            for layer in layers:
                state = one.hidden[layer, b, place].tolist()
                size = (sum(value**2 for value in state) / len(state)) ** 0.5
                votes += max(abs(state[d]) for d in HIDDEN.dims or ()) / size >= HIDDEN.tau
            row.append(votes > len(layers) / 2)
        found.append(row)
    return found


def by_attention(one: Case, layers: list[int]) -> list[list[bool]]:
    """Over all rows behind the last image."""
    found = []
    for b, columns in enumerate(one.columns):
        counts = [0] * len(columns)
        places = range(columns[-1] + 1, one.weights.shape[-1])
        for layer in layers:
            for head in range(HEADS):
                for place in places:
                    values = one.weights[layer, b, head, place][columns].tolist()
                    middle = sorted(values)[(len(values) - 1) // 2]  # torch takes the lower one of two
                    assert abs(middle - median(values)) < 1
                    for number, value in enumerate(values):
                        counts[number] += value >= MEDIAN.times * middle
        found.append([count > MEDIAN.share * len(layers) * HEADS * len(places) for count in counts])
    return found


def check(columns: Any, expected: list[list[bool]]) -> None:
    assert any(map(any, expected)), "a test without sinks says nothing"
    assert not all(map(all, expected))
    for row, wanted in zip(columns.tolist(), expected, strict=True):
        assert row == wanted + [False] * (len(row) - len(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_told_by_hidden_states_in_most_layers(name: str) -> None:
    one = case(name)
    for layers in ([1, 2, 3], [2]):
        check(sink_columns(one.replay, HIDDEN, layers), by_hidden_states(one, layers))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_told_by_attention_in_most_rows(name: str) -> None:
    one = case(name)
    check(sink_columns(one.replay, MEDIAN, [1, 3]), by_attention(one, [1, 3]))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_told_by_the_border_of_each_image(name: str) -> None:
    one = case(name, images=(2, 1))
    expected = [
        [
            y in (0, height - 1) or x in (0, width - 1)
            for height, width in grids
            for y in range(height)
            for x in range(width)
        ]
        for grids in one.grids
    ]
    check(sink_columns(one.replay, "border", [1]), expected)


def test_several_answers_have_the_sinks_of_their_own_sample() -> None:
    one = case("qwen2_5_vl")
    replay = Replay(one.model, one.inputs, one.tokens.repeat_interleave(2, 0))
    for sinks in (HIDDEN, MEDIAN, BorderSinks()):
        single = sink_columns(one.replay, sinks, [1, 2])
        several = sink_columns(replay, sinks, [1, 2])
        assert single is not None
        assert several is not None
        assert torch.equal(several, single.repeat_interleave(2, 0))
        assert not torch.equal(single[0], single[1])


def test_prompts_that_a_modulator_runs_beside_do_not_disturb() -> None:
    one = case("llava")
    plain = sink_columns(one.replay, HIDDEN, [1, 2])
    with VHR(2.0, (2, 3))(one.model):  # it runs the prompt without its image, and acts from layer 2 on
        modulated = sink_columns(one.replay, HIDDEN, [1, 2])
    assert plain is not None
    assert modulated is not None
    assert torch.equal(modulated, plain)


@pytest.mark.parametrize("method", [Mean, Relative, LocalizationHeads])
def test_every_method_leaves_them_out(method: Any) -> None:
    one = case("llava")
    options = {"heads": ((1, 2), (3, 0)), "sigma": 0} if method is LocalizationHeads else {"layers": (1, 3)}
    full = method(**options)(one.replay, one.replay)
    for sinks in (HiddenSinks(tau=1.5, dims=(3, 9, 20)), MEDIAN, "border"):
        columns = sink_columns(one.replay, sinks, [1, 3])
        found = method(**options, sinks=sinks)(one.replay, one.replay)
        torch.testing.assert_close(found, without_sinks(full, columns), **TOLERANCE)
        assert (found != full).any()


def test_dimensions_are_found_where_none_are_published() -> None:
    from visionsel.multimodal.sinks import discover_sink_dims

    one = case("llava")
    dims = discover_sink_dims(one.model)
    found = sink_columns(one.replay, HiddenSinks(tau=2.0), [1, 2])
    named = sink_columns(one.replay, HiddenSinks(tau=2.0, dims=dims), [1, 2])
    assert found is not None
    assert named is not None
    assert torch.equal(found, named)


def test_a_row_of_zeros_has_no_value_above_its_median() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0, 3.0], [1.0, 2.0, 30.0, 9.0]])
    real = torch.tensor([True, True, True, False])
    assert above_median(rows, real, 10).tolist() == [[False] * 4, [False, False, True, False]]


def test_borders_may_be_wide_but_leave_something() -> None:
    assert on_border(5, 6, 2).logical_not().nonzero().tolist() == [[2, 2], [2, 3]]
    with pytest.raises(ValueError, match="leaves nothing of a grid of 2 x 7"):
        on_border(2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenSinks(tau=0), "tau must be more than 0"),
        (lambda: HiddenSinks(dims=()), "dims is empty"),
        (lambda: BorderSinks(0), "width must be at least 1"),
        (lambda: MedianSinks(times=1), "times must be more than 1"),
        (lambda: sink_columns(case("llava").replay, HiddenSinks(dims=(64,)), [1]), "dimensions 0 to 63"),
    ],
)
def test_bad_numbers_are_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
