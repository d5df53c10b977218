# mypy: allow-untyped-defs
"""Kernels of `triton.py`. Importing this file imports triton, so it is imported at first use.

All of them run on one axis of programs, heads fastest, and read maps `[B, H, W, heads, head_dim]` by their
strides, named q, k, v, g (query, key, value, gradient of the result) and b, y, x, h, d (the axes). Maps that
they write are contiguous. Windows and the tokens in a window are row-major; `columns` windows make a row.
Logits are those of base 2, so that exp2 serves; `lse` and `delta` are float32 `[B, heads, windows, tokens]`.

The keys of a query window are slots 0 to topk * tokens: token `slot % tokens` of routed window
`slot // tokens`. Blocks of slots run over several windows if these are small. The queries of a key window
are slots of the same kind, over the (query window, place in its routing) that route to it.
"""

import triton
import triton.language as tl

__all__ = ["backward_key", "backward_query", "forward"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def offsets(window, token, columns, height, width, stride_y, stride_x):
    """Where tokens lie in a map that has windows of `height` x `width`; int64, since maps may be large."""
    y = window // columns * height + token // width
    x = window % columns * width + token % width
    return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def load_rows(start, row, seen, stride_d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """`[rows, BLOCK]`: zeros where a row is not seen and beyond DIM."""
    d = tl.arange(0, BLOCK)
    place = start + row[:, None] + d.to(tl.int64)[None, :] * stride_d
    return tl.load(place, mask=seen[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(start, row, seen, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `load_rows` reads, to a map whose last axis is contiguous."""
    d = tl.arange(0, BLOCK)
    place = start + row[:, None] + d[None, :]
    tl.store(place, values.to(start.dtype.element_ty), mask=seen[:, None] & (d < DIM)[None, :])


@triton.jit
def forward(
    query,
    key,
    value,
    index,
    weight,
    out,
    lse,
    qb,
    qy,
    qx,
    qh,
    qd,
    kb,
    ky,
    kx,
    kh,
    kd,
    vb,
    vy,
    vx,
    vh,
    vd,
    heads,
    windows,
    columns,
    topk,
    query_height,
    query_width,
    key_height,
    key_width,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One block of OWNED queries of a window: its result and the log-sum-exp of its logits."""
    tokens = query_height * query_width
    keys = key_height * key_width
    blocks = (tokens + OWNED - 1) // OWNED
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    token = program // heads % blocks * OWNED + tl.arange(0, OWNED)
    window = program // (heads * blocks) % windows
    batch = (program // (heads * blocks * windows)).to(tl.int64)

    inside = token < tokens
    row = offsets(window, token, columns, query_height, query_width, qy, qx)
    q = load_rows(query + batch * qb + head * qh, row, inside, qd, HEAD_DIM, BLOCK_D).to(OPERAND)
    routed = (batch * windows + window) * topk
    total = topk * keys
    top = tl.full([OWNED], float("-inf"), tl.float32)
    norm = tl.zeros([OWNED], tl.float32)
    result = tl.zeros([OWNED, BLOCK_V], tl.float32)
    for start in range(0, total, READ):
        slot = start + tl.arange(0, READ)
        seen = slot < total
        nth = slot // keys
        region = tl.load(index + routed + nth, mask=seen, other=0).to(tl.int32)
        key_row = offsets(region, slot % keys, columns, key_height, key_width, ky, kx)
        k = load_rows(key + batch * kb + head * kh, key_row, seen, kd, HEAD_DIM, BLOCK_D).to(OPERAND)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if WEIGHTED:
            factor = tl.load(weight + routed + nth, mask=seen, other=0.0).to(tl.float32)
            logits = logits * factor[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))  # finite: each block has a key that is seen
        shrink = tl.exp2(top - higher)
        p = tl.exp2(logits - higher[:, None])
        norm = norm * shrink + tl.sum(p, 1)
        if WEIGHTED:
            p = p * factor[None, :]
        value_row = offsets(region, slot % keys, columns, key_height, key_width, vy, vx)
        v = load_rows(value + batch * vb + head * vh, value_row, seen, vd, VALUE_DIM, BLOCK_V).to(OPERAND)
        result = tl.dot(p.to(OPERAND), v, result * shrink[:, None], input_precision="ieee")
        top = higher

    step = heads * VALUE_DIM
    row = offsets(window, token, columns, query_height, query_width, columns * query_width * step, step)
    place = out + batch * windows * tokens * step + head * VALUE_DIM
    store_rows(place, row, inside, result / norm[:, None], VALUE_DIM, BLOCK_V)
    place = lse + ((batch * heads + head) * windows + window) * tokens + token
    tl.store(place, top + tl.log2(norm), mask=inside)


@triton.jit
def backward_query(
    query,
    key,
    value,
    index,
    weight,
    out,
    lse,
    grad,
    delta,
    grad_query,
    grad_slots,
    qb,
    qy,
    qx,
    qh,
    qd,
    kb,
    ky,
    kx,
    kh,
    kd,
    vb,
    vy,
    vx,
    vh,
    vd,
    gb,
    gy,
    gx,
    gh,
    gd,
    heads,
    windows,
    columns,
    topk,
    query_height,
    query_width,
    key_height,
    key_width,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERAND: tl.constexpr,
    FOR_QUERY: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
):
    """One block of OWNED queries of a window, with p the attention and w the routing weights.

    Writes delta, the product of result and gradient that `backward_key` needs too; the gradient of the
    queries, sum of p (dp w - delta) w k, and that of w at each slot, summed over the queries of the block:
    `[B, windows, blocks, heads, topk * tokens]`.
    """
    tokens = query_height * query_width
    keys = key_height * key_width
    blocks = (tokens + OWNED - 1) // OWNED
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    block = program // heads % blocks
    token = block * OWNED + tl.arange(0, OWNED)
    window = program // (heads * blocks) % windows
    batch = (program // (heads * blocks * windows)).to(tl.int64)

    inside = token < tokens
    step = heads * VALUE_DIM
    row = offsets(window, token, columns, query_height, query_width, columns * query_width * step, step)
    place = out + batch * windows * tokens * step + head * VALUE_DIM
    result = load_rows(place, row, inside, 1, VALUE_DIM, BLOCK_V).to(tl.float32)
    row = offsets(window, token, columns, query_height, query_width, gy, gx)
    g = load_rows(grad + batch * gb + head * gh, row, inside, gd, VALUE_DIM, BLOCK_V)
    product = tl.sum(result * g.to(tl.float32), 1)
    place = ((batch * heads + head) * windows + window) * tokens + token
    tl.store(delta + place, product, mask=inside)

    if FOR_QUERY or FOR_WEIGHT:
        g = g.to(OPERAND)
        bound = tl.load(lse + place, mask=inside, other=float("inf"))  # no attention from what is no query
        row = offsets(window, token, columns, query_height, query_width, qy, qx)
        q = load_rows(query + batch * qb + head * qh, row, inside, qd, HEAD_DIM, BLOCK_D).to(OPERAND)
        routed = (batch * windows + window) * topk
        total = topk * keys
        dq = tl.zeros([OWNED, BLOCK_D], tl.float32)
        for start in range(0, total, READ):
            slot = start + tl.arange(0, READ)
            seen = slot < total
            nth = slot // keys
            region = tl.load(index + routed + nth, mask=seen, other=0).to(tl.int32)
            key_row = offsets(region, slot % keys, columns, key_height, key_width, ky, kx)
            k = load_rows(key + batch * kb + head * kh, key_row, seen, kd, HEAD_DIM, BLOCK_D).to(OPERAND)
            value_row = offsets(region, slot % keys, columns, key_height, key_width, vy, vx)
            v = load_rows(value + batch * vb + head * vh, value_row, seen, vd, VALUE_DIM, BLOCK_V).to(OPERAND)
            qk = tl.dot(q, tl.trans(k), input_precision="ieee")
            logits = qk * (scale * LOG2E)
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            if WEIGHTED:
                factor = tl.load(weight + routed + nth, mask=seen, other=0.0).to(tl.float32)
                logits = logits * factor[None, :]
            p = tl.exp2(tl.where(seen[None, :], logits, float("-inf")) - bound[:, None])
            if WEIGHTED:
                ds = p * (dp * factor[None, :] - product[:, None])
            else:
                ds = p * (dp - product[:, None])
            if FOR_WEIGHT:
                part = tl.sum(ds * qk * scale + p * dp, 0)
                part_place = ((batch * windows + window) * blocks + block) * heads + head
                tl.store(grad_slots + part_place * total + slot, part, mask=seen)
            if FOR_QUERY:
                if WEIGHTED:
                    ds = ds * factor[None, :]
                dq = tl.dot(ds.to(OPERAND), k, dq, input_precision="ieee")
        if FOR_QUERY:
            step = heads * HEAD_DIM
            stride_y = columns * query_width * step
            row = offsets(window, token, columns, query_height, query_width, stride_y, step)
            place = grad_query + batch * windows * tokens * step + head * HEAD_DIM
            store_rows(place, row, inside, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_key(
    query,
    key,
    value,
    entries,
    starts,
    weight,
    lse,
    grad,
    delta,
    grad_key,
    grad_value,
    qb,
    qy,
    qx,
    qh,
    qd,
    kb,
    ky,
    kx,
    kh,
    kd,
    vb,
    vy,
    vx,
    vh,
    vd,
    gb,
    gy,
    gx,
    gh,
    gd,
    heads,
    windows,
    columns,
    topk,
    query_height,
    query_width,
    key_height,
    key_width,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OWNED: tl.constexpr,
    READ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERAND: tl.constexpr,
    FOR_KEY: tl.constexpr,
    FOR_VALUE: tl.constexpr,
):
    """One block of OWNED keys of a window: gradients of keys and values, over the queries that read it.

    `entries` `[B, windows * topk]` are the flat places in the routing, in the order of the windows that they
    name, and `starts` `[B, windows + 1]` says where each window's begin. All products are transposed:
    `[keys, queries]`.
    """
    tokens = query_height * query_width
    keys = key_height * key_width
    blocks = (keys + OWNED - 1) // OWNED
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    token = program // heads % blocks * OWNED + tl.arange(0, OWNED)
    window = program // (heads * blocks) % windows
    batch = (program // (heads * blocks * windows)).to(tl.int64)

    inside = token < keys
    row = offsets(window, token, columns, key_height, key_width, ky, kx)
    k = load_rows(key + batch * kb + head * kh, row, inside, kd, HEAD_DIM, BLOCK_D).to(OPERAND)
    if FOR_KEY:
        row = offsets(window, token, columns, key_height, key_width, vy, vx)
        v = load_rows(value + batch * vb + head * vh, row, inside, vd, VALUE_DIM, BLOCK_V).to(OPERAND)
    dk = tl.zeros([OWNED, BLOCK_D], tl.float32)
    dv = tl.zeros([OWNED, BLOCK_V], tl.float32)
    first = tl.load(starts + batch * (windows + 1) + window)
    last = tl.load(starts + batch * (windows + 1) + window + 1)
    routing = batch * windows * topk
    total = (last - first).to(tl.int32) * tokens
    for start in range(0, total, READ):
        slot = start + tl.arange(0, READ)
        seen = slot < total
        entry = tl.load(entries + routing + first + slot // tokens, mask=seen, other=0).to(tl.int32)
        reader = entry // topk
        query_row = offsets(reader, slot % tokens, columns, query_height, query_width, qy, qx)
        q = load_rows(query + batch * qb + head * qh, query_row, seen, qd, HEAD_DIM, BLOCK_D).to(OPERAND)
        grad_row = offsets(reader, slot % tokens, columns, query_height, query_width, gy, gx)
        g = load_rows(grad + batch * gb + head * gh, grad_row, seen, gd, VALUE_DIM, BLOCK_V).to(OPERAND)
        place = (batch * heads + head) * windows * tokens + reader * tokens + slot % tokens
        bound = tl.load(lse + place, mask=seen, other=float("inf"))  # no attention from what is no query
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        if WEIGHTED:
            factor = tl.load(weight + routing + entry, mask=seen, other=0.0).to(tl.float32)
            logits = logits * factor[None, :]
        # rows beyond the window are never stored, but must not overflow
        p = tl.exp2(tl.where(inside[:, None], logits, float("-inf")) - bound[None, :])
        if FOR_VALUE:
            if WEIGHTED:
                dv = tl.dot((p * factor[None, :]).to(OPERAND), g, dv, input_precision="ieee")
            else:
                dv = tl.dot(p.to(OPERAND), g, dv, input_precision="ieee")
        if FOR_KEY:
            product = tl.load(delta + place, mask=seen, other=0.0)
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            if WEIGHTED:
                ds = p * (dp * factor[None, :] - product[None, :]) * factor[None, :]
            else:
                ds = p * (dp - product[None, :])
            dk = tl.dot(ds.to(OPERAND), q, dk, input_precision="ieee")

    if FOR_KEY:
        step = heads * HEAD_DIM
        row = offsets(window, token, columns, key_height, key_width, columns * key_width * step, step)
        place = grad_key + batch * windows * keys * step + head * HEAD_DIM
        store_rows(place, row, inside, dk * scale, HEAD_DIM, BLOCK_D)
    if FOR_VALUE:
        step = heads * VALUE_DIM
        row = offsets(window, token, columns, key_height, key_width, columns * key_width * step, step)
        place = grad_value + batch * windows * keys * step + head * VALUE_DIM
        store_rows(place, row, inside, dv, VALUE_DIM, BLOCK_V)
