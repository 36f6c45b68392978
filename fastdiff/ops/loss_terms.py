"""The functions of an element that losses (fastdiff/ops/loss.py) add up, and their slopes.

Every operation stands in an order, which the bits depend on; csrc/include/loss.h and
kernels/loss_terms.py are the same again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops.exp import exp
from fastdiff.ops.log import log

__all__ = [
    "C1", "C3", "EXPM1", "EXPM1_TERMS", "FIRST_BIN", "HALF_BIN", "LAST_BIN", "RHOS", "SMALL",
    "SMALL_TERMS", "discretized_nll", "discretized_nll_slopes", "rho_slope", "rho_value",
]  # fmt: skip

RHOS = ("square", "abs", "huber", "pseudo_huber")

# The normal CDF as 1 / (1 + exp(-a)), a = p (C1 + C3 p^2) (Page 1977), and half a bin of 256 on
# [-1, 1] (Ho et al. 2020, eq. 13).
HALF_BIN = 1.0 / 255.0
C1 = 2.0 * math.sqrt(2.0 / math.pi)
C3 = C1 * 0.044715
FIRST_BIN, LAST_BIN = -0.999, 0.999
# log((1 - exp(-w)) / w) = -w/2 + w (w sum_j SMALL[j] w^2j) for 0 <= w < 1, Bernoulli numbers.
SMALL = tuple(
    bernoulli / (2 * k * math.factorial(2 * k))
    for k, bernoulli in enumerate(
        (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798), 1
    )
)
SMALL_TERMS = {torch.float32: 4, torch.float64: 9}
# (exp(w) - 1) / w = sum_j EXPM1[j] w^j for 0 <= w < 1.
EXPM1 = tuple(1.0 / math.factorial(j + 1) for j in range(16))
EXPM1_TERMS = {torch.float32: 10, torch.float64: 16}


def rho_value(rho: int, e: Tensor, delta: Tensor) -> Tensor:
    if RHOS[rho] == "square":
        return e * e
    a = e.abs()
    if RHOS[rho] == "abs":
        return a
    if RHOS[rho] == "huber":
        return torch.where(a < delta, e * e * 0.5, delta * (a - delta * 0.5))
    e2 = e * e
    return e2 / (_sqrt(e2 + delta * delta) + delta)


def rho_slope(rho: int, e: Tensor, delta: Tensor) -> Tensor:
    if RHOS[rho] == "square":
        return e + e
    if RHOS[rho] == "abs":
        sign = torch.where(e > 0, 1.0, torch.where(e < 0, -1.0, e))  # NaN and 0 pass
        return sign.to(e.dtype)
    if RHOS[rho] == "huber":
        return torch.where(e < -delta, -delta, torch.where(e > delta, delta, e))
    return e / _sqrt(e * e + delta * delta)


def _sqrt(x: Tensor) -> Tensor:
    # float64 sqrt rounded to float32 is the IEEE result; torch.sqrt(float32) on CPU is not.
    return x.double().sqrt().to(x.dtype)


def _softplus(x: Tensor) -> Tensor:
    a = x.abs()
    return torch.where(x > 0, x, torch.zeros_like(x)) + log(exp(-a) + 1.0)


def _sigmoid(x: Tensor) -> Tensor:
    e = exp(-x.abs())
    return torch.where(x < 0, e, torch.ones_like(x)) / (e + 1.0)


def _log_one_minus_exp(w: Tensor) -> Tensor:
    """log(1 - exp(-w)), w > 0, without cancellation."""
    terms, w2 = SMALL_TERMS[w.dtype], w * w
    series = w2 * SMALL[terms - 1] + SMALL[terms - 2]
    for j in range(terms - 3, -1, -1):
        series = series * w2 + SMALL[j]
    small = w < 1.0
    argument = torch.where(small, w, 1.0 - exp(-w))
    return log(argument) + torch.where(small, (series * w - 0.5) * w, torch.zeros_like(w))


def _inverse_expm1(w: Tensor) -> Tensor:
    """1 / (exp(w) - 1), w > 0, without cancellation: the derivative of log(1 - exp(-w))."""
    terms = EXPM1_TERMS[w.dtype]
    series = w * EXPM1[terms - 1] + EXPM1[terms - 2]
    for j in range(terms - 3, -1, -1):
        series = series * w + EXPM1[j]
    small = w < 1.0
    e = exp(-w)
    return torch.where(small, torch.ones_like(w), e) / torch.where(small, series * w, 1.0 - e)


class _Bin(NamedTuple):
    """A bin's upper and lower end p and m in standard deviations; the CDF's arguments there, and
    their difference without cancellation."""

    p: Tensor
    m: Tensor
    p2: Tensor
    m2: Tensor
    upper: Tensor
    lower: Tensor
    squares: Tensor  # p^2 + p m + m^2
    width: Tensor


def _bin(d: Tensor, s: Tensor) -> _Bin:
    p, m = s * (d + HALF_BIN), s * (d - HALF_BIN)
    p2, m2 = p * p, m * m
    squares = p2 + p * m + m2
    return _Bin(
        p, m, p2, m2, p * (p2 * C3 + C1), m * (m2 * C3 + C1), squares,
        s * (squares * (2.0 * HALF_BIN * C3) + 2.0 * HALF_BIN * C1),
    )  # fmt: skip


def discretized_nll(x: Tensor, d: Tensor, s: Tensor, floor: Tensor) -> Tensor:
    """-log of the probability of x's bin under a normal of mean x - d and deviation 1 / s.

    256 bins of width 2/255, the outer two open. With F(a) = 1 / (1 + exp(-a)) as CDF,
    -log(F(a) - F(b)) = softplus(-a) + softplus(b) - log(1 - exp(-(a - b))), which has no tails
    in which it would cancel; the outer bins have one of the first two terms. At most `floor`.
    """
    bin_ = _bin(d, s)
    below, above = _softplus(-bin_.upper), _softplus(bin_.lower)
    inner = below + above - _log_one_minus_exp(bin_.width)
    value = torch.where(x < FIRST_BIN, below, torch.where(x > LAST_BIN, above, inner))
    return torch.where(value > floor, floor, value)


def discretized_nll_slopes(x: Tensor, d: Tensor, s: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of discretized_nll by d and by the log variance l (s = exp(-l / 2))."""
    bin_ = _bin(d, s)
    # Of softplus(-upper) and softplus(lower), by p and m.
    below = -_sigmoid(-bin_.upper) * (bin_.p2 * (3.0 * C3) + C1)
    above = _sigmoid(bin_.lower) * (bin_.m2 * (3.0 * C3) + C1)
    q = _inverse_expm1(bin_.width) * s
    width_by_d = (bin_.p + bin_.m) * s * (6.0 * HALF_BIN * C3)
    width_by_s = bin_.squares * (6.0 * HALF_BIN * C3) + 2.0 * HALF_BIN * C1
    first, last = x < FIRST_BIN, x > LAST_BIN
    inner_d = (below + above) * s - q * width_by_d
    inner_l = below * bin_.p + above * bin_.m - q * width_by_s
    by_d = torch.where(first, below * s, torch.where(last, above * s, inner_d))
    by_l = torch.where(first, below * bin_.p, torch.where(last, above * bin_.m, inner_l)) * -0.5
    capped = discretized_nll(x, d, s, floor) >= floor
    return torch.where(capped, 0.0, by_d), torch.where(capped, 0.0, by_l)
