"""The noise levels a solver visits, with the model's t at each: what `set_timesteps` decides.

A level is named by its ratio sigma_t / alpha_t, the variance-exploding view in data units; half
its negative log-SNR is log of that. Ratios go from inf (alpha_t = 0, zero terminal SNR) to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.schedules import GaussianPath, NoiseSchedule, Schedule, timestep_spacing
from fastdiff.schedules import sigmas as ladders
from fastdiff.schedules._values import (
    FloatArray,
    as_float,
    as_float_vector,
    as_int,
    freeze,
    refuse_where,
)
from fastdiff.schedules.spacing import SPACINGS
from fastdiff.solvers.checks import check_choice

__all__ = ["NOISE_PREDICTION", "Grid", "grid", "level", "model_t", "refuse_zero_alpha"]

CONVENTIONS = ("dpm_solver", "euler", "ddim")
FINALS = ("zero", "sigma_min")
LADDERS: dict[str, Callable[..., FloatArray]] = {
    "karras": ladders.karras, "exponential": ladders.exponential, "beta": ladders.beta,
    "lu": ladders.lu,
}  # fmt: skip
NOISE_PREDICTION = "noise prediction is not defined there: use data prediction"
SAME = 1e-9  # relative: far below any real step, far above rounding


@dataclass(frozen=True, eq=False)
class Grid:
    """R + 1 noise levels, noisiest first; the model is called at the first R.

    Attributes:
        t: (R,) float64, the model's own t at every call.
        alpha, sigma: (R+1,) float64, x = alpha x_0 + sigma epsilon at every level.
        initial_scale: standard deviation of the noise a sampler starts from.
    """

    t: FloatArray
    alpha: FloatArray
    sigma: FloatArray
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        t = as_float_vector("t", self.t)
        alpha = as_float_vector("alpha", self.alpha, length=t.size + 1)
        sigma = as_float_vector("sigma", self.sigma, length=t.size + 1)
        refuse_where("alpha", alpha, ~((alpha >= 0) & np.isfinite(alpha)), "be finite and >= 0")
        refuse_where("sigma", sigma, ~((sigma >= 0) & np.isfinite(sigma)), "be finite and >= 0")
        refuse_where("alpha", alpha, (alpha == 0) & (sigma == 0), "be > 0 where sigma is 0")
        for name, array in (("t", t), ("alpha", alpha), ("sigma", sigma)):
            object.__setattr__(self, name, freeze(array))

    def __len__(self) -> int:
        """Model calls R."""
        return self.t.size

    @property
    def ratio(self) -> FloatArray:
        """(R+1,) sigma / alpha, in data units; inf where alpha = 0."""
        with np.errstate(divide="ignore"):
            ratio: FloatArray = self.sigma / self.alpha
        return ratio

    @property
    def lambda_(self) -> FloatArray:
        """(R+1,) log(alpha / sigma), half the log-SNR; -inf at alpha = 0, inf at sigma = 0."""
        with np.errstate(divide="ignore"):
            lambda_: FloatArray = np.log(self.alpha) - np.log(self.sigma)
        return lambda_


def grid(
    schedule: Schedule,
    steps: int | None = None,
    *,
    spacing: str = "linspace",
    timesteps: Any = None,
    sigmas: str | Any | None = None,
    final: str = "zero",
    steps_offset: int = 0,
    convention: str = "dpm_solver",
    lambda_min: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Grid:
    """The levels that diffusers' schedulers visit for these options, in float64.

    With T the schedule's length, n = steps and L the number of its levels with lambda >= lambda_min
    (T without one):

        convention    linspace                            leading                         t
        dpm_solver    round linspace(0, L-1, n+1), not 0  (L // (n+1)) {1 .. n} + offset  integers
        euler         linspace(0, T-1, n)                 (T // n) {0 .. n-1} + offset    real
        ddim          round linspace(0, T-1, n)           (T // n) {0 .. n-1} + offset    integers

    and trailing is round(L - i T/n) - 1, i = 0 .. n-1, for all (Lin et al. 2023, table 2).
    "dpm_solver" is what diffusers' DPM-Solver, UniPC, DEIS and SA-Solver schedulers do, "euler" its
    Euler, Heun, LMS and KDPM2, "ddim" its DDIM, DDPM and PNDM. The numbers are indices of a
    NoiseSchedule. On a flow path (alpha = 1 - sigma) index i has sigma (i+1)/T, and "dpm_solver"
    counts from one below, sigma = linspace(0, 1 - 1/T, n+1) before the shift, so that it leaves
    out sigma = 1, where alpha is 0, as its diffusers namesakes do. Between indices sigma / alpha
    is linear. Only schedules whose timesteps are integers get integers.

    Args:
        schedule: NoiseSchedule or GaussianPath.
        steps: n, >= 1; None with explicit timesteps or sigmas.
        spacing: "linspace", "leading" or "trailing".
        timesteps: the model's own t at every call, (R,), strictly decreasing, within the range of
            schedule.timesteps. Their levels are the schedule's, unless sigmas are given too.
        sigmas: None; or "karras" (rho), "exponential", "beta", "lu": a ladder of n levels
            sigma / alpha from sigma_max to sigma_min; or an array (R,) of levels sigma / alpha,
            strictly decreasing, which may start at inf (alpha = 0) and may end in 0 (then that is
            the final level). t is interpolated in log(sigma / alpha), as diffusers and k-diffusion
            do; where schedule.timesteps are proportional to sigma_t (flow, ve), it is so
            exactly. dpm_solver rounds t for "karras" and "lu" and truncates it otherwise, as
            upstream does.
        final: the level after the last call: "zero", or "sigma_min", the schedule's lowest.
        steps_offset: added to leading indices.
        lambda_min: levels with a lower log(alpha / sigma) are not visited (dpm_solver; upstream's
            lambda_min_clipped, -5.1 for the cosine schedule).
        sigma_min, sigma_max: the ends of a ladder; default the schedule's (the highest finite).
        rho: of "karras".

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check(schedule, spacing, final, convention)
    table = schedule.sigmas
    index: FloatArray | None = None  # what is visited: fractional indices of the table,
    ratio: FloatArray | None = None  # or levels
    if timesteps is not None and (steps is not None or isinstance(sigmas, str)):
        raise ValueError("timesteps exclude steps and a named ladder of sigmas")
    if isinstance(sigmas, str):
        check_choice("sigmas", sigmas, tuple(LADDERS))
        finite = table[np.isfinite(table) & (table > 0)]
        low, high = (
            finite[end] if value is None else as_float(name, value)
            for name, value, end in (("sigma_min", sigma_min, 0), ("sigma_max", sigma_max, -1))
        )
        shape = {"rho": rho} if sigmas == "karras" else {}
        ratio = LADDERS[sigmas](as_int("steps", steps, 1), low, high, append_zero=False, **shape)
    elif sigmas is not None:
        if steps is not None:
            raise ValueError("steps and an array of sigmas exclude each other")
        ratio = as_float_vector("sigmas", sigmas)
        refuse_where("sigmas", ratio, ratio < 0, "be >= 0")
        if ratio[-1] == 0 and ratio.size > 1:
            ratio, final = ratio[:-1], "zero"
        _strictly_decreasing("sigmas", ratio)
    elif timesteps is not None:
        t = _explicit_t(timesteps, None)
        ends = schedule.timesteps[0], schedule.timesteps[-1]
        refuse_where("timesteps", t, (t < ends[0]) | (t > ends[1]), f"be in {list(map(int, ends))}")
        index = np.interp(t, schedule.timesteps, np.arange(len(schedule)))
    else:
        index = _spaced(schedule, steps, spacing, steps_offset, convention, lambda_min)
        name = "steps" if lambda_min is None else "steps (with lambda_min)"
        if not (np.diff(index) < 0).all():
            raise ValueError(
                f"{name} = {steps} is too many for {len(schedule)} levels, {spacing} spacing"
            )

    if ratio is not None:
        t = model_t(schedule, ratio)
        if convention != "euler" and schedule.timesteps.dtype.kind == "i":
            rounded = isinstance(sigmas, str) and sigmas in ("karras", "lu")
            t = np.round(t) if rounded else np.trunc(t)
        alpha, sigma = level(schedule, ratio)
    else:
        assert index is not None
        alpha, sigma = _at_index(schedule, index)
        t = np.interp(index, np.arange(len(schedule)), schedule.timesteps)
        if _flow_shift(schedule) is not None:
            t = model_t(schedule, _ratio(alpha, sigma))
    if timesteps is not None:
        t = _explicit_t(timesteps, t.size)

    last_alpha, last_sigma = 1.0, 0.0
    if final == "sigma_min":
        last_alpha, last_sigma = float(schedule.alpha_t[0]), float(schedule.sigma_t[0])
    lowest = float(_ratio(alpha, sigma)[-1])
    if not lowest * last_alpha >= last_sigma * (1 - SAME):
        name = "sigmas" if ratio is not None else "timesteps"
        raise ValueError(
            f"{name} must not go below the final level {last_sigma / last_alpha} (final="
            f"{final!r}), got sigma / alpha = {lowest}"
        )
    if abs(lowest * last_alpha - last_sigma) <= SAME * last_sigma:  # a ladder's end, rounded
        last_alpha, last_sigma = float(alpha[-1]), float(sigma[-1])
    if sigma[-1] == 0:
        raise ValueError("sigmas must be > 0 where the model is called")
    exploding = isinstance(schedule, GaussianPath) and bool((schedule.alpha_t == 1).all())
    return Grid(
        t=t, alpha=np.append(alpha, last_alpha), sigma=np.append(sigma, last_sigma),
        initial_scale=float(sigma[0]) if exploding else 1.0,
    )  # fmt: skip


def level(schedule: Schedule, ratio: Any) -> tuple[FloatArray, FloatArray]:
    """(alpha, sigma) of the schedule's path at levels ratio = sigma / alpha, in [0, inf].

        variance preserving   alpha = 1 / sqrt(1 + ratio^2)
        flow                  alpha = 1 / (1 + ratio)
        variance exploding    alpha = 1
        any other path        alpha interpolated in log ratio between the path's levels

    and sigma = ratio alpha. float64, shaped like ratio.
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    a, s = schedule.alpha_t, schedule.sigma_t
    finite = np.where(np.isinf(ratio), 1.0, ratio)
    if isinstance(schedule, NoiseSchedule) or np.allclose(a**2 + s**2, 1, rtol=0, atol=SAME):
        alpha = 1 / np.hypot(1.0, finite)
    elif np.allclose(a + s, 1, rtol=0, atol=SAME):
        alpha = 1 / (1 + finite)
    elif (a == 1).all():
        if np.isinf(ratio).any():
            raise ValueError("sigmas must be finite on a variance-exploding path")
        alpha = np.ones_like(finite)
    else:
        known = np.isfinite(schedule.sigmas) & (schedule.sigmas > 0)
        with np.errstate(divide="ignore"):
            log_ratio = np.log(finite)
        alpha = np.interp(log_ratio, np.log(schedule.sigmas[known]), a[known])
    sigma = np.where(np.isinf(ratio), 1.0, finite * alpha)
    return np.where(np.isinf(ratio), 0.0, alpha), sigma


def model_t(schedule: Schedule, ratio: Any) -> FloatArray:
    """The model's t at levels ratio = sigma / alpha: schedule.timesteps, linear in log ratio.

    Held at the ends of the schedule. Where timesteps are a multiple of sigma_t (flow, ve) t is that
    multiple of sigma.
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    times = np.asarray(schedule.timesteps, dtype=np.float64)
    scale = times[-1] / schedule.sigma_t[-1]
    if np.allclose(times, scale * schedule.sigma_t, rtol=SAME, atol=0):
        return np.asarray(scale * level(schedule, ratio)[1])
    known = np.isfinite(schedule.sigmas) & (schedule.sigmas > 0)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(ratio)
    t = np.interp(log_ratio, np.log(schedule.sigmas[known]), times[known])
    return np.where(np.isinf(ratio), times[-1], t)


def refuse_zero_alpha(levels: Grid, reason: str) -> None:
    if levels.alpha[0] == 0:
        raise ValueError(
            f"schedule has alpha_t = 0 at the first level (zero terminal SNR): {reason}, or leave "
            "that level out with timesteps= or sigmas="
        )


def _spaced(
    schedule: Schedule,
    steps: Any,
    spacing: str,
    steps_offset: int,
    convention: str,
    lambda_min: float | None,
) -> FloatArray:
    """The visited indices, decreasing."""
    T = len(schedule)
    n = as_int("steps", steps, 1, T)
    offset = as_int("steps_offset", steps_offset, 0)
    kept = T
    if lambda_min is not None:
        if convention != "dpm_solver":
            raise ValueError(f"lambda_min needs convention 'dpm_solver', not {convention!r}")
        kept = int(np.count_nonzero(schedule.log_snr / 2 >= as_float("lambda_min", lambda_min)))
        if kept < 2:
            raise ValueError(f"lambda_min must leave at least 2 of the levels, got {lambda_min}")
    if spacing == "trailing":
        indices = np.arange(kept, 0, -T / n)[:n].round() - 1
    elif convention == "dpm_solver":
        if spacing == "linspace":
            indices = np.linspace(0, kept - 1, n + 1)[:0:-1]
        else:
            indices = np.arange(n, 0, -1.0) * (kept // (n + 1)) + offset
        if _flow_shift(schedule) is not None:
            return np.asarray(indices - 1)
        indices = indices.round()
    elif convention == "euler" and spacing == "linspace":
        indices = np.linspace(0, T - 1, n)[::-1]
    else:
        indices = timestep_spacing(T, n, spacing, steps_offset=offset).astype(np.float64)
    if indices[0] > T - 1:
        raise ValueError(f"steps_offset = {offset} goes beyond the {T} levels")
    return np.asarray(indices, dtype=np.float64)


def _at_index(schedule: Schedule, index: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(alpha, sigma) at fractional indices; the table's own numbers at whole ones."""
    T, shift = len(schedule), _flow_shift(schedule)
    if shift is not None:  # sigma = s i / (s i + T - i), i counted from 1
        noise, data = shift * (index + 1), T - (index + 1)
        return data / (noise + data), noise / (noise + data)
    whole = index == np.floor(index)
    at = index.astype(np.int64)
    table = np.where(np.isinf(schedule.sigmas), np.nan, schedule.sigmas)
    ratio = np.where(whole, 1.0, np.interp(index, np.arange(T), table))
    if np.isnan(ratio).any():
        raise ValueError(
            "spacing needs a level between the two noisiest, which zero terminal SNR does not "
            "define: use 'trailing' or 'leading'"
        )
    alpha, sigma = level(schedule, ratio)
    return np.where(whole, schedule.alpha_t[at], alpha), np.where(
        whole, schedule.sigma_t[at], sigma
    )


def _flow_shift(schedule: Schedule) -> float | None:
    """The s of schedules.flow's levels, sigma_i = s i / (s i + T - i), i = 1 .. T; else None."""
    T, a, s = len(schedule), schedule.alpha_t, schedule.sigma_t
    if isinstance(schedule, NoiseSchedule) or T < 2 or a[-1] != 0:
        return None
    shift = float(s[0] / a[0]) * (T - 1)
    i = np.arange(1, T + 1)
    flow = shift * i / (shift * i + T - i)
    same = np.allclose(s, flow, rtol=SAME, atol=0) and np.allclose(a + s, 1, rtol=SAME, atol=0)
    return shift if same else None


def _ratio(alpha: FloatArray, sigma: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        ratio: FloatArray = sigma / alpha
    return ratio


def _explicit_t(timesteps: Any, length: int | None) -> FloatArray:
    t = as_float_vector("timesteps", timesteps, length=length)
    refuse_where("timesteps", t, ~np.isfinite(t), "be finite")
    if length is None:
        _strictly_decreasing("timesteps", t)
    return t


def _strictly_decreasing(name: str, array: FloatArray) -> None:
    wrong = np.r_[False, array[1:] >= array[:-1]]
    refuse_where(name, array, wrong, "strictly decrease (noisiest first)")


def _check(schedule: Any, spacing: Any, final: Any, convention: Any) -> None:
    if not isinstance(schedule, NoiseSchedule | GaussianPath):
        raise TypeError(
            f"schedule must be a NoiseSchedule or a GaussianPath, not {type(schedule).__name__}"
        )
    check_choice("spacing", spacing, SPACINGS)
    check_choice("final", final, FINALS)
    check_choice("convention", convention, CONVENTIONS)
