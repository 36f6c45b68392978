"""The quantile function of the beta distribution, in NumPy."""

from __future__ import annotations

import math

import numpy as np

from ._values import FloatArray

LARGEST_SHAPE = 100.0


def beta_quantile(p: FloatArray, a: float, b: float) -> FloatArray:
    """x with I_x(a, b) = p, the inverse of the regularized incomplete beta function.

    p: (n,) in [0, 1]; a, b in (0, LARGEST_SHAPE]. float64 (n,), 0 at p = 0 and 1 at p = 1.
    Solved on the side of 1/2 where x lies: for x > 1/2 by I_x(a, b) = 1 - I_{1-x}(b, a).
    """
    at_half = math.exp(_log_cdf(np.array([math.log(0.5)]), a, b)[0])
    lower = p <= at_half
    x = np.empty_like(p)
    x[lower] = _small_quantile(p[lower], a, b)
    x[~lower] = 1 - _small_quantile(1 - p[~lower], b, a)
    x[p == 1] = 1  # where the CDF at 1/2 rounds to 1
    return x


def _small_quantile(p: FloatArray, a: float, b: float) -> FloatArray:
    """x <= 1/2 with I_x(a, b) = p: Newton on log I against u = log x, kept in a bracket.

    log x, because for small a the solution p^(1/a) may be far below the smallest float64.
    """
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    u = np.minimum((log_p + math.log(a) + _log_beta(a, b)) / a, math.log(0.5))
    solvable = np.isfinite(log_p)
    target, u_s = log_p[solvable], u[solvable]
    # I_x(a, b) lies within [1/2, 2]^(b-1) of its leading term x^a / (a B(a, b)) for x <= 1/2.
    width = abs(b - 1) * math.log(2) / a + 1
    low, high = u_s - width, np.full_like(u_s, math.log(0.5))
    for _ in range(100):
        log_cdf = _log_cdf(u_s, a, b)
        error = log_cdf - target
        low, high = np.where(error <= 0, u_s, low), np.where(error >= 0, u_s, high)
        slope = np.exp(a * u_s + (b - 1) * np.log1p(-np.exp(u_s)) - _log_beta(a, b) - log_cdf)
        new = u_s - error / slope
        new = np.where((new > low) & (new < high), new, (low + high) / 2)
        step, u_s = np.abs(new - u_s), new
        if (step <= 1e-13 * (1 + np.abs(u_s))).all():  # quadratic: what is left is rounding
            break
    x = np.zeros_like(p)
    x[solvable] = np.exp(u_s)
    return x


def _log_cdf(u: FloatArray, a: float, b: float) -> FloatArray:
    """log I_x(a, b) at x = e^u <= 1/2, by a series of positive terms (DLMF 8.17.8).

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) sum_k (a + b)_k / (a + 1)_k x^k
    """
    x = np.exp(u)
    term, total, k = np.ones_like(x), np.ones_like(x), 0
    while (term > 1e-17 * total).any():
        term = term * ((a + b + k) / (a + 1 + k)) * x
        total = total + term
        k += 1
    lead = a * u + b * np.log1p(-x) - math.log(a) - _log_beta(a, b)
    result: FloatArray = lead + np.log(total)
    return result


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
