"""The functions of an element in losses and bounds (fastdiff/ops/loss_terms.py), and their slopes.

`negated` changes every sign; Triton's unary minus is a difference from +0, which loses that of 0.
"""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.exp import exp
from fastdiff.kernels.log import log
from fastdiff.kernels.noise import horner
from fastdiff.ops import loss_terms as definition

SQUARE, ABS, HUBER, PSEUDO_HUBER = (
    tl.constexpr(definition.RHOS.index(name)) for name in ("square", "abs", "huber", "pseudo_huber")
)
HALF_BIN = tl.constexpr(definition.HALF_BIN)
C1 = tl.constexpr(definition.C1)
C3 = tl.constexpr(definition.C3)
SLOPE_C3 = tl.constexpr(3.0 * definition.C3)
WIDTH_C1 = tl.constexpr(2.0 * definition.HALF_BIN * definition.C1)
WIDTH_C3 = tl.constexpr(2.0 * definition.HALF_BIN * definition.C3)
WIDTH_SLOPE_C3 = tl.constexpr(6.0 * definition.HALF_BIN * definition.C3)
FIRST_BIN = tl.constexpr(definition.FIRST_BIN)
LAST_BIN = tl.constexpr(definition.LAST_BIN)
SMALL_DEGREE = tl.constexpr(definition.SMALL_TERMS[torch.float32] - 1)
SMALL = tl.constexpr(definition.SMALL[: definition.SMALL_TERMS[torch.float32]])
EXPM1_DEGREE = tl.constexpr(definition.EXPM1_TERMS[torch.float32] - 1)
EXPM1 = tl.constexpr(definition.EXPM1[: definition.EXPM1_TERMS[torch.float32]])


@triton.jit
def negated(x):
    return x * -1.0


@triton.jit
def rho_value(e, delta, RHO: tl.constexpr):
    if RHO == SQUARE:
        value = e * e
    elif RHO == ABS:
        value = tl.abs(e)
    elif RHO == HUBER:
        a = tl.abs(e)
        value = tl.where(a < delta, e * e * 0.5, delta * (a - delta * 0.5))
    else:
        e2 = e * e
        value = tl.div_rn(e2, tl.sqrt_rn(e2 + delta * delta) + delta)
    return value


@triton.jit
def rho_slope(e, delta, RHO: tl.constexpr):
    if RHO == SQUARE:
        slope = e + e
    elif RHO == ABS:
        slope = tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e))  # NaN and 0 pass
    elif RHO == HUBER:
        slope = tl.where(e < negated(delta), negated(delta), tl.where(e > delta, delta, e))
    else:
        slope = tl.div_rn(e, tl.sqrt_rn(e * e + delta * delta))
    return slope


@triton.jit
def softplus(x):
    return tl.where(x > 0, x, 0.0) + log(exp(negated(tl.abs(x))) + 1.0)


@triton.jit
def sigmoid(x):
    e = exp(negated(tl.abs(x)))
    return tl.div_rn(tl.where(x < 0, e, 1.0), e + 1.0)


@triton.jit
def log_one_minus_exp(w):
    """log(1 - exp(-w)), w > 0, without cancellation."""
    series = horner(SMALL, SMALL_DEGREE, w * w)
    small = w < 1.0
    argument = tl.where(small, w, 1.0 - exp(negated(w)))
    return log(argument) + tl.where(small, (series * w - 0.5) * w, 0.0)


@triton.jit
def inverse_expm1(w):
    """1 / (exp(w) - 1), w > 0, without cancellation."""
    series = horner(EXPM1, EXPM1_DEGREE, w)
    small = w < 1.0
    e = exp(negated(w))
    return tl.div_rn(tl.where(small, 1.0, e), tl.where(small, series * w, 1.0 - e))


