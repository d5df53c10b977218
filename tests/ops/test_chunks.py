"""Attention in chunks on the CPU: against plain code and the operators' references, and when it is taken."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from visionsel import ops
from visionsel.ops import chunks
from visionsel.ops.bilevel_routing import chunked

GROUPS, QUERIES, KEYS = 7, 3, 5


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few logits, so that small calls have many, of which the last is not full."""
    monkeypatch.setattr(chunks, "_NUMBERS", 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def biased(kind: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Tensors that learn, the attention of them in chunks, and the same in plain code."""
    tensors = [normal(GROUPS, QUERIES, 4), normal(GROUPS, KEYS, 4, seed=1), normal(GROUPS, KEYS, 2, seed=2)]
    index, spread, rows = None, None, None
    if kind == "table":
        tensors.append(normal(3, QUERIES, KEYS, seed=3))
        tensors[-1][1, :, 2:] = -torch.inf
        index = torch.tensor([0, 1, 1, 2, 0, 1, 0])
    elif kind == "factors":
        tensors.append(normal(GROUPS, QUERIES, 2, seed=3))
        spread = normal(2, KEYS, seed=4)
    elif kind == "rows":
        tensors[1:] = [normal(11, 4, seed=1), normal(11, 2, seed=2), normal(3, QUERIES, KEYS, seed=3)]
        index = torch.tensor([0, 1, 1, 2, 0, 1, 0])
        rows = torch.randint(11, (GROUPS, KEYS), generator=torch.Generator().manual_seed(0))
    elif kind == "routed":
        index = torch.tensor([[0, 3], [1, 1], [6, 2], [5, 4], [4, 0], [2, 6], [3, 5]])
        tensors = [normal(GROUPS, QUERIES, 4), normal(GROUPS, 5 * 4, seed=1), normal(GROUPS, 5 * 2, seed=2)]
        return (
            tensors,
            partial(chunked.attend, index=index, scale=0.3),
            partial(chunked.plain, index=index, scale=0.3),
        )

    def fast(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return chunks.attend(query, key, value, 0.3, bias, index, spread, rows)

    def slow(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return chunks.plain(query, key, value, bias, index, spread, rows, 0.3)

    return tensors, fast, slow


KINDS = ["none", "table", "factors", "rows", "routed"]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learnt", [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (1, 2)])
def test_it_is_plain_attention_with_the_gradients_that_are_needed(kind: str, learnt: tuple[int, ...]) -> None:
    tensors, fast, slow = biased(kind)
    learnt = tuple(place for place in learnt if place < len(tensors))
    if not learnt:
        pytest.skip("there is no bias to learn")
    for place in learnt:
        tensors[place].requires_grad_()
    results = []
    for attend in (fast, slow):
        out = attend(*tensors)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [tensors[place] for place in learnt])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fast(*tensors), results[1][0], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_orders_are_those_of_finite_differences(kind: str) -> None:
    tensors, fast, _ = biased(kind)
    if kind == "table":
        tensors[-1] = normal(3, QUERIES, KEYS, seed=3)  # no difference of infinite numbers
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(fast, leaves)
    assert torch.autograd.gradgradcheck(fast, leaves)


@pytest.mark.usefixtures("few")
def test_one_tensor_may_be_query_key_and_value() -> None:
    x = normal(GROUPS, QUERIES, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: chunks.attend(x, x, x, 0.3), x)
    index = torch.arange(GROUPS)[:, None]

    def routed(x: Tensor) -> Tensor:
        rows = x.flatten(1)
        return chunked.attend(x, rows, rows, index, 0.3)

    assert torch.autograd.gradgradcheck(routed, x)


def test_a_bias_is_a_table_or_factors() -> None:
    x, bias = normal(GROUPS, QUERIES, 2), normal(GROUPS, QUERIES, QUERIES)
    with pytest.raises(ValueError, match="pass one of the two"):
        chunks.attend(x, x, x, 0.3, bias)


Attention = Callable[..., Tensor]


def neighborhood(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, backend: str) -> Tensor:
    return ops.neighborhood_attention(q, k, v, (3, 5), (2, 1), table, 0.4, backend)


def halo(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, backend: str) -> Tensor:
    height, width = (None, None) if table is None else table
    return ops.halo_attention(q, k, v, 4, 1, height, width, backend=backend)


def bilevel(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, backend: str) -> Tensor:
    return ops.bilevel_routing_attention(q, k, v, (4, 4), 2, 0.4, backend)


# operator, the shape of its table, what computes in chunks when training and when not
CASES: dict[str, tuple[Attention, tuple[int, ...] | None, tuple[str, str | None]]] = {
    "neighborhood": (neighborhood, (2, 5, 9), ("neighborhood.tiled.attend_in_chunks", None)),
    "neighborhood without bias": (neighborhood, None, ("neighborhood.tiled.attend_in_chunks", None)),
    "halo": (halo, (2, 11, 4), ("halo.chunked.attend", "halo.chunked.attend")),
    "halo without tables": (halo, None, ("halo.chunked.attend", "halo.chunked.attend")),
    "bilevel routing": (bilevel, None, ("bilevel_routing.chunked.attend", "bilevel_routing.chunked.attend")),
}


def call(name: str, dtype: torch.dtype = torch.float64) -> tuple[Attention, list[Tensor | None]]:
    attend, table, _ = CASES[name]
    q, k, v = (normal(2, 16, 20, 2, 4, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    bias = None if table is None else normal(*table, seed=3).to(dtype).requires_grad_()
    return attend, [q, k, v, bias]


def leaves(tensors: list[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def watch(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What would be called for chunks; it still works."""
    target = CASES[name][2][0 if training else 1]
    assert target is not None
    path, function = f"visionsel.ops.{target}".rsplit(".", 1)
    module = import_module(path)
    watched = Mock(wraps=getattr(module, function))
    monkeypatch.setattr(module, function, watched)
    return watched


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_operators_take_it_for_large_calls_and_equal_their_reference(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, tensors = call(name)
    if CASES[name][2][not training] is None:
        pytest.skip("without gradients the tiles of a kind share a table")
    watched = watch(name, training, monkeypatch)
    results = []
    for backend in ("tiled", "reference"):
        with torch.set_grad_enabled(training):
            out = attend(*tensors, backend)
        results.append([out])
        if training:
            results[-1] += torch.autograd.grad(out.sin().sum(), leaves(tensors))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    watched.assert_called_once()


@pytest.mark.parametrize("name", CASES)
def test_small_calls_are_left_to_plain_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, tensors = call(name)
    watched = watch(name, True, monkeypatch)
    attend(*tensors, "tiled")
    watched.assert_not_called()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_left_to_plain_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, tensors = call(name, torch.bfloat16)
    watched = watch(name, True, monkeypatch)
    attend(*tensors, "tiled")
    watched.assert_not_called()


def derivative(attend: Attention, tensors: list[Tensor | None]) -> Tensor:
    """Of the sum, by each query."""
    q, *rest = tensors
    return torch.func.grad(lambda q: attend(q, *rest, "tiled").sin().sum())(q)


def tangent(attend: Attention, tensors: list[Tensor | None]) -> Tensor:
    """Of the result, where all queries move alike."""
    q, *rest = tensors
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        moved = torch.autograd.forward_ad.unpack_dual(attend(dual, *rest, "tiled")).tangent
    assert moved is not None
    return moved


def compiled(attend: Attention, tensors: list[Tensor | None]) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(attend, fullgraph=True, backend=aot_eager)(*tensors, "tiled")


def traced(attend: Attention, tensors: list[Tensor | None]) -> Tensor:
    def of_all(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        return attend(q, k, v, table, "tiled")

    present = tuple(leaves(tensors))
    return torch.jit.trace(of_all, present, check_trace=False)(*present)


@pytest.mark.parametrize("way", [derivative, tangent, compiled, traced])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated")  # forward_ad scripts its formulas
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_compilers_and_tracers_see_plain_products(
    name: str, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is tangent and name == "bilevel routing":
        pytest.skip("PyTorch's fused kernel on the CPU has no forward-mode derivative")
    attend, tensors = call(name)
    expected = way(attend, tensors)
    monkeypatch.setattr(chunks, "_NUMBERS", 4)
    watched = watch(name, True, monkeypatch)
    torch.testing.assert_close(way(attend, tensors), expected, rtol=0, atol=1e-12)
    watched.assert_not_called()


@pytest.mark.usefixtures("few")
def test_what_is_routed_is_not_kept_for_the_backward() -> None:
    attend, tensors = call("bilevel routing")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(*tensors, "tiled")
    # maps of queries, keys, values and results, and the routing; twice the keys would be routed, and as many
    # logits as ten maps
    assert max(kept) <= leaves(tensors)[0].numel()


@pytest.mark.usefixtures("few")
def test_gradient_checkpointing_changes_no_bit() -> None:
    for name in CASES:
        attend, tensors = call(name)
        plain = torch.autograd.grad(attend(*tensors, "tiled").sin().sum(), leaves(tensors))
        out = torch.utils.checkpoint.checkpoint(attend, *tensors, "tiled", use_reentrant=False)
        again = torch.autograd.grad(out.sin().sum(), leaves(tensors))
        assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_parts_cover_all_groups_once_and_none_is_longer_than_the_first() -> None:
    assert chunks.slices(0, 5) == []
    for groups in (1, 7, 8, 9, 100):
        parts = chunks.slices(groups, chunks._NUMBERS * torch.get_num_threads() // 8)
        assert [n for part in parts for n in range(part.start, part.stop)] == list(range(groups))
        lengths = [part.stop - part.start for part in parts]
        assert lengths[0] == max(lengths) <= 8
        assert max(lengths) - min(lengths) <= 1
