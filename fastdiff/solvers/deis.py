"""DEIS: exponential Adams-Bashforth in log(sigma / alpha) (Zhang & Chen 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import Schedule
from fastdiff.schedules._values import FloatArray, as_flag, as_int
from fastdiff.solvers.grid import grid, refuse_zero_alpha
from fastdiff.solvers.prediction import Estimates
from fastdiff.solvers.weights import lagrange_polynomials, phi
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["deis", "deis_weights"]

FEW_STEPS = 15  # lower_order_final: below this many


def deis(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    prediction_type: str = "epsilon",
    clip: tuple[float, float] | None = None,
    thresholding: tuple[float, float] | None = None,
    lower_order_final: bool = True,
    final: str = "sigma_min",
    **levels: Any,
) -> SolverPlan:
    """DEIS in its log-rho form, a multistep method of order 1, 2 or 3.

        rho = sigma_t / alpha_t
        x_t / alpha_t = x_s / alpha_s + sum_j C_j epsilon_j
        C_j = int_{rho_s}^{rho_t} prod_{k != j} (log r - log rho_k) / (log rho_j - log rho_k) dr

    over the last `order` calls (Zhang & Chen 2023, eqs. 14 and 15 and proposition 3 with the
    polynomials in log rho; diffusers' DEISMultistepScheduler). Order 1 is DDIM. Lagrange
    polynomials in rho itself make LMS (solvers.lms).

    Args:
        schedule: what the model was trained with; levels must have alpha_t > 0.
        steps: model calls, with `levels`: spacing, timesteps, sigmas and so on, as in grid() of
            fastdiff/solvers/grid.py.
        order: 1, 2 or 3; the first calls use the orders that they have history for.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
        clip: (lo, hi) bounds of x_0, or None.
        thresholding: (ratio, largest) of dynamic thresholding of x_0 instead, or None.
        lower_order_final: with fewer than 15 steps the last two are of order <= 2 and 1.
        final: "sigma_min" (diffusers), the schedule's lowest level, or "zero", x_0, to which the
            step is of order 1.

    A ladder of sigmas ends where final="sigma_min" leads, so that its last step does nothing, as
    in diffusers; final="zero" makes use of it. On a flow path diffusers stops at the last level
    visited, this at the path's first (one more step).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    order = as_int("order", order, 1, 3)
    visited = grid(schedule, steps, final=final, **levels)
    refuse_zero_alpha(visited, "sigma_t / alpha_t must be finite")
    R, alpha, sigma, lambda_ = len(visited), visited.alpha, visited.sigma, visited.lambda_
    estimates = Estimates(prediction_type, alpha[:-1], sigma[:-1], clip, thresholding)
    lower = as_flag("lower_order_final", lower_order_final) and R < FEW_STEPS
    rec = Recorder(
        f"DEIS-{order}, {R} steps",
        about={
            "schedule": schedule.name, "prediction_type": prediction_type,
            "clip": str(estimates.clip), "thresholding": str(estimates.thresholding),
        },
    )  # fmt: skip
    x = rec.begin(visited.initial_scale)
    slopes: list[LinearForm] = []
    for i in range(R):
        x, o = rec.call(x, t=visited.t[i])
        _, eps = estimates(rec, x, o, i)
        slopes = [*slopes, eps][-order:]
        k = min(len(slopes), R - i) if lower else len(slopes)
        if k == 1 or sigma[i + 1] == 0:
            change = (sigma[i + 1] * alpha[i] - sigma[i] * alpha[i + 1]) / alpha[i]
            x = alpha[i + 1] / alpha[i] * x + change * eps
        else:
            C = deis_weights(-lambda_[i + 1 - k : i + 1], -lambda_[i + 1])
            x = alpha[i + 1] / alpha[i] * x
            for C_j, eps_j in zip(C, slopes[-k:], strict=True):
                x = x + alpha[i + 1] * C_j * eps_j
    return rec.finish(x)


def deis_weights(log_rho: FloatArray, log_end: float) -> FloatArray:
    """C_j over nodes log_rho (k,), the newest last, for the step from it to log_end.

    With u = log r - log rho_s and h = log rho_t - log rho_s, C_j = rho_s int_0^h l_j(u) e^u du, of
    int_0^h u^m e^u du = h^(m+1) e^h m! phi_{m+1}(-h).
    """
    h = log_end - log_rho[-1]
    basis = lagrange_polynomials(np.asarray(log_rho) - log_rho[-1])
    moments = [h ** (m + 1) * math.factorial(m) * phi(m + 1, -h) for m in range(len(log_rho))]
    weights: FloatArray = math.exp(log_end) * (basis @ moments)
    return weights
