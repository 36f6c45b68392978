"""SA-Solver (Xue et al. 2023): stochastic Adams predictor and corrector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastdiff.plan import SolverPlan
from fastdiff.schedules import Schedule
from fastdiff.schedules._values import as_flag, as_float, as_int
from fastdiff.solvers.checks import check_choice
from fastdiff.solvers.grid import NOISE_PREDICTION, Grid, grid, refuse_zero_alpha
from fastdiff.solvers.prediction import Estimates
from fastdiff.solvers.weights import lagrange_polynomials, phi
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["sa_solver"]

ALGORITHMS = ("data_prediction", "noise_prediction")


def sa_solver(
    schedule: Schedule,
    steps: int | None = None,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[float], float] | None = None,
    algorithm_type: str = "data_prediction",
    prediction_type: str = "epsilon",
    clip: tuple[float, float] | None = None,
    thresholding: tuple[float, float] | None = None,
    lower_order_final: bool = True,
    final: str = "sigma_min",
    **levels: Any,
) -> SolverPlan:
    """SA-Solver with tau of its own at every step.

    From level s to t, h = lambda_t - lambda_s, l_j the Lagrange polynomials over the levels whose
    outputs m_j are used (s and earlier for the predictor, t as well for the corrector):

        data    x_t = sigma_t/sigma_s e^(-tau^2 h) x_s + sum_j b_j x_0,j
                      + sigma_t sqrt(1 - e^(-2 tau^2 h)) z
                b_j = (1 + tau^2) alpha_t int_s^t e^(-(1 + tau^2)(lambda_t - lambda)) l_j dlambda
        noise   x_t = alpha_t/alpha_s x_s + sum_j b_j eps_j + tau sigma_t sqrt(e^2h - 1) z
                b_j = -(1 + tau^2) sigma_t int_s^t e^(lambda_t - lambda) l_j dlambda

    The corrector forms x_t again, from the same x_s and z, once the model has been called at the
    predictor's x_t. With two levels and data prediction (1 + tau^2) alpha_t h^2/h_j (1/2 -
    phi_2(-(1 + tau^2) h)) moves from the older b_j to the newer one, h_j the distance of the two:
    a term of order h^3, as in the authors' and diffusers' code. (Xue, Yi, Luo, Zhang, Sun, Li & Ma
    2023, section 5 and algorithm 1.) tau = 0 is an ODE solver, tau = 1 the reverse SDE.

    Args:
        schedule: a NoiseSchedule or a GaussianPath; one that begins at alpha = 0 needs data
            prediction and a prediction_type other than "epsilon".
        steps: model calls, with `levels`: spacing, timesteps, sigmas and so on, as in grid() of
            fastdiff/solvers/grid.py.
        predictor_order: 1 to 4. corrector_order: 1 to 4, the number of levels with t; 0 for none.
        tau: >= 0; a number, or a function of the model's t. Default: 1 for 200 <= t <= 800, else 0.
        algorithm_type: "data_prediction" or "noise_prediction".
        prediction_type: "epsilon", "sample", "v_prediction" or "flow" (epsilon - x_0).
        clip: (lo, hi) bounds of x_0, or None.
        thresholding: (ratio, largest) of dynamic thresholding of x_0, or None.
        lower_order_final: no higher predictor order than there are steps left. (A step that ends at
            sigma = 0 has order 1.)
        final: "sigma_min" (as upstream) or "zero"; noise_prediction needs tau = 0 at the last step
            for "zero".

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_choice("algorithm_type", algorithm_type, ALGORITHMS)
    data = algorithm_type == "data_prediction"
    predictor = as_int("predictor_order", predictor_order, 1, 4)
    corrector = as_int("corrector_order", corrector_order, 0, 4)
    lower = as_flag("lower_order_final", lower_order_final)
    visited = grid(schedule, steps, final=final, **levels)
    rows, start = len(visited), int(visited.alpha[0] == 0)
    taus = _taus(tau, visited.t.tolist())
    if not data and visited.sigma[-1] == 0 and taus[-1] != 0:
        raise ValueError("final must be 'sigma_min' for noise_prediction with tau > 0 at the end")
    if not data:
        refuse_zero_alpha(visited, NOISE_PREDICTION)
    alpha, sigma = visited.alpha[:-1], visited.sigma[:-1]
    estimates = Estimates(prediction_type, alpha, sigma, clip, thresholding)
    step = _Step(visited, data)

    rec = Recorder(
        f"SA-Solver({predictor}, {corrector}), {rows} steps",
        about={
            "schedule": schedule.name, "algorithm_type": algorithm_type,
            "tau": " ".join(f"{value:g}" for value in taus), "prediction_type": prediction_type,
            "clip": str(estimates.clip), "thresholding": str(estimates.thresholding),
        },
        draw_dtype="model_output",
    )  # fmt: skip
    x = rec.begin(scale=visited.initial_scale)
    m: list[LinearForm] = []  # outputs, newest first
    x_s, z = x, x  # the sample and the draw of the last step
    for i in range(rows):
        x, o = rec.call(x, t=visited.t[i])
        x_0, epsilon = estimates(rec, x, o, i)
        m.insert(0, x_0 if data else epsilon)
        left = rows - i if lower else 4
        # Outputs at alpha = 0, where lambda is -inf, are no nodes of a polynomial.
        known = max(1, i + 1 - start)
        if corrector and i > start:
            k = min(corrector, left + 2, known)
            x = step.to(i, i, x_s, m[:k], z, taus[i - 1])
        x_s, z = x, rec.noise()
        k = 1 if visited.sigma[i + 1] == 0 else min(predictor, left, known)
        x = step.to(i + 1, i, x, m[:k], z, taus[i])
    return rec.finish(x)


