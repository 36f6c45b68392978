"""Sigma ladders: the n noise levels, in data units, that a sampler steps down.

Every ladder is a new descending float64 array from exactly sigma_max to exactly sigma_min; with
`append_zero` (the default, as samplers need it) a final 0 follows and the array is (n + 1,), else
(n,). n = 1 is [sigma_max]. For a DDPM schedule sigma is its `sigmas`, sigma_t / alpha_t.

Every function raises TypeError, ValueError unless n >= 1, 0 < sigma_min < sigma_max < inf, and
where n levels cannot be told apart in float64.

Sources, cited by the names used below:
  NCSN         Song, Ermon 2019, "Generative modeling by estimating gradients of the data
               distribution"
  EDM          Karras, Aittala, Aila, Laine 2022, "Elucidating the design space of diffusion-based
               generative models"
  DPM-Solver   Lu, Zhou, Bao, Chen, Li, Zhu 2022, "DPM-Solver"
  Beta         Lee et al. 2024, "Beta sampling is all you need"
"""

from __future__ import annotations

import math

import numpy as np

from ._beta_quantile import LARGEST_SHAPE, beta_quantile
from ._values import FloatArray, as_flag, as_float, as_int


def karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, *, append_zero: bool = True
) -> FloatArray:
    """EDM eq 5: even steps in sigma^(1/rho).

        sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    rho: > 0; 7 in EDM, 1 is even in sigma, large rho tends to `exponential`. Else ValueError.
    Returns (n,) or (n + 1,), see the module.
    """
    n, log_min, log_max = _check(n, sigma_min, sigma_max)
    rho = _positive("rho", rho)
    # sigma_max taken out of the bracket: nothing overflows for small rho or cancels for large rho.
    drop = np.linspace(0, 1, n) * -math.expm1((log_min - log_max) / rho)
    with np.errstate(divide="ignore"):
        sigmas = np.exp(log_max + rho * np.log1p(-drop))
    return _ladder(sigmas, sigma_min, sigma_max, append_zero)


def polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, *, append_zero: bool = True
) -> FloatArray:
    """log sigma polynomial in the step, as k-diffusion has it.

        log sigma_i = log sigma_min + (1 - i/(n-1))^rho (log sigma_max - log sigma_min)

    rho: > 0, else ValueError; 1 is `exponential`. Returns (n,) or (n + 1,), see the module.
    """
    n, log_min, log_max = _check(n, sigma_min, sigma_max)
    rho = _positive("rho", rho)
    sigmas = np.exp(log_min + np.linspace(1, 0, n) ** rho * (log_max - log_min))
    return _ladder(sigmas, sigma_min, sigma_max, append_zero)


def exponential(
    n: int, sigma_min: float, sigma_max: float, *, append_zero: bool = True
) -> FloatArray:
    """Even steps in log sigma, under the name k-diffusion gives it.

        sigma_i = sigma_max (sigma_min / sigma_max)^(i/(n-1))

    Returns (n,) or (n + 1,), see the module.
    """
    return polyexponential(n, sigma_min, sigma_max, 1.0, append_zero=append_zero)


def ve_geometric(
    n: int, sigma_min: float, sigma_max: float, *, append_zero: bool = True
) -> FloatArray:
    """The geometric sequence of NCSN section 4.1, sigma_1 / sigma_2 = ... = sigma_{L-1} / sigma_L.

    The same numbers as `exponential`. Annealed Langevin dynamics (NCSN algorithm 1) runs at every
    level and has no final 0: append_zero=False. Returns (n,) or (n + 1,), see the module.
    """
    return polyexponential(n, sigma_min, sigma_max, 1.0, append_zero=append_zero)


def lu(n: int, sigma_min: float, sigma_max: float, *, append_zero: bool = True) -> FloatArray:
    """Even steps in lambda = log(alpha_t / sigma_t), half the log-SNR: DPM-Solver.

    sigma here is sigma_t / alpha_t = e^-lambda, so these are the numbers of `exponential`.
    Returns (n,) or (n + 1,), see the module.
    """
    return polyexponential(n, sigma_min, sigma_max, 1.0, append_zero=append_zero)


def beta(
    n: int,
    sigma_min: float,
    sigma_max: float,
    alpha: float = 0.6,
    beta: float = 0.6,
    *,
    append_zero: bool = True,
) -> FloatArray:
    """Levels at the quantiles of a beta distribution: dense at both ends when alpha, beta < 1.

        sigma_i = sigma_min + F^-1(1-i/(n-1)) (sigma_max - sigma_min),  F = CDF of Beta(alpha, beta)

    Beta, in the form diffusers has it. alpha, beta: shape parameters in (0, 100], else ValueError.
    The quantile is computed here, from a series of positive terms, so that no SciPy is needed at
    run time. Returns (n,) or (n + 1,), see the module.
    """
    n, _, _ = _check(n, sigma_min, sigma_max)
    a, b = _positive("alpha", alpha), _positive("beta", beta)
    for name, shape in (("alpha", a), ("beta", b)):
        if shape > LARGEST_SHAPE:
            raise ValueError(f"{name} must be in (0, {LARGEST_SHAPE:g}], got {shape}")
    quantile = beta_quantile(np.linspace(1, 0, n), a, b)
    sigmas = float(sigma_min) + quantile * (float(sigma_max) - float(sigma_min))
    return _ladder(sigmas, sigma_min, sigma_max, append_zero)


def _check(n: int, sigma_min: float, sigma_max: float) -> tuple[int, float, float]:
    n = as_int("n", n, 1)
    low, high = as_float("sigma_min", sigma_min), as_float("sigma_max", sigma_max)
    if low <= 0:
        raise ValueError(f"sigma_min must be > 0, got {low}")
    if high <= low:
        raise ValueError(f"sigma_max must be > sigma_min = {low}, got {high}")
    return n, math.log(low), math.log(high)


def _positive(name: str, value: float) -> float:
    value = as_float(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return value


def _ladder(
    sigmas: FloatArray, sigma_min: float, sigma_max: float, append_zero: bool
) -> FloatArray:
    """Exact ends, strict descent, and the final 0 where wanted."""
    zero = as_flag("append_zero", append_zero)
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    if not (np.diff(sigmas) < 0).all():
        raise ValueError(
            f"n = {sigmas.size} levels from sigma_max = {sigma_max} to sigma_min = {sigma_min} "
            "cannot be told apart in float64: take fewer, or a milder shape"
        )
    return np.append(sigmas, 0.0) if zero else sigmas
