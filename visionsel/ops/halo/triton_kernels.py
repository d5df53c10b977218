# mypy: allow-untyped-defs
"""Kernels of `triton.py`. Importing this file imports triton, so it is imported at first use.

All of them run on one axis of programs, heads fastest, and read maps `[B, H, W, heads, head_dim]` by their
strides; maps that they write are contiguous. A block has BLOCK keys and SIDE queries a side, its window
WINDOW = BLOCK + 2 * HALO keys; a token is a query's place in its block, a slot a key's place in the window,
both in reading order. What belongs to queries and is no map is contiguous `[B, blocks, heads, tokens, ...]`:
`factors`, with a last axis of 2 * WINDOW for the relative logits of the window's rows and of its columns;
`lse`, the log2 of the softmax's sums; `delta`, the products of results and their gradients.

DIMS are the head dims of keys and values, these padded, and the padded axis of factors.

The relative logits of pairs are factors times a matrix of ones and zeros, which is exact, and runs on tensor
cores as the products of queries and keys do.
"""

import triton
import triton.language as tl

__all__ = ["backward_key", "backward_query", "factor_query", "factor_tables", "forward", "relate"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_map(maps, strides, sample, head, y, x, present, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Vectors `[N, PADDED]` at positions of a map; zeros where none is present and beyond DIM."""
    d = tl.arange(0, PADDED)
    row = sample * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2] + head * strides[3]
    place = row[:, None] + d.to(tl.int64)[None, :] * strides[4]
    return tl.load(maps + place, mask=present[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def load_rows(start, row, present, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows `[N, PADDED]` of a contiguous matrix; zeros where none is present and beyond its DIM columns."""
    d = tl.arange(0, PADDED)
    place = row[:, None] * DIM + d[None, :]
    return tl.load(start + place, mask=present[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(start, row, present, values, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Write what `load_rows` reads."""
    d = tl.arange(0, PADDED)
    place = row[:, None] * DIM + d[None, :]
    mask = present[:, None] & (d < DIM)[None, :]
    tl.store(start + place, values.to(start.dtype.element_ty), mask=mask)


@triton.jit
def rows_of(sample, head, y, x, height, width, heads):
    """Rows of positions in a contiguous map; int64, since maps may be large."""
    return (sample * height * width + y * width + x) * heads + head


@triton.jit
def queries_of(program, height, width, heads, BLOCK: tl.constexpr, SIDE: tl.constexpr, OWNED: tl.constexpr):
    """Which queries a program has.

    Returns:
        Sample, head, row and column of the block, tokens `[OWNED]`, and the row of the block's first token in
        what lies by blocks.
    """
    PARTS: tl.constexpr = (SIDE * SIDE + OWNED - 1) // OWNED
    columns = width // BLOCK
    blocks = height // BLOCK * columns
    head = program % heads
    token = program // heads % PARTS * OWNED + tl.arange(0, OWNED)
    block = program // (heads * PARTS) % blocks
    sample = (program // (heads * PARTS * blocks)).to(tl.int64)
    first = ((sample * blocks + block) * heads + head) * (SIDE * SIDE)
    return sample, head, block // columns, block % columns, token, first


@triton.jit
def factor_places(token, offset, AXIS: tl.constexpr, WINDOW: tl.constexpr, SIDE: tl.constexpr):
    """Where the products of queries with rows `offset` of a table lie in factors, and which are there."""
    place = token // SIDE if AXIS == 0 else token % SIDE
    key = offset[None, :] + place[:, None] - (WINDOW - 1)
    return token[:, None] * (2 * WINDOW) + AXIS * WINDOW + key, (key >= 0) & (key < WINDOW)


@triton.jit
def spread(i, j, WINDOW: tl.constexpr, PADDED: tl.constexpr, OPERAND: tl.constexpr):
    """`[N, PADDED]`: ones at the two factors of keys in row i and column j of the window, else zeros."""
    factor = tl.arange(0, PADDED)[None, :]
    return tl.where((factor == i[:, None]) | (factor == WINDOW + j[:, None]), 1.0, 0.0).to(OPERAND)


@triton.jit
def load_keys(
    keys,
    where,
    slot,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Keys and values in slots of a window, zeros beside the map; not WHOLE: some may be no slots.

    `keys` are the maps of keys and values with their strides; `where` is the sample, the head, row and column
    of the block, and the map's height and width.
    """
    key, key_strides, value, value_strides = keys
    sample, head, top, left, height, width = where
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    y = top * BLOCK - HALO + slot // WINDOW
    x = left * BLOCK - HALO + slot % WINDOW
    on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    if not WHOLE:
        on_map = on_map & (slot < WINDOW * WINDOW)
    k = load_map(key, key_strides, sample, head, y, x, on_map, DIMS[0], DIMS[2])
    return k, load_map(value, value_strides, sample, head, y, x, on_map, DIMS[1], DIMS[3])


@triton.jit
def window_logits(
    q,
    k,
    f,
    slot,
    scale,
    WINDOW: tl.constexpr,
    PADDED_F: tl.constexpr,
    RELATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Logits of queries and the keys in slots of their window."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if RELATIVE:
        ones = spread(slot // WINDOW, slot % WINDOW, WINDOW, PADDED_F, f.dtype)
        logits = tl.dot(f, tl.trans(ones), logits, input_precision="ieee")
    if not WHOLE:
        logits = tl.where((slot < WINDOW * WINDOW)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def attend(
    keys,
    where,
    scale,
    q,
    f,
    high,
    total,
    result,
    start,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    READ: tl.constexpr,
    RELATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The softmax so far, and with READ keys more."""
    slot = start + tl.arange(0, READ)
    k, v = load_keys(keys, where, slot, DIMS, BLOCK, HALO, WHOLE)
    logits = window_logits(q, k.to(q.dtype), f, slot, scale, BLOCK + 2 * HALO, DIMS[4], RELATIVE, WHOLE)
    higher = tl.maximum(high, tl.max(logits, 1))  # finite: some slot is a key's
    shrink = tl.exp2((high - higher) * LOG2E)
    p = tl.exp2(logits * LOG2E - (higher * LOG2E)[:, None])
    total = total * shrink + tl.sum(p, 1)
    result = tl.dot(p.to(q.dtype), v.to(q.dtype), result * shrink[:, None], input_precision="ieee")
    return higher, total, result


@triton.jit
def descend(
    keys,
    where,
    scale,
    q,
    f,
    g,
    bound,
    product,
    dq,
    df,
    start,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    READ: tl.constexpr,
    RELATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
    FOR_QUERY: tl.constexpr,
    FOR_FACTORS: tl.constexpr,
):
    """Gradients of queries, not yet scaled, and of factors so far, and with READ keys more."""
    slot = start + tl.arange(0, READ)
    k, v = load_keys(keys, where, slot, DIMS, BLOCK, HALO, WHOLE)
    k = k.to(q.dtype)
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    logits = window_logits(q, k, f, slot, scale, WINDOW, DIMS[4], RELATIVE, WHOLE)
    p = tl.exp2(logits * LOG2E - bound[:, None])
    dp = tl.dot(g, tl.trans(v.to(q.dtype)), input_precision="ieee")
    ds = (p * (dp - product[:, None])).to(q.dtype)
    if FOR_QUERY:
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    if FOR_FACTORS:
        ones = spread(slot // WINDOW, slot % WINDOW, WINDOW, DIMS[4], q.dtype)
        df = tl.dot(ds, ones, df, input_precision="ieee")
    return dq, df


@triton.jit
def forward(
    query,
    key,
    value,
    factors,
    out,
    lse,
    query_strides,
    key_strides,
    value_strides,
    height,
    width,
    heads,
    scale,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    LAST: tl.constexpr,
    RELATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """OWNED queries of a block: their results and log2 of the sums of their softmax."""
    HEAD_DIM: tl.constexpr = DIMS[0]
    VALUE_DIM: tl.constexpr = DIMS[1]
    PADDED_D: tl.constexpr = DIMS[2]
    PADDED_V: tl.constexpr = DIMS[3]
    PADDED_F: tl.constexpr = DIMS[4]
    sample, head, top, left, token, first = queries_of(
        tl.program_id(0), height, width, heads, BLOCK, SIDE, OWNED
    )
    inside = token < SIDE * SIDE
    keys = key, key_strides, value, value_strides
    where = sample, head, top, left, height, width
    y = top * SIDE + token // SIDE
    x = left * SIDE + token % SIDE
    q = load_map(query, query_strides, sample, head, y, x, inside, HEAD_DIM, PADDED_D).to(OPERAND)
    f = q
    if RELATIVE:
        f = load_rows(factors + first * (2 * WINDOW), token, inside, 2 * WINDOW, PADDED_F).to(OPERAND)
    high = tl.full([OWNED], float("-inf"), tl.float32)
    total = tl.zeros([OWNED], tl.float32)
    result = tl.zeros([OWNED, PADDED_V], tl.float32)
    WHOLE: tl.constexpr = WINDOW * WINDOW // READ * READ
    for start in range(0, WHOLE, READ):
        high, total, result = attend(
            keys, where, scale, q, f, high, total, result, start, DIMS, BLOCK, HALO, READ, RELATIVE, True
        )
    if LAST > 0:
        high, total, result = attend(
            keys, where, scale, q, f, high, total, result, WHOLE, DIMS, BLOCK, HALO, LAST, RELATIVE, False
        )

    row = rows_of(sample, head, y, x, height // BLOCK * SIDE, width // BLOCK * SIDE, heads)
    store_rows(out, row, inside, result / total[:, None], VALUE_DIM, PADDED_V)
    tl.store(lse + first + token, high * LOG2E + tl.log2(total), mask=inside)


@triton.jit
def backward_query(
    query,
    key,
    value,
    factors,
    out,
    lse,
    grad,
    delta,
    grad_query,
    grad_factors,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    height,
    width,
    heads,
    scale,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    LAST: tl.constexpr,
    RELATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
    FOR_QUERY: tl.constexpr,
    FOR_FACTORS: tl.constexpr,
):
    """OWNED queries of a block: delta, which `backward_key` needs too, and gradients of query and factors."""
    HEAD_DIM: tl.constexpr = DIMS[0]
    VALUE_DIM: tl.constexpr = DIMS[1]
    PADDED_D: tl.constexpr = DIMS[2]
    PADDED_V: tl.constexpr = DIMS[3]
    PADDED_F: tl.constexpr = DIMS[4]
    sample, head, top, left, token, first = queries_of(
        tl.program_id(0), height, width, heads, BLOCK, SIDE, OWNED
    )
    inside = token < SIDE * SIDE
    keys = key, key_strides, value, value_strides
    where = sample, head, top, left, height, width
    y = top * SIDE + token // SIDE
    x = left * SIDE + token % SIDE
    row = rows_of(sample, head, y, x, height // BLOCK * SIDE, width // BLOCK * SIDE, heads)
    result = load_rows(out, row, inside, VALUE_DIM, PADDED_V).to(tl.float32)
    g = load_map(grad, grad_strides, sample, head, y, x, inside, VALUE_DIM, PADDED_V)
    product = tl.sum(result * g.to(tl.float32), 1)
    tl.store(delta + first + token, product, mask=inside)

    if FOR_QUERY or FOR_FACTORS:
        g = g.to(OPERAND)
        q = load_map(query, query_strides, sample, head, y, x, inside, HEAD_DIM, PADDED_D).to(OPERAND)
        bound = tl.load(lse + first + token, mask=inside, other=float("inf"))  # no attention from no query
        f = q
        if RELATIVE:
            f = load_rows(factors + first * (2 * WINDOW), token, inside, 2 * WINDOW, PADDED_F).to(OPERAND)
        dq = tl.zeros([OWNED, PADDED_D], tl.float32)
        df = tl.zeros([OWNED, PADDED_F], tl.float32)
        WHOLE: tl.constexpr = WINDOW * WINDOW // READ * READ
        for start in range(0, WHOLE, READ):
            dq, df = descend(
                keys,
                where,
                scale,
                q,
                f,
                g,
                bound,
                product,
                dq,
                df,
                start,
                DIMS,
                BLOCK,
                HALO,
                READ,
                RELATIVE,
                True,
                FOR_QUERY,
                FOR_FACTORS,
            )
        if LAST > 0:
            dq, df = descend(
                keys,
                where,
                scale,
                q,
                f,
                g,
                bound,
                product,
                dq,
                df,
                WHOLE,
                DIMS,
                BLOCK,
                HALO,
                LAST,
                RELATIVE,
                False,
                FOR_QUERY,
                FOR_FACTORS,
            )
        if FOR_QUERY:
            store_rows(grad_query, row, inside, dq * scale, HEAD_DIM, PADDED_D)
        if FOR_FACTORS:
            store_rows(grad_factors + first * (2 * WINDOW), token, inside, df, 2 * WINDOW, PADDED_F)


@triton.jit
def backward_key(
    query,
    key,
    value,
    factors,
    lse,
    grad,
    delta,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    height,
    width,
    heads,
    scale,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    READ: tl.constexpr,
    RELATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
    FOR_KEY: tl.constexpr,
    FOR_VALUE: tl.constexpr,
):
    """A tile of keys: gradients of keys and values, over the queries of the blocks whose window reaches it.

    Tiles begin SHIFT_H rows and SHIFT_W columns before the map, where they are reached by fewer blocks. All
    products are transposed: `[keys, queries]`.
    """
    HEAD_DIM: tl.constexpr = DIMS[0]
    VALUE_DIM: tl.constexpr = DIMS[1]
    PADDED_D: tl.constexpr = DIMS[2]
    PADDED_V: tl.constexpr = DIMS[3]
    PADDED_F: tl.constexpr = DIMS[4]
    TOKENS: tl.constexpr = SIDE * SIDE
    PARTS: tl.constexpr = (TOKENS + READ - 1) // READ
    columns = width // BLOCK
    blocks = height // BLOCK * columns
    tiles_h = (height + SHIFT_H + TILE_H - 1) // TILE_H
    tiles_w = (width + SHIFT_W + TILE_W - 1) // TILE_W
    program = tl.program_id(0)
    head = program % heads
    first_x = program // heads % tiles_w * TILE_W - SHIFT_W
    first_y = program // (heads * tiles_w) % tiles_h * TILE_H - SHIFT_H
    sample = (program // (heads * tiles_w * tiles_h)).to(tl.int64)

    place = tl.arange(0, TILE_H * TILE_W)
    key_y = first_y + place // TILE_W
    key_x = first_x + place % TILE_W
    inside = (key_y >= 0) & (key_y < height) & (key_x >= 0) & (key_x < width)
    k = load_map(key, key_strides, sample, head, key_y, key_x, inside, HEAD_DIM, PADDED_D).to(OPERAND)
    if FOR_KEY:
        v = load_map(value, value_strides, sample, head, key_y, key_x, inside, VALUE_DIM, PADDED_V).to(
            OPERAND
        )
    dk = tl.zeros([TILE_H * TILE_W, PADDED_D], tl.float32)
    dv = tl.zeros([TILE_H * TILE_W, PADDED_V], tl.float32)
    # blocks whose window reaches a key of the tile
    first_top = tl.maximum(first_y - HALO, 0) // BLOCK
    first_left = tl.maximum(first_x - HALO, 0) // BLOCK
    tops = tl.minimum(first_y + TILE_H - 1 + HALO, height - 1) // BLOCK + 1 - first_top
    lefts = tl.minimum(first_x + TILE_W - 1 + HALO, width - 1) // BLOCK + 1 - first_left
    for step in range(0, tops * lefts * PARTS):
        top = first_top + step // PARTS // lefts
        left = first_left + step // PARTS % lefts
        token = step % PARTS * READ + tl.arange(0, READ)
        seen = token < TOKENS
        y = top * SIDE + token // SIDE
        x = left * SIDE + token % SIDE
        q = load_map(query, query_strides, sample, head, y, x, seen, HEAD_DIM, PADDED_D).to(OPERAND)
        g = load_map(grad, grad_strides, sample, head, y, x, seen, VALUE_DIM, PADDED_V).to(OPERAND)
        first = ((sample * blocks + top * columns + left) * heads + head) * TOKENS
        bound = tl.load(lse + first + token, mask=seen, other=float("inf"))  # no attention from no query
        i = key_y - (top * BLOCK - HALO)
        j = key_x - (left * BLOCK - HALO)
        reached = inside & (i >= 0) & (i < WINDOW) & (j >= 0) & (j < WINDOW)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        if RELATIVE:
            f = load_rows(factors + first * (2 * WINDOW), token, seen, 2 * WINDOW, PADDED_F).to(OPERAND)
            ones = spread(i, j, WINDOW, PADDED_F, OPERAND)
            logits = tl.dot(ones, tl.trans(f), logits, input_precision="ieee")
        p = tl.where(reached[:, None], tl.exp2(logits * LOG2E - bound[None, :]), 0.0)
        if FOR_VALUE:
            dv = tl.dot(p.to(OPERAND), g, dv, input_precision="ieee")
        if FOR_KEY:
            product = tl.load(delta + first + token, mask=seen, other=0.0)
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            ds = p * (dp - product[None, :])
            dk = tl.dot(ds.to(OPERAND), q, dk, input_precision="ieee")

    row = rows_of(sample, head, key_y, key_x, height, width, heads)
    if FOR_KEY:
        store_rows(grad_key, row, inside, dk * scale, HEAD_DIM, PADDED_D)
    if FOR_VALUE:
        store_rows(grad_value, row, inside, dv, VALUE_DIM, PADDED_V)


@triton.jit
def relate(
    query,
    tables,
    factors,
    query_strides,
    height,
    width,
    heads,
    HEAD_DIM: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Factors of OWNED queries of a block, from the tables `[2, 2 * WINDOW - 1, HEAD_DIM]`."""
    ROWS: tl.constexpr = 2 * WINDOW - 1
    sample, head, top, left, token, first = queries_of(
        tl.program_id(0), height, width, heads, BLOCK, SIDE, OWNED
    )
    inside = token < SIDE * SIDE
    y = top * SIDE + token // SIDE
    x = left * SIDE + token % SIDE
    q = load_map(query, query_strides, sample, head, y, x, inside, HEAD_DIM, PADDED_D).to(OPERAND)
    start_factors = factors + first * (2 * WINDOW)
    for axis in tl.static_range(2):
        for start in range(0, ROWS, READ):
            offset = start + tl.arange(0, READ)
            row = axis * ROWS + offset
            table = load_rows(tables, row, offset < ROWS, HEAD_DIM, PADDED_D).to(OPERAND)
            products = tl.dot(q, tl.trans(table), input_precision="ieee")
            place, there = factor_places(token, offset, axis, WINDOW, SIDE)
            tl.store(
                start_factors + place, products.to(factors.dtype.element_ty), mask=inside[:, None] & there
            )


@triton.jit
def factor_query(
    tables,
    grad,
    grad_query,
    height,
    width,
    heads,
    HEAD_DIM: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Gradient of OWNED queries of a block from that of their factors."""
    ROWS: tl.constexpr = 2 * WINDOW - 1
    sample, head, top, left, token, first = queries_of(
        tl.program_id(0), height, width, heads, BLOCK, SIDE, OWNED
    )
    inside = token < SIDE * SIDE
    dq = tl.zeros([OWNED, PADDED_D], tl.float32)
    for axis in tl.static_range(2):
        for start in range(0, ROWS, READ):
            offset = start + tl.arange(0, READ)
            row = axis * ROWS + offset
            table = load_rows(tables, row, offset < ROWS, HEAD_DIM, PADDED_D).to(OPERAND)
            place, there = factor_places(token, offset, axis, WINDOW, SIDE)
            there = there & inside[:, None]
            g = tl.load(grad + first * (2 * WINDOW) + place, mask=there, other=0.0).to(OPERAND)
            dq = tl.dot(g, table, dq, input_precision="ieee")
    y = top * SIDE + token // SIDE
    x = left * SIDE + token % SIDE
    row = rows_of(sample, head, y, x, height // BLOCK * SIDE, width // BLOCK * SIDE, heads)
    store_rows(grad_query, row, inside, dq, HEAD_DIM, PADDED_D)


@triton.jit
def factor_tables(
    query,
    grad,
    parts,
    query_strides,
    height,
    width,
    heads,
    tiles,
    share,
    HEAD_DIM: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Gradient of READ rows of a table from the factors of `share` of the `tiles` of OWNED queries.

    It goes to `parts` `[shares, 2, 2 * WINDOW - 1, HEAD_DIM]`.
    """
    ROWS: tl.constexpr = 2 * WINDOW - 1
    CHUNKS: tl.constexpr = (ROWS + READ - 1) // READ
    chunk = tl.program_id(0) % CHUNKS
    nth = tl.program_id(0) // CHUNKS
    offset = chunk * READ + tl.arange(0, READ)
    last = tl.minimum(nth * share + share, tiles)
    for axis in tl.static_range(2):
        sums = tl.zeros([READ, PADDED_D], tl.float32)
        for tile in range(nth * share, last):
            sample, head, top, left, token, first = queries_of(tile, height, width, heads, BLOCK, SIDE, OWNED)
            inside = token < SIDE * SIDE
            y = top * SIDE + token // SIDE
            x = left * SIDE + token % SIDE
            q = load_map(query, query_strides, sample, head, y, x, inside, HEAD_DIM, PADDED_D).to(OPERAND)
            place, there = factor_places(token, offset, axis, WINDOW, SIDE)
            there = there & inside[:, None]
            g = tl.load(grad + first * (2 * WINDOW) + place, mask=there, other=0.0).to(OPERAND)
            sums = tl.dot(tl.trans(g), q, sums, input_precision="ieee")
        row = (nth * 2 + axis).to(tl.int64) * ROWS + offset
        store_rows(parts, row, offset < ROWS, sums, HEAD_DIM, PADDED_D)
