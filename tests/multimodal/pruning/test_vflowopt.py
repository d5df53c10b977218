"""VFlowOpt: against loops written here from the paper's formulas; what it does in models."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import signals
from visionsel.multimodal.families.family import TokenLayout, View
from visionsel.multimodal.pruning import vflowopt
from visionsel.multimodal.pruning.pruner import TowerCrop
from visionsel.multimodal.pruning.vflowopt import PUBLISHED, VFlowOpt
from visionsel.multimodal.pruning.vflowopt_map import relevance
from visionsel.multimodal.pruning.vflowopt_recycle import layout_blocks
from visionsel.multimodal.pruning.vflowopt_schedule import last_keep, mean_keep, scheduled

NAN = float("nan")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# the importance map


def draw_attention(n: int, heads: int = 3, sharpness: float = 2.0, batch: int = 1) -> Tensor:
    return (sharpness * torch.randn(batch, heads, n, n, dtype=torch.float64)).softmax(-1)


def plain_importance(attention: Tensor, entropy: Tensor, threshold: float, alpha: float) -> list[float]:
    """Of one sample: `[heads, N, N]` and `[N]`."""
    heads, n, _ = attention.shape
    mean = [
        [sum(attention[h, i, j].item() for h in range(heads)) / heads for j in range(n)] for i in range(n)
    ]
    received = [sum(mean[i][j] for i in range(n)) / n for j in range(n)]
    chosen = [j for j in range(n) if received[j] > threshold * sum(received) / n]
    if not chosen:
        chosen = [max(range(n), key=lambda j: (received[j], -j))]
    exponentials = [math.exp(e) for e in entropy.tolist()]
    return [
        sum(mean[g][j] for g in chosen) / len(chosen) + alpha * exponentials[j] / sum(exponentials)
        for j in range(n)
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.5, 50.0])
@pytest.mark.parametrize("alpha", [0.0, 0.4, -1.0])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_map_is_what_global_patches_attend_to_plus_the_softmax_of_the_entropy(
    threshold: float, alpha: float, n: int
) -> None:
    attention, entropy = draw_attention(n, batch=2), 3 * torch.rand(2, n, dtype=torch.float64)
    found = vflowopt.importance(attention, entropy, threshold=threshold, alpha=alpha)
    for b in range(2):
        expected = plain_importance(attention[b], entropy[b], threshold, alpha)
        torch.testing.assert_close(found[b], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_where_no_patch_is_global_the_first_of_those_that_receive_most_is() -> None:
    attention = torch.tensor([[0.2, 0.4, 0.4], [0.1, 0.45, 0.45], [0.4, 0.3, 0.3]], dtype=torch.float64)
    found = vflowopt.importance(attention[None, None], torch.zeros(1, 3), threshold=40.0, alpha=0.0)
    assert torch.equal(found[0], attention[1])


def test_samples_of_a_ragged_batch_have_the_maps_that_they_have_alone() -> None:
    numbers = (7, 1, 4)
    valid = torch.arange(7) < torch.tensor(numbers)[:, None]
    attention = torch.full((3, 2, 7, 7), NAN, dtype=torch.float64)
    entropy = torch.full((3, 7), NAN, dtype=torch.float64)
    for b, n in enumerate(numbers):
        attention[b, :, :n, :n] = draw_attention(n, heads=2)[0]
        entropy[b, :n] = torch.rand(n, dtype=torch.float64)
    found = vflowopt.importance(attention, entropy, threshold=1.1, alpha=0.5, valid=valid)
    assert torch.equal(found[~valid], torch.zeros(int((~valid).sum()), dtype=torch.float64))
    for b, n in enumerate(numbers):
        alone = vflowopt.importance(attention[b : b + 1, :, :n, :n], entropy[b : b + 1, :n], 1.1, 0.5)[0]
        torch.testing.assert_close(found[b, :n], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("which", ["attention", "entropy"])
def test_a_map_of_nan_is_refused_by_name(which: str) -> None:
    values = {"attention": draw_attention(4), "entropy": torch.rand(1, 4)}
    values[which].view(-1)[2] = NAN
    with pytest.raises(ValueError, match=f"{which} has NaN"):
        vflowopt.importance(**values, threshold=1.0, alpha=0.0)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 1.2, 40.0])
def test_the_map_made_in_chunks_is_that_of_the_whole_matrix(skip: int, threshold: float) -> None:
    query, key = (torch.randn(3, 11 + skip, 4, dtype=torch.float64) for _ in range(2))
    attention = (query @ key.transpose(1, 2) * 0.9).softmax(-1)[None, :, skip:, skip:]
    expected = vflowopt.importance(attention, torch.zeros(1, 11), threshold=threshold, alpha=0.0)[0]
    for chunk in (1, 4, 256):
        found = relevance(TowerCrop(query, key, 0.9, skip), threshold, chunk)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


# the entropy of patches


def normalise(levels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """As an image processor does: `[B, 3, H, W]` of 0..255."""
    centre, scale = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    return ((levels / 255 - centre) / scale).to(dtype)


def plain_entropy(levels: Tensor, patch: int) -> list[float]:
    """Of one picture `[3, H, W]`, whole numbers."""
    values = []
    for top in range(0, levels.shape[1] - patch + 1, patch):
        for left in range(0, levels.shape[2] - patch + 1, patch):
            part = levels[:, top : top + patch, left : left + patch].sum(0).flatten().tolist()
            bins = Counter((int(total) + 1) // 3 for total in part)  # thirds to the nearest
            values.append(-sum(n / patch**2 * math.log2(n / patch**2) for n in bins.values()))
    return values


@pytest.mark.parametrize("levels", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_patch_of_k_levels_in_equal_parts_has_log2_k_bits_whatever_the_normalisation(
    levels: int, dtype: torch.dtype
) -> None:
    picture = (torch.arange(16) % levels * 17).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    for mean, std in ((CLIP_MEAN, CLIP_STD), ((0.5,) * 3, (0.5,) * 3)):
        found = vflowopt.patch_entropy(normalise(picture, mean, std, dtype), 4, mean, std)
        assert found.dtype == dtype
        torch.testing.assert_close(found.item(), math.log2(levels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_entropy_is_that_of_the_grey_levels_of_the_picture(dtype: torch.dtype) -> None:
    pictures = torch.randint(0, 256, (2, 3, 9, 13))
    pictures[1] //= 60  # few levels: many pixels share a bin
    pixels = normalise(pictures, CLIP_MEAN, CLIP_STD, dtype)
    found = vflowopt.patch_entropy(pixels, 4, CLIP_MEAN, CLIP_STD)
    expected = torch.tensor([plain_entropy(picture, 4) for picture in pictures], dtype=dtype)
    assert expected.shape == (2, 6)  # the rest of 9 x 13 is in no patch
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1:], vflowopt.patch_entropy(pixels[1:], 4, CLIP_MEAN, CLIP_STD))


@pytest.mark.parametrize(
    ("pixels", "arguments", "message"),
    [
        (torch.full((1, 3, 4, 4), NAN), (2, CLIP_MEAN, CLIP_STD), "pixels have NaN"),
        (torch.zeros(1, 3, 4, 4), (5, CLIP_MEAN, CLIP_STD), "no patch of 5 x 5"),
        (torch.zeros(1, 1, 4, 4), (2, CLIP_MEAN, CLIP_STD), "3 means and 3 deviations for 1 channels"),
    ],
)
def test_pixels_without_entropy_are_refused(pixels: Tensor, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vflowopt.patch_entropy(pixels, *arguments)


# recycling


def plain_recycle(
    features: Tensor, importance: list[float], keep: int, grid: tuple[int, int], block: float
) -> dict[int, Tensor]:
    """The tokens of one sample that are left, and what they have become."""
    n = len(importance)
    ranked = sorted(range(n), key=lambda i: (-importance[i], i))
    whole = ranked[: n if keep >= n else max(0, keep - int(n // block**2))]
    left = {i: features[i] for i in whole}
    groups: dict[tuple[int, int], list[int]] = {}
    for i in range(n):
        if i not in whole:
            row, column = i // grid[1], i % grid[1]
            groups.setdefault((int(row // block), int(column // block)), []).append(i)
    for members in groups.values():
        weights = [max(importance[i], 0.0) for i in members]
        if sum(weights) == 0:
            weights = [1.0] * len(members)
        best = max(members, key=lambda i: (importance[i], -i))
        pairs = zip(weights, members, strict=True)
        left[best] = sum((w / sum(weights) * features[i] for w, i in pairs), torch.zeros_like(features[0]))
    return left


def check_recycle(
    features: Tensor, importance: Tensor, keep: float | int, number: int, grid: Any, block: float
) -> None:
    mask, found = vflowopt.recycle(features, importance, keep=keep, grid=grid, block=block)
    for b in range(len(features)):
        expected = plain_recycle(features[b], importance[b].tolist(), number, grid, block)
        assert mask[b].nonzero().flatten().tolist() == sorted(expected)
        for i, value in expected.items():
            torch.testing.assert_close(found[b, i], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "block"),
    [((4, 6), 2), ((5, 7), 2), ((5, 7), 3), ((7, 3), 2.6), ((4, 4), 15.6), ((3, 5), 1), ((1, 1), 3)],
)
@pytest.mark.parametrize("keep", [1, 5, 0.3, 0.75, 1.0, 100])
def test_the_least_important_tokens_of_a_block_merge_into_their_best_by_importance(
    grid: tuple[int, int], block: float, keep: float | int
) -> None:
    n = grid[0] * grid[1]
    features, scores = torch.randn(2, n, 3, dtype=torch.float64), torch.rand(2, n, dtype=torch.float64)
    number = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
    check_recycle(features, scores, keep, number, grid, block)


@pytest.mark.parametrize("kind", ["ties", "all the same", "zeros", "negative", "mixed"])
def test_ties_go_to_the_lower_index_and_negative_importance_weighs_nothing(kind: str) -> None:
    features = torch.randn(1, 20, 3, dtype=torch.float64)
    scores = {
        "ties": torch.randint(1, 4, (1, 20)).double(),
        "all the same": torch.full((1, 20), 0.25, dtype=torch.float64),
        "zeros": torch.zeros(1, 20, dtype=torch.float64),
        "negative": -torch.rand(1, 20, dtype=torch.float64),
        "mixed": torch.randn(1, 20, dtype=torch.float64),
    }[kind]
    for keep in (1, 4, 9, 19):
        check_recycle(features, scores, keep, keep, (4, 5), 2)


def test_keeping_all_changes_nothing_and_keeping_one_gives_the_mean_weighted_by_importance() -> None:
    features, scores = torch.randn(2, 16, 3), torch.rand(2, 16)
    mask, found = vflowopt.recycle(features, scores, keep=1.0, grid=(4, 4), block=2)
    assert mask.all()
    assert torch.equal(found, features)
    mask, found = vflowopt.recycle(features, scores, keep=1, grid=(4, 4), block=4)
    assert torch.equal(mask, scores == scores.amax(1, keepdim=True))
    mean = (features * scores[..., None]).sum(1) / scores.sum(1, keepdim=True)
    torch.testing.assert_close(found[mask], mean)


def test_recycling_half_precision_is_computed_in_float32_and_each_sample_by_itself() -> None:
    features, scores = torch.randn(3, 30, 8).bfloat16(), torch.rand(3, 30).bfloat16()
    mask, found = vflowopt.recycle(features, scores, keep=9, grid=(5, 6), block=2.5)
    wide_mask, wide = vflowopt.recycle(features.float(), scores.float(), keep=9, grid=(5, 6), block=2.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(mask, wide_mask)
    assert torch.equal(found, wide.bfloat16())
    for b in range(3):
        alone = vflowopt.recycle(features[b : b + 1], scores[b : b + 1], keep=9, grid=(5, 6), block=2.5)
        assert torch.equal(alone[0][0], mask[b])
        assert torch.equal(alone[1][0], found[b])


def test_what_cannot_be_recycled_is_refused() -> None:
    features, scores = torch.randn(1, 12, 2), torch.rand(1, 12)
    with pytest.raises(ValueError, match="a grid of 3 x 5 has 15 tokens; got features"):
        vflowopt.recycle(features, scores, keep=4, grid=(3, 5), block=2)
    for block in (0, 0.5, NAN):
        with pytest.raises(ValueError, match="block must be"):
            vflowopt.recycle(features, scores, keep=4, grid=(3, 4), block=block)
    for keep in (0, 1.5, True):
        with pytest.raises(ValueError, match="keep must be"):
            vflowopt.recycle(features, scores, keep=keep, grid=(3, 4), block=2)
    scores[0, 3] = NAN
    with pytest.raises(ValueError, match="NaN"):
        vflowopt.recycle(features, scores, keep=4, grid=(3, 4), block=2)


def test_blocks_do_not_reach_from_view_to_view_and_newlines_are_in_none() -> None:
    base = View("thumbnail", torch.arange(4).view(2, 2), torch.arange(4).view(2, 2))
    tiles = View("tiles", torch.tensor([[4, 5, 6], [8, 9, 10]]), torch.arange(4, 10).view(2, 3))
    other = TokenLayout(2, (View("image", torch.tensor([[0, 1]]), torch.tensor([[10, 11]])),))
    found = layout_blocks([TokenLayout(12, (base, tiles)), other], block=2)
    assert found.tolist() == [0, 0, 0, 0, 1, 1, 2, -1, 1, 1, 2, -1, 3, 3]


# schedules


def test_published_schedules_keep_their_budgets_on_28_layers() -> None:
    for keep, plan in PUBLISHED.items():
        assert abs(mean_keep(plan.vision_keep, plan.stage_keep, (9, 18), 28) - keep) < 1e-3
        assert VFlowOpt(keep=keep).schedule(28) == plan
        assert VFlowOpt(keep=keep).starts(28) == (9, 18)


@pytest.mark.parametrize("depth", [4, 28, 32])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.375, 0.7, 0.95, 1.0])
def test_other_budgets_lie_between_with_the_input_ratio_solved(keep: float, depth: int) -> None:
    pruner = VFlowOpt(keep=keep)
    plan = pruner.schedule(depth)
    mean = mean_keep(plan.vision_keep, plan.stage_keep, pruner.starts(depth), depth)
    assert mean == pytest.approx(keep, abs=1e-9)
    assert scheduled(0.375).stage_keep == pytest.approx((0.866, 0.682))
    assert VFlowOpt(keep=60).schedule(depth, 100) == VFlowOpt(keep=0.6).schedule(depth)


def test_the_mean_over_layers_is_the_sum_over_layers() -> None:
    left, counted = 0.8, []
    for layer in range(10):
        left *= {3: 0.5, 7: 0.25}.get(layer, 1.0)
        counted.append(left)
    assert mean_keep(0.8, (0.5, 0.25), (3, 7), 10) == pytest.approx(sum(counted) / 10)
    assert last_keep(sum(counted) / 10, 0.8, (0.5,), (3, 7), 10) == pytest.approx(0.25)
    assert last_keep(0.9, 0.8, (0.5,), (3, 7), 10) == 1.0
    assert last_keep(0.4, 0.8, (0.5,), (3, 7), 10) is None  # 0.8 * (3 + 2) is all of it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"vision_keep": 1.2}, "vision_keep"),
        ({"stage_keep": (0.5, 0.0)}, "stage_keep"),
        ({"stage_keep": (0.5,)}, "stage_keep"),
        ({"layers": (3,)}, "stage_keep"),
        ({"threshold": -1.0}, "threshold"),
        ({"block": 0.5}, "block"),
        ({"alpha": NAN}, "alpha"),
    ],
)
def test_values_out_of_range_are_refused_at_construction(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VFlowOpt(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": (2, 9)}, "choose one of 1 to 3"),
        ({"layers": (0, 2)}, "choose one of 1 to 3"),
        ({"layers": (2, 2)}, "layers must rise"),
        ({"layers": (0.2, 0.3)}, "layers must rise"),
        ({"keep": 0.6, "layers": (1, 2), "stage_keep": (0.2, 0.5)}, "leaves at most 0.350"),
    ],
)
def test_what_a_decoder_cannot_do_is_refused_on_entry(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), VFlowOpt(**wrong)(tiny.make_model("llava")):
        pass


# in models


def kept_tokens(model: Any, inputs: dict[str, Any], pruner: VFlowOpt) -> list[list[list[int]]]:
    """For each stage and sample the numbers of the image tokens that are left."""
    with torch.no_grad(), pruner(model) as pruned:
        model(**inputs)
    image = inputs["input_ids"] == tiny.IMAGE
    return [
        [row[here].nonzero().flatten().tolist() for row, here in zip(kept, image, strict=True)]
        for _, kept in pruned.kept
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("threshold", [0.7, 1.3, 60.0])
def test_in_a_model_it_reads_the_tower_recycles_and_drops_by_the_same_map(
    alpha: float, threshold: float
) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    levels = torch.randint(0, 256, (2, 3, 16, 16))
    levels[:, :, :8] //= 50
    inputs["pixel_values"] = normalise(levels, CLIP_MEAN, CLIP_STD, torch.float64)
    pruner = VFlowOpt(
        vision_keep=0.75,
        layers=(1, 3),
        stage_keep=(0.8, 0.5),
        threshold=threshold,
        block=2,
        alpha=alpha,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
    seen = signals(model, inputs)
    entered: list[Tensor] = []
    norm = model.model.language_model.layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    stages = kept_tokens(model, inputs, pruner)
    handle.remove()
    query, key = seen.tower[-2]  # LLaVA uses the output of the last layer but one
    attention = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 1:, 1:]
    before = seen.at_image(seen.hidden[0])
    for b in range(2):
        entropy = torch.tensor(plain_entropy(levels[b], 4), dtype=torch.float64)
        scores = plain_importance(attention[b], entropy, threshold, alpha)
        left = plain_recycle(before[b], scores, 12, (4, 4), 2)
        assert stages[0][b] == sorted(left)
        text = int(seen.text[b].sum())
        found = entered[0][b, -text - len(left) : -text]
        torch.testing.assert_close(found, torch.stack([left[i] for i in sorted(left)]), rtol=0, atol=1e-12)
        alive = sorted(left, key=lambda i: (-scores[i], i))
        for stage, ratio in ((1, 0.8), (2, 0.5)):
            alive = alive[: len(alive) - round(len(alive) * (1 - ratio))]
            assert stages[stage][b] == sorted(alive)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_budget_of_everything_leaves_the_model_as_it_is(name: str) -> None:
    model, inputs = tiny.make_model(name), tiny.make_inputs(name)
    with torch.no_grad():
        expected = model(**inputs).logits
        with VFlowOpt(keep=1.0)(model):
            found = model(**inputs).logits
    assert torch.equal(found, expected)


def test_newline_tokens_are_the_most_important() -> None:
    model = tiny.make_model("llava_next")
    inputs = tiny.make_inputs("llava_next", batch=1, image_sizes=[(32, 32)])
    # 16 tokens of the image, then 8 rows of 8 tokens and a newline
    newlines = [16 + 9 * row + 8 for row in range(8)]
    [first, *_] = kept_tokens(model, inputs, VFlowOpt(vision_keep=8 / 88, stage_keep=(1.0, 1.0), block=24.0))
    assert set(newlines) < set(first[0])
    assert len(first[0]) == 8 + 2  # and a recycled token of the image and of the tiles


def one_of(name: str, inputs: dict[str, Any], sample: int) -> dict[str, Any]:
    """A sample of a batch of one image each, by itself and without padding."""
    real = inputs["attention_mask"][sample].bool()
    rows = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    alone = {key: value[sample : sample + 1, real] for key, value in inputs.items() if key in rows}
    if name in tiny.QWEN:
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        alone["image_grid_thw"] = inputs["image_grid_thw"][sample : sample + 1]
        alone["pixel_values"] = inputs["pixel_values"].split(sizes)[sample]
    else:
        alone |= {key: value[sample : sample + 1] for key, value in inputs.items() if key not in rows}
    return alone


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3"]
)
@pytest.mark.parametrize("keep", [0.4, 9])
def test_the_choice_for_a_sample_does_not_depend_on_the_batch(name: str, keep: float | int) -> None:
    model, inputs = tiny.make_model(name), tiny.make_inputs(name)
    pruner = VFlowOpt(keep=keep, alpha=0.7, threshold=1.1)
    together = kept_tokens(model, inputs, pruner)
    for sample in range(2):
        alone = kept_tokens(model, one_of(name, inputs, sample), pruner)
        assert [stage[0] for stage in alone] == [stage[sample] for stage in together]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("token", [0, 2, 7, 19])
def test_entropy_reaches_the_token_of_its_patches_though_the_tower_may_sort_them(
    name: str, token: int
) -> None:
    model, inputs = tiny.make_model(name), tiny.make_inputs(name, batch=1, image_sizes=[(32, 40)])
    inputs["pixel_values"] = torch.zeros(80, 96, dtype=torch.float64)
    inputs["pixel_values"][4 * token : 4 * token + 4] = torch.randn(4, 96, dtype=torch.float64)
    pruner = VFlowOpt(vision_keep=0.05, stage_keep=(0.5, 1.0), block=24.0, alpha=1e3)
    first, second, _ = kept_tokens(model, inputs, pruner)
    assert len(first[0]) == 2  # one whole, one recycled
    assert second[0] == [token]


@pytest.mark.parametrize("crop", [0, 1])
def test_entropy_reaches_the_right_crop_of_samples_with_different_numbers_of_them(crop: int) -> None:
    model = tiny.make_model("llava_next")
    inputs = tiny.make_inputs("llava_next", image_sizes=[(16, 16), (32, 32)])
    pixels = torch.where(inputs["pixel_values"] == 0, 0.0, 0.3)
    assert not pixels[0, 2:].any()  # filled up
    pixels[1, crop, :, 4:8, 8:12] = torch.randn(3, 4, 4, dtype=torch.float64)
    inputs["pixel_values"] = pixels
    pruner = VFlowOpt(vision_keep=0.01, stage_keep=(0.3, 1.0), block=24.0, alpha=1e3)
    second = kept_tokens(model, inputs, pruner)[1]
    # row 1, column 2 of the whole image, or of the first of four tiles: 8 tokens and a newline a row
    assert second[1] == [4 + 2 if crop == 0 else 16 + 9 + 2]


def test_it_works_inside_generate_with_beams_and_a_video() -> None:
    model, inputs = tiny.make_model("llava_onevision"), tiny.make_inputs("llava_onevision", batch=1)
    with VFlowOpt(keep=0.3)(model):
        assert model.generate(**inputs, max_new_tokens=2, num_beams=2).shape[0] == 1
    inputs = tiny.make_inputs("qwen2_vl", batch=1, images=0, video=True)
    model = tiny.make_model("qwen2_vl")
    with VFlowOpt(keep=0.5, alpha=0.5)(model) as pruned:
        model.generate(**inputs, max_new_tokens=2)
    video = inputs["input_ids"] == tiny.VIDEO
    assert 1 <= int((pruned.kept[0][1] & video).sum()) < int(video.sum())
