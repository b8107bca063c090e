"""Pooling, normalisation and both heads of `reference_heads.py` as one Triton kernel.

One launch takes the encoder's residual stream and the numbers of a batch of stages to all
predictions. What the heads ask of a text by itself is worked out once and kept in its row of a
table on the device, so that later stages of a workflow point at texts of earlier launches. Sizes of
a launch are those of a capacity, the real ones are read on the device: one captured graph serves
all smaller batches. Knows no texts' contents, no graphs and no slots' owners.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chimera_kernels import reference_heads
from chimera_kernels.reference import Norm, Pooling
from chimera_kernels.reference_heads import HeadOutputs, HeadWeights
from chimera_kernels.resources import Variant

# The largest sizes the kernel is meant and tested for; those of the heads by their symbols.
MAX_STAGES, MAX_SEQUENCES = 256, 512
_LIMITS = {
    "D": (1024, "dimensions of a text"),
    "N": (64, "numbers"),
    "G": (16, "steps of each number"),
    "K": (64, "kinds"),
    "P": (64, "dimensions of the first text's projection"),
    "O": (64, "dimensions of the own text's projection"),
    "M": (32, "models"),
    "Q": (9, "quantile levels"),
    "C": (1024, "centres"),
    "H": (2560, "hidden units"),
}

_WARPS = 8
_TILE = 4096  # elements that a program adds up at once: 16 registers of each thread
_SHARES = 256  # to make of the tokens if there are fewer sequences
_ROW_ALIGNMENT = 32  # floats: rows of the table begin at cache lines

# Stages of one block: every weight that a program reads serves all of them.
_STAGES = tl.constexpr(16)
_UNITS = tl.constexpr(32)  # hidden units, or centres, of one program
_COLUMNS = tl.constexpr(64)  # columns of the second product at once
_MAX_SPLITS = tl.constexpr(16)  # shares of one sequence
_INNER = tl.constexpr(32)  # inner places of a product at once
_PRECISION = tl.constexpr("ieee")

_PROBABILITY_LIMIT = tl.constexpr(reference_heads._PROBABILITY_LIMIT)
_MAX_LOG_TOKENS = tl.constexpr(reference_heads._MAX_LOG_TOKENS)
_MAX_LOG_STAGES = tl.constexpr(8.0)
_SHIFTED = tl.constexpr(reference_heads._SHIFTED)
_NAN = tl.constexpr(tl.PropagateNan.ALL)

# Counters: who comes next, how many programs are done, how many texts are in the table; then the
# parts done of each stage block, then those of each sequence.
_TICKET = tl.constexpr(0)
_DONE = tl.constexpr(1)
_ARRIVED = tl.constexpr(2)
_BLOCKS = tl.constexpr(3)
_SEQUENCES = tl.constexpr(3 + MAX_STAGES // 16)
_COUNTERS = tl.constexpr(1024)


@triton.jit
def _wait(counter, target):
    """Until `target` others have signalled. What they wrote before can then be read."""
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass


@triton.jit
def _signal(counter):
    """Shows others what this program has written; how many signals there were before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def _pool(
    share, hidden, norm_weight, norm_bias, eps, cu_seqlens, seq_slots, texts,
    projection, offset, pooled, counters, splits,
    D: tl.constexpr, K: tl.constexpr, FEATURES: tl.constexpr, TEXT: tl.constexpr,
    CLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One share of a sequence's tokens; whoever comes last of a sequence completes its text."""
    sequence = share // splits
    D_P: tl.constexpr = triton.next_power_of_2(D)
    columns = tl.arange(0, D_P)
    known = columns < D
    first = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    if CLS:
        end = first + 1
    total = tl.zeros([TOKENS, D_P], tl.float32)
    start = first + (share % splits) * TOKENS
    for token in tl.range(start, end, splits * TOKENS, num_stages=2):
        rows = token + tl.arange(0, TOKENS)
        mask = (rows < end)[:, None] & known[None, :]
        x = tl.load(hidden + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if norm_weight is not None:
            mean = tl.sum(x, 1) / D
            x = tl.where(mask, x - mean[:, None], 0.0)
            x *= (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
        total += x
    tl.store(pooled + share * D + columns, tl.sum(total, 0), mask=known)
    if _signal(counters + _SEQUENCES + sequence) == splits - 1:
        part = tl.arange(0, _MAX_SPLITS)
        parts = tl.load(
            pooled + (sequence * splits + part)[:, None] * D + columns[None, :],
            mask=(part < splits)[:, None] & known[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        vector = tl.sum(parts, 0) / tl.maximum(end - first, 1)
        if norm_weight is not None:
            vector *= tl.load(norm_weight + columns, mask=known, other=0.0).to(tl.float32)
            if norm_bias is not None:
                vector += tl.load(norm_bias + columns, mask=known, other=0.0).to(tl.float32)
        size = tl.sqrt(tl.sum(vector * vector, 0))
        vector /= tl.maximum(size, 1e-12, propagate_nan=_NAN)
        text = texts + tl.load(seq_slots + sequence).to(tl.int64) * TEXT
        tl.store(text + columns, vector, mask=known)
        tl.debug_barrier()
        has_text = tl.max((vector != 0.0).to(tl.int32), 0) > 0
        _describe(text, has_text, projection, offset, D, K, FEATURES)
        _signal(counters + _ARRIVED)


@triton.jit
def _describe(
    text, has_text, projection, offset, D: tl.constexpr, K: tl.constexpr, FEATURES: tl.constexpr
):
    """From a text's vector its kinds' probabilities and its two projections, behind the vector."""
    F_P: tl.constexpr = triton.next_power_of_2(FEATURES)
    f = tl.arange(0, F_P)
    known = f < FEATURES
    products = tl.zeros([F_P, _INNER], tl.float32)
    for start in tl.range(0, D, _INNER, num_stages=3):
        d = start + tl.arange(0, _INNER)
        x = tl.load(text + d, mask=d < D, other=0.0, cache_modifier=".cg")
        mask = known[:, None] & (d < D)[None, :]
        w = tl.load(projection + f[:, None] * D + d[None, :], mask=mask, other=0.0)
        products += w * x[None, :]
    features = tl.sum(products, 1) + tl.load(offset + f, mask=known, other=0.0)
    logits = tl.where(f < K, features, float("-inf"))
    shares = tl.exp(logits - tl.max(logits, 0))
    features = tl.where(f < K, shares / tl.sum(shares, 0), tl.where(has_text, features, 0.0))
    tl.store(text + D + f, features, mask=known)


@triton.jit
def _hidden_units(
    block, part, numbers, kind, task_slot, new_slot, texts, absent, edges,
    hidden_weight, hidden_bias, out_weight, sums, counters, sequences, stages,
    D: tl.constexpr, N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    FEATURES: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """What a few hidden units add to the raw outputs of a block of stages."""
    rows = block * _STAGES + tl.arange(0, _STAGES)
    real = rows < stages
    units = part * _UNITS + tl.arange(0, _UNITS)
    products = tl.zeros([_STAGES, _UNITS], tl.float32)
    # The numbers do not wait for the texts.
    for start in tl.range(0, N * G, _INNER, num_stages=3):
        i = start + tl.arange(0, _INNER)
        known = i < N * G
        mask = real[:, None] & known[None, :]
        x = tl.load(numbers + rows[:, None] * N + (i // G)[None, :], mask=mask, other=0.0)
        low = tl.load(edges + i + i // G, mask=known, other=0.0)
        high = tl.load(edges + i + i // G + 1, mask=known, other=1.0)
        steps = tl.clamp(
            (x - low[None, :]) / (high - low)[None, :], 0.0, 1.0, propagate_nan=_NAN
        )  # fmt: skip
        w_mask = known[:, None] & (units < H)[None, :]
        w = tl.load(hidden_weight + i[:, None] * H + units[None, :], mask=w_mask, other=0.0)
        products = tl.dot(steps, w, products, input_precision=_PRECISION)
    _wait(counters + _ARRIVED, sequences)
    declared = tl.load(kind + rows, mask=real, other=0)
    task = tl.load(task_slot + rows, mask=real, other=-1).to(tl.int64)
    new = tl.load(new_slot + rows, mask=real, other=-1).to(tl.int64)
    for start in tl.range(0, FEATURES, _INNER, num_stages=3):
        f = start + tl.arange(0, _INNER)
        known = f < FEATURES
        slot = tl.where((f < K + P)[None, :], task[:, None], new[:, None])
        mask = (slot >= 0) & known[None, :]
        x = tl.load(
            texts + slot * TEXT + D + f[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        without = tl.load(absent + f, mask=known, other=0.0)
        x = tl.where(slot >= 0, x, without[None, :])
        one_hot = (declared[:, None] == f[None, :]).to(tl.float32)
        x = tl.where((declared >= 0)[:, None] & (f < K)[None, :], one_hot, x)
        w_mask = known[:, None] & (units < H)[None, :]
        w_rows = (N * G + f)[:, None]
        w = tl.load(hidden_weight + w_rows * H + units[None, :], mask=w_mask, other=0.0)
        products = tl.dot(x, w, products, input_precision=_PRECISION)
    x = products + tl.load(hidden_bias + units, mask=units < H, other=0.0)[None, :]
    x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    PARTS: tl.constexpr = triton.cdiv(H, _UNITS)
    places = (rows * PARTS + part) * OUT
    _times(x, out_weight, units, sums, places, real, H, OUT)


@triton.jit
def _near_centres(
    block, part, task_slot, texts, centres, width, shift, sums, counters, sequences, stages,
    D: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """What a few centres of the kernel regression add to the shift of a block of stages."""
    rows = block * _STAGES + tl.arange(0, _STAGES)
    real = rows < stages
    units = part * _UNITS + tl.arange(0, _UNITS)
    slot = tl.load(task_slot + rows, mask=real, other=-1).to(tl.int64)
    products = tl.zeros([_STAGES, _UNITS], tl.float32)
    nonzero = tl.zeros([_STAGES, _INNER], tl.int32)
    _wait(counters + _ARRIVED, sequences)
    for start in tl.range(0, D, _INNER, num_stages=3):
        d = start + tl.arange(0, _INNER)
        mask = (slot >= 0)[:, None] & (d < D)[None, :]
        x = tl.load(
            texts + slot[:, None] * TEXT + d[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        w_mask = (d < D)[:, None] & (units < C)[None, :]
        w = tl.load(centres + d[:, None] * C + units[None, :], mask=w_mask, other=0.0)
        products = tl.dot(x, w, products, input_precision=_PRECISION)
        nonzero |= (x != 0.0).to(tl.int32)
    near = tl.exp((products - 1.0) / tl.load(width))
    has_text = tl.max(nonzero, 1) > 0
    near = tl.where(has_text[:, None] & (units < C)[None, :], near, 0.0)
    PARTS: tl.constexpr = triton.cdiv(C, _UNITS)
    places = (rows * PARTS + part) * OUT
    _times(near, shift, units, sums, places, real, C, OUT)


@triton.jit
def _times(x, weight, units, out, places, real, ROWS: tl.constexpr, OUT: tl.constexpr):
    """x [stages, units] times these units' rows of weight [ROWS, OUT], a row to each place."""
    for start in tl.range(0, OUT, _COLUMNS, num_stages=3):  # pyright: ignore
        columns = start + tl.arange(0, _COLUMNS)
        mask = (units < ROWS)[:, None] & (columns < OUT)[None, :]
        w = tl.load(weight + units[:, None] * OUT + columns[None, :], mask=mask, other=0.0)
        y = tl.dot(x, w, input_precision=_PRECISION)
        mask = real[:, None] & (columns < OUT)[None, :]
        tl.store(out + places[:, None] + columns[None, :], y, mask=mask)


@triton.jit
def _sum_parts(
    parts, stage, columns, mask,
    COUNT: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sum over a stage's COUNT parts of the given columns [WIDTH]; parts is [B, COUNT, OUT]."""
    total = tl.zeros([AT_ONCE, WIDTH], tl.float32)
    for start in tl.range(0, COUNT, AT_ONCE, num_stages=2):
        part = start + tl.arange(0, AT_ONCE)
        total += tl.load(
            parts + (stage * COUNT + part)[:, None] * OUT + columns[None, :],
            mask=(part < COUNT)[:, None] & mask[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
    return tl.sum(total, 0)


@triton.jit
def _column(x, v):
    """Column v of x [M, 4]."""
    return tl.sum(tl.where((tl.arange(0, 4) == v)[None, :], x, 0.0), 1)


@triton.jit
def _logit(p):
    p = tl.clamp(p, _PROBABILITY_LIMIT, 1.0 - _PROBABILITY_LIMIT, propagate_nan=_NAN)
    return tl.log(p / (1.0 - p))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=_NAN)


@triton.jit
def _finish(
    stage, stage_group, kind, task_slot, texts, absent, base, shift_scale, out_bias, router_share,
    platt, conformal, raw_sums, shift_sums, out, counters, sequences,
    D: tl.constexpr, K: tl.constexpr, S: tl.constexpr, M: tl.constexpr, Q: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, TEXT: tl.constexpr,
    RAW_PARTS: tl.constexpr, SHIFT_PARTS: tl.constexpr,
):  # fmt: skip
    """All models' predictions for one stage."""
    M_P: tl.constexpr = triton.next_power_of_2(M)
    Q_P: tl.constexpr = triton.next_power_of_2(Q + 1)
    K_P: tl.constexpr = triton.next_power_of_2(K)
    group = tl.load(stage_group + stage)
    m = tl.arange(0, M_P)

    # The prior waits for the texts only.
    _wait(counters + _ARRIVED, sequences)
    k = tl.arange(0, K_P)
    declared = tl.load(kind + stage)
    slot = tl.load(task_slot + stage).to(tl.int64)
    soft = tl.load(
        texts + slot * TEXT + D + k, mask=(slot >= 0) & (k < K), other=0.0, cache_modifier=".cg"
    )  # fmt: skip
    soft = tl.where(slot >= 0, soft, tl.load(absent + k, mask=k < K, other=0.0))
    kinds = tl.where(declared >= 0, (declared == k).to(tl.float32), soft)
    j = tl.arange(0, M_P * 4)
    row = tl.load(
        base + (group * K + k)[:, None] * (M * 4) + j[None, :],
        mask=(k < K)[:, None] & (j < M * 4)[None, :], other=0.0,
    )  # fmt: skip
    prior = tl.sum(kinds[:, None] * row, 0)  # [M · 4]

    PARTS: tl.constexpr = triton.cdiv(H, _UNITS) + triton.cdiv(C, _UNITS)
    _wait(counters + _BLOCKS + stage // _STAGES, PARTS)
    v = j % 4
    mask = (j < M * 4) & (v < _SHIFTED)
    shift = _sum_parts(
        shift_sums, stage, (j // 4) * _SHIFTED + v, mask,
        triton.cdiv(C, _UNITS), M * _SHIFTED, M_P * 4, SHIFT_PARTS,
    )  # fmt: skip
    shift *= tl.load(shift_scale + group * _SHIFTED + v, mask=mask, other=0.0)
    moved = tl.reshape(prior + shift, [M_P, 4])
    prior = tl.reshape(prior, [M_P, 4])

    # Of each model and target Q values, the location in the middle and the gaps around it. Behind
    # them is one of the two other raw outputs: the logit, and the log of the stages after.
    j = tl.arange(0, M_P * 2 * Q_P)
    mask = (j < M * 2 * Q_P) & (j % Q_P <= Q)
    column = (j // Q_P) * (Q + 1) + j % Q_P
    raw = tl.load(out_bias + column, mask=mask, other=0.0) + _sum_parts(
        raw_sums, stage, column, mask,
        triton.cdiv(H, _UNITS), M * 2 * (Q + 1), M_P * 2 * Q_P, RAW_PARTS,
    )  # fmt: skip
    raw = tl.reshape(raw, [M_P, 2, Q_P])
    q = tl.arange(0, Q_P)[None, None, :]
    target = tl.arange(0, 2)[None, :, None]
    others = tl.sum(tl.where(q == Q, raw, 0.0), 2)  # [M, 2]
    first = (tl.arange(0, 2) == 0)[None, :]
    raw_logit = tl.sum(tl.where(first, others, 0.0), 1)
    raw_after = tl.sum(tl.where(first, 0.0, others), 1)

    share = tl.load(router_share + group)
    network = _logit(_column(prior, 0)) + raw_logit
    logit = share * network + (1.0 - share) * _logit(_column(moved, 0))
    slope = tl.load(platt + m * 2, mask=m < M, other=0.0)
    intercept = tl.load(platt + m * 2 + 1, mask=m < M, other=0.0)
    out += stage * (M * (2 + 2 * Q))
    places = out + m * (2 + 2 * Q)
    tl.store(places, 1.0 / (1.0 + tl.exp(-(slope * logit + intercept))), mask=m < M)
    log_after = _column(moved, 3) + raw_after
    after = tl.exp(tl.minimum(log_after, _MAX_LOG_STAGES, propagate_nan=_NAN))
    tl.store(places + 1, after, mask=m < M)

    MIDDLE: tl.constexpr = Q // 2
    location = tl.sum(tl.where(q == MIDDLE, raw, 0.0), 2)
    location += tl.where(first, _column(moved, 1)[:, None], _column(moved, 2)[:, None])
    # softplus, as torch has it
    soft = tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0, propagate_nan=_NAN)))
    gaps = tl.where(raw > 20.0, raw, soft)
    above = tl.cumsum(tl.where((q > MIDDLE) & (q < Q), gaps, 0.0), 2)
    below = tl.cumsum(tl.where(q < MIDDLE, gaps, 0.0), 2, reverse=True)
    values = tl.where(q < MIDDLE, location[:, :, None] - below, location[:, :, None] + above)
    values += tl.load(conformal + (target * S + group) * Q + q, mask=q < Q, other=0.0)
    values = tl.associative_scan(values, 2, _larger)
    values = tl.clamp(values, 0.0, _MAX_LOG_TOKENS, propagate_nan=_NAN)
    both = tl.reduce(values, 1, _larger)[:, None, :]
    values = tl.where(target == 0, values, both)
    models = m[:, None, None]
    places = out + models * (2 + 2 * Q) + 2 + target * Q + q
    tl.store(places, values, mask=(models < M) & (q < Q) & (target < 2))


@triton.jit(do_not_specialize=["sequence_capacity", "stage_capacity"])
def heads_kernel(
    hidden, norm_weight, norm_bias, eps, cu_seqlens, seq_slots, texts,
    numbers, stage_group, kind, task_slot, new_slot, counts, out,
    edges, projection, offset, absent, base, centres, width, shift, shift_scale,
    hidden_weight, hidden_bias, out_weight, out_bias, router_share, platt, conformal,
    pooled, raw_sums, shift_sums, counters, sequence_capacity, stage_capacity,
    D: tl.constexpr, N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    FEATURES: tl.constexpr, S: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, TEXT: tl.constexpr, CLS: tl.constexpr, TOKENS: tl.constexpr,
    SHARES: tl.constexpr, RAW_PARTS: tl.constexpr, SHIFT_PARTS: tl.constexpr,
):  # fmt: skip
    """Three kinds of work in this order: shares of sequences, parts of stage blocks, single stages.

    Each program takes what comes next by a counter, or nothing. Whoever waits waits for earlier
    work only, so for what a running program has in hand: in whatever order the hardware starts
    them, there is no deadlock. The last to leave sets all counters to zero for the next launch.
    """
    sequences = tl.minimum(tl.load(counts), sequence_capacity)
    stages = tl.minimum(tl.load(counts + 1), stage_capacity)
    if CLS:
        splits = 1
    else:
        splits = tl.minimum(tl.maximum(SHARES // tl.maximum(sequences, 1), 1), _MAX_SPLITS)
    UNIT_PARTS: tl.constexpr = triton.cdiv(H, _UNITS)
    PARTS: tl.constexpr = UNIT_PARTS + triton.cdiv(C, _UNITS)
    first_part = sequences * splits
    first_stage = first_part + tl.cdiv(stages, _STAGES) * PARTS
    end = first_stage + stages

    ticket = tl.atomic_add(counters + _TICKET, 1, sem="relaxed")
    if ticket < first_part:
        _pool(
            ticket, hidden, norm_weight, norm_bias, eps, cu_seqlens, seq_slots, texts,
            projection, offset, pooled, counters, splits,
            D, K, FEATURES, TEXT, CLS, TOKENS,
        )  # fmt: skip
    elif ticket < first_stage:
        block = (ticket - first_part) // PARTS
        part = (ticket - first_part) % PARTS
        if part < UNIT_PARTS:
            _hidden_units(
                block, part, numbers, kind, task_slot, new_slot, texts, absent, edges,
                hidden_weight, hidden_bias, out_weight, raw_sums, counters, sequences, stages,
                D, N, G, K, P, FEATURES, H, M * 2 * (Q + 1), TEXT,
            )  # fmt: skip
        else:
            _near_centres(
                block, part - UNIT_PARTS, task_slot, texts, centres, width, shift,
                shift_sums, counters, sequences, stages, D, C, M * _SHIFTED, TEXT,
            )  # fmt: skip
        _signal(counters + _BLOCKS + block)
    elif ticket < end:
        _finish(
            ticket - first_stage, stage_group, kind, task_slot, texts, absent, base,
            shift_scale, out_bias, router_share, platt, conformal, raw_sums, shift_sums, out,
            counters, sequences, D, K, S, M, Q, H, C, TEXT, RAW_PARTS, SHIFT_PARTS,
        )  # fmt: skip

    if _signal(counters + _DONE) == tl.num_programs(0) - 1:
        i = tl.arange(0, _COUNTERS)
        tl.store(counters + i, 0, mask=i < sequences + _SEQUENCES)


class StageBatch(NamedTuple):
    """B stages on the device, B being the capacity; what lies beyond `counts` is not looked at."""

    numbers: Tensor  # [B, N] fp32 as `features.numbers` makes them
    stage_group: Tensor  # [B] int32
    kind: Tensor  # [B] int32, or -1 where the text has to tell it
    task_slot: Tensor  # [B] int32, row of the workflow's first text in the table, or -1: none
    new_slot: Tensor  # [B] int32, row of this stage's own text, or -1: none
    counts: Tensor  # [2] int32: how many sequences and how many stages there really are


class Sizes(NamedTuple):
    """All sizes of the heads; the symbols are those of `reference_heads`, G being the steps."""

    D: int
    N: int
    G: int
    K: int
    P: int
    O: int  # noqa: E741
    S: int
    M: int
    Q: int
    C: int
    H: int


class _Prepared(NamedTuple):
    """The weights as the kernel reads them, fp32 and contiguous, F = K + P + O."""

    edges: Tensor  # [N, G + 1]
    projection: Tensor  # [F, D]: what is asked of each text, a row each
    offset: Tensor  # [F]: added to it
    absent: Tensor  # [F]: what holds instead without a text
    base: Tensor  # [S, K, M, 4]
    centres: Tensor  # [D, C]
    width: Tensor  # [1]
    shift: Tensor  # [C, M * 3]
    shift_scale: Tensor  # [S, 3]
    hidden_weight: Tensor  # [N G + F, H]
    hidden_bias: Tensor  # [H]
    out_weight: Tensor  # [H, M * 2 * (Q + 1)]: columns as `_finish` wants them
    out_bias: Tensor  # [M * 2 * (Q + 1)]
    router_share: Tensor  # [S]
    platt: Tensor  # [M, 2]
    conformal: Tensor  # [2, S, Q]


class Heads:
    """The heads of one bundle on one device, with the memory that their launches need.

    A table of texts [slots, `text_width`] fp32 belongs to one `Heads`: a row begins with the
    text's unit vector [D], behind it is what these weights make of it. Launches of one `Heads`
    have to follow each other on one stream.
    """

    def __init__(
        self,
        weights: HeadWeights,
        device: str,
        max_stages: int = MAX_STAGES,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        """Raises ValueError for sizes beyond what the kernel is meant for."""
        self.sizes = sizes_of(weights)
        _check("stages at once", max_stages, MAX_STAGES)
        _check("sequences at once", max_sequences, MAX_SEQUENCES)
        self.max_stages, self.max_sequences = max_stages, max_sequences
        self.text_width = _text_width(self.sizes)
        self._weights = _prepare(weights, self.sizes, device)
        D, M, Q, C, H = (getattr(self.sizes, symbol) for symbol in "DMQCH")
        self._scratch = (
            torch.empty(max(_SHARES, max_sequences), D, device=device),
            torch.empty(max_stages, _parts(H), M * 2 * (Q + 1), device=device),
            torch.empty(max_stages, _parts(C), M * _SHIFTED.value, device=device),
        )
        self._counters = torch.zeros(_COUNTERS.value, dtype=torch.int32, device=device)

    def launch(
        self,
        hidden: Tensor,
        norm: Norm | None,
        eps: float,
        pooling: Pooling,
        cu_seqlens: Tensor,
        seq_slots: Tensor,
        stages: StageBatch,
        texts: Tensor,
        out: Tensor,
    ) -> None:
        """Pool new sequences into their rows of `texts`, then predict `stages` into `out`.

        `hidden` [T, D] in fp32, bf16 or fp16 is the residual stream before `norm`, or final if
        that is None. `cu_seqlens` [S+1] and `seq_slots` [S], int32, are of the capacity S, as
        `stages` are of theirs; no two sequences share a slot. Rows of `out` [B, M, 2 + 2Q] fp32
        beyond the real number of stages stay as they are; `outputs` takes it apart. Allocates
        nothing, so it can be captured into a graph.
        """
        sequences, capacity = len(seq_slots), len(stages.kind)
        self._check_launch(hidden, norm, cu_seqlens, seq_slots, stages, texts, out)
        assert pooling in ("mean", "cls")
        shares = min(max(_SHARES, sequences), _MAX_SPLITS.value * sequences)
        blocks = -(-capacity // _STAGES.value)
        parts = _parts(self.sizes.H) + _parts(self.sizes.C)
        heads_kernel[(max(1, shares + blocks * parts + capacity),)](
            hidden, *(norm or (None, None)), eps, cu_seqlens, seq_slots, texts, *stages, out,
            *self._weights, *self._scratch, self._counters, sequences, capacity,
            **_constants(self.sizes, pooling),
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def _check_launch(
        self,
        hidden: Tensor,
        norm: Norm | None,
        cu_seqlens: Tensor,
        seq_slots: Tensor,
        stages: StageBatch,
        texts: Tensor,
        out: Tensor,
    ) -> None:
        sizes, sequences, capacity = self.sizes, len(seq_slots), len(stages.kind)
        assert sequences <= self.max_sequences
        assert capacity <= self.max_stages
        assert hidden.shape[1:] == (sizes.D,)
        assert norm is None or norm.weight.shape == (sizes.D,)
        assert cu_seqlens.shape == (sequences + 1,)
        assert stages.numbers.shape == (capacity, sizes.N)
        assert all(x.shape == (capacity,) for x in stages[1:5])
        assert stages.counts.shape == (2,)
        assert texts.shape[1:] == (self.text_width,)
        assert out.shape == (capacity, sizes.M, 2 + 2 * sizes.Q)
        assert all(x.dtype == torch.float32 for x in (stages.numbers, texts, out))
        assert all(x.dtype == torch.int32 for x in (cu_seqlens, seq_slots, *stages[1:]))
        assert all(x.is_contiguous() for x in (hidden, cu_seqlens, seq_slots, *stages, texts, out))
        assert hidden.numel() < 1 << 31  # places in it are 32-bit numbers

    def cost(self, tokens: int, sequences: int, stages: int, hidden_bytes: int) -> tuple[int, int]:
        """Bytes that a launch has to move if it reads and writes everything once, and its FLOPs.

        `tokens` are those of the new sequences together, `hidden_bytes` those of one element.
        """
        D, N, G, K, P, O, _, M, Q, C, H = self.sizes  # noqa: E741
        features, values = K + P + O, M * (2 + 2 * Q)
        read = sum(x.numel() for x in self._weights) + stages * (N + 4 + 2 * (D + features))
        written = sequences * (D + features) + stages * values
        per_stage = (N * G + features) * H + H * values + D * C + C * M * _SHIFTED.value
        flops = 8 * tokens * D + 2 * sequences * D * features + 2 * stages * per_stage
        return tokens * D * hidden_bytes + 4 * (read + written), flops


def outputs(out: Tensor) -> HeadOutputs:
    """Views of what a launch wrote into `out` [B, M, 2 + 2Q]."""
    levels = (out.shape[2] - 2) // 2
    return HeadOutputs(out[..., 0], out[..., 2 : 2 + levels], out[..., 2 + levels :], out[..., 1])


def sizes_of(weights: HeadWeights) -> Sizes:
    """The sizes of these heads; ValueError if the kernel is not meant for one of them."""
    numbers, edges = weights.edges.shape
    sizes = Sizes(
        D=weights.kind_weight.shape[0],
        N=numbers,
        G=edges - 1,
        K=weights.kind_weight.shape[1],
        P=weights.task_projection.shape[1],
        O=weights.new_projection.shape[1],
        S=weights.base.shape[0],
        M=weights.base.shape[2],
        Q=weights.conformal.shape[2],
        C=weights.centres.shape[0],
        H=weights.hidden_weight.shape[1],
    )
    for symbol, (most, name) in _LIMITS.items():
        _check(name, getattr(sizes, symbol), most)
    if sizes.Q % 2 == 0:
        raise ValueError(f"{sizes.Q} quantile levels; the kernel takes an odd number of them")
    return sizes


def _check(name: str, size: int, most: int) -> None:
    if not 1 <= size <= most:
        raise ValueError(f"{size} {name}; the kernel takes 1 to {most}")


def _parts(units: int) -> int:
    """Programs that share these hidden units, or centres, for one block of stages."""
    return -(-units // _UNITS.value)


def _text_width(sizes: Sizes) -> int:
    return -(-(sizes.D + sizes.K + sizes.P + sizes.O) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def _prepare(weights: HeadWeights, sizes: Sizes, device: str) -> _Prepared:
    w = HeadWeights(*(x.detach().to("cpu", torch.float32) for x in weights))
    middle = sizes.Q // 2
    order: list[int] = []  # of one model's raw outputs
    for first, other in ((1, 0), (1 + sizes.Q, 1 + 2 * sizes.Q)):
        gaps = list(range(first + 1, first + sizes.Q))
        order += [*gaps[:middle], first, *gaps[middle:], other]
    means = (-w.task_mean @ w.task_projection, -w.new_mean @ w.new_projection)
    prepared = _Prepared(
        edges=w.edges,
        projection=torch.cat([w.kind_weight, w.task_projection, w.new_projection], dim=1).T,
        offset=torch.cat([w.kind_bias, *means]),
        absent=torch.cat([w.kind_bias.softmax(0), *(torch.zeros_like(x) for x in means)]),
        base=w.base,
        centres=w.centres.T,
        width=w.width,
        shift=w.shift,
        shift_scale=w.shift_scale,
        hidden_weight=w.hidden_weight,
        hidden_bias=w.hidden_bias,
        out_weight=w.out_weight.unflatten(1, (sizes.M, -1))[..., order].flatten(1),
        out_bias=w.out_bias.unflatten(0, (sizes.M, -1))[..., order].flatten(),
        router_share=w.router_share,
        platt=w.platt,
        conformal=w.conformal,
    )
    return _Prepared(*(x.contiguous().to(device) for x in prepared))


def _constants(sizes: Sizes, pooling: Pooling) -> dict[str, Any]:
    D, N, G, K, P, O, S, M, Q, C, H = sizes  # noqa: E741
    models = triton.next_power_of_2(M)
    raw_width, shift_width = models * 2 * triton.next_power_of_2(Q + 1), models * 4
    return {
        "D": D, "N": N, "G": G, "K": K, "P": P, "FEATURES": K + P + O, "S": S, "M": M, "Q": Q,
        "C": C, "H": H, "TEXT": _text_width(sizes), "CLS": pooling == "cls",
        "TOKENS": 1 if pooling == "cls" else min(32, _TILE // triton.next_power_of_2(D)),
        "SHARES": _SHARES,
        "RAW_PARTS": min(32, _TILE // raw_width), "SHIFT_PARTS": min(32, _TILE // shift_width),
    }  # fmt: skip


def variants() -> list[Variant]:
    """The kernel for two real bundles and for the largest sizes."""
    mint = Sizes(D=384, N=37, G=8, K=8, P=23, O=32, S=6, M=13, Q=7, C=379, H=1280)
    testbed = Sizes(D=64, N=37, G=8, K=6, P=64, O=2, S=6, M=3, Q=7, C=512, H=320)
    largest = Sizes(S=6, **{symbol: most for symbol, (most, _) in _LIMITS.items()})
    return [
        _variant("heads, 13 models", mint, "mean", "fp32"),
        _variant("heads, 13 models, bf16", mint, "mean", "bf16"),
        _variant("heads, 3 models, first token", testbed, "cls", "fp16"),
        _variant("heads, largest", largest, "mean", "fp32"),
    ]


def _variant(name: str, sizes: Sizes, pooling: Pooling, dtype: str) -> Variant:
    integers = ("cu_seqlens", "seq_slots", "stage_group", "kind", "task_slot", "new_slot",
                "counts", "counters")  # fmt: skip
    scalars = ("sequence_capacity", "stage_capacity")
    types = {"hidden": "*" + dtype, "eps": "fp32"}
    types |= dict.fromkeys(integers, "*i32") | dict.fromkeys(scalars, "i32")
    constants = _constants(sizes, pooling)
    names = [name for name in heads_kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "*fp32") for name in names}
    return Variant(name, heads_kernel, signature, constants, num_warps=_WARPS)
