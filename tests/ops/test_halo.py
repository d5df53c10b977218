"""Halo attention: the fast backend against the reference, the reference against loops written here."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionsel.ops import chunks
from visionsel.ops.halo import halo_attention

# float32: the error of reordered sums of a few hundred terms of order 1; float64: the same at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(
    *,
    batch: int = 2,
    blocks: tuple[int, int] = (2, 3),
    block_size: int = 4,
    halo_size: int = 1,
    stride: int = 1,
    heads: int = 2,
    head_dim: int = 4,
    value_dim: int = 4,
    tables: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    height, width = blocks[0] * block_size, blocks[1] * block_size
    q = normal(batch, height // stride, width // stride, heads, head_dim)
    k = normal(batch, height, width, heads, head_dim)
    v = normal(batch, height, width, heads, value_dim)
    rows = 2 * (block_size + 2 * halo_size) - 1
    if not tables:
        return q, k, v, None, None
    return q, k, v, 0.5 * normal(rows, head_dim), 0.5 * normal(rows, head_dim)


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_h: Tensor,
    rel_w: Tensor,
    scale: float,
) -> Tensor:
    """Query by query and key by key."""
    _, height, width, _, _ = k.shape
    stride = height // q.shape[1]
    side, window = block_size // stride, block_size + 2 * halo_size
    out = q.new_empty(*q.shape[:4], v.shape[-1])
    for b, y, x, head in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:4])).tolist():
        top, left = y // side * block_size - halo_size, x // side * block_size - halo_size
        query = q[b, y, x, head]
        logits, values = [], []
        for i in range(window):
            for j in range(window):
                inside = 0 <= top + i < height and 0 <= left + j < width
                key = k[b, top + i, left + j, head] if inside else torch.zeros_like(query)
                values.append(v[b, top + i, left + j, head] if inside else v.new_zeros(v.shape[-1]))
                relative = rel_h[i - y % side + window - 1] + rel_w[j - x % side + window - 1]
                logits.append(scale * query @ key + query @ relative)
        out[b, y, x, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize(("block_size", "halo_size", "stride"), [(3, 1, 1), (4, 2, 2), (2, 0, 1), (3, 4, 3)])
def test_it_is_what_the_paper_says(backend: str, block_size: int, halo_size: int, stride: int) -> None:
    q, k, v, rel_h, rel_w = draw(
        batch=1, blocks=(2, 1), block_size=block_size, halo_size=halo_size, stride=stride, value_dim=3
    )
    expected = by_loops(q, k, v, block_size, halo_size, rel_h, rel_w, 0.3)
    out = halo_attention(q, k, v, block_size, halo_size, rel_h, rel_w, 0.3, backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    side=st.integers(1, 4),
    stride=st.integers(1, 3),
    halo_size=st.integers(0, 4),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tables=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
    numbers=st.sampled_from([chunks._NUMBERS, 40]),  # of a chunk: one or many
)
def test_tiled_equals_the_reference_in_values_and_gradients(
    batch: int,
    blocks: tuple[int, int],
    side: int,
    stride: int,
    halo_size: int,
    heads: int,
    dims: tuple[int, int],
    tables: bool,
    dtype: torch.dtype,
    seed: int,
    numbers: int,
) -> None:
    block_size = side * stride
    args = draw(
        batch=batch,
        blocks=blocks,
        block_size=block_size,
        halo_size=halo_size,
        stride=stride,
        heads=heads,
        head_dim=dims[0],
        value_dim=dims[1],
        tables=tables,
        dtype=dtype,
        seed=seed,
    )
    results = []
    with patch.object(chunks, "_NUMBERS", numbers):
        for backend in ("reference", "tiled"):
            q, k, v, rel_h, rel_w = (None if t is None else t.clone().requires_grad_() for t in args)
            out = halo_attention(q, k, v, block_size, halo_size, rel_h, rel_w, backend=backend)
            weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
            gradients = torch.autograd.grad(
                (out * weight).sum(), [t for t in (q, k, v, rel_h, rel_w) if t is not None]
            )
            with torch.inference_mode():  # another path than training takes
                inferred = halo_attention(q, k, v, block_size, halo_size, rel_h, rel_w, backend=backend)
            results.append([out.detach(), inferred, *gradients])
    for expected, got in zip(*results, strict=True):
        # a table's gradient sums over every block of the batch
        atol = ATOL[dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("trained", ["q", "k", "v", "tables"])
def test_gradients_are_right_when_only_one_input_needs_them(trained: str) -> None:
    gradients = []
    for backend in ("reference", "tiled"):
        q, k, v, rel_h, rel_w = draw()
        leaf = {"q": q, "k": k, "v": v, "tables": rel_w}[trained].requires_grad_()
        out = halo_attention(q, k, v, 4, 1, rel_h, rel_w, backend=backend)
        gradients += torch.autograd.grad(out.sin().sum(), leaf)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_arguments_work_by_position_and_by_keyword(backend: str) -> None:
    q, k, v, rel_h, rel_w = draw()
    by_position = halo_attention(q, k, v, 4, 1, rel_h, rel_w, 0.5, backend)
    by_keyword = halo_attention(
        q=q,
        k=k,
        v=v,
        block_size=4,
        halo_size=1,
        rel_pos_height=rel_h,
        rel_pos_width=rel_w,
        scale=0.5,
        backend=backend,
    )
    assert torch.equal(by_position, by_keyword)


def test_the_default_scale_is_that_of_the_head_dim() -> None:
    q, k, v, rel_h, rel_w = draw(head_dim=16)
    expected = halo_attention(q, k, v, 4, 1, rel_h, rel_w, scale=0.25)
    assert torch.equal(halo_attention(q, k, v, 4, 1, rel_h, rel_w), expected)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_views_of_a_fused_projection_are_accepted_and_left_alone(backend: str) -> None:
    fused = torch.randn(2, 8, 8, 2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = fused.clone()
    q, k, v = fused.split([4, 4, 4], dim=-1)
    _, _, _, rel_h, rel_w = draw(halo_size=2)
    tables = rel_h.clone(), rel_w.clone()
    out = halo_attention(q, k, v, 4, 2, rel_h, rel_w, backend=backend)
    expected = halo_attention(*(t.contiguous() for t in (q, k, v)), 4, 2, rel_h, rel_w, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    # channels-first memory, as a convolution leaves it
    q, k, v = (t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in (q, k, v))
    out = halo_attention(q, k, v, 4, 2, rel_h, rel_w, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert torch.equal(fused, before)
    assert torch.equal(rel_h, tables[0])
    assert torch.equal(rel_w, tables[1])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    q, k, v, rel_h, rel_w = draw(batch=3)
    out = halo_attention(q, k, v, 4, 1, rel_h, rel_w)
    order = [2, 0, 1]
    torch.testing.assert_close(
        halo_attention(q[order], k[order], v[order], 4, 1, rel_h, rel_w), out[order], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        halo_attention(q[1:2], k[1:2], v[1:2], 4, 1, rel_h, rel_w), out[1:2], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_stays_near_double(
    backend: str, dtype: torch.dtype, atol: float, training: bool
) -> None:
    # atol: a few units in the last place of values of order 1
    args = draw(dtype=dtype)
    expected = halo_attention(*(t.double() for t in args[:3]), 4, 1, *(t.double() for t in args[3:]))
    q, k, v, rel_h, rel_w = (t.clone().requires_grad_(training) for t in args)
    out = halo_attention(q, k, v, 4, 1, rel_h, rel_w, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    # tables kept in float32 beside half-precision maps
    out = halo_attention(q, k, v, 4, 1, rel_h.float(), rel_w.float(), backend=backend)
    assert out.dtype == dtype


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tables", [False, True])
def test_autocast_computes_in_its_dtype(backend: str, training: bool, tables: bool) -> None:
    args = draw(dtype=torch.float32, tables=tables)
    q, k, v, rel_h, rel_w = (None if t is None else t.requires_grad_(training) for t in args)
    expected = halo_attention(q, k, v, 4, 1, rel_h, rel_w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = halo_attention(q, k, v, 4, 1, rel_h, rel_w, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_training_works_after_inference_mode() -> None:
    # sizes of its own, so that this test is the first to build their index tables
    args = draw(blocks=(3, 5), block_size=2, halo_size=1)
    with torch.inference_mode():
        expected = halo_attention(*args[:3], 2, 1, *args[3:])
    q, k, v, rel_h, rel_w = (t.requires_grad_() for t in args)
    out = halo_attention(q, k, v, 2, 1, rel_h, rel_w)
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-12)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v, rel_h, rel_w))


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        q, k, v, rel_h, rel_w = (t.requires_grad_() for t in draw())
        if recompute:
            out = torch.utils.checkpoint.checkpoint(
                halo_attention, q, k, v, 4, 1, rel_h, rel_w, use_reentrant=False
            )
        else:
            out = halo_attention(q, k, v, 4, 1, rel_h, rel_w)
        gradients.append(torch.autograd.grad(out.sin().sum(), (q, k, v, rel_h, rel_w)))
    for expected, got in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


class Attention(nn.Module):
    def __init__(self, block_size: int, halo_size: int) -> None:
        super().__init__()
        self.sizes = block_size, halo_size

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        return halo_attention(q, k, v, *self.sizes, rel_h, rel_w)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_to_one_graph(stride: int, training: bool) -> None:
    torch.compiler.reset()
    # aot_eager traces forward and backward as inductor does, without the minutes of C++;
    # the second call changes height and width, and makes them dynamic
    compiled = torch.compile(Attention(4, 1), fullgraph=True, backend="aot_eager")
    for blocks in ((2, 3), (3, 2), (4, 4)):
        results = []
        for attend in (Attention(4, 1), compiled):
            args = [t.requires_grad_(training) for t in draw(blocks=blocks, stride=stride)]
            out = attend(*args)
            results.append([out, *(torch.autograd.grad(out.sin().sum(), args) if training else ())])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    torch.compiler.reset()
    args = draw(dtype=torch.float32)
    out = torch.compile(Attention(4, 1), fullgraph=True)(*args)
    torch.testing.assert_close(out, Attention(4, 1)(*args), rtol=0, atol=1e-5)


def test_one_exported_program_serves_every_number_of_blocks() -> None:
    free = torch.export.Dim.DYNAMIC
    blocks = torch.export.Dim("rows"), torch.export.Dim("columns")
    maps = {0: free, 1: 4 * blocks[0], 2: 4 * blocks[1]}
    program = torch.export.export(
        Attention(4, 1), draw(), dynamic_shapes=(maps, maps, maps, None, None)
    ).module()
    for shape in ((2, 3), (1, 1), (5, 1), (1, 2)):
        args = draw(batch=3, blocks=shape)
        torch.testing.assert_close(program(*args), Attention(4, 1)(*args), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 5}, r"block_size 5 must divide the map of k, got 8 x 12"),
        ({"block_size": 0}, r"block_size must be a positive int, got 0"),
        ({"block_size": (4, 4)}, r"block_size must be a positive int, got \(4, 4\)"),
        ({"halo_size": -1}, r"halo_size must be an int of 0 or more, got -1"),
        ({"q": torch.zeros(2, 8, 12, 8)}, r"q must be \[B, H, W, heads, head_dim\]"),
        (
            {"q": torch.zeros(2, 4, 12, 2, 4)},
            r"q times an integer .*, got k 8 x 12, q 4 x 12 and block_size 4",
        ),
        ({"q": torch.zeros(2, 16, 24, 2, 4)}, r"q times an integer .*, got k 8 x 12, q 16 x 24 and"),
        ({"q": torch.zeros(2, 0, 0, 2, 4)}, r"q times an integer .*, got k 8 x 12, q 0 x 0 and"),
        ({"q": torch.zeros(2, 4, 6, 2, 4), "block_size": 1}, r"q times an integer .* block_size 1"),
        ({"q": torch.zeros(2, 8, 12, 2, 5)}, r"q and k must agree in batch, heads and head_dim"),
        ({"v": torch.zeros(2, 8, 12, 1, 4)}, r"k and v must agree in all but head_dim"),
        ({"v": torch.zeros(2, 8, 12, 2, 4, dtype=torch.float64)}, r"must share dtype and device"),
        ({"rel_pos_width": None}, r"both rel_pos_height and rel_pos_width, or neither"),
        ({"rel_pos_width": torch.zeros(10, 4)}, r"rel_pos_width must be .* = \[11, 4\], got \[10, 4\]"),
        ({"rel_pos_height": torch.zeros(11, 2)}, r"rel_pos_height must be .* = \[11, 4\], got \[11, 2\]"),
        ({"rel_pos_height": torch.zeros(11, 4, dtype=torch.int64)}, r"rel_pos_height must be floating point"),
        ({"backend": "fast"}, r"unknown backend 'fast'; choose one of auto, tiled, reference"),
    ],
)
def test_invalid_calls_say_what_is_wrong(changes: dict[str, object], message: str) -> None:
    q, k, v, rel_h, rel_w = draw(dtype=torch.float32)
    call = {"q": q, "k": k, "v": v, "block_size": 4, "halo_size": 1}
    call |= {"rel_pos_height": rel_h, "rel_pos_width": rel_w}
    with pytest.raises(ValueError, match=message):
        halo_attention(**(call | changes))
