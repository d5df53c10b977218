"""The flex backends: masks, blocks and biases on dense matrices, then the compiled kernels."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask

from visionsel.ops import flexible
from visionsel.ops.bilevel_routing import bilevel_routing_attention
from visionsel.ops.bilevel_routing import flex as bilevel
from visionsel.ops.bilevel_routing.reference import reference as routed_reference
from visionsel.ops.neighborhood import flex as neighborhood
from visionsel.ops.neighborhood import neighborhood_attention
from visionsel.ops.neighborhood.reference import reference as neighborhood_reference

# float32: reordered sums of some hundred terms and an exponential of 20 ulp; float64: sums at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}

MODULES = pytest.mark.parametrize("module", [neighborhood, bilevel], ids=["neighborhood", "bilevel"])

# map, kernel, dilation; tiles are 8 x 8
NEIGHBORHOODS = [
    pytest.param((7, 7), (7, 7), (1, 1), id="one window"),
    pytest.param((25, 17), (5, 5), (1, 1), id="twelve tiles"),
    pytest.param((19, 11), (3, 9), (1, 1), id="unequal sides"),
    pytest.param((8, 16), (7, 3), (1, 2), id="no padding"),
    pytest.param((17, 9), (3, 3), (2, 3), id="grids of unequal size, a tile of padding alone"),
    pytest.param((5, 30), (1, 7), (3, 4), id="a kernel of one row"),
]

# windows, their queries, their keys, topk
ROUTINGS = [
    pytest.param((3, 2), (3, 3), (3, 3), 2, id="padded"),
    pytest.param((2, 2), (8, 8), (8, 8), 3, id="whole blocks"),
    pytest.param((2, 3), (4, 4), (2, 1), 1, id="pooled keys"),
    pytest.param((2, 2), (9, 8), (4, 4), 4, id="queries of two blocks' size, every window"),
    pytest.param((1, 1), (2, 2), (2, 2), 1, id="one window"),
]


def maps(
    *shape: int, value_dim: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dims = (shape[-1], shape[-1], shape[-1] if value_dim is None else value_dim)
    q, k, v = (torch.randn(*shape[:-1], d, generator=generator, dtype=torch.float64).to(dtype) for d in dims)
    return q, k, v


def table(heads: int, kernel: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def windowed_maps(
    windows: tuple[int, int],
    queries: tuple[int, int],
    keys: tuple[int, int],
    head_dim: int = 3,
    value_dim: int = 5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (2, windows[0] * queries[0], windows[1] * queries[1], 2, head_dim)
    q = maps(*shape, dtype=dtype)[0]
    shape = (2, windows[0] * keys[0], windows[1] * keys[1], 2, head_dim)
    return q, *maps(*shape, value_dim=value_dim, dtype=dtype, seed=1)[1:]


def routing(windows: tuple[int, int], topk: int, seed: int = 0) -> Tensor:
    """`[2, windows, topk]`, without repetition."""
    generator = torch.Generator().manual_seed(seed)
    count = windows[0] * windows[1]
    return torch.rand(2, count, count, generator=generator).argsort(-1)[..., :topk]


def listed(number: Tensor, index: Tensor) -> Tensor:
    """A dense boolean matrix of a BlockMask's list of blocks."""
    first = torch.arange(index.shape[-1]) < number.unsqueeze(-1)
    return torch.zeros_like(first.expand(index.shape)).scatter(-1, index.long(), first)


def by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float = 1.0,
    kernel_options: object = None,
) -> Tensor:
    """What flex_attention's kernels compute, on dense matrices: the blocks listed, and the mask inside of
    those that are not listed as full. The kernel of the gradient of keys has the transposed lists.
    """
    batch = torch.arange(query.shape[0])[:, None, None, None]
    head = torch.arange(query.shape[1])[:, None, None]
    row, column = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    logits = query @ key.mT * scale
    if score_mod is not None:
        logits = score_mod(logits, batch, head, row, column)
    if block_mask is not None:
        partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
        assert torch.equal(partial.mT, listed(block_mask.q_num_blocks, block_mask.q_indices))
        full = torch.zeros_like(partial)
        if block_mask.full_kv_num_blocks is not None:
            full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
            assert torch.equal(full.mT, listed(block_mask.full_q_num_blocks, block_mask.full_q_indices))
        assert not (full & partial).any()
        full, partial = (
            x.repeat_interleave(block_mask.BLOCK_SIZE[0], -2).repeat_interleave(block_mask.BLOCK_SIZE[1], -1)
            for x in (full, partial)
        )
        seen = full | partial & block_mask.mask_mod(batch, head, row, column)
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ value


