"""Pseudo numerical methods, Adams-Bashforth on even steps: PNDM, PLMS and improved PNDM."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import Schedule
from fastdiff.schedules._values import FloatArray, as_flag, as_int
from fastdiff.solvers.checks import check_choice
from fastdiff.solvers.grid import Grid, grid, refuse_zero_alpha
from fastdiff.solvers.prediction import Estimates
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["ipndm", "plms", "pndm"]

# Adams-Bashforth on even steps, the newest slope first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
COMBINED = ("epsilon", "model_output")


def pndm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    combine: str = "epsilon",
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
    timesteps: Any = None,
    clip: tuple[float, float] | None = None,
) -> SolverPlan:
    """Pseudo numerical method F-PNDM: three pseudo Runge-Kutta steps, then pseudo linear multistep.

        phi(x, e, t, s) = alpha_s / alpha_t x + (sigma_s - sigma_t alpha_s / alpha_t) e
        e_1 = e(x_t, t),  x_2 = phi(x_t, e_1, t, m),  e_2 = e(x_2, m),  x_3 = phi(x_t, e_2, t, m)
        e_3 = e(x_3, m),  x_4 = phi(x_t, e_3, t, s),  e_4 = e(x_4, s)
        x_s = phi(x_t, (e_1 + 2 e_2 + 2 e_3 + e_4) / 6, t, s)                m half-way from t to s
        x_s = phi(x_t, (55 e_t - 59 e_{t+d} + 37 e_{t+2d} - 9 e_{t+3d}) / 24, t, s)     afterwards

    (Liu, Ren, Lin & Zhao 2022, "Pseudo numerical methods for diffusion models on manifolds",
    section 3.3, eqs. 9, 12 and 13, algorithm 2.) 12 + (steps - 3) model calls. The method is of
    second order in the step whatever the order of its slopes, as the paper proves.

    Steps run from each kept timestep to the next. Where the stride is constant and even ("leading",
    or "trailing" with T a multiple of 2 steps) this is what diffusers' PNDMScheduler computes; that
    takes the stride T // steps also where the kept timesteps are further apart.

    Args:
        schedule: what the model was trained with.
        steps, spacing, steps_offset: kept timesteps, at least 4, as diffusers' PNDM spreads them
            (solvers.grid, convention "ddim").
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
        combine: what the formula averages over calls: "epsilon" (the paper), or "model_output",
            of which epsilon at t is taken afterwards, as diffusers does (no difference for
            epsilon-models; for others that is of first order only).
        set_alpha_to_one: the last step goes to x_0 itself instead of the schedule's first level.
        timesteps: explicit kept timesteps instead of steps, descending.
        clip: (lo, hi) bounds of x_0, or None.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    levels = _pseudo_grid(schedule, steps, spacing, steps_offset, set_alpha_to_one, timesteps)
    n = len(levels)
    if n < 4:
        raise ValueError(f"steps must be >= 4 for the Runge-Kutta warm-up, got {n}; or use plms()")
    half = [_index(schedule, t) for t in levels.t[:4]]
    half = [b + (a - b) // 2 for a, b in pairwise(half)]
    path = _Pseudo(
        prediction_type, combine, clip,
        np.append(levels.alpha, schedule.alpha_t[half]),
        np.append(levels.sigma, schedule.sigma_t[half]),
        np.concatenate([levels.t, [np.nan], schedule.timesteps[half]]),
    )  # fmt: skip
    rec = _recorder(f"PNDM, {n} steps", schedule, prediction_type, combine, clip)
    x = rec.begin(levels.initial_scale)
    slopes: list[LinearForm] = []
    for i in range(3):
        m, s = n + 1 + i, i + 1  # half-way, and the end of the step
        x_t, e_1 = path.call(rec, x, i)
        _, e_2 = path.call(rec, path.phi(x_t, e_1, i, m), m)
        _, e_3 = path.call(rec, path.phi(x_t, e_2, i, m), m)
        _, e_4 = path.call(rec, path.phi(x_t, e_3, i, s), s)
        x = path.phi(x_t, (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6, i, s)
        slopes.append(e_1)
    for i in range(3, n):
        x, e = path.call(rec, x, i)
        slopes = [*slopes[-3:], e]
        x = path.phi(x, _adams_bashforth(slopes), i, i + 1)
    return rec.finish(x)


def plms(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 4,
    prediction_type: str = "epsilon",
    combine: str = "epsilon",
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
    timesteps: Any = None,
    clip: tuple[float, float] | None = None,
) -> SolverPlan:
    """Pseudo linear multistep (PNDM without Runge-Kutta; order 2 is S-PNDM).

        x'  = phi(x_t, e_t, t, s),   e' = e(x', s)
        x_s = phi(x_t, (e_t + e') / 2, t, s)                              the first step only
        x_s = phi(x_t, sum_j b_j e_{t + j d}, t, s)                       b: Adams-Bashforth

    with orders 2, 3, 4 as the slopes come in (Liu et al. 2022, eq. 12; the start is that of
    the latent diffusion code's PLMS sampler). steps + 1 model calls; one for a single step.
    phi, all options, and what holds of diffusers (skip_prk_steps=True) are those of pndm(); order
    is 2, 3 or 4.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    order = as_int("order", order, 2, 4)
    levels = _pseudo_grid(schedule, steps, spacing, steps_offset, set_alpha_to_one, timesteps)
    n = len(levels)
    path = _Pseudo(prediction_type, combine, clip, levels.alpha, levels.sigma, levels.t)
    rec = _recorder(f"PLMS-{order}, {n} steps", schedule, prediction_type, combine, clip)
    x_T, e = path.call(rec, rec.begin(levels.initial_scale), 0)
    x = path.phi(x_T, e, 0, 1)
    slopes = [e]
    if n > 1:
        _, e = path.call(rec, x, 1)
        x = path.phi(x_T, (slopes[0] + e) / 2, 0, 1)
    for i in range(1, n):
        x, e = path.call(rec, x, i)
        slopes = [*slopes, e][-order:]
        x = path.phi(x, _adams_bashforth(slopes), i, i + 1)
    return rec.finish(x)


def ipndm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 4,
    prediction_type: str = "epsilon",
    clip: tuple[float, float] | None = None,
    spacing: str = "leading",
    sigmas: Any = None,
    **levels: Any,
) -> SolverPlan:
    """Improved PNDM: pseudo linear multistep that starts with its own lower orders.

        x_s = phi(x_t, sum_j b_j e_{t + j d}, t, s),   b: Adams-Bashforth of order 1, 2, .., order

    (Zhang & Chen 2023, "Fast sampling of diffusion models with exponential integrator", their
    iPNDM; phi as in pndm().) One model call a step.

    The coefficients are those of even steps. diffusers' IPNDMScheduler is this on the path
    sigma = sin^2(pi t / 2), alpha = sqrt(1 - sigma^2) with v-prediction and final="zero", but for
    its first step from t = 1: there x_0 = -v, which it takes for 0.

    Args:
        schedule: what the model was trained with.
        steps, spacing, sigmas: model calls, with `levels`: timesteps, final, steps_offset and so
            on, as in grid() of fastdiff/solvers/grid.py (convention "ddim"; of sigmas "euler").
        order: 1 (DDIM) to 4.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow"; all but the first serve at
            alpha = 0 too.
        clip: (lo, hi) bounds of x_0, or None.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    order = as_int("order", order, 1, 4)
    visited = grid(
        schedule, steps, spacing=spacing, sigmas=sigmas,
        convention="ddim" if sigmas is None else "euler", **levels,
    )  # fmt: skip
    alpha, sigma = visited.alpha, visited.sigma
    estimates = Estimates(prediction_type, alpha[:-1], sigma[:-1], clip)
    rec = _recorder(f"iPNDM-{order}, {len(visited)} steps", schedule, prediction_type, None, clip)
    x = rec.begin(visited.initial_scale)
    slopes: list[LinearForm] = []
    for i in range(len(visited)):
        x, o = rec.call(x, t=visited.t[i])
        x_0, e = estimates(rec, x, o, i)
        slopes = [*slopes, e][-order:]
        if len(slopes) == 1:  # the same step, and alpha may be 0
            x = alpha[i + 1] * x_0 + sigma[i + 1] * e
        else:
            x = _phi(x, _adams_bashforth(slopes), alpha, sigma, i, i + 1)
    return rec.finish(x)


class _Pseudo:
    """Calls and transfers between the levels of a pseudo numerical method."""

    def __init__(
        self,
        prediction_type: str,
        combine: str,
        clip: tuple[float, float] | None,
        alpha: FloatArray,
        sigma: FloatArray,
        t: FloatArray,
    ) -> None:
        check_choice("combine", combine, COMBINED)
        self.raw = combine == "model_output" and prediction_type != "epsilon"
        if self.raw and clip is not None:
            raise ValueError("clip needs combine='epsilon'")
        self.alpha, self.sigma, self.t = alpha, sigma, t
        nonzero = np.where(sigma == 0, 1.0, sigma)  # x_0 itself is never given to the model
        self.estimates = Estimates(prediction_type, alpha, nonzero, clip)

    def call(self, rec: Recorder, x: LinearForm, i: int) -> tuple[LinearForm, LinearForm]:
        """The sample that the model sees at level i, and what is combined."""
        x, o = rec.call(x, t=self.t[i])
        _, e = self.estimates(rec, x, o, i)
        return x, o if self.raw else e

    def phi(self, x: LinearForm, e: LinearForm, i: int, k: int) -> LinearForm:
        """The transfer of x from level i to level k."""
        if self.raw:
            e = self.estimates.own_epsilon(x, e, i)
        return _phi(x, e, self.alpha, self.sigma, i, k)


def _phi(
    x: LinearForm, e: LinearForm, alpha: FloatArray, sigma: FloatArray, i: int, k: int
) -> LinearForm:
    change = (sigma[k] * alpha[i] - sigma[i] * alpha[k]) / alpha[i]  # 0 where the levels are one
    return alpha[k] / alpha[i] * x + change * e


def _adams_bashforth(slopes: list[LinearForm]) -> LinearForm:
    """The combination of the slopes, oldest first, of order len(slopes)."""
    weights = ADAMS_BASHFORTH[len(slopes) - 1]
    combined = weights[0] * slopes[-1]
    for weight, e in zip(weights[1:], slopes[-2::-1], strict=True):
        combined = combined + weight * e
    return combined


def _pseudo_grid(
    schedule: Schedule,
    steps: int | None,
    spacing: str,
    steps_offset: int,
    set_alpha_to_one: bool,
    timesteps: Any,
) -> Grid:
    final = "zero" if as_flag("set_alpha_to_one", set_alpha_to_one) else "sigma_min"
    levels = grid(
        schedule, steps, spacing=spacing, timesteps=timesteps, final=final,
        steps_offset=steps_offset, convention="ddim",
    )  # fmt: skip
    refuse_zero_alpha(levels, "the pseudo numerical step divides by alpha_t")
    return levels


def _index(schedule: Schedule, t: float) -> int:
    return int(np.round(np.interp(t, schedule.timesteps, np.arange(len(schedule)))))


def _recorder(
    name: str,
    schedule: Schedule,
    prediction_type: str,
    combine: str | None,
    clip: tuple[float, float] | None,
) -> Recorder:
    about = {"schedule": schedule.name, "prediction_type": prediction_type, "clip": str(clip)}
    return Recorder(name, about=about | ({} if combine is None else {"combine": combine}))
