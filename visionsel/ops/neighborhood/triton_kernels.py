# mypy: allow-untyped-defs
"""Triton kernels of neighborhood attention, forward and backward.

Positions of one remainder modulo the dilation never see the others and form a grid of their own. A program
holds a tile of a grid's queries (or of its keys) and goes over the rectangle of keys (or queries) that some
of them see, in blocks of its positions in reading order; a query and a key that is not its neighbor get the
logit -inf. Logits are powers of two: everything in them is multiplied by log2(e).

`height`, `width`, `y`, `x` count positions of the map; `_h`, `_w` those of a grid. `T` tokens of a tile, `N`
of a block, `D` and `V` the head dims of keys and values, padded to powers of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(program, heads, tiles_h, tiles_w, dilation_h, dilation_w):
    """Head, tile, grid and sample of a program; heads lie side by side in memory and come first."""
    head = program % heads
    rest = program // heads
    tile_w = rest % tiles_w
    rest = rest // tiles_w
    tile_h = rest % tiles_h
    rest = rest // tiles_h
    grid_w = rest % dilation_w
    rest = rest // dilation_w
    grid_h = rest % dilation_h
    return head, tile_h, tile_w, grid_h, grid_w, (rest // dilation_h).to(tl.int64)


@triton.jit
def grid_length(length, grid, dilation):
    """Positions of a side that leave the remainder `grid`."""
    return (length - grid + dilation - 1) // dilation


@triton.jit
def ends(tile, length, TILE: tl.constexpr):
    """First and last position of a tile; the last of the grid for a tile behind its end."""
    return tl.minimum(tile * TILE, length - 1), tl.minimum(tile * TILE + TILE, length) - 1


@triton.jit
def window_start(query, length, KERNEL: tl.constexpr):
    """First of the neighbors of a query: the window is centred, and moved inside the grid at its ends."""
    return tl.minimum(tl.maximum(query - KERNEL // 2, 0), length - KERNEL)


@triton.jit
def first_query(key, length, KERNEL: tl.constexpr):
    """First of the queries that see a key; windows at the beginning of the grid reach keys before KERNEL."""
    return tl.where(key < KERNEL, 0, key - KERNEL // 2)


@triton.jit
def last_query(key, length, KERNEL: tl.constexpr):
    """Last of the queries that see a key; windows at the end of the grid reach the last KERNEL keys."""
    return tl.where(key >= length - KERNEL, length - 1, key + KERNEL // 2)


@triton.jit
def queries_at(distance, length, KERNEL: tl.constexpr):
    """First and number of the queries that see the key at a distance: they follow each other."""
    moved = tl.abs(distance) > KERNEL // 2  # only windows that were moved reach so far
    first = tl.where(distance < 0, tl.where(moved, length - KERNEL - distance, -distance), 0)
    return first, tl.where(moved, KERNEL, length) - tl.abs(distance)


@triton.jit
def tile_positions(tile_h, tile_w, length_h, length_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Positions `[T]` of a tile, and which are inside the grid; the others repeat its last row or column."""
    token = tl.arange(0, TILE_H * TILE_W)
    h = tile_h * TILE_H + token // TILE_W
    w = tile_w * TILE_W + token % TILE_W
    return tl.minimum(h, length_h - 1), tl.minimum(w, length_w - 1), (h < length_h) & (w < length_w)