def attended(module: ModuleType, call: tuple[Any, ...]) -> Tensor:
    """What the backend would compile, run as it stands."""
    if module is bilevel:
        return bilevel.attend(*call)
    query, kernel, dilation = call[0], call[3], call[4]
    plan = neighborhood.build_plan(query.shape[1], query.shape[2], kernel, dilation, query.device)
    return neighborhood.attend(*call, plan)


def assert_same(module: ModuleType, call: tuple[Any, ...], atol: float) -> None:
    """Values and all gradients are those of the reference."""
    results = []
    for fast in (True, False):
        leaves = [
            x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call
        ]
        if fast:
            out = attended(module, tuple(leaves))
        elif module is bilevel:
            out = routed_reference(*leaves, None)
        else:
            out = neighborhood_reference(*leaves)
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for fast_one, truth in zip(*results, strict=True):
        size = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast_one, truth, rtol=0, atol=atol * size)


@pytest.mark.parametrize(("size", "kernel", "dilation"), NEIGHBORHOODS)
@pytest.mark.parametrize("biased", [True, False])
def test_tiles_hold_the_neighbors_and_the_mask_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    biased: bool,
) -> None:
    monkeypatch.setattr(flexible, "flex_attention", by_blocks)
    q, k, v = maps(2, *size, 2, 3, value_dim=5)
    bias = table(2, kernel) if biased else None
    assert_same(neighborhood, (q, k, v, kernel, dilation, bias, 0.7), ATOL[q.dtype])


def test_a_tile_visits_only_what_its_windows_reach() -> None:
    number, index, _, _ = neighborhood.build_plan(40, 40, (7, 7), (1, 1), torch.device("cpu"))
    inner = 2 * 5 + 2  # of 5 x 5 tiles
    assert number[0, 0, inner] == 9
    assert index[0, 0, inner, :9].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    number, index, _, _ = neighborhood.build_plan(16, 16, (3, 3), (2, 2), torch.device("cpu"))
    assert number.flatten().tolist() == [1, 1, 1, 1]  # each of four grids is a tile that sees itself
    assert index[0, 0, :, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("windows", "queries", "keys", "topk"), ROUTINGS)
def test_blocks_are_the_routed_windows(
    monkeypatch: pytest.MonkeyPatch,
    windows: tuple[int, int],
    queries: tuple[int, int],
    keys: tuple[int, int],
    topk: int,
) -> None:
    monkeypatch.setattr(flexible, "flex_attention", by_blocks)
    q, k, v = windowed_maps(windows, queries, keys)
    assert_same(bilevel, (q, k, v, windows, 0.7, routing(windows, topk)), ATOL[q.dtype])


@pytest.mark.parametrize("tokens", [(3, 3), (4, 4)], ids=["padded", "whole blocks"])
def test_windows_named_twice_count_twice(monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, int]) -> None:
    monkeypatch.setattr(flexible, "flex_attention", by_blocks)
    q, k, v = windowed_maps((2, 2), tokens, tokens)
    index = torch.tensor([[0, 0, 3], [1, 2, 3], [2, 2, 2], [3, 1, 3]]).expand(2, -1, -1)
    # the logarithm of the number of times is a float32
    assert_same(bilevel, (q, k, v, (2, 2), 0.7, index), 1e-6)


def test_without_an_index_every_window_attends_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexible, "flex_attention", by_blocks)
    q, k, v = windowed_maps((2, 3), (3, 3), (2, 1))
    every = torch.arange(6).expand(2, 6, 6)
    out = bilevel.attend(q, k, v, (2, 3), 0.7, None)
    torch.testing.assert_close(
        out, routed_reference(q, k, v, (2, 3), 0.7, every, None), rtol=0, atol=ATOL[q.dtype]
    )


