"""Bits of the binomial process drawn and bounded (fastdiff/ops/bits.py), each in one pass."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.exp import exp
from fastdiff.kernels.launch import Launch, inside, load, sample_origin, store, tiling
from fastdiff.kernels.log import log
from fastdiff.kernels.loss_terms import negated, softplus
from fastdiff.kernels.noise import halves, philox4x32, sample_key
from fastdiff.kernels.policy import Policy
from fastdiff.kernels.row import nan_unless
from fastdiff.kernels.sums import pairwise, total_of
from fastdiff.ops import bits as definition
from fastdiff.ops.loss import PIECE

__all__ = ["prepare", "prepare_bound", "prepare_bound_grad"]

BOUND_COLUMNS = tl.constexpr(definition.BOUND_COLUMNS)
SCALE = tl.constexpr(definition.BOUND_COLUMNS - 1)
LEAST = tl.constexpr(2.0**-126)
_TOTAL_LEVELS = 10  # a warp adds 1024 partial sums, 32 a thread


@triton.jit
def row_entries(table, rows, last_row, b, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """A sample's row of the table; NaN where it is outside."""
    asked = tl.load(rows + b * STRIDE)
    index = tl.minimum(asked.to(tl.uint32), last_row.to(tl.uint32)).to(tl.int64)
    entries = ()
    for column in tl.static_range(COLUMNS):
        entries = entries + (tl.load(table + index * COLUMNS + column),)
    return nan_unless(index == asked, entries)


@triton.jit
def word_tile(first_block, key, step, stream, BLOCK: tl.constexpr):
    """The words of BLOCK consecutive elements, the first of which is 4 * first_block."""
    q = first_block + tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(q, key[2], step, stream, key[0], key[1])
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))


@triton.jit
def logistic(logits):
    """(e, a, b): exp(-|l|), (1 + e) (1 - s(l)), (1 + e) s(l)."""
    e = exp(negated(tl.abs(logits)))
    return e, tl.where(logits > 0, e, 1.0), tl.where(logits < 0, e, 1.0)


@triton.jit
def by_bit(row, x, FIRST: tl.constexpr):
    return tl.where(x, row[FIRST + 2], row[FIRST])


@triton.jit
def by_bits(row, x, y, FIRST: tl.constexpr):
    set_ = tl.where(y, row[FIRST + 3], row[FIRST + 2])
    unset = tl.where(y, row[FIRST + 1], row[FIRST])
    return tl.where(x, set_, unset)


@triton.jit
def is_below(word, p):
    """word < 2^32 p, exactly: from 2^24 on a float has no part but the whole one."""
    scaled = tl.where(p < 1.0, p * 4294967296.0, 0.0)
    whole = scaled.to(tl.uint32)
    threshold = whole + (whole.to(tl.float32) < scaled).to(tl.uint32)
    return (word < threshold) | (p >= 1.0)


@triton.jit
def draw_tile(
    out, logits, x, row, key, step, stream, origin, start, mask, BLOCK: tl.constexpr
):  # fmt: skip
    words = word_tile((start >> 2).to(tl.uint32), key, step, stream, BLOCK)
    index = origin + start + tl.arange(0, BLOCK)
    given = tl.full((BLOCK,), False, tl.int1)
    if x is not None:
        given = load(x + index, None, mask) != 0
    if logits is None:
        p = tl.where(given, row[1], row[0])
    else:
        e, a, b = logistic(load(logits + index, None, mask))
        p = tl.div_rn(by_bit(row, given, 0) * a + by_bit(row, given, 1) * b, e + 1.0)
    drawn = is_below(words, p)
    if out.dtype.element_ty == tl.uint8:
        store(out + index, drawn, mask)
    else:
        store(out + index, tl.where(p == p, drawn.to(tl.float32), p), mask)


