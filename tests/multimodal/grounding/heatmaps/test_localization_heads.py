"""Localization heads are chosen by the rules of the paper, and their map is a smoothed sum of eager rows."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.grounding.heatmaps.eager import (
    HEADS,
    NAMES,
    NEW,
    TOLERANCE,
    Case,
    captions,
    case,
    padded,
    questions,
)
from tests.multimodal.tiny import LAYERS
from visionsel.embedded import load_lvlm
from visionsel.embedded.localization_preset import SIZE, find_preset
from visionsel.multimodal.grounding.heatmaps.head_selector import (
    PRESETS,
    HeadSelector,
    HeadStatistics,
    head_statistics,
    order_heads,
)
from visionsel.multimodal.grounding.heatmaps.localization_heads import LocalizationHeads, choose_heads
from visionsel.multimodal.grounding.heatmaps.spatial import (
    bend,
    blur,
    components,
    fills_bottom,
    spatial_entropy,
)

Head = tuple[int, int]


def pieces(grid: Tensor) -> list[set[tuple[int, int]]]:
    """Connected components above the mean, by walking from cell to cell."""
    rows = grid.tolist()
    mean = sum(map(sum, rows)) / grid.numel()
    left = {(y, x) for y, row in enumerate(rows) for x, value in enumerate(row) if value > mean}
    found = []
    while left:
        border = [left.pop()]
        piece = set(border)
        while border:
            y, x = border.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            piece |= near
            border += near
        found.append(piece)
    return found


def entropy_of(grids: list[Tensor]) -> float:
    found = [pieces(grid) for grid in grids]
    for grid, parts in zip(grids, found, strict=True):
        height, width = grid.shape
        if {(height - 1, x) for x in range(width)} <= set().union(*parts):
            return math.inf
    sizes = [len(piece) for parts in found for piece in parts]
    return -sum(size / sum(sizes) * math.log(size / sum(sizes)) for size in sizes)


def split(one: Case, b: int, values: Tensor) -> list[Tensor]:
    """The grids of the images of a sample."""
    parts = values.split([h * w for h, w in one.grids[b]])
    return [part.view(size) for part, size in zip(parts, one.grids[b], strict=True)]


def bend_of(values: list[float]) -> float:
    """The point of a sorted curve that is farthest from its chord, by the distance of a point to a line."""
    curve = sorted(values)
    dx, dy = len(curve) - 1.0, curve[-1] - curve[0]
    away = [abs(dy * i - dx * (value - curve[0])) / math.hypot(dx, dy) for i, value in enumerate(curve)]
    return curve[away.index(max(away))]


def statistics_of(one: Case, b: int) -> tuple[dict[Head, float], dict[Head, float]]:
    sums, entropies = {}, {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            values = one.attention(layer, head, "prompt", b, 0)
            sums[layer, head] = values.double().sum().item()
            entropies[layer, head] = entropy_of(split(one, b, values))
    return sums, entropies


def ordered(sums: dict[Head, float], entropies: dict[Head, float], tau: float) -> list[Head]:
    passed = [head for head in sums if sums[head] >= tau and entropies[head] < math.inf]
    return sorted(passed, key=lambda head: (round(entropies[head], 9), head))


def smoothed(grid: Tensor, sigma: float = 1.0) -> Tensor:
    height, width = grid.shape
    out = torch.zeros_like(grid)
    for y in range(height):
        for x in range(width):
            total = weight = 0.0
            for v in range(max(0, y - 3), min(height, y + 4)):
                for u in range(max(0, x - 3), min(width, x + 4)):
                    share = math.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * sigma**2))
                    total, weight = total + share * float(grid[v, u]), weight + share
            out[y, x] = total / weight
    return out


def expected_maps(one: Case, heads: list[list[Head]], row: str) -> Tensor:
    maps = []
    for b in range(2):
        sums = [sum(one.attention(*head, row, b, t) for head in heads[b]) for t in range(NEW)]
        maps.append(
            [torch.cat([smoothed(grid).flatten() for grid in split(one, b, one_sum)]) for one_sum in sums]
        )
    return padded(maps)


@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_the_sum_of_the_heads_smoothed_on_each_image(name: str) -> None:
    one, heads = case(name), ((3, 1), (1, 0), (1, 2))
    for method in (LocalizationHeads(heads), LocalizationHeads(heads, row="predict")):
        found = method(one.replay)
        torch.testing.assert_close(found, expected_maps(one, [list(heads)] * 2, method.row), **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_each_prompt_has_heads_of_its_own_where_none_are_given(name: str) -> None:
    one = case(name)
    chosen = []
    for b in range(2):
        sums, entropies = statistics_of(one, b)
        chosen.append(ordered(sums, entropies, bend_of(list(sums.values())))[:2])
    assert choose_heads(head_statistics(one.replay), 2) == chosen
    assert chosen[0] != chosen[1]
    for method in (LocalizationHeads(k=2), LocalizationHeads(k=2, row="token")):
        torch.testing.assert_close(method(one.replay), expected_maps(one, chosen, method.row), **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_selector_counts_the_best_heads_of_each_sample(name: str) -> None:
    cases = [case(name), case(name, after=(2, 7)), case(name, images=(1, 1))]
    found = HeadSelector.from_replays((one.replay for one in cases), top=2)
    samples = [statistics_of(one, b) for one in cases for b in range(2)]
    mean = {head: sum(sums[head] for sums, _ in samples) / 6 for head in samples[0][0]}
    tau = bend_of(list(mean.values()))
    counts: dict[Head, int] = {}
    for _, entropies in samples:
        for head in ordered(mean, entropies, tau)[:2]:
            counts[head] = counts.get(head, 0) + 1
    best = sorted(counts, key=lambda head: (-counts[head], head))
    assert found.counts == tuple((*head, counts[head]) for head in best)
    assert found.tau == pytest.approx(tau, abs=1e-6)
    assert found.samples == 6
    assert len(set(counts.values())) > 1
    assert found.best(2) == tuple(best[:2])
    method = LocalizationHeads(found, k=2)
    torch.testing.assert_close(
        method(cases[0].replay), expected_maps(cases[0], [best[:2]] * 2, "prompt"), **TOLERANCE
    )


def test_a_curve_bends_where_it_is_farthest_from_its_chord() -> None:
    assert bend(torch.tensor([0.9, 0.0, 0.1, 0.05, 1.0])) == pytest.approx(0.1)
    assert bend(torch.tensor([0.0, 8.0, 9.0, 10.0])) == 8  # steep first: above the chord
    assert bend(torch.tensor([3.0, 1.0, 2.0])) == 1  # a line
    assert bend(torch.full((4,), 0.5)) == 0.5
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 4
    assert bend(values) == pytest.approx(bend_of(values.tolist()))


def test_components_are_connected_over_corners_and_bends() -> None:
    cells = torch.tensor(
        [[1, 0, 0, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    ).bool()
    labels = components(cells)
    assert torch.equal(labels > 0, cells)
    assert labels[0, 0] == labels[1, 1]
    assert labels[0, 3] == labels[3, 0] != labels[0, 0]
    assert torch.equal(components(cells.expand(2, 3, 5, 5)), labels.expand(2, 3, 5, 5))


def test_entropy_is_that_of_the_shares_of_the_components() -> None:
    one = torch.tensor([[0.9, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9]])
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert float(spatial_entropy([one])) == pytest.approx(expected)
    other = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # of another image: a third component
    assert float(spatial_entropy([one, other])) == pytest.approx(1.5 * math.log(2))
    assert float(spatial_entropy([other])) == 0
    assert float(spatial_entropy([torch.full((3, 3), 0.1)])) == math.inf
    grids = torch.rand(40, 5, 6, generator=torch.Generator().manual_seed(1)) ** 2
    expected_all = [entropy_of([grid]) for grid in grids]
    found = spatial_entropy([grids]).masked_fill(fills_bottom([grids]), torch.inf)
    torch.testing.assert_close(found, torch.tensor(expected_all, dtype=torch.float64))


def test_heads_that_look_at_the_bottom_row_or_away_are_left_out() -> None:
    bottom = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert bool(fills_bottom([bottom]))
    assert bool(fills_bottom([bottom.flip(0), bottom]))
    assert not bool(fills_bottom([bottom.T]))
    sums = torch.tensor([[0.1, 0.5], [0.9, 0.4]])
    entropy = torch.tensor([[0.0, 0.3], [0.2, torch.inf]])
    assert order_heads(sums, entropy, 0.4) == [(1, 0), (0, 1)]


def test_smoothing_keeps_a_flat_map_and_is_a_gaussian_inside() -> None:
    torch.testing.assert_close(blur(torch.full((2, 9), 0.3)), torch.full((2, 9), 0.3))
    point = torch.zeros(15, 15, dtype=torch.float64)
    point[7, 7] = 1
    weights = torch.tensor([math.exp(-(d**2) / 2) for d in range(-3, 4)], dtype=torch.float64)
    weights /= weights.sum()
    torch.testing.assert_close(blur(point)[4:11, 4:11], weights[:, None] * weights)
    assert float(blur(point).sum()) == pytest.approx(1)


def test_files_are_read_back_and_checked_against_the_model(tmp_path: Path) -> None:
    one = case("llava")
    found = HeadSelector.from_replays([one.replay], top=2)
    path = found.save(tmp_path / "heads.json")
    assert HeadSelector.load(path, one.model) == found
    assert json.loads(path.read_text())["heads"] == [list(head) for head in found.counts]
    direct, named = LocalizationHeads(found, k=2), LocalizationHeads(str(path), k=2)
    assert torch.equal(named(one.replay), direct(one.replay))
    other = case("qwen2_5_vl")
    with pytest.raises(ValueError, match="of another model: llava with a llama of 4 layers"):
        HeadSelector.load(path, other.model)
    with pytest.raises(ValueError, match="of another model"):
        direct(other.replay)
    with pytest.raises(ValueError, match=r"k must be in 1 to \d+, as many heads were counted; got 16"):
        LocalizationHeads(found, k=16)(one.replay)
    content = json.loads(path.read_text())
    for wrong in ({"heads": [[9, 0, 1]]}, {"heads": []}, {"model": {}}, {"tau": "high"}):
        path.write_text(json.dumps(content | wrong))
        with pytest.raises(ValueError, match="is no file of HeadSelector"):
            HeadSelector.load(path)
    with pytest.raises(FileNotFoundError):
        LocalizationHeads(str(tmp_path / "none.json"))(one.replay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ((1, 4),)}, "head 4 of layer 1 does not exist: the decoder has 4 layers of 4 heads"),
        ({"heads": ((-1, 0),)}, "head 0 of layer -1 does not exist"),
        ({"heads": ()}, "different pairs of layer and head"),
        ({"heads": ((1, 0), (1, 0))}, "different pairs"),
        ({"heads": "llava"}, "no preset of heads is called 'llava'; there are embedded"),
        ({"k": 0}, "k must be at least 1"),
        ({"sigma": -1.0}, "sigma at least 0"),
        ({"row": "last"}, "row must be one of"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalizationHeads(**options)(case("llava").replay)


def test_a_prompt_on_which_no_head_passes_is_told() -> None:
    nothing = HeadStatistics(torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 2), torch.full((1, 2, 2), torch.inf))
    with pytest.raises(ValueError, match="no head passes the criteria on prompt 0"):
        choose_heads(nothing)
    with pytest.raises(ValueError, match="there are no samples"):
        HeadSelector.from_replays([])
    with pytest.raises(ValueError, match="1 images, 2 texts"):
        HeadSelector.fit(*load_lvlm(), [None], ["a", "b"])


def test_fitting_makes_prompts_and_does_not_depend_on_batches() -> None:
    from visionsel.data.shapes import ShapesWorld

    model, processor = load_lvlm()
    samples = list(ShapesWorld("balanced", 5, 6))
    images, texts = [s.image for s in samples], [s.questions[i].text for i, s in enumerate(samples)]
    assert len({len(text.split()) for text in texts}) > 1
    found = HeadSelector.fit(model, processor, images, texts, top=3, batch_size=4)
    assert found == replace(
        HeadSelector.fit(model, processor, [[image] for image in images], texts, top=3, batch_size=1),
        tau=found.tau,
    )
    with pytest.raises(ValueError, match="top must be at least 1"):
        HeadSelector.fit(model, processor, images, texts, top=0)


@pytest.mark.slow
def test_the_preset_is_what_its_command_makes(tmp_path: Path) -> None:
    assert json.loads((PRESETS / "embedded.json").read_text())["made"]["size"] == SIZE
    made = HeadSelector.load(find_preset(tmp_path / "heads.json"))
    shipped = HeadSelector.preset("embedded")
    assert made.best(3) == shipped.best(3)
    assert made.samples == shipped.samples
    for (layer, head, count), (other_layer, other_head, other) in zip(
        made.counts, shipped.counts, strict=True
    ):
        assert (layer, head) == (other_layer, other_head) or abs(count - other) <= 5
        assert abs(count - other) <= 5  # sums in another order may tip the one or other sample


def test_the_preset_points_at_what_a_trained_model_names_or_is_asked_about() -> None:
    said, asked = captions(), questions()
    method = LocalizationHeads(heads="embedded", row="predict")
    assert said.hits(method(said.replay)) >= 0.7
    assert asked.hits(LocalizationHeads(heads="embedded")(asked.replay)) >= 0.75
    assert asked.hits(LocalizationHeads()(asked.replay)) >= 0.75
