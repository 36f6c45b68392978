"""The named variance-preserving schedules: linear, scaled linear, cosine, sigmoid, your own.

Every function returns a `NoiseSchedule` and checks its arguments before it computes anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._values import FloatArray, as_flag, as_float, as_float_vector, as_int, refuse_where
from .noise_schedule import NoiseSchedule, _from_log_alphas_cumprod

# cosh of half of it, squared, is far from the largest float64.
_LARGEST_LOGIT = 700.0


def linear(
    T: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    *,
    scale_endpoints: bool = False,
) -> NoiseSchedule:
    """beta_t on a straight line: beta_t = beta_start + (t-1)/(T-1) (beta_end - beta_start).

    Ho et al. 2020 (DDPM), section 4. T=1 gives beta_start.

    scale_endpoints: multiply both ends by 1000 / T, so that abar_T stays about what it is for 1000
        steps (the rule of the improved- and guided-diffusion codes for their "linear" schedule).

    Raises TypeError, ValueError unless T >= 1 and 0 <= beta_start <= beta_end <= 1, beta_start < 1
    (after scaling).
    """
    T, beta_start, beta_end = _check_ends(
        T, beta_start, beta_end, as_flag("scale_endpoints", scale_endpoints)
    )
    return NoiseSchedule(np.linspace(beta_start, beta_end, T), name="linear")


def scaled_linear(
    T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> NoiseSchedule:
    """sqrt(beta_t) on a straight line: beta_t = (linspace(sqrt(beta_start), sqrt(beta_end)))^2.

    Rombach et al. 2022 (latent diffusion), the schedule of their released models; called
    "scaled_linear" or "quad". T=1 gives beta_start.

    Raises TypeError, ValueError as `linear` does.
    """
    T, beta_start, beta_end = _check_ends(T, beta_start, beta_end, False)
    betas = np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    return NoiseSchedule(betas, name="scaled_linear")


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """abar(t) = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta_t clipped at max_beta.

    Nichol, Dhariwal 2021, eq 17. With a, b the angles at t-1 and t,
    beta_t = 1 - cos^2(b)/cos^2(a) = sin(a + b) sin(b - a)/cos^2(a), which does not cancel.

    Raises TypeError, ValueError unless T >= 1, s >= 0, 0 < max_beta <= 1.
    """
    T = as_int("T", T, 1)
    s = as_float("s", s)
    if s < 0:
        raise ValueError(f"s must be >= 0, got {s}")
    max_beta = _check_max_beta(max_beta)
    angle = (np.arange(T + 1) / T + s) / (1 + s) * (np.pi / 2)
    a, b = angle[:-1], angle[1:]
    betas = np.sin(a + b) * np.sin(b - a) / np.cos(a) ** 2
    return NoiseSchedule(np.minimum(betas, max_beta), name="cosine")


def sigmoid(
    T: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> NoiseSchedule:
    """abar on a sigmoid: gamma(u) = (S(end/tau) - S((start + u (end - start))/tau)) /
    (S(end/tau) - S(start/tau)) with S(v) = 1/(1 + e^-v), abar_t = gamma(t/T), beta_t clipped.

    Jabri, Fleet, Chen 2022, "Scalable adaptive computation for iterative generation"; Chen 2023,
    "On the importance of noise scheduling for diffusion models", algorithm 1. Differences of S
    are taken as S(p) - S(q) = sinh((p - q)/2) / (2 cosh(p/2) cosh(q/2)), which does not cancel.

    Raises TypeError, ValueError unless T >= 1, start < end, tau > 0, |start|, |end| <= 700 tau,
    0 < max_beta <= 1.
    """
    T = as_int("T", T, 1)
    start, end, tau = as_float("start", start), as_float("end", end), as_float("tau", tau)
    if tau <= 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if start >= end:
        raise ValueError(f"start must be < end, got start={start}, end={end}")
    for name, value in (("start", start), ("end", end)):
        if abs(value) > _LARGEST_LOGIT * tau:
            raise ValueError(f"{name} must be within {_LARGEST_LOGIT:g} tau of 0, got {value}")
    max_beta = _check_max_beta(max_beta)
    v = np.linspace(start, end, T + 1) / tau
    p, q, last = v[:-1], v[1:], v[-1]
    betas: FloatArray = np.sinh((q - p) / 2) / np.sinh((last - p) / 2)
    betas = betas * (np.cosh(last / 2) / np.cosh(q / 2))
    return NoiseSchedule(np.minimum(betas, max_beta), name="sigmoid")


def custom(betas: Any, timesteps: Any = None, name: str = "custom") -> NoiseSchedule:
    """The chain of your own betas (T,): `NoiseSchedule(betas, timesteps, name)`.

    Raises TypeError, ValueError as `NoiseSchedule` does.
    """
    return NoiseSchedule(betas, timesteps, name)


def from_alphas_cumprod(
    alphas_cumprod: Any, timesteps: Any = None, name: str = "from_alphas_cumprod"
) -> NoiseSchedule:
    """The chain with the given abar (T,): beta_t = 1 - abar_t / abar_{t-1}, abar_0 = 1.

    alphas_cumprod: in (0, 1], never increasing; the last may be 0 (zero terminal SNR).

    Raises TypeError, ValueError naming `alphas_cumprod`, or as `NoiseSchedule` does.
    """
    abar = as_float_vector("alphas_cumprod", alphas_cumprod)
    last_may_be_zero = np.r_[abar[:-1] > 0, abar[-1] >= 0]
    must = "be in (0, 1] (only the last may be 0)"
    refuse_where("alphas_cumprod", abar, ~last_may_be_zero | (abar > 1), must)
    refuse_where("alphas_cumprod", abar, np.r_[False, abar[1:] > abar[:-1]], "never increase")
    with np.errstate(divide="ignore"):
        log_abar = np.log(abar)
    return _from_log_alphas_cumprod(log_abar, timesteps, name)


def _check_ends(
    T: int, beta_start: float, beta_end: float, scale_endpoints: bool
) -> tuple[int, float, float]:
    T = as_int("T", T, 1)
    beta_start, beta_end = as_float("beta_start", beta_start), as_float("beta_end", beta_end)
    said = ""
    if scale_endpoints:
        beta_start, beta_end = beta_start * 1000 / T, beta_end * 1000 / T
        said = f" (times 1000/T with T={T})"
    if not 0 <= beta_start < 1:
        raise ValueError(f"beta_start must be in [0, 1), got {beta_start}{said}")
    if not beta_start <= beta_end <= 1:
        raise ValueError(f"beta_end must be in [beta_start, 1], got {beta_end}{said}")
    return T, beta_start, beta_end


def _check_max_beta(max_beta: float) -> float:
    max_beta = as_float("max_beta", max_beta)
    if not 0 < max_beta <= 1:
        raise ValueError(f"max_beta must be in (0, 1], got {max_beta}")
    return max_beta
