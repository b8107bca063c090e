"""The encoder's kernels: embedding, attention, layer norm, and linear with all that joins it.

Each is a tile function, which says what one program computes, and a kernel that gives every tile a
program of its own; persistent.py shares the tiles out otherwise. Grids are those of a capacity: how
many tokens there really are is read on the device, and rows beyond are neither read nor written.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter (3.7) multiplies the bits of bf16 operands as integers, and cuts off where
# the hardware rounds. Under it, both are done by hand.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, rounded to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b, in fp32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def statistics(x, rows, valid, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows of x [T, WIDTH], each [rows].

    Unrolled, with one reduction at the end, so that all loads are on their way at once.
    """
    totals = tl.zeros([rows.shape[0], BLOCK], tl.float32)
    squares = tl.zeros([rows.shape[0], BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (columns < WIDTH)[None, :]
        part = tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        part = part.to(tl.float32)
        totals += part
        squares += part * part
    mean = tl.sum(totals, 1) / WIDTH
    variance = tl.maximum(tl.sum(squares, 1) / WIDTH - mean * mean, 0.0)
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def linear_tile(
    x, weight, bias, norm_weight, norm_bias, residual, positions, cos, sin, y,
    row_tile, column_tile, total, eps,
    IN: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    PAIRING: tl.constexpr, HALF: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [ROWS, COLUMNS] tile of y [T, OUT]; `linear_kernel` says of what."""
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    valid = rows < total
    place = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if PAIRING == "gate":
        first, second, inside = place, place + OUT, place < OUT
    elif PAIRING == "rope":
        first = (place // HALF) * (2 * HALF) + place % HALF
        second, inside = first + HALF, place < OUT // 2
    else:
        first, second, inside = place, place, place < OUT
    if NORM:
        mean, scale = statistics(x, rows, valid, eps, IN, INNER)  # pyright: ignore
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    paired = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, IN, INNER):
        inner = start + tl.arange(0, INNER)
        known = inner < IN
        part = tl.load(
            x + rows[:, None] * IN + inner[None, :],
            mask=valid[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        if NORM:
            gain = tl.load(norm_weight + inner, mask=known, other=0.0)
            shift = tl.load(norm_bias + inner, mask=known, other=0.0)
            part = (part - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
        part = narrowed(part.to(tl.float32), weight.dtype.element_ty)
        mask = known[:, None] & inside[None, :]
        at = weight + first[None, :] * IN + inner[:, None]
        sums = dot(part, tl.load(at, mask=mask, other=0.0), sums, PRECISION)
        if PAIRING != "":
            at = weight + second[None, :] * IN + inner[:, None]
            paired = dot(part, tl.load(at, mask=mask, other=0.0), paired, PRECISION)
    sums += tl.load(bias + first, mask=inside, other=0.0)[None, :]
    written = valid[:, None] & inside[None, :]
    out = y + rows[:, None] * OUT + first[None, :]
    if PAIRING == "rope":
        paired += tl.load(bias + second, mask=inside, other=0.0)[None, :]
        position = tl.load(positions + rows, mask=valid, other=0)
        at = position[:, None] * HALF + (place % HALF)[None, :]
        # The last third of the columns are values, which are not rotated.
        turned = inside & (first < OUT // 3 * 2)
        c = tl.load(cos + at, mask=valid[:, None] & turned[None, :], other=1.0)
        s = tl.load(sin + at, mask=valid[:, None] & turned[None, :], other=0.0)
        tl.store(out, narrowed(sums * c - paired * s, y.dtype.element_ty), mask=written)
        turn = narrowed(paired * c + sums * s, y.dtype.element_ty)
        tl.store(out + HALF, turn, mask=written)
    else:
        sums = activate(sums, ACTIVATION)
        if PAIRING == "gate":
            sums *= paired + tl.load(bias + second, mask=inside, other=0.0)[None, :]
        if RESIDUAL != "":
            at = residual + rows[:, None] * OUT + first[None, :]
            old = tl.load(at, mask=written, other=0.0).to(tl.float32)
            if RESIDUAL == "normed":
                mean, scale = statistics(residual, rows, valid, eps, OUT, INNER)  # pyright: ignore
                gain = tl.load(norm_weight + first, mask=inside, other=0.0)
                shift = tl.load(norm_bias + first, mask=inside, other=0.0)
                old = (old - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
            sums += old
        tl.store(out, narrowed(sums, y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["sequences"])
def linear_kernel(
    x, weight, bias, norm_weight, norm_bias, residual, positions, cos, sin, y, cu_seqlens, eps,
    sequences,
    IN: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    PAIRING: tl.constexpr, HALF: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y [T, OUT] = after(before(x) [T, IN] Wᵀ + b), accumulated in fp32.

    NORM: `before` is the layer norm. PAIRING "gate": W has 2 OUT rows, y = activation(first half) ·
    second half. "rope": x Wᵀ is [T, 3, H, 2 HALF], of which queries and keys are rotated.
    RESIDUAL: "plain" adds `residual` [T, OUT], "normed" its layer norm.
    """
    total = tl.load(cu_seqlens + sequences)
    row_tile = tl.program_id(0)
    if row_tile * ROWS >= total:
        return
    linear_tile(
        x, weight, bias, norm_weight, norm_bias, residual, positions, cos, sin, y,
        row_tile, tl.program_id(1), total, eps,
        IN, OUT, NORM, ACTIVATION, PAIRING, HALF, RESIDUAL, PRECISION, ROWS, COLUMNS, INNER,
    )  # fmt: skip


@triton.jit
def attention_tile(
    qkv, context, cu_seqlens, sequence, head, query_tile, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of QUERIES tokens of one sequence and head to all the keys that they see.

    Online softmax (Milakov and Gimelshein 2018) in base 2: `scale` is log2(e) / √d. A head of WIDTH
    lies in LANES, a power of two.
    """
    begin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    if query_tile * QUERIES < length:
        row: tl.constexpr = 3 * HEADS * WIDTH
        lanes = tl.arange(0, LANES)
        used = lanes < WIDTH
        queries = query_tile * QUERIES + tl.arange(0, QUERIES)
        asked = queries < length
        base = qkv + begin * row + head * WIDTH
        query = tl.load(
            base + queries[:, None] * row + lanes[None, :],
            mask=asked[:, None] & used[None, :], other=0.0,
        )  # fmt: skip
        highest = tl.full([QUERIES], -1e30, tl.float32)
        weights = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, LANES], tl.float32)
        nothing = tl.zeros([QUERIES, KEYS], tl.float32)
        low, high = 0, length
        if WINDOW >= 0:
            low = tl.maximum(query_tile * QUERIES - WINDOW, 0) // KEYS * KEYS
            high = tl.minimum(length, (query_tile + 1) * QUERIES + WINDOW)
        for start in range(low, high, KEYS):
            keys = start + tl.arange(0, KEYS)
            there = keys < length
            at = base + HEADS * WIDTH + keys[None, :] * row + lanes[:, None]
            key = tl.load(at, mask=used[:, None] & there[None, :], other=0.0)
            seen = there[None, :]
            if WINDOW >= 0:
                apart = queries[:, None] - keys[None, :]
                seen = seen & (apart <= WINDOW) & (apart >= -WINDOW)
            scores = dot(query, key, nothing, PRECISION) * scale
            scores = tl.where(seen, scores, float("-inf"))
            # Finite from the start, so that a row that sees nothing in this block is no NaN.
            top = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp2(highest - top)
            part = tl.exp2(scores - top[:, None])
            weights = weights * shrink + tl.sum(part, 1)
            at = base + 2 * HEADS * WIDTH + keys[:, None] * row + lanes[None, :]
            value = tl.load(at, mask=there[:, None] & used[None, :], other=0.0)
            mixed = mixed * shrink[:, None]
            mixed = dot(narrowed(part, value.dtype), value, mixed, PRECISION)
            highest = top
        at = context + (begin + queries)[:, None] * (HEADS * WIDTH) + head * WIDTH + lanes[None, :]
        mixed = mixed / tl.where(asked, weights, 1.0)[:, None]
        written = asked[:, None] & used[None, :]
        tl.store(at, narrowed(mixed, context.dtype.element_ty), mask=written)


@triton.jit
def attention_kernel(
    qkv, context, cu_seqlens, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """context [T, H d] = softmax(q kᵀ / √d) v within each sequence and head, of qkv [T, 3, H, d].

    WINDOW: how far a token sees to either side, -1 for all.
    """
    attention_tile(
        qkv, context, cu_seqlens, tl.program_id(2), tl.program_id(1), tl.program_id(0), scale,
        HEADS, WIDTH, LANES, WINDOW, PRECISION, QUERIES, KEYS,
    )  # fmt: skip


@triton.jit
def embed_tile(
    ids, positions, token_table, position_table, stream, row_tile, total,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    valid = rows < total
    token = tl.load(ids + rows, mask=valid, other=0)
    columns = tl.arange(0, BLOCK)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    at = token[:, None] * WIDTH + columns[None, :]
    value = tl.load(token_table + at, mask=mask, other=0.0).to(tl.float32)
    if POSITIONS:
        position = tl.load(positions + rows, mask=valid, other=0)
        at = position[:, None] * WIDTH + columns[None, :]
        value += tl.load(position_table + at, mask=mask, other=0.0).to(tl.float32)
    at = rows[:, None] * WIDTH + columns[None, :]
    tl.store(stream + at, narrowed(value, stream.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["sequences"])
def embed_kernel(
    ids, positions, token_table, position_table, stream, cu_seqlens, sequences,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """stream [T, WIDTH] = token [+ position], before the layer norm."""
    total = tl.load(cu_seqlens + sequences)
    row_tile = tl.program_id(0)
    if row_tile * ROWS >= total:
        return
    embed_tile(
        ids, positions, token_table, position_table, stream, row_tile, total,
        WIDTH, ROWS, BLOCK, POSITIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sequences"])
def normalise_kernel(
    x, norm_weight, norm_bias, y, cu_seqlens, eps, sequences,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = layer norm of x, both [T, WIDTH]; BLOCK holds a whole row."""
    total = tl.load(cu_seqlens + sequences)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    known = columns < WIDTH
    mask = (rows < total)[:, None] & known[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / WIDTH
    value = tl.where(known[None, :], value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / WIDTH + eps)
    gain = tl.load(norm_weight + columns, mask=known, other=0.0)
    shift = tl.load(norm_bias + columns, mask=known, other=0.0)
    value = value * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(y + at, narrowed(value, y.dtype.element_ty), mask=mask)
