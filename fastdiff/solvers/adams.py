"""Adams-Bashforth families: PNDM and PLMS, improved PNDM, linear multistep (LMS)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import Schedule
from fastdiff.schedules._values import FloatArray, as_flag, as_int
from fastdiff.solvers.estimates import Estimates
from fastdiff.solvers.grid import Grid, grid
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["adams_weights", "ipndm", "lms", "plms", "pndm"]

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
    spacing: str = "leading",
    steps_offset: int = 0,
    timesteps: Any = None,
    sigmas: Any = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    final: str = "zero",
    clip: tuple[float, float] | None = None,
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
        steps, spacing, steps_offset, timesteps, sigmas, sigma_min, sigma_max, rho, final: the
            levels visited (solvers.grid, convention "ddim"; a ladder of sigmas "euler").
        order: 1 (DDIM) to 4.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow"; all but the first serve at
            alpha = 0 too.
        clip: (lo, hi) bounds of x_0, or None.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    order = as_int("order", order, 1, 4)
    levels = grid(
        schedule, steps, spacing=spacing, timesteps=timesteps, sigmas=sigmas, final=final,
        steps_offset=steps_offset, convention="ddim" if sigmas is None else "euler",
        sigma_min=sigma_min, sigma_max=sigma_max, rho=rho,
    )  # fmt: skip
    estimates = Estimates(prediction_type, levels.alpha[:-1], levels.sigma[:-1], clip)
    alpha, sigma = levels.alpha, levels.sigma
    rec = _recorder(f"iPNDM-{order}, {len(levels)} steps", schedule, prediction_type, None, clip)
    x = rec.begin(levels.initial_scale)
    slopes: list[LinearForm] = []
    for i in range(len(levels)):
        x, o = rec.call(x, t=levels.t[i])
        x_0, e = estimates(rec, x, o, i)
        slopes = [*slopes, e][-order:]
        if len(slopes) == 1:  # the same step, and alpha may be 0
            x = alpha[i + 1] * x_0 + sigma[i + 1] * e
        else:
            x = _phi(x, _adams_bashforth(slopes), alpha, sigma, i, i + 1)
    return rec.finish(x)


def lms(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 4,
    prediction_type: str = "epsilon",
    spacing: str = "linspace",
    steps_offset: int = 0,
    timesteps: Any = None,
    sigmas: Any = None,
    rho: float = 7.0,
    clip: tuple[float, float] | None = None,
) -> SolverPlan:
    """Linear multistep with exact weights for uneven steps, in the variance-exploding view.

        y = x_t / alpha_t,  sigma = sigma_t / alpha_t,  d_i = (y_i - x_0) / sigma_i = epsilon
        y_{i+1} = y_i + sum_j w_j d_{i-j},   w_j = int_{sigma_i}^{sigma_{i+1}} l_j(sigma) d sigma

    with l_j the Lagrange polynomials over sigma_i .. sigma_{i-k+1}, k = min(i + 1, order)
    (Katherine Crowson's LMS sampler, an Adams-Bashforth method on the ODE of Karras et al. 2022,
    eq. 3). The weights are polynomials integrated exactly. The sampler's state is y; the model sees
    x_t = alpha_t y. The last step goes to sigma = 0.

    Args:
        schedule: what the model was trained with; levels must have alpha_t > 0.
        steps, spacing, steps_offset, timesteps, sigmas, rho: the levels visited (solvers.grid,
            convention "euler"). A named ladder of sigmas runs between the ends of what `spacing`
            visits.
        order: 1 (Euler) to 4.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
        clip: (lo, hi) bounds of x_0, or None.

    y_T has standard deviation sigma_T, with spacing="leading" sqrt(sigma_T^2 + 1), as in diffusers'
    LMSDiscreteScheduler.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    order = as_int("order", order, 1, 4)
    ends: dict[str, float] = {}
    if isinstance(sigmas, str):
        spread = grid(
            schedule, steps, spacing=spacing, steps_offset=steps_offset, convention="euler"
        ).ratio
        ends = {"sigma_min": float(spread[-2]), "sigma_max": float(spread[0])}
    levels = grid(
        schedule, steps, spacing=spacing, timesteps=timesteps, sigmas=sigmas, final="zero",
        steps_offset=steps_offset, convention="euler", rho=rho, **ends,
    )  # fmt: skip
    refuse_zero_alpha(levels, "the method works in x_t / alpha_t")
    sigma, alpha = levels.ratio, levels.alpha
    estimates = Estimates(prediction_type, alpha[:-1], levels.sigma[:-1], clip)
    rec = _recorder(f"LMS-{order}, {len(levels)} steps", schedule, prediction_type, None, clip)
    scale = float(np.hypot(sigma[0], 1.0) if spacing == "leading" else sigma[0])
    y = rec.begin(scale=scale)
    slopes: list[LinearForm] = []
    for i in range(len(levels)):
        y, o = rec.call(y, t=levels.t[i], c_in=alpha[i])
        _, d = estimates(rec, alpha[i] * y, o, i)
        slopes = [*slopes, d][-order:]
        nodes = sigma[i + 1 - len(slopes) : i + 1]
        weights = adams_weights(nodes, sigma[i + 1])
        y = y + sum(w * d for w, d in zip(weights, slopes, strict=True))
    return rec.finish(y)


def lagrange_polynomials(nodes: FloatArray) -> FloatArray:
    """(k, k): the coefficients, ascending, of the polynomials l_j that are 1 at nodes[j] and 0 at
    the others, around nodes[-1]: l_j(u) = sum_m c[j, m] (u - nodes[-1])^m."""
    off = np.asarray(nodes) - nodes[-1]
    basis = []
    for j in range(len(off)):
        others = np.delete(off, j)
        basis.append(np.polynomial.polynomial.polyfromroots(others) / np.prod(off[j] - others))
    return np.array(basis)


def adams_weights(nodes: FloatArray, end: float) -> FloatArray:
    """int_{nodes[-1]}^{end} l_j(u) du of the Lagrange polynomials over nodes: (k,), exact.

    The weights of slopes at nodes[0] .. nodes[-1] in an Adams-Bashforth step to `end`.
    """
    scale = end - nodes[-1]
    if scale == 0:
        return np.zeros(len(nodes))
    basis = lagrange_polynomials(np.asarray(nodes) / scale)  # in steps: nothing over- or underflows
    return scale * (basis @ (1.0 / np.arange(1, len(nodes) + 1)))


def refuse_zero_alpha(levels: Grid, reason: str) -> None:
    if levels.alpha[0] == 0:
        raise ValueError(
            f"schedule has alpha_t = 0 at the first level (zero terminal SNR), but {reason}: "
            "leave that level out with timesteps= or sigmas="
        )


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
        if combine not in COMBINED:
            raise ValueError(f"combine must be one of {', '.join(COMBINED)}, not {combine!r}")
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
            e = self.estimates.e[i] * x + self.estimates.f[i] * e
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
