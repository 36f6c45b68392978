"""One tile of a loss (fastdiff/ops/loss.py): its elements, their terms, and the gradients.

SPEC, a Structure, is a constant: what a loss has not is not compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastdiff.kernels.exp import learned_scale
from fastdiff.kernels.launch import empty_sum, load, store
from fastdiff.kernels.loss_terms import bound_slopes, bound_value, negated, rho_slope, rho_value
from fastdiff.kernels.row import combine, load_coefficients, nan_unless
from fastdiff.kernels.step import draw
from fastdiff.ops import loss as definition
from fastdiff.ops.loss import COLUMNS

ERROR = tl.constexpr(definition.ERROR)
BOUND = tl.constexpr(definition.BOUND)
X_START = tl.constexpr(definition.X_START)
WIDTH = tl.constexpr(len(COLUMNS))
# Where the groups of columns that belong together begin, and where others are.
LO, P, E, D, VARIANCE, DELTA, SIGMA = (
    tl.constexpr(COLUMNS.index(name))
    for name in ("lo", "p_y", "e_x", "d_x", "l0", "delta", "sigma")
)


class Structure(NamedTuple):
    """A LossSpec as the kernels read it.

    Attributes:
        clamp: 0 without c.
        by_o: bits of the terms that have a derivative by o.
        fast: whether the device has it, too.
    """

    terms: int
    error: int
    bound: int
    clamp: int
    rho: int
    density: bool
    learned: bool
    makes: bool
    by_o: int
    draws: bool
    fast: bool


@triton.jit
def row_of(table, rows, last_row, b, STRIDE: tl.constexpr):
    """A sample's row, and whether the table has it; without, the last row stands for it."""
    asked = tl.load(rows + b * STRIDE)
    index = tl.minimum(asked.to(tl.uint32), last_row.to(tl.uint32)).to(tl.int64)
    return table + index * WIDTH, index == asked