@pytest.mark.parametrize(
    ("tokens", "block"), [(1, 16), (16, 16), (17, 32), (49, 64), (64, 64), (65, 128), (247, 256), (260, 320)]
)
def test_blocks_have_the_sizes_that_the_kernels_take(tokens: int, block: int) -> None:
    assert bilevel.block_size(tokens) == block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("blocks", [(64, 64), (16, 16), (64, 16), (16, 64), (192, 32)])
def test_tile_sizes_divide_the_blocks_and_each_other(
    dtype: torch.dtype, head_dim: int, blocks: tuple[int, int]
) -> None:
    x = torch.empty(1, 1, 1, head_dim, dtype=dtype)
    options = flexible.kernel_options(x, x, *blocks)
    for name, size in options.items():
        if "BLOCK" in name:
            assert size >= 16
            assert blocks[0 if "_M" in name else 1] % size == 0, name
    # what the backward kernel asserts
    assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0
    assert options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's own uncompiled flex_attention, which knows masks but no blocks, with gradients on the CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    yield
    torch._dynamo.reset()


def by_torch_uncompiled(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.usefixtures("uncompiled"),
        # what it is for
        pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
        # torch asks each tensor that comes into a graph for its gradient
        pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    ):
        test = mark(test)
    return test


@by_torch_uncompiled
def test_uncompiled_flex_attention_reads_the_same_mask_and_bias() -> None:
    q, k, v = maps(1, 9, 6, 2, 3, value_dim=5)
    assert_same(neighborhood, (q, k, v, (3, 3), (2, 1), table(2, (3, 3)), 0.7), ATOL[q.dtype])


@by_torch_uncompiled
@pytest.mark.parametrize("tokens", [(3, 3), (4, 4)], ids=["padded", "whole blocks"])
def test_uncompiled_flex_attention_reads_the_routing_from_the_mask(tokens: tuple[int, int]) -> None:
    q, k, v = windowed_maps((2, 2), tokens, tokens)
    assert_same(bilevel, (q, k, v, (2, 2), 0.7, routing((2, 2), 2)), ATOL[q.dtype])


@pytest.fixture
def cpu_kernel() -> Iterator[None]:
    """Kernels compiled on the CPU, none of which was compiled before."""
    x = torch.zeros(1, 8, 8, 1, 4)
    if reason := flexible.refusal(x, x, learns=False):
        pytest.skip(reason)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernel")
@torch.no_grad()
def test_the_compiled_neighborhood_equals_the_reference() -> None:
    kernel, dilation = (7, 5), (1, 2)
    for seed in (0, 1):
        q, k, v = maps(2, 19, 13, 2, 16, value_dim=24, dtype=torch.float32, seed=seed)
        bias = table(2, kernel, torch.float32) * (seed + 1)
        # a scale of 1 is a factor that compilers drop
        out = neighborhood.flex(q, k, v, kernel, dilation, bias, 1.0)
        expected = neighborhood_reference(q, k, v, kernel, dilation, bias, 1.0)
        torch.testing.assert_close(out, expected, rtol=0, atol=ATOL[q.dtype])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernel")
@torch.no_grad()
def test_the_compiled_routing_follows_the_index_without_a_new_compilation() -> None:
    # windows of 64 tokens are whole blocks, on which the kernel does not look at the mask
    windows = (2, 3)
    q, k, v = windowed_maps(windows, (8, 8), (8, 8), 16, 24, torch.float32)
    outs = []
    for seed in (0, 1):
        index = routing(windows, 2, seed)
        outs.append(bilevel.flex(q, k, v, windows, 0.3, index, None))
        expected = routed_reference(q, k, v, windows, 0.3, index, None)
        torch.testing.assert_close(outs[-1], expected, rtol=0, atol=ATOL[q.dtype])
    assert (outs[0] - outs[1]).abs().max() > 0.1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernel")
@torch.no_grad()
def test_the_compiled_routing_masks_padding_and_counts_repeated_windows() -> None:
    q, k, v = windowed_maps((2, 2), (3, 4), (2, 1), 8, 5, torch.float32)
    index = torch.tensor([[0, 0, 3], [1, 2, 3], [2, 2, 2], [3, 1, 3]]).expand(2, -1, -1)
    out = bilevel.flex(q, k, v, (2, 2), 0.3, index, None)
    expected = routed_reference(q, k, v, (2, 2), 0.3, index, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=ATOL[q.dtype])