@triton.jit
def bin_ends(d, s):
    """A bin's upper and lower end p, m in standard deviations, p^2, m^2, the CDF's arguments there,
    p^2 + p m + m^2, and the difference of the arguments without cancellation."""
    p = s * (d + HALF_BIN)
    m = s * (d - HALF_BIN)
    p2 = p * p
    m2 = m * m
    squares = p2 + p * m + m2
    width = s * (squares * WIDTH_C3 + WIDTH_C1)
    return p, m, p2, m2, p * (p2 * C3 + C1), m * (m2 * C3 + C1), squares, width


@triton.jit
def discretized_nll(x, d, s, floor):
    _, _, _, _, upper, lower, _, width = bin_ends(d, s)
    below = softplus(negated(upper))
    above = softplus(lower)
    inner = below + above - log_one_minus_exp(width)
    value = tl.where(x < FIRST_BIN, below, tl.where(x > LAST_BIN, above, inner))
    return tl.where(value > floor, floor, value)


@triton.jit
def discretized_nll_slopes(x, d, s, floor):
    """Derivatives of discretized_nll by d and by the log variance."""
    p, m, p2, m2, upper, lower, squares, width = bin_ends(d, s)
    below = negated(sigmoid(negated(upper))) * (p2 * SLOPE_C3 + C1)
    above = sigmoid(lower) * (m2 * SLOPE_C3 + C1)
    q = inverse_expm1(width) * s
    width_by_d = (p + m) * s * WIDTH_SLOPE_C3
    width_by_s = squares * WIDTH_SLOPE_C3 + WIDTH_C1
    first = x < FIRST_BIN
    last = x > LAST_BIN
    inner_d = (below + above) * s - q * width_by_d
    inner_l = below * p + above * m - q * width_by_s
    by_d = tl.where(first, below * s, tl.where(last, above * s, inner_d))
    by_l = tl.where(first, below * p, tl.where(last, above * m, inner_l)) * -0.5
    capped = discretized_nll(x, d, s, floor) >= floor
    return tl.where(capped, 0.0, by_d), tl.where(capped, 0.0, by_l)


@triton.jit
def bound_value(x, d, v, variance, DENSITY: tl.constexpr, LEARNED: tl.constexpr):
    """f(d, l) of every element.

    variance: the row's l0, l1, true_log_variance, true_inverse_variance, half_inverse_variance,
    inverse_std, discretized and floor. A sample is a likelihood or it is not: a branch.
    """
    square = d * d
    if LEARNED:
        log_variance = variance[0] + variance[1] * v
    if DENSITY:
        if LEARNED:
            value = (log_variance + square * exp(negated(log_variance))) * -0.5
        else:
            value = negated(square * variance[4])
    elif variance[6] != 0:
        s = variance[5]
        if LEARNED:
            s = exp(log_variance * -0.5)
        value = discretized_nll(x, d, s, variance[7])
    elif LEARNED:
        difference = log_variance - variance[2]
        ratio = exp(negated(difference))
        distance = square * (ratio * variance[3])
        value = (difference - 1.0 + ratio + distance) * 0.5
    else:
        value = square * variance[4]
    return value


@triton.jit
def bound_slopes(x, d, v, variance, DENSITY: tl.constexpr, LEARNED: tl.constexpr):
    """Derivatives of bound_value by d, and by l, which counts only where it is learned."""
    if LEARNED:
        log_variance = variance[0] + variance[1] * v
    if DENSITY:
        if LEARNED:
            product = d * exp(negated(log_variance))
            by_d = negated(product)
            by_l = (d * product - 1.0) * 0.5
        else:
            by_d = negated((d + d) * variance[4])
            by_l = by_d
    elif variance[6] != 0:
        s = variance[5]
        if LEARNED:
            s = exp(log_variance * -0.5)
        by_d, by_l = discretized_nll_slopes(x, d, s, variance[7])
    elif LEARNED:
        ratio = exp(negated(log_variance - variance[2]))
        by_d = d * (ratio * variance[3])
        by_l = (1.0 - ratio - d * by_d) * 0.5
    else:
        by_d = (d + d) * variance[4]
        by_l = by_d
    return by_d, by_l