@triton.jit(
    do_not_specialize=[
        "last_row", "seed_low", "seed_high", "sample_offset", "step", "stream", "n_units",
    ],
    do_not_specialize_on_alignment=["table", "rows", "keys"],
)  # fmt: skip
def bits_kernel(
    out,
    logits,
    x,
    table,
    rows,
    keys,
    last_row: tl.uint32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    sample_offset: tl.uint32,
    step: tl.uint32,
    stream: tl.uint32,
    n_units: tl.int64,
    ROW_STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n, origin = sample_origin(n_units, UNIT, SINGLE, LARGE, SAMPLE_AXIS)
    COLUMNS: tl.constexpr = 2 if logits is None else 4
    row = row_entries(table, rows, last_row, b, ROW_STRIDE, COLUMNS)
    key = sample_key(keys, seed_low, seed_high, sample_offset, b)
    step = step.to(tl.uint32)
    stream = stream.to(tl.uint32)
    tile = tl.program_id(1 - SAMPLE_AXIS)
    while tile.to(n.dtype) * BLOCK < n:
        start = tile.to(n.dtype) * BLOCK
        if start <= n - BLOCK:
            draw_tile(out, logits, x, row, key, step, stream, origin, start, None, BLOCK)
        else:
            mask = inside(start, n, BLOCK)
            draw_tile(out, logits, x, row, key, step, stream, origin, start, mask, BLOCK)
        tile += tl.num_programs(1 - SAMPLE_AXIS)


@triton.jit
def odds(row, x_t, a, b, FIRST: tl.constexpr):
    """(1 + e) times a probability: the entries of x_0 = 0 and 1 in their shares."""
    value = by_bit(row, x_t, FIRST) * a + by_bit(row, x_t, FIRST + 1) * b
    return tl.where(value < LEAST, LEAST, value)


@triton.jit
def divergence(logits, x_t, x_start, row, MIXTURE: tl.constexpr):
    q = by_bits(row, x_t, x_start, 0)
    entropy = by_bits(row, x_t, x_start, 8)
    if MIXTURE:
        e, a, b = logistic(logits)
        one = q * log(odds(row, x_t, a, b, 0))
        other = by_bits(row, x_t, x_start, 4) * log(odds(row, x_t, a, b, 4))
        value = log(e + 1.0) - one - other - entropy
    else:
        value = softplus(logits) - q * logits - entropy
    return value


@triton.jit
def divergence_slope(logits, x_t, x_start, row, MIXTURE: tl.constexpr):
    q = by_bits(row, x_t, x_start, 0)
    e, a, b = logistic(logits)
    if MIXTURE:
        rest = by_bits(row, x_t, x_start, 4)
        difference = tl.div_rn(rest, odds(row, x_t, a, b, 4)) - tl.div_rn(
            q, odds(row, x_t, a, b, 0)
        )
        spread = by_bit(row, x_t, 1) - by_bit(row, x_t, 0)
        slope = tl.div_rn(difference * spread * e, e + 1.0)
    else:
        slope = tl.div_rn(b, e + 1.0) - q
    return slope


@triton.jit
def bound_tile(
    logits,
    x_t,
    x_start,
    partials,
    out,
    row,
    weight,
    b,
    pieces,
    partial_stride,
    origin,
    start,
    mask,
    MIXTURE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: its sums, or its gradient where there is a place for it."""
    index = origin + start + tl.arange(0, BLOCK)
    logit = load(logits + index, None, mask)
    at = load(x_t + index, None, mask) != 0
    begun = load(x_start + index, None, mask) != 0
    if out is None:
        value = divergence(logit, at, begun, row, MIXTURE)
        if mask is not None:
            value = tl.where(mask, value, 0.0)
        piece = (start >> LEVELS).to(tl.int32) + tl.arange(0, BLOCK >> LEVELS)
        place = partials + b * partial_stride + piece
        tl.store(place, pairwise(value, LEVELS), mask=piece < pieces)
    else:
        slope = divergence_slope(logit, at, begun, row, MIXTURE)
        store(out + index, slope * weight, mask)


@triton.jit(
    do_not_specialize=["last_row", "pieces", "partial_stride", "n_units"],
    do_not_specialize_on_alignment=["partials", "gradients", "table", "rows"],
)
def bound_kernel(
    logits,
    x_t,
    x_start,
    partials,
    gradients,
    out,
    table,
    rows,
    last_row: tl.uint32,
    pieces: tl.int64,
    partial_stride: tl.int64,
    n_units: tl.int64,
    MIXTURE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums, or with `gradients` the derivative by the logits."""
    b, n, origin = sample_origin(n_units, UNIT, SINGLE, LARGE, SAMPLE_AXIS)
    row = row_entries(table, rows, last_row, b, ROW_STRIDE, BOUND_COLUMNS)
    weight = 0.0
    if gradients is not None:
        weight = tl.load(gradients + b) * row[SCALE]
    tile = tl.program_id(1 - SAMPLE_AXIS)
    while tile.to(n.dtype) * BLOCK < n:
        start = tile.to(n.dtype) * BLOCK
        if start <= n - BLOCK:
            bound_tile(
                logits, x_t, x_start, partials, out, row, weight, b, pieces, partial_stride,
                origin, start, None, MIXTURE, LEVELS, BLOCK,
            )  # fmt: skip
        else:
            bound_tile(
                logits, x_t, x_start, partials, out, row, weight, b, pieces, partial_stride,
                origin, start, inside(start, n, BLOCK), MIXTURE, LEVELS, BLOCK,
            )  # fmt: skip
        tile += tl.num_programs(1 - SAMPLE_AXIS)


@triton.jit(
    do_not_specialize=["last_row", "pieces", "partial_stride", "n"],
    do_not_specialize_on_alignment=["partials", "results", "table", "rows"],
)
def total_kernel(
    partials,
    results,
    table,
    rows,
    last_row: tl.uint32,
    pieces: tl.int64,
    partial_stride: tl.int64,
    n: tl.int64,
    ROW_STRIDE: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """The result of one sample from its partial sums, which are used up."""
    b = tl.program_id(0)
    row = row_entries(table, rows, last_row, b, ROW_STRIDE, BOUND_COLUMNS)
    total = total_of(partials + b * partial_stride, pieces.to(tl.int32), n, LEVELS)
    tl.store(results + b, total * row[SCALE])


def prepare(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
    *,
    nvidia: bool = True,
    policy: Policy | None = None,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `bits`, or None when there is nothing to write."""
    (out,) = outputs
    if not out.numel():
        return None
    t = definition.unpack(inputs, layout)
    batch = out.shape[0]
    images = [out, *(v for v in (t.logits, t.x) if v is not None)]
    tiles = tiling(
        out.numel() // batch, batch, images,
        makes_noise=True, nvidia=nvidia, policy=policy, block=block,
    )  # fmt: skip
    arguments = (
        out, t.logits, t.x, t.table, t.rows, t.keys, t.table.shape[0] - 1,
        *halves(seed), sample_offset, step, stream, tiles.units,
    )  # fmt: skip
    constants = {"ROW_STRIDE": int(t.rows.numel() > 1), **tiles.constants}
    del constants["PIECE"], constants["NEIGHBOURS"]
    return Launch(bits_kernel, tiles.grid, arguments, constants, tiles.options)


def _bound_launch(
    inputs: list[Tensor],
    layout: str,
    *,
    partials: Tensor | None,
    out: Tensor | None,
    nvidia: bool,
    policy: Policy | None,
    block: int | None,
) -> Launch:
    """The launch of bound_kernel for samples that have elements."""
    logits, x_t, x_start, table, rows, *gradients = inputs
    batch = logits.shape[0]
    n = logits.numel() // batch
    images = [logits, x_t, x_start, *([] if out is None else [out])]
    tiles = tiling(
        n, batch, images, makes_noise=False, nvidia=nvidia, policy=policy, block=block, least=PIECE
    )
    arguments = (
        logits, x_t, x_start, partials, gradients[0] if gradients else None, out, table, rows,
        table.shape[0] - 1, triton.cdiv(n, PIECE), 0 if partials is None else partials.shape[1],
        tiles.units,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "MIXTURE": layout == "1",
        "ROW_STRIDE": int(rows.numel() > 1),
        "LEVELS": min(tiles.constants["BLOCK"], PIECE).bit_length() - 1,
        **tiles.constants,
    }
    del constants["PIECE"], constants["NEIGHBOURS"]
    return Launch(bound_kernel, tiles.grid, arguments, constants, tiles.options)


def prepare_bound(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
    *,
    nvidia: bool = True,
    policy: Policy | None = None,
    block: int | None = None,
) -> Launch | None:
    """The launches of one `bits_bound`, or None where samples have no elements.

    Args:
        block: elements of a tile, a power of two and a multiple of PIECE unless it holds a sample.
    """
    if not inputs[0].numel():
        return None
    results, partials = outputs
    launch = _bound_launch(
        inputs, layout, partials=partials, out=None, nvidia=nvidia, policy=policy, block=block
    )
    table, rows = inputs[3], inputs[4]
    pieces, stride = launch.arguments[-3], launch.arguments[-2]
    n = inputs[0].numel() // inputs[0].shape[0]
    arguments = (partials, results, table, rows, table.shape[0] - 1, pieces, stride, n)
    constants = {"ROW_STRIDE": int(rows.numel() > 1), "LEVELS": _TOTAL_LEVELS}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    launch.then = Launch(total_kernel, (results.numel(), 1), arguments, constants, options)
    return launch


def prepare_bound_grad(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
    *,
    nvidia: bool = True,
    policy: Policy | None = None,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `bits_bound_grad`, or None when there is nothing to write."""
    if not outputs[0].numel():
        return None
    return _bound_launch(
        inputs, layout, partials=None, out=outputs[0], nvidia=nvidia, policy=policy, block=block
    )