@pytest.mark.usefixtures("cpu_kernel")
@torch.no_grad()
def test_inside_torch_compile_they_join_its_graph() -> None:
    # weights ask for gradients where none is recorded
    q, k, v = (x.requires_grad_() for x in maps(2, 12, 12, 2, 8, dtype=torch.float32))
    bias, index = table(2, (5, 5), torch.float32).requires_grad_(), routing((2, 2), 3)

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            neighborhood.flex(q, k, v, (5, 5), (2, 1), bias, 0.3),
            bilevel.flex(q, k, v, (2, 2), 0.3, index, None),
            bilevel.flex(q, k, v, (2, 2), 0.3, None, None),
        )

    # aot_eager: the graph as the compiler sees it, without the time for kernels
    near, routed, whole = torch.compile(model, fullgraph=True, backend="aot_eager")(q, k, v)
    expected = neighborhood_reference(q, k, v, (5, 5), (2, 1), bias, 0.3)
    torch.testing.assert_close(near, expected, rtol=0, atol=ATOL[q.dtype])
    for out, named in ((routed, index), (whole, torch.arange(4).expand(2, 4, 4))):
        expected = routed_reference(q, k, v, (2, 2), 0.3, named, None)
        torch.testing.assert_close(out, expected, rtol=0, atol=ATOL[q.dtype])


CALLS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "neighborhood": lambda x: (x, x, x, (3, 3), (1, 1), None, 1.0),
    "bilevel": lambda x: (x, x, x, (1, 1), 1.0, torch.zeros(x.shape[0], 1, 1, dtype=torch.int64), None),
}


def call(module: ModuleType, x: Tensor) -> tuple[Any, ...]:
    return CALLS["neighborhood" if module is neighborhood else "bilevel"](x)


@MODULES
@pytest.mark.usefixtures("cpu_kernel")
def test_it_refuses_to_run_uncompiled(module: ModuleType) -> None:
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="switched off"):
        module.flex(*call(module, torch.zeros(1, 8, 8, 1, 4)))


@MODULES
def test_it_says_what_it_cannot_serve(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 8, 8, 1, 4)
    assert "float16 or bfloat16, the tensors are torch.float64" in module.why_not(*call(module, x.double()))
    assert "the tensors are on meta" in module.why_not(*call(module, x.to("meta")))
    assert "a tensor is empty" in module.why_not(*call(module, x[..., :0]))
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype, shape=(1, 8, 8, 1, 8))
    assert "CUDA kernels need head dims of at least 16, got 8 and 8" in flexible.refusal(
        on_cuda, on_cuda, False
    )
    leaf = x.clone().requires_grad_()
    reason = "no backward on the CPU"
    assert reason in module.why_not(*call(module, leaf))
    by_name = partial(neighborhood_attention, kernel_size=3, backend="flex")
    if module is bilevel:
        by_name = partial(bilevel_routing_attention, num_windows=2, topk=2, backend="flex")
    with pytest.raises(NotImplementedError, match=f"'flex' cannot serve this call: .* {reason}"):
        by_name(leaf, leaf, leaf)
    on_cuda.shape, on_cuda.dtype = (1, 8, 8, 1, 16), torch.bfloat16
    monkeypatch.setattr(flexible, "no_compiler", lambda device: f"no compiler for {device}")
    for old, learns, reason in (
        (True, True, "from PyTorch 2.14 on"),
        (True, False, "no compiler"),
        (False, True, "no compiler"),
    ):
        monkeypatch.setattr(flexible, "LARGE_BLOCKS_ONLY", old)
        assert reason in flexible.refusal(on_cuda, on_cuda, learns)


def test_a_bias_that_learns_is_training_and_a_weight_is_refused() -> None:
    x = torch.zeros(1, 8, 8, 1, 4)
    bias = torch.zeros(1, 5, 5, requires_grad=True)
    assert "no backward" in neighborhood.why_not(x, x, x, (3, 3), (1, 1), bias, 1.0)
    index = torch.zeros(1, 1, 1, dtype=torch.int64)
    weight = torch.ones(1, 1, 1)
    assert "routing_weight" in bilevel.why_not(x, x, x, (1, 1), 1.0, index, weight)


