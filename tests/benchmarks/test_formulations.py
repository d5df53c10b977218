"""What the operators are compared with computes the same, and anything else is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, formulations, models, paired
from visionsel.layers.lepe_attention import AttentionLePE
from visionsel.models import acceleration

NEIGHBORHOODS = ["naive gather", "naive unfold", "dense SDPA"]
ROUTINGS = ["authors'", "authors', NCHW", "dense SDPA"]
SMALL: list[tuple[cases.Case, list[str]]] = [
    (cases.Neighborhood(8, 2, 1, False, 2, 3, 4), NEIGHBORHOODS),
    (cases.Neighborhood(8, 2, 2, True, 2, 3, 4), NEIGHBORHOODS),
    (cases.Neighborhood(9, 1, 2, True, 1, 3, 4), ["naive gather", "dense SDPA"]),  # grids of two sizes
    (cases.BilevelRouting((8, 12), 2, 3, 4, 2, 4), ROUTINGS),
    (cases.BilevelRouting((7, 9), 2, 3, 4, 1, 4), ["authors'"]),  # padded
    (cases.Halo(8, 16, 2, 2, 4, 1), ["timm"]),
    (cases.Focal(6, 8, 2, 2), ["authors'", "timm", "transformers"]),
    (cases.Focal(7, 8, 3), ["authors'", "timm", "transformers"]),
]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("case", "others"), SMALL, ids=lambda value: getattr(value, "name", ""))
def test_all_ways_to_compute_a_case_agree_with_the_reference(
    case: cases.Case, others: list[str], mode: str
) -> None:
    if "transformers" in others:
        pytest.importorskip("transformers", reason="needs the multimodal extra")
    prepared = case.prepare(dtype=torch.float64)
    functions, left_out = cases.functions(case, prepared, ["auto", "reference", "no such"], mode)
    assert list(functions) == [*others, "auto", "reference"]
    assert left_out["no such"] == "the operator has no such backend"
    if case.operator == "neighborhood":
        assert "cannot serve this call" in left_out["natten"]  # in float64
    # float64, sums in another order
    paired.check(case.name, {name: function() for name, function in functions.items()}, tolerance=1e-10)


@pytest.mark.parametrize("wrong", ["bias", "routing", "levels"])
def test_a_wrong_formulation_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Tensor]
    case: cases.Case
    if wrong == "bias":
        case, name, right = SMALL[1][0], "neighborhood_by_unfold", formulations.neighborhood_by_unfold

        def broken(q: Tensor, k: Tensor, v: Tensor, kernel: int, dilation: int, bias: Tensor) -> Tensor:
            return right(q, k, v, kernel, dilation, bias.flip(1))

    elif wrong == "routing":
        case, name, right = SMALL[3][0], "bilevel_routing_nchw", formulations.bilevel_routing_nchw

        def broken(layer: Any, x: Tensor) -> Tensor:
            monkeypatch.setattr(layer, "topk", 2)
            return right(layer, x)

    else:
        case, name, right = SMALL[6][0], "focal_modulation", formulations.focal_modulation

        def broken(layer: Any, x: Tensor) -> Tensor:
            return right(layer, x) + 1e-3

    monkeypatch.setattr(formulations, name, broken)
    functions, _ = cases.functions(case, case.prepare(), ["auto"], "forward")
    with pytest.raises(RuntimeError, match=r"differs from .* of its largest value"):
        paired.compare(case.name, functions, rounds=1)


def test_full_attention_is_that_of_the_layer() -> None:
    layer = AttentionLePE(16, num_heads=2, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(formulations.full_attention(layer, x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "side", "others"),
    [
        ("nat_tiny", 64, ["naive gather", "auto", "accelerated", "packed"]),
        ("biformer_tiny", 112, ["authors'", "auto", "accelerated", "packed"]),
        ("focalnet_tiny_srf", 64, ["timm", "transformers", "accelerated", "packed"]),
    ],
)
def test_whole_models_agree(name: str, side: int, others: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the multimodal extra")
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name: create(name, **({} if "focal" in name else {"depths": (1, 1, 1, 1)})),
    )
    # what is faster on this machine is not what is tested
    monkeypatch.setattr(acceleration, "onednn_is_faster", lambda *_: True)
    made, left_out = models.pair(name)
    assert (list(made), left_out) == (others, {})
    if others[0] != "timm":  # a layer in each of four blocks was exchanged
        assert len([m for m in made[others[0]].modules() if "forward" in vars(m)]) == 4
    image = torch.randn(1, 3, side, side)
    # float32, through four blocks
    paired.check(name, {key: models.forward(model, image) for key, model in made.items()}, tolerance=1e-4)
    assert all(not model.training for model in made.values())


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (SMALL[0][0], "naive gather"),
        (SMALL[3][0], "authors'"),
        (SMALL[5][0], "reference"),  # timm computes each relative logit about twice
        (SMALL[6][0], "authors'"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_work_of_a_case_is_what_its_plainest_code_multiplies(case: cases.Case, name: str) -> None:
    prepared = case.prepare()
    variant = prepared.others[name] if name in prepared.others else prepared.ours(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        variant.call()
    assert case.work().flops == counter.get_total_flops()
