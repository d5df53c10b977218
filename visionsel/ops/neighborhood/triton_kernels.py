# mypy: allow-untyped-defs
"""Triton kernels of neighborhood attention, forward and backward.

A program has one head and one kind of tile, and goes over its share of the tiles of that kind, in all samples
(`rectangles.py` says which). What bias and neighborhood add to the logits is the same for all of them and
stays in registers (KEPT), unless the rectangles are large. A tile of queries goes over the rectangle of keys
that some of them see, or a tile of keys over that of queries, in blocks of its positions in reading order; a
query and a key that is not its neighbor get the logit -inf. Logits are powers of two: everything in them is
multiplied by log2(e).

`y`, `x` count positions of the map; `_h`, `_w` those of a grid. `T` positions of a tile, `N` of a block,
`D` and `V` the head dims of keys and values, padded to powers of two. KERNEL has the kernel's sides; DIMS
the head dims and the padded ones; SHAPE the sides of tile and rectangle, the positions of a block and the
number of blocks.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def share_of(shares, program):
    """What a program does: kind, tiles and their number, items, sides of a tile and of a rectangle."""
    row = shares + program * 10
    kind = tl.load(row), tl.load(row + 1)
    items = tl.load(row + 4), tl.load(row + 5)
    tile_sides = tl.load(row + 6), tl.load(row + 7)
    return kind, tl.load(row + 2), tl.load(row + 3), items, tile_sides, (tl.load(row + 8), tl.load(row + 9))


@triton.jit
def tile_of(tiles, item, begin, number):
    """Sample of an item, and the first pixels of tile and rectangle, y and x."""
    row = tiles + (begin + item % number) * 4
    tile = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64)
    rectangle = tl.load(row + 2).to(tl.int64), tl.load(row + 3).to(tl.int64)
    return (item // number).to(tl.int64), tile, rectangle


@triton.jit
def steps(place, sides, dilation, COLUMNS: tl.constexpr):
    """Pixels down and right from the first, of places in reading order; the last ones behind the end."""
    h = tl.minimum(place // COLUMNS, sides[0] - 1)
    w = tl.minimum(place % COLUMNS, sides[1] - 1)
    return h * dilation[0], w * dilation[1]


@triton.jit
def inside(place, sides, COLUMNS: tl.constexpr):
    """Which places are not behind the end."""
    return (place // COLUMNS < sides[0]) & (place % COLUMNS < sides[1])


@triton.jit
def load(
    maps,
    strides,
    sample,
    head,
    first,
    step,
    real,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Vectors `[N, BLOCK]` at steps from the first pixel of a map `[B, H, W, heads, DIM]`; zeros if not real.

    UPCAST is for the interpreter, which multiplies the bits of bfloat16 as integers.
    """
    d = tl.arange(0, BLOCK)
    maps += sample * strides[0] + first[0] * strides[1] + first[1] * strides[2] + head * strides[3]
    at = (step[0] * strides[1] + step[1] * strides[2])[:, None] + (d * strides[4])[None, :]
    vectors = tl.load(maps + at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    return vectors.to(tl.float32) if UPCAST else vectors


@triton.jit
def token_of(sizes, sample, head, first):
    """Where the first pixel's token of a head lies in `[B, H, W, heads]`."""
    return ((sample * sizes[0] + first[0]) * sizes[1] + first[1]) * sizes[2] + head


@triton.jit
def tokens_from(sizes, step):
    """How far behind it those of other pixels lie."""
    return (step[0] * sizes[1] + step[1]) * sizes[2]


@triton.jit
def store(maps, token, step, vectors, present, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write vectors `[N, BLOCK]` to tokens of a contiguous map."""
    d = tl.arange(0, BLOCK)
    at = step[:, None] * DIM + d[None, :]
    vectors = vectors.to(maps.dtype.element_ty)
    tl.store(maps + token * DIM + at, vectors, mask=present[:, None] & (d < DIM)[None, :])


@triton.jit
def entries(relative_h, relative_w, kind, block, SHAPE: tl.constexpr):
    """Rows and columns of a bias table `[T, N]` for the pairs of a tile and a block; -1 for no neighbors."""
    TILE_W: tl.constexpr = SHAPE[1]
    COLUMNS: tl.constexpr = SHAPE[3]
    BLOCK: tl.constexpr = SHAPE[4]
    token = tl.arange(0, SHAPE[0] * SHAPE[1])
    place = block * BLOCK + tl.arange(0, BLOCK)
    real = (place < SHAPE[2] * SHAPE[3])[None, :]
    at_h = ((kind[0] * SHAPE[0] + token // TILE_W) * SHAPE[2])[:, None] + (place // COLUMNS)[None, :]
    at_w = ((kind[1] * TILE_W + token % TILE_W) * COLUMNS)[:, None] + (place % COLUMNS)[None, :]
    row = tl.load(relative_h + at_h, mask=real, other=-1)
    return row, tl.load(relative_w + at_w, mask=real, other=-1)


@triton.jit
def added(
    table,
    head,
    relative_h,
    relative_w,
    kind,
    block,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """What the logits `[T, N]` of a tile and a block get: the bias, -inf where no neighbors."""
    row, column = entries(relative_h, relative_w, kind, block, SHAPE)
    seen = (row >= 0) & (column >= 0)
    if BIASED:
        at = (head * (2 * KERNEL[0] - 1) + row) * (2 * KERNEL[1] - 1) + column
        return tl.load(table + at, mask=seen, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def added_by_block(
    table,
    head,
    relative_h,
    relative_w,
    kind,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    SHAPE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """`added` of all blocks of a rectangle; nothing where they are not kept."""
    BLOCKS: tl.constexpr = SHAPE[5]
    kept = ()
    if KEPT:
        for block in tl.static_range(BLOCKS):
            some = added(table, head, relative_h, relative_w, kind, block, BIASED, KERNEL, SHAPE)
            kept = kept + (some,)  # type: ignore[assignment]
    return kept


@triton.jit(do_not_specialize=["sizes"])
def forward(
    query,
    key,
    value,
    table,
    out,
    lse,
    tiles,
    shares,
    relative_h,
    relative_w,
    query_strides,
    key_strides,
    value_strides,
    sizes,
    dilation,
    scale,
    DIMS: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    SHAPE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Outputs of tiles of queries, and log2 of the sums of their softmax."""
    T: tl.constexpr = SHAPE[0] * SHAPE[1]
    TILE_W: tl.constexpr = SHAPE[1]
    COLUMNS: tl.constexpr = SHAPE[3]
    BLOCK: tl.constexpr = SHAPE[4]
    BLOCKS: tl.constexpr = SHAPE[5]
    VALUE_DIM: tl.constexpr = DIMS[1]
    BLOCK_V: tl.constexpr = DIMS[3]
    head = tl.program_id(0) % sizes[2]
    kind, begin, number, items, tile_sides, sides = share_of(shares, tl.program_id(0) // sizes[2])
    kept = added_by_block(table, head, relative_h, relative_w, kind, BIASED, KERNEL, SHAPE, KEPT)
    own = steps(tl.arange(0, T), tile_sides, dilation, TILE_W)
    present = inside(tl.arange(0, T), tile_sides, TILE_W)
    apart = tokens_from(sizes, own)
    for item in range(items[0], items[1]):
        sample, tile, rectangle = tile_of(tiles, item, begin, number)
        q = load(query, query_strides, sample, head, tile, own, present, DIMS[0], DIMS[2], UPCAST)
        if KEPT:
            found = ()
            for block in tl.static_range(BLOCKS):
                place = block * BLOCK + tl.arange(0, BLOCK)
                step, real = steps(place, sides, dilation, COLUMNS), inside(place, sides, COLUMNS)
                k = load(key, key_strides, sample, head, rectangle, step, real, DIMS[0], DIMS[2], UPCAST)
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + kept[block]
                found = found + (logits,)  # type: ignore[assignment]
            top = found[0]  # type: ignore[misc]
            for block in tl.static_range(1, BLOCKS):
                top = tl.maximum(top, found[block])
            high = tl.max(top, 1)
            base = tl.where(high == float("-inf"), 0.0, high)  # the table closes all neighbors
            sums = tl.full([T, BLOCK], 0.0, tl.float32)
            result = tl.full([T, BLOCK_V], 0.0, tl.float32)
            for block in tl.static_range(BLOCKS):
                place = block * BLOCK + tl.arange(0, BLOCK)
                step, real = steps(place, sides, dilation, COLUMNS), inside(place, sides, COLUMNS)
                v = load(value, value_strides, sample, head, rectangle, step, real, DIMS[1], DIMS[3], UPCAST)
                p = tl.exp2(found[block] - base[:, None])
                sums += p
                result = tl.dot(p.to(v.dtype), v, result, input_precision="ieee")
            total = tl.sum(sums, 1)
        else:
            high = tl.full([T], float("-inf"), tl.float32)
            total = tl.full([T], 0.0, tl.float32)
            result = tl.full([T, BLOCK_V], 0.0, tl.float32)
            for block in range(BLOCKS):
                more = added(table, head, relative_h, relative_w, kind, block, BIASED, KERNEL, SHAPE)
                place = block * BLOCK + tl.arange(0, BLOCK)
                step, real = steps(place, sides, dilation, COLUMNS), inside(place, sides, COLUMNS)
                k = load(key, key_strides, sample, head, rectangle, step, real, DIMS[0], DIMS[2], UPCAST)
                v = load(value, value_strides, sample, head, rectangle, step, real, DIMS[1], DIMS[3], UPCAST)
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + more
                higher = tl.maximum(high, tl.max(logits, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)  # no neighbor so far
                p = tl.exp2(logits - base[:, None])
                shrink = tl.exp2(high - base)
                result = tl.dot(p.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
                total = total * shrink + tl.sum(p, 1)
                high = higher
        token = token_of(sizes, sample, head, tile)
        store(out, token, apart, result / total[:, None], present, VALUE_DIM, BLOCK_V)
        tl.store(lse + token + apart, high + tl.log2(total), mask=present)


@triton.jit(do_not_specialize=["count"])
def row_products(left, right, sums, count, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Scalar products of the rows of two contiguous tensors `[count, DIM]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * DIM + d[None, :]
    present = (row < count)[:, None] & (d < DIM)[None, :]
    products = tl.load(left + at, mask=present, other=0.0).to(tl.float32)
    products = products * tl.load(right + at, mask=present, other=0.0).to(tl.float32)
    tl.store(sums + row, tl.sum(products, 1), mask=row < count)


@triton.jit(do_not_specialize=["sizes"])
def query_gradient(
    query,
    key,
    value,
    table,
    grad_out,
    lse,
    delta,
    grad_query,
    tiles,
    shares,
    relative_h,
    relative_w,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    sizes,
    dilation,
    scale,
    factor,
    DIMS: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    SHAPE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Gradients of tiles of queries; `scale` is that of the logits, `factor` that of the products."""
    T: tl.constexpr = SHAPE[0] * SHAPE[1]
    TILE_W: tl.constexpr = SHAPE[1]
    BLOCKS: tl.constexpr = SHAPE[5]
    HEAD_DIM: tl.constexpr = DIMS[0]
    BLOCK_D: tl.constexpr = DIMS[2]
    head = tl.program_id(0) % sizes[2]
    kind, begin, number, items, tile_sides, sides = share_of(shares, tl.program_id(0) // sizes[2])
    kept = added_by_block(table, head, relative_h, relative_w, kind, BIASED, KERNEL, SHAPE, KEPT)
    own = steps(tl.arange(0, T), tile_sides, dilation, TILE_W)
    present = inside(tl.arange(0, T), tile_sides, TILE_W)
    apart = tokens_from(sizes, own)
    keys = key, key_strides, value, value_strides
    for item in range(items[0], items[1]):
        sample, tile, rectangle = tile_of(tiles, item, begin, number)
        where = sample, head, rectangle, sides, dilation
        token = token_of(sizes, sample, head, tile)
        q = load(query, query_strides, sample, head, tile, own, present, DIMS[0], DIMS[2], UPCAST)
        g = load(grad_out, out_strides, sample, head, tile, own, present, DIMS[1], DIMS[3], UPCAST)
        sums = tl.load(lse + token + apart)
        mean = tl.load(delta + token + apart)
        result = tl.full([T, BLOCK_D], 0.0, tl.float32)
        if KEPT:
            for block in tl.static_range(BLOCKS):
                grad, k = logits_gradient(
                    keys, where, q, g, sums, mean, scale, kept[block], block, DIMS, UPCAST, SHAPE
                )
                result = tl.dot(grad.to(k.dtype), k, result, input_precision="ieee")
        else:
            for block in range(BLOCKS):
                more = added(table, head, relative_h, relative_w, kind, block, BIASED, KERNEL, SHAPE)
                grad, k = logits_gradient(
                    keys, where, q, g, sums, mean, scale, more, block, DIMS, UPCAST, SHAPE
                )
                result = tl.dot(grad.to(k.dtype), k, result, input_precision="ieee")
        store(grad_query, token, apart, result * factor, present, HEAD_DIM, BLOCK_D)


@triton.jit
def logits_gradient(
    keys,
    where,
    q,
    g,
    sums,
    mean,
    scale,
    more,
    block,
    DIMS: tl.constexpr,
    UPCAST: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Gradient of the logits `[T, N]` of queries and a block of keys, and the keys.

    `keys` are the maps of keys and values with their strides, `where` says what lies where.
    """
    key, key_strides, value, value_strides = keys
    sample, head, rectangle, sides, dilation = where
    place = block * SHAPE[4] + tl.arange(0, SHAPE[4])
    COLUMNS: tl.constexpr = SHAPE[3]
    step, real = steps(place, sides, dilation, COLUMNS), inside(place, sides, COLUMNS)
    k = load(key, key_strides, sample, head, rectangle, step, real, DIMS[0], DIMS[2], UPCAST)
    v = load(value, value_strides, sample, head, rectangle, step, real, DIMS[1], DIMS[3], UPCAST)
    found = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + more
    p = tl.exp2(found - sums[:, None])
    return p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None]), k


@triton.jit(do_not_specialize=["sizes"])
def key_gradient(
    query,
    key,
    value,
    table,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
    tiles,
    shares,
    relative_h,
    relative_w,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    sizes,
    dilation,
    scale,
    factor,
    DIMS: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
    FOR_KEY: tl.constexpr,
    FOR_VALUE: tl.constexpr,
    KERNEL: tl.constexpr,
    SHAPE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Gradients of tiles of keys and of their values, what is asked for; logits are `[keys, queries]`."""
    T: tl.constexpr = SHAPE[0] * SHAPE[1]
    TILE_W: tl.constexpr = SHAPE[1]
    BLOCKS: tl.constexpr = SHAPE[5]
    HEAD_DIM: tl.constexpr = DIMS[0]
    VALUE_DIM: tl.constexpr = DIMS[1]
    BLOCK_D: tl.constexpr = DIMS[2]
    BLOCK_V: tl.constexpr = DIMS[3]
    head = tl.program_id(0) % sizes[2]
    kind, begin, number, items, tile_sides, sides = share_of(shares, tl.program_id(0) // sizes[2])
    kept = added_by_block(table, head, relative_h, relative_w, kind, BIASED, KERNEL, SHAPE, KEPT)
    own = steps(tl.arange(0, T), tile_sides, dilation, TILE_W)
    present = inside(tl.arange(0, T), tile_sides, TILE_W)
    apart = tokens_from(sizes, own)
    queries = query, query_strides, grad_out, out_strides, lse, delta
    for item in range(items[0], items[1]):
        sample, tile, rectangle = tile_of(tiles, item, begin, number)
        where = sample, head, rectangle, sides, dilation
        k = load(key, key_strides, sample, head, tile, own, present, DIMS[0], DIMS[2], UPCAST)
        v = load(value, value_strides, sample, head, tile, own, present, DIMS[1], DIMS[3], UPCAST)
        for_key = tl.full([T, BLOCK_D], 0.0, tl.float32)
        for_value = tl.full([T, BLOCK_V], 0.0, tl.float32)
        if KEPT:
            for block in tl.static_range(BLOCKS):
                for_key, for_value = gather_gradients(
                    queries,
                    where,
                    sizes,
                    k,
                    v,
                    scale,
                    kept[block],
                    block,
                    for_key,
                    for_value,
                    DIMS,
                    UPCAST,
                    FOR_KEY,
                    FOR_VALUE,
                    SHAPE,
                )
        else:
            for block in range(BLOCKS):
                more = added(table, head, relative_h, relative_w, kind, block, BIASED, KERNEL, SHAPE)
                for_key, for_value = gather_gradients(
                    queries,
                    where,
                    sizes,
                    k,
                    v,
                    scale,
                    more,
                    block,
                    for_key,
                    for_value,
                    DIMS,
                    UPCAST,
                    FOR_KEY,
                    FOR_VALUE,
                    SHAPE,
                )
        token = token_of(sizes, sample, head, tile)
        if FOR_KEY:
            store(grad_key, token, apart, for_key * factor, present, HEAD_DIM, BLOCK_D)
        if FOR_VALUE:
            store(grad_value, token, apart, for_value, present, VALUE_DIM, BLOCK_V)


@triton.jit
def gather_gradients(
    queries,
    where,
    sizes,
    k,
    v,
    scale,
    more,
    block,
    for_key,
    for_value,
    DIMS: tl.constexpr,
    UPCAST: tl.constexpr,
    FOR_KEY: tl.constexpr,
    FOR_VALUE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """The gradients of keys `[T, D]` and values `[T, V]` so far, and those by one block of queries."""
    query, query_strides, grad_out, out_strides, lse, delta = queries
    sample, head, rectangle, sides, dilation = where
    place = block * SHAPE[4] + tl.arange(0, SHAPE[4])
    COLUMNS: tl.constexpr = SHAPE[3]
    step, real = steps(place, sides, dilation, COLUMNS), inside(place, sides, COLUMNS)
    token = token_of(sizes, sample, head, rectangle)
    apart = tokens_from(sizes, step)
    q = load(query, query_strides, sample, head, rectangle, step, real, DIMS[0], DIMS[2], UPCAST)
    g = load(grad_out, out_strides, sample, head, rectangle, step, real, DIMS[1], DIMS[3], UPCAST)
    found = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + more
    p = tl.exp2(found - tl.load(lse + token + apart)[None, :])
    if FOR_VALUE:
        for_value = tl.dot(p.to(g.dtype), g, for_value, input_precision="ieee")
    if FOR_KEY:
        mean = tl.load(delta + token + apart)
        grad = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - mean[None, :])
        for_key = tl.dot(grad.to(q.dtype), q, for_key, input_precision="ieee")
    return for_key, for_value


@triton.jit(do_not_specialize=["sizes"])
def table_gradient(
    query,
    key,
    value,
    table,
    grad_out,
    lse,
    delta,
    partial,
    tiles,
    shares,
    relative_h,
    relative_w,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    sizes,
    dilation,
    scale,
    DIMS: tl.constexpr,
    UPCAST: tl.constexpr,
    KERNEL: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Gradient of a head's bias table by one block of the rectangles of a program's tiles.

    The gradients of the logits of all tiles are added up first, and only then those of one entry of the
    table. `partial` `[shares, BLOCKS, heads, *table]` holds zeros.
    """
    T: tl.constexpr = SHAPE[0] * SHAPE[1]
    TILE_W: tl.constexpr = SHAPE[1]
    BLOCK: tl.constexpr = SHAPE[4]
    COLUMNS: tl.constexpr = 2 * KERNEL[1] - 1
    head = tl.program_id(0) % sizes[2]
    part = tl.program_id(0) // sizes[2]
    block = part % SHAPE[5]
    kind, begin, number, items, tile_sides, sides = share_of(shares, part // SHAPE[5])
    more = added(table, head, relative_h, relative_w, kind, block, True, KERNEL, SHAPE)
    sum_of_tiles = tl.full([T, BLOCK], 0.0, tl.float32)
    own = steps(tl.arange(0, T), tile_sides, dilation, TILE_W)
    present = inside(tl.arange(0, T), tile_sides, TILE_W)
    apart = tokens_from(sizes, own)
    keys = key, key_strides, value, value_strides
    for item in range(items[0], items[1]):
        sample, tile, rectangle = tile_of(tiles, item, begin, number)
        where = sample, head, rectangle, sides, dilation
        token = token_of(sizes, sample, head, tile)
        q = load(query, query_strides, sample, head, tile, own, present, DIMS[0], DIMS[2], UPCAST)
        g = load(grad_out, out_strides, sample, head, tile, own, present, DIMS[1], DIMS[3], UPCAST)
        # no attention from behind the grid's end
        sums = tl.load(lse + token + apart, mask=present, other=float("inf"))
        mean = tl.load(delta + token + apart)
        grad, _ = logits_gradient(keys, where, q, g, sums, mean, scale, more, block, DIMS, UPCAST, SHAPE)
        sum_of_tiles += grad

    row, column = entries(relative_h, relative_w, kind, block, SHAPE)
    column = tl.where(row >= 0, column, -1)
    partial += (part * sizes[2] + head) * (2 * KERNEL[0] - 1) * COLUMNS
    for at_h in range(tl.min(tl.where(column >= 0, row, 2 * KERNEL[0])), tl.max(row) + 1):
        for at_w in range(COLUMNS):
            pair = (row == at_h) & (column == at_w)
            tl.store(partial + at_h * COLUMNS + at_w, tl.sum(tl.where(pair, sum_of_tiles, 0.0)))