@triton.jit
def keys_of(
    tile_h,
    tile_w,
    length_h,
    length_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """The rectangle of keys that a tile of queries sees: first row and column, columns, positions."""
    first_h, last_h = ends(tile_h, length_h, TILE_H)
    first_w, last_w = ends(tile_w, length_w, TILE_W)
    begin_h = window_start(first_h, length_h, KERNEL_H)
    begin_w = window_start(first_w, length_w, KERNEL_W)
    columns = window_start(last_w, length_w, KERNEL_W) + KERNEL_W - begin_w
    return (
        begin_h,
        begin_w,
        columns,
        (window_start(last_h, length_h, KERNEL_H) + KERNEL_H - begin_h) * columns,
    )


@triton.jit
def queries_of(
    tile_h,
    tile_w,
    length_h,
    length_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """The rectangle of queries that see a tile of keys: first row and column, columns, positions."""
    first_h, last_h = ends(tile_h, length_h, TILE_H)
    first_w, last_w = ends(tile_w, length_w, TILE_W)
    begin_h = first_query(first_h, length_h, KERNEL_H)
    begin_w = first_query(first_w, length_w, KERNEL_W)
    columns = last_query(last_w, length_w, KERNEL_W) + 1 - begin_w
    return begin_h, begin_w, columns, (last_query(last_h, length_h, KERNEL_H) + 1 - begin_h) * columns


@triton.jit
def load(
    maps, strides, sample, head, y, x, present, DIM: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    """Vectors `[N, BLOCK]` at positions of a map `[B, H, W, heads, DIM]`; zeros where none is present.

    UPCAST is for the interpreter, which multiplies the bits of bfloat16 as integers.
    """
    d = tl.arange(0, BLOCK)
    at = sample * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2] + head * strides[3]
    at = at[:, None] + d[None, :].to(tl.int64) * strides[4]
    vectors = tl.load(maps + at, mask=present[:, None] & (d < DIM)[None, :], other=0.0)
    return vectors.to(tl.float32) if UPCAST else vectors


@triton.jit
def store(maps, token, vectors, present, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write vectors `[N, BLOCK]` to tokens of a contiguous map."""
    d = tl.arange(0, BLOCK)
    at = token[:, None] * DIM + d[None, :]
    tl.store(maps + at, vectors.to(maps.dtype.element_ty), mask=present[:, None] & (d < DIM)[None, :])


@triton.jit
def logits(
    products,
    scale,
    table,
    head,
    query_h,
    query_w,
    key_h,
    key_w,
    length_h,
    length_w,
    present,
    BIASED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
):
    """Logits of products `query . key`; positions broadcast to their shape, -inf where no neighbors."""
    start_h = window_start(query_h, length_h, KERNEL_H)
    start_w = window_start(query_w, length_w, KERNEL_W)
    seen = (key_h >= start_h) & (key_h < start_h + KERNEL_H)
    seen = seen & (key_w >= start_w) & (key_w < start_w + KERNEL_W) & present
    found = products * scale
    if BIASED:
        row = head * (2 * KERNEL_H - 1) + key_h - query_h + KERNEL_H - 1
        at = row * (2 * KERNEL_W - 1) + key_w - query_w + KERNEL_W - 1
        found += tl.load(table + at, mask=seen, other=0.0).to(tl.float32) * LOG2E
    return tl.where(seen, found, float("-inf"))


@triton.jit(do_not_specialize=["height", "width", "heads", "tiles_h", "tiles_w"])
def forward(
    query,
    key,
    value,
    table,
    out,
    lse,
    query_strides,
    key_strides,
    value_strides,
    height,
    width,
    heads,
    tiles_h,
    tiles_w,
    dilation_h,
    dilation_w,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Outputs of a tile of queries, and log2 of the sums of their softmax."""
    head, tile_h, tile_w, grid_h, grid_w, sample = place(
        tl.program_id(0), heads, tiles_h, tiles_w, dilation_h, dilation_w
    )
    length_h = grid_length(height, grid_h, dilation_h)
    length_w = grid_length(width, grid_w, dilation_w)
    query_h, query_w, inside = tile_positions(tile_h, tile_w, length_h, length_w, TILE_H, TILE_W)
    y = grid_h + query_h * dilation_h
    x = grid_w + query_w * dilation_w
    q = load(query, query_strides, sample, head, y, x, inside, HEAD_DIM, BLOCK_D, UPCAST)

    begin_h, begin_w, columns, count = keys_of(
        tile_h, tile_w, length_h, length_w, KERNEL_H, KERNEL_W, TILE_H, TILE_W
    )
    high = tl.full([TILE_H * TILE_W], float("-inf"), tl.float32)
    total = tl.full([TILE_H * TILE_W], 0.0, tl.float32)
    result = tl.full([TILE_H * TILE_W, BLOCK_V], 0.0, tl.float32)
    for start in range(0, count, BLOCK):
        block = start + tl.arange(0, BLOCK)
        key_h = begin_h + block // columns
        key_w = begin_w + block % columns
        present = block < count
        key_y = grid_h + key_h * dilation_h
        key_x = grid_w + key_w * dilation_w
        k = load(key, key_strides, sample, head, key_y, key_x, present, HEAD_DIM, BLOCK_D, UPCAST)
        v = load(value, value_strides, sample, head, key_y, key_x, present, VALUE_DIM, BLOCK_V, UPCAST)
        found = logits(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            scale,
            table,
            head,
            query_h[:, None],
            query_w[:, None],
            key_h[None, :],
            key_w[None, :],
            length_h,
            length_w,
            present[None, :],
            BIASED,
            KERNEL_H,
            KERNEL_W,
        )
        higher = tl.maximum(high, tl.max(found, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no neighbor so far
        p = tl.exp2(found - base[:, None])
        shrink = tl.exp2(high - base)
        total = total * shrink + tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        high = higher

    index = ((sample * height + y) * width + x) * heads + head
    store(out, index, result / total[:, None], inside, VALUE_DIM, BLOCK_V)
    tl.store(lse + index, high + tl.log2(total), mask=inside)


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


@triton.jit(do_not_specialize=["height", "width", "heads", "tiles_h", "tiles_w"])
def query_gradient(
    query,
    key,
    value,
    table,
    grad_out,
    lse,
    delta,
    grad_query,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    height,
    width,
    heads,
    tiles_h,
    tiles_w,
    dilation_h,
    dilation_w,
    scale,
    factor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a tile of queries; `scale` is that of the logits, `factor` that of the products."""
    head, tile_h, tile_w, grid_h, grid_w, sample = place(
        tl.program_id(0), heads, tiles_h, tiles_w, dilation_h, dilation_w
    )
    length_h = grid_length(height, grid_h, dilation_h)
    length_w = grid_length(width, grid_w, dilation_w)
    query_h, query_w, inside = tile_positions(tile_h, tile_w, length_h, length_w, TILE_H, TILE_W)
    y = grid_h + query_h * dilation_h
    x = grid_w + query_w * dilation_w
    index = ((sample * height + y) * width + x) * heads + head
    q = load(query, query_strides, sample, head, y, x, inside, HEAD_DIM, BLOCK_D, UPCAST)
    g = load(grad_out, out_strides, sample, head, y, x, inside, VALUE_DIM, BLOCK_V, UPCAST)
    sums = tl.load(lse + index, mask=inside, other=0.0)
    mean = tl.load(delta + index, mask=inside, other=0.0)

    begin_h, begin_w, columns, count = keys_of(
        tile_h, tile_w, length_h, length_w, KERNEL_H, KERNEL_W, TILE_H, TILE_W
    )
    result = tl.full([TILE_H * TILE_W, BLOCK_D], 0.0, tl.float32)
    for start in range(0, count, BLOCK):
        block = start + tl.arange(0, BLOCK)
        key_h = begin_h + block // columns
        key_w = begin_w + block % columns
        present = block < count
        key_y = grid_h + key_h * dilation_h
        key_x = grid_w + key_w * dilation_w
        k = load(key, key_strides, sample, head, key_y, key_x, present, HEAD_DIM, BLOCK_D, UPCAST)
        v = load(value, value_strides, sample, head, key_y, key_x, present, VALUE_DIM, BLOCK_V, UPCAST)
        found = logits(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            scale,
            table,
            head,
            query_h[:, None],
            query_w[:, None],
            key_h[None, :],
            key_w[None, :],
            length_h,
            length_w,
            present[None, :] & inside[:, None],
            BIASED,
            KERNEL_H,
            KERNEL_W,
        )
        p = tl.exp2(found - sums[:, None])
        grad = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])
        result = tl.dot(grad.to(k.dtype), k, result, input_precision="ieee")
    store(grad_query, index, result * factor, inside, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["height", "width", "heads", "tiles_h", "tiles_w"])
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
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    height,
    width,
    heads,
    tiles_h,
    tiles_w,
    dilation_h,
    dilation_w,
    scale,
    factor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
    FOR_KEY: tl.constexpr,
    FOR_VALUE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a tile of keys and of its values, what is asked for; logits are `[keys, queries]`."""
    head, tile_h, tile_w, grid_h, grid_w, sample = place(
        tl.program_id(0), heads, tiles_h, tiles_w, dilation_h, dilation_w
    )
    length_h = grid_length(height, grid_h, dilation_h)
    length_w = grid_length(width, grid_w, dilation_w)
    key_h, key_w, inside = tile_positions(tile_h, tile_w, length_h, length_w, TILE_H, TILE_W)
    y = grid_h + key_h * dilation_h
    x = grid_w + key_w * dilation_w
    k = load(key, key_strides, sample, head, y, x, inside, HEAD_DIM, BLOCK_D, UPCAST)
    v = load(value, value_strides, sample, head, y, x, inside, VALUE_DIM, BLOCK_V, UPCAST)

    begin_h, begin_w, columns, count = queries_of(
        tile_h, tile_w, length_h, length_w, KERNEL_H, KERNEL_W, TILE_H, TILE_W
    )
    key_result = tl.full([TILE_H * TILE_W, BLOCK_D], 0.0, tl.float32)
    value_result = tl.full([TILE_H * TILE_W, BLOCK_V], 0.0, tl.float32)
    for start in range(0, count, BLOCK):
        block = start + tl.arange(0, BLOCK)
        query_h = begin_h + block // columns
        query_w = begin_w + block % columns
        present = block < count
        query_y = grid_h + query_h * dilation_h
        query_x = grid_w + query_w * dilation_w
        index = ((sample * height + query_y) * width + query_x) * heads + head
        q = load(query, query_strides, sample, head, query_y, query_x, present, HEAD_DIM, BLOCK_D, UPCAST)
        g = load(grad_out, out_strides, sample, head, query_y, query_x, present, VALUE_DIM, BLOCK_V, UPCAST)
        sums = tl.load(lse + index, mask=present, other=0.0)
        found = logits(
            tl.dot(k, tl.trans(q), input_precision="ieee"),
            scale,
            table,
            head,
            query_h[None, :],
            query_w[None, :],
            key_h[:, None],
            key_w[:, None],
            length_h,
            length_w,
            present[None, :] & inside[:, None],
            BIASED,
            KERNEL_H,
            KERNEL_W,
        )
        p = tl.exp2(found - sums[None, :])
        if FOR_VALUE:
            value_result = tl.dot(p.to(g.dtype), g, value_result, input_precision="ieee")
        if FOR_KEY:
            mean = tl.load(delta + index, mask=present, other=0.0)
            grad = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - mean[None, :])
            key_result = tl.dot(grad.to(q.dtype), q, key_result, input_precision="ieee")

    index = ((sample * height + y) * width + x) * heads + head
    if FOR_KEY:
        store(grad_key, index, key_result * factor, inside, HEAD_DIM, BLOCK_D)
    if FOR_VALUE:
        store(grad_value, index, value_result, inside, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["samples", "height", "width", "heads", "splits", "blocks", "strips"])
def table_gradient(
    query,
    key,
    value,
    table,
    grad_out,
    lse,
    delta,
    partial,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    samples,
    height,
    width,
    heads,
    dilation_h,
    dilation_w,
    splits,
    blocks,
    strips,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of a head's bias table: its gradient from some rows of queries, in `[parts, *table.shape]`.

    A row of the table belongs to one distance between the rows of query and key. A program takes a strip of
    columns of queries and a block of columns of keys, adds up the gradients of their logits over its share
    of the rows of the batch, and only then gathers what lies at one distance in columns.
    """
    parts = splits * blocks * strips * dilation_w
    part = tl.program_id(0) % parts
    row = tl.program_id(0) // parts % (2 * KERNEL_H - 1)
    head = tl.program_id(0) // parts // (2 * KERNEL_H - 1)
    split = part % splits
    strip = part // splits // blocks % strips
    grid_w = part // splits // blocks // strips

    length_w = grid_length(width, grid_w, dilation_w)
    column = tl.arange(0, BLOCK)
    query_w = strip * STRIP + column
    inside = (column < STRIP) & (query_w < length_w)
    first_w, last_w = ends(strip, length_w, STRIP)
    key_w = window_start(first_w, length_w, KERNEL_W) + part // splits % blocks * BLOCK + column
    present = key_w < window_start(last_w, length_w, KERNEL_W) + KERNEL_W
    x = grid_w + query_w * dilation_w
    key_x = grid_w + key_w * dilation_w

    distance = row - (KERNEL_H - 1)
    _, rows = queries_at(distance, grid_length(height, 0, dilation_h), KERNEL_H)
    items = samples * dilation_h * rows
    share = (items + splits - 1) // splits
    total = tl.full([BLOCK, BLOCK], 0.0, tl.float32)
    for item in range(split * share, tl.minimum(split * share + share, items)):
        sample = (item // (rows * dilation_h)).to(tl.int64)
        grid_h = item // rows % dilation_h
        length_h = grid_length(height, grid_h, dilation_h)
        first, count = queries_at(distance, length_h, KERNEL_H)
        query_h = first + item % rows
        y = grid_h + query_h * dilation_h
        key_y = y + distance * dilation_h
        live = item % rows < count  # shorter grids have a row less
        asking, seen = inside & live, present & live
        index = ((sample * height + y) * width + x) * heads + head
        q = load(query, query_strides, sample, head, y, x, asking, HEAD_DIM, BLOCK_D, UPCAST)
        g = load(grad_out, out_strides, sample, head, y, x, asking, VALUE_DIM, BLOCK_V, UPCAST)
        sums = tl.load(lse + index, mask=asking, other=0.0)
        mean = tl.load(delta + index, mask=asking, other=0.0)
        k = load(key, key_strides, sample, head, key_y, key_x, seen, HEAD_DIM, BLOCK_D, UPCAST)
        v = load(value, value_strides, sample, head, key_y, key_x, seen, VALUE_DIM, BLOCK_V, UPCAST)
        found = logits(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            scale,
            table,
            head,
            query_h,
            query_w[:, None],
            query_h + distance,
            key_w[None, :],
            length_h,
            length_w,
            asking[:, None] & seen[None, :],
            True,
            KERNEL_H,
            KERNEL_W,
        )
        p = tl.exp2(found - sums[:, None])
        total += p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])

    partial += ((part * heads + head) * (2 * KERNEL_H - 1) + row) * (2 * KERNEL_W - 1)
    apart = key_w[None, :] - query_w[:, None] + KERNEL_W - 1
    for at in range(2 * KERNEL_W - 1):
        tl.store(partial + at, tl.sum(tl.where(apart == at, total, 0.0)))