@MODULES
def test_it_says_what_the_machine_is_missing(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    x = torch.zeros(1, 8, 8, 1, 4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "needs AVX2 and no macOS" in module.why_not(*call(module, x))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(flexible, "no_compiler", lambda device: f"no compiler for {device}")
    assert module.why_not(*call(module, x)) == "no compiler for cpu"


@MODULES
def test_symbolic_maps_are_refused(module: ModuleType) -> None:
    torch._dynamo.reset()

    def reason(x: Tensor) -> tuple[Tensor, str | None]:
        return x, module.why_not(*call(module, x))

    compiled = torch.compile(reason, fullgraph=True, dynamic=True, backend="eager")
    assert "fixed size" in compiled(torch.zeros(2, 9, 8, 2, 4))[1]


def same_on_cuda(run: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Values and gradients of `run(..., backend)` by flex are those of the reference in float32."""
    if flexible.LARGE_BLOCKS_ONLY and leaves[0].dtype != torch.float32:
        pytest.skip("refused before PyTorch 2.14")
    results = []
    for backend, dtype in (("flex", leaves[0].dtype), ("reference", torch.float32)):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = run(*own, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), own)])
    # half precision: each of some products in a row rounds once more
    eps = {torch.float32: 1e-5}.get(leaves[0].dtype, 8 * torch.finfo(leaves[0].dtype).eps)
    for fast, truth in zip(*results, strict=True):
        size = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast.float(), truth, rtol=0, atol=eps * size)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 4)])
def test_on_cuda_the_neighborhood_equals_the_reference(dtype: torch.dtype, dilation: tuple[int, int]) -> None:
    torch._dynamo.reset()
    q, k, v = maps(2, 30, 21, 2, 32, value_dim=48, dtype=dtype)
    leaves = [x.cuda() for x in (q, k, v, table(2, (7, 5), dtype))]

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return neighborhood_attention(q, k, v, (7, 5), dilation, bias, backend=backend)

    same_on_cuda(run, leaves)
    same_on_cuda(
        lambda *x, backend: neighborhood_attention(*x, (7, 5), dilation, backend=backend), leaves[:3]
    )


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    ("windows", "queries", "keys", "topk"),
    [
        pytest.param((7, 7), (7, 7), (7, 7), 4, id="padded"),
        pytest.param((4, 3), (8, 8), (8, 8), 5, id="whole blocks"),
        pytest.param((3, 3), (16, 12), (4, 3), 2, id="large windows of pooled keys"),
        pytest.param((2, 2), (4, 4), (4, 4), 4, id="every window"),
    ],
)
def test_on_cuda_routing_equals_the_reference(
    dtype: torch.dtype,
    windows: tuple[int, int],
    queries: tuple[int, int],
    keys: tuple[int, int],
    topk: int,
) -> None:
    torch._dynamo.reset()
    counters.clear()
    leaves = [x.cuda() for x in windowed_maps(windows, queries, keys, 32, 48, dtype)]
    index = routing(windows, topk).cuda()
    twice = torch.cat([index[..., :1], index[..., :-1]], -1)  # the first window named twice
    for routed in (index, index.flip(1), twice):
        same_on_cuda(
            lambda q, k, v, backend, routed=routed: bilevel_routing_attention(
                q, k, v, windows, topk, backend=backend, routing=routed
            ),
            leaves,
        )
    assert counters["stats"]["unique_graphs"] == 1  # a new routing is no new kernel


@pytest.mark.gpu
@pytest.mark.skipif(flexible.LARGE_BLOCKS_ONLY, reason="refused before PyTorch 2.14")
def test_on_cuda_autocast_gives_half_precision() -> None:
    torch._dynamo.reset()
    q, k, v = (x.cuda() for x in maps(2, 16, 16, 2, 32, dtype=torch.float32))
    bias = table(2, (7, 7), torch.float32).cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = neighborhood_attention(q, k, v, 7, 1, bias, backend="flex")
    expected = neighborhood_attention(q, k, v, 7, 1, bias, backend="reference")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)
    out.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()