class _Step:
    def __init__(self, levels: Grid, data: bool) -> None:
        self.alpha, self.sigma = levels.alpha.tolist(), levels.sigma.tolist()
        self.lambda_ = levels.lambda_.tolist()
        self.data = data

    def to(
        self, t: int, newest: int, x: LinearForm, m: list[LinearForm], z: LinearForm, tau: float
    ) -> LinearForm:
        """From level t - 1 to t with the outputs m at levels newest, newest - 1, .."""
        s, lam = t - 1, self.lambda_
        h = lam[t] - lam[s]
        if h == 0:
            return x
        alpha_s, sigma_s, alpha_t, sigma_t = (
            self.alpha[s], self.sigma[s], self.alpha[t], self.sigma[t],
        )  # fmt: skip
        drift = 1 + tau**2
        if self.data:
            y = drift * h
            forget = tau**2 * h if tau else 0.0  # h may be inf
            x = sigma_t / sigma_s * math.exp(-forget) * x
            noise = sigma_t * math.sqrt(-math.expm1(-2 * forget))
            # y k! phi_{k+1}(-y) = y int_0^1 e^(-y (1 - u)) u^k du
            moments = [-math.expm1(-y)]
            moments += [y * math.factorial(k) * phi(k + 1, -y) for k in range(1, len(m))]
            scale = alpha_t
        elif h == math.inf:  # sigma_t = 0: sigma_t (e^h - 1) = alpha_t sigma_s / alpha_s
            return alpha_t / alpha_s * (x - sigma_s * m[0])
        else:
            x = alpha_t / alpha_s * x
            noise = tau * sigma_t * math.sqrt(math.expm1(2 * h))
            moments = [h * math.factorial(k) * phi(k + 1, h) for k in range(len(m))]
            scale = -drift * sigma_t
        nodes = [(lam[newest - j] - lam[s]) / h for j in range(len(m))] if len(m) > 1 else [0.0]
        weights = (scale * (lagrange_polynomials(nodes) @ moments)).tolist()
        if self.data and len(m) == 2:
            moved = drift * alpha_t * h * (0.5 - phi(2, -y)) / (nodes[0] - nodes[1])
            weights = [weights[0] + moved, weights[1] - moved]
        for weight, m_j in zip(weights, m, strict=True):
            x = x + weight * m_j
        return x + noise * z


def _taus(tau: float | Callable[[float], float] | None, t: list[float]) -> list[float]:
    if tau is None:
        return [1.0 if 200 <= value <= 800 else 0.0 for value in t]
    values = [as_float("tau", tau(value) if callable(tau) else tau) for value in t]
    if min(values) < 0:
        raise ValueError(f"tau must be >= 0, got {min(values)}")
    return values