@triton.jit
def columns(row, exists, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT columns of a row; NaN where there is no such row. Unused ones are not loaded."""
    MASK: tl.constexpr = (1 << COUNT) - 1
    return nan_unless(exists, load_coefficients(row + FIRST, MASK, COUNT, COUNT))


@triton.jit
def column(row, exists, COLUMN: tl.constexpr):
    return tl.where(exists, tl.load(row + COLUMN), float("nan"))


@triton.jit
def coefficients_of(row, exists):
    """[lo, hi], P, E, D, what bound_value takes, delta, and sigma with its log scales."""
    return (
        columns(row, exists, LO, 2),
        columns(row, exists, P, 2),
        columns(row, exists, E, 5),
        columns(row, exists, D, 4),
        columns(row, exists, VARIANCE, 8),
        column(row, exists, DELTA),
        columns(row, exists, SIGMA, 3),
    )


@triton.jit
def elements(
    model_outputs,
    x,
    y,
    noise,
    made,
    coefficients,
    guidance_scale,
    key,
    counter,
    index,
    o_index,
    n,
    start,
    mask,
    SPEC: tl.constexpr,
    NOISE_DTYPE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the terms of a tile are made of: x, c, whether the clamp is at work, e, d, v.

    What there is no use for is 0. mask is None inside a sample. The noise comes first, as in step.
    """
    bounds, p, error, bound = coefficients[0], coefficients[1], coefficients[2], coefficients[3]
    z = 0
    if SPEC.draws:
        if len(noise) > 0:
            z = load(noise[0] + index, None, mask)
        else:
            z = draw(None, start, key, counter, NOISE_DTYPE, SPEC.fast, NEIGHBOURS, BLOCK)
    state = 0
    if y is not None:
        state = load(y + index, None, mask)
    o = load(model_outputs[0] + o_index, None, mask)
    if len(model_outputs) == 2:
        o_cond = load(model_outputs[1] + o_index, None, mask)
        o = o + guidance_scale * (o_cond - o)
    v = 0
    if SPEC.learned:
        v = load(model_outputs[len(model_outputs) - 1] + (o_index + n), None, mask)

    c = 0
    clamped = 0
    if SPEC.clamp > 0:
        c = combine(p, (state, o), None, SPEC.clamp, 2, 2, True, BLOCK)
        below = c < bounds[0]  # NaN passes
        above = c > bounds[1]
        clamped = below | above
        c = tl.where(below, bounds[0], tl.where(above, bounds[1], c))

    x_value = 0
    if SPEC.makes:
        shift = combine(bound, (0, state, o, c), None, SPEC.bound & 14, 4, 4, True, BLOCK)
        sigma = coefficients[6][0]
        if SPEC.learned:
            sigma = sigma * learned_scale(v, coefficients[6][1], coefficients[6][2])
        x_value = negated(shift) + sigma * z
        if made is not None:
            x_value = store(made + index, x_value, mask)
    elif x is not None:
        x_value = load(x + index, None, mask)
    e = 0
    if ERROR & SPEC.terms:
        e = combine(error, (x_value, state, o, c, z), None, SPEC.error, 5, 5, True, BLOCK)
    d = 0
    if BOUND & SPEC.terms:
        d = combine(bound, (x_value, state, o, c), None, SPEC.bound, 4, 4, True, BLOCK)
    return x_value, c, clamped, e, d, v


@triton.jit
def values_of(x, c, e, d, v, coefficients, SPEC: tl.constexpr):
    """The terms of every element."""
    values = ()
    if ERROR & SPEC.terms:
        values = values + (rho_value(e, coefficients[5], SPEC.rho),)
    if BOUND & SPEC.terms:
        bound = bound_value(x, d, v, coefficients[4], SPEC.density, SPEC.learned)
        values = values + (bound,)
    if X_START & SPEC.terms:
        difference = x - c
        values = values + (difference * difference,)
    return values


@triton.jit
def slope_weight(weight, coefficients, p_o, clamped, MASK: tl.constexpr, CLAMP: tl.constexpr):
    """What a term's slope is multiplied by in its derivative by o.

    That is weight (a_o + a_c p_o), without a_c p_o where the clamp is at work, a the coefficients
    over [x, y, o, c, ..] that are in MASK.
    """
    factor = tl.full((), 0.0, tl.float32)
    if MASK & 4:
        factor = weight * coefficients[2]
    if (MASK & 8) and (CLAMP & 2):
        through = coefficients[3] * p_o
        if MASK & 4:
            through = coefficients[2] + through
        factor = tl.where(clamped, factor, weight * through)
    return factor


@triton.jit
def gradient_of(
    x,
    c,
    clamped,
    e,
    d,
    v,
    weights,
    coefficients,
    SPEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Derivatives by o and, where it is learned, by v; weights: of ERROR, BOUND and X_START."""
    p_o = coefficients[1][1]
    by_o = empty_sum(BLOCK)
    by_v = tl.zeros((BLOCK,), tl.float32)
    if ERROR & SPEC.by_o:
        slope = rho_slope(e, coefficients[5], SPEC.rho)
        factor = slope_weight(weights[0], coefficients[2], p_o, clamped, SPEC.error, SPEC.clamp)
        by_o = by_o + slope * factor
    if BOUND & SPEC.terms:
        variance = coefficients[4]
        by_d, by_l = bound_slopes(x, d, v, variance, SPEC.density, SPEC.learned)
        if BOUND & SPEC.by_o:
            factor = slope_weight(weights[1], coefficients[3], p_o, clamped, SPEC.bound, SPEC.clamp)
            by_o = by_o + by_d * factor
        if SPEC.learned:
            by_v = by_l * (weights[1] * variance[1])
    if X_START & SPEC.by_o:
        difference = x - c
        factor = tl.where(clamped, 0.0, weights[2] * negated(p_o))
        by_o = by_o + (difference + difference) * factor
    if SPEC.by_o == 0:
        by_o = tl.zeros((BLOCK,), tl.float32)
    return by_o, by_v


@triton.jit
def store_gradient(
    out, index, by_o, by_v, guidance_scale, n, mask, SPEC: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the gradients of one model output, or of the two that guidance combines."""
    if len(out) == 2:
        store(out[0] + index, by_o * (1.0 - guidance_scale), mask)
        if SPEC.learned:
            store(out[0] + (index + n), tl.zeros((BLOCK,), tl.float32), mask)
        by_o = by_o * guidance_scale
    store(out[len(out) - 1] + index, by_o, mask)
    if SPEC.learned:
        store(out[len(out) - 1] + (index + n), by_v, mask)
