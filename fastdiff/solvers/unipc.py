"""UniPC (Zhao et al. 2023): a multistep predictor and a corrector that costs no model call."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import Schedule
from fastdiff.schedules._values import as_flag, as_int
from fastdiff.solvers.checks import check_choice
from fastdiff.solvers.grid import NOISE_PREDICTION, Grid, grid, refuse_zero_alpha
from fastdiff.solvers.prediction import Estimates
from fastdiff.solvers.weights import phi
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["unipc"]

SOLVER_TYPES = ("bh1", "bh2")


def unipc(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    prediction_type: str = "epsilon",
    clip: tuple[float, float] | None = None,
    thresholding: tuple[float, float] | None = None,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
    **levels: Any,
) -> SolverPlan:
    """UniPC-p in its B(h) form.

    From level s to t with h = lambda_t - lambda_s, z = -h, a = sigma_t/sigma_s, b = alpha_t and
    outputs m = x_0 (predict_x0), or z = h, a = alpha_t/alpha_s, b = sigma_t and m = epsilon:

        r_j = (lambda_j - lambda_s) / h,    D_j = (m_j - m_s) / r_j       for earlier levels j
        x_t = a x_s - b (e^z - 1) m_s - b B(h) sum_j rho_j D_j                          (UniP)
        R rho = b_vec,    R_kj = r_j^(k-1),    b_k = k! z phi_{k+1}(z) / B(h)
        B(h) = z (bh1) or e^z - 1 (bh2)

    and once the model has been called at x_t, its D_t with r_t = 1 joins the sum and x_t is formed
    again from the same x_s (UniC). At order 2 UniP has rho = 1/2, at order 1 UniC has. (Zhao, Bai,
    Rao, Zhou & Lu 2023, section 3, algorithms 1-2 and their data-prediction forms.) Order p with
    the corrector converges at order p + 1. The sample that the model saw is corrected after the
    call, so the result, the last predictor's, is not.

    Args:
        schedule: a NoiseSchedule or a GaussianPath; one that begins at alpha = 0 needs predict_x0
            and a prediction_type other than "epsilon".
        steps: model calls, with `levels`: spacing, timesteps, sigmas, final and so on, as in
            grid() of fastdiff/solvers/grid.py.
        order: p, from 1 to 4.
        solver_type: "bh1" or "bh2".
        predict_x0: integrate x_0, else epsilon.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow" (epsilon - x_0).
        clip: (lo, hi) bounds of x_0, or None.
        thresholding: (ratio, largest) of dynamic thresholding of x_0, or None.
        lower_order_final: no higher order than there are steps left. (A step that ends at
            sigma = 0 has order 1.)
        disable_corrector: steps whose result is not corrected.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    order = as_int("order", order, 1, 4)
    data, lower = as_flag("predict_x0", predict_x0), as_flag("lower_order_final", lower_order_final)
    visited = grid(schedule, steps, **levels)
    rows, start = len(visited), int(visited.alpha[0] == 0)
    disabled = {as_int("disable_corrector", i, 0) for i in disable_corrector}
    if not data:
        refuse_zero_alpha(visited, NOISE_PREDICTION)
    alpha, sigma = visited.alpha[:-1], visited.sigma[:-1]
    estimates = Estimates(prediction_type, alpha, sigma, clip, thresholding)
    step = _Step(visited, data, solver_type)

    rec = Recorder(
        f"UniPC-{order}, {rows} steps",
        about={
            "schedule": schedule.name, "order": str(order), "solver_type": solver_type,
            "predict_x0": str(data), "prediction_type": prediction_type,
            "clip": str(estimates.clip), "thresholding": str(estimates.thresholding),
        },
    )  # fmt: skip
    x = rec.begin(scale=visited.initial_scale)
    m: list[LinearForm] = []  # outputs, newest first
    x_s, p = x, 1  # the sample and the order of the last step
    for i in range(rows):
        x, o = rec.call(x, t=visited.t[i])
        x_0, epsilon = estimates(rec, x, o, i)
        m_t = x_0 if data else epsilon
        if i > start and i - 1 not in disabled:
            x = step.to(i, x_s, m[:p], m_t)
        m.insert(0, m_t)
        # Outputs at alpha = 0, where lambda is -inf, are no base for differences.
        p = max(1, min(order, rows - i if lower else order, i + 1 - start))
        if visited.sigma[i + 1] == 0:
            p = 1
        x_s, x = x, step.to(i + 1, x, m[:p])
    return rec.finish(x)


class _Step:
    def __init__(self, levels: Grid, data: bool, solver_type: str) -> None:
        self.alpha, self.sigma = levels.alpha.tolist(), levels.sigma.tolist()
        self.lambda_ = levels.lambda_.tolist()
        self.data, self.solver_type = data, solver_type

    def to(
        self, t: int, x: LinearForm, m: list[LinearForm], m_t: LinearForm | None = None
    ) -> LinearForm:
        """From level s = t - 1 to t: UniP with the outputs m at s, s - 1, ..; with m_t UniC."""
        s, lam = t - 1, self.lambda_
        h = lam[t] - lam[s]
        if h == 0:
            return x
        if self.data:
            z, scale, decay = -h, self.alpha[t], self.sigma[t] / self.sigma[s]
        else:
            z, scale, decay = h, self.sigma[t], self.alpha[t] / self.alpha[s]
        if z == math.inf:  # sigma_t = 0: sigma_t (e^h - 1) = alpha_t sigma_s / alpha_s
            return decay * x - decay * self.sigma[s] * m[0]
        x_t = decay * x - scale * math.expm1(z) * m[0]
        r = [(lam[s - j] - lam[s]) / h for j in range(1, len(m))]
        D = [(m_j - m[0]) / r_j for m_j, r_j in zip(m[1:], r, strict=True)]
        if m_t is not None:
            r, D = [*r, 1.0], [*D, m_t - m[0]]
        if not D:
            return x_t
        B = z if self.solver_type == "bh1" else math.expm1(z)
        halved = len(D) == 1  # UniP-2 and UniC-1
        for rho, d in zip([0.5] if halved else self._rho(r, z, B), D, strict=True):
            x_t = x_t - scale * B * rho * d
        return x_t

    @staticmethod
    def _rho(r: list[float], z: float, B: float) -> list[float]:
        k = np.arange(1, len(r) + 1)
        b = [math.factorial(n) * z * phi(n + 1, z) / B for n in k.tolist()]
        rho: list[float] = np.linalg.solve(np.asarray(r) ** (k - 1)[:, None], b).tolist()
        return rho
