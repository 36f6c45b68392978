"""DPM-Solver and DPM-Solver++ (Lu et al. 2022), single- and multistep, and their SDE forms."""

from __future__ import annotations

import math
from typing import Any

from fastdiff.plan import SolverPlan
from fastdiff.schedules import Schedule
from fastdiff.schedules._values import as_flag, as_int
from fastdiff.solvers.checks import check_choice
from fastdiff.solvers.grid import NOISE_PREDICTION, Grid, grid, refuse_zero_alpha
from fastdiff.solvers.prediction import Estimates
from fastdiff.solvers.weights import phi
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["dpm_solver"]

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")
METHODS = ("multistep", "singlestep")
FEW_STEPS = 15  # below which lower_order_final lowers the order of multistep solvers


def dpm_solver(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    method: str = "multistep",
    prediction_type: str = "epsilon",
    clip: tuple[float, float] | None = None,
    thresholding: tuple[float, float] | None = None,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **levels: Any,
) -> SolverPlan:
    """DPM-Solver of order 1, 2 or 3.

    With lambda = log(alpha/sigma), h = lambda_t - lambda_s, phi_k of weights.py and D_k the
    estimate of h^k d^k m/dlambda^k at s from the model's outputs m (D_0 = m_s):

        dpmsolver++      x_t = sigma_t/sigma_s x_s + alpha_t h sum_k phi_{k+1}(-h) D_k,     m = x_0
        dpmsolver        x_t = alpha_t/alpha_s x_s - sigma_t h sum_k phi_{k+1}(h) D_k,      m = eps
        sde-dpmsolver++  x_t = sigma_t/sigma_s e^-h x_s + alpha_t 2h sum_k phi_{k+1}(-2h) D_k
                               + sigma_t sqrt(1 - e^-2h) z                                  m = x_0
        sde-dpmsolver    x_t = alpha_t/alpha_s x_s - 2 sigma_t h sum_k phi_{k+1}(h) D_k
                               + sigma_t sqrt(e^2h - 1) z                                   m = eps

    "heun" are these weights; "midpoint" replaces phi_2 by phi_1 / 2 at order 2 and, singlestep,
    leaves out D_2 at order 3. (Lu et al. 2022, "DPM-Solver", eq. 3.7 and algorithms 1-2;
    "DPM-Solver++", algorithms 1-2 and the SDE section; names are diffusers'.) Of order 3 multistep,
    D_2 is half the second derivative, as in the authors' code: its order of convergence is 2.
    Its SDE weight of D_2 is alpha_t 2h phi_3(-2h), as in k-diffusion's dpmpp_3m_sde; diffusers
    0.42 has -alpha_t (phi_2(-2h) + 1/2), which does not vanish with h.

    multistep keeps the outputs of earlier calls; singlestep goes back to the sample of one or two
    calls before, in the pattern 1, 2 (, 3), so one call moves one level either way. (It draws anew
    for each of them, so that with sde-dpmsolver++ the distribution converges at order 1 only.)

    Args:
        schedule: a NoiseSchedule or a GaussianPath; one that begins at alpha = 0 needs data
            prediction ("++") and a prediction_type other than "epsilon".
        steps: model calls, with `levels`: spacing, timesteps, sigmas, final, steps_offset,
            lambda_min and so on, as in grid() of fastdiff/solvers/grid.py.
        order: 1, 2 or 3 (sde-dpmsolver: 1 or 2).
        algorithm_type, solver_type, method: see above; singlestep has no sde-dpmsolver.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow" (epsilon - x_0).
        clip: (lo, hi) bounds of x_0, or None.
        thresholding: (ratio, largest) of dynamic thresholding of x_0, or None.
        lower_order_final: multistep with fewer than 15 steps ends with orders 2, 1; singlestep ends
            with order 1 (2, 1 of 3; always, where the pattern does not fill the steps).
        euler_at_final: the last step has order 1. (It has where it ends at sigma = 0.)

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_choice("algorithm_type", algorithm_type, ALGORITHMS)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_choice("method", method, METHODS)
    data, sde = algorithm_type.endswith("++"), algorithm_type.startswith("sde")
    largest = 2 if algorithm_type == "sde-dpmsolver" else 3
    order = as_int("order", order, 1, largest)
    lower = as_flag("lower_order_final", lower_order_final)
    euler = as_flag("euler_at_final", euler_at_final)
    if method == "singlestep" and algorithm_type == "sde-dpmsolver":
        raise ValueError("algorithm_type sde-dpmsolver is multistep only")
    visited = grid(schedule, steps, **levels)
    if algorithm_type == "sde-dpmsolver" and visited.sigma[-1] == 0:
        raise ValueError("final must be 'sigma_min' for sde-dpmsolver, which diverges at sigma = 0")
    if not data:
        refuse_zero_alpha(visited, NOISE_PREDICTION)
    alpha, sigma = visited.alpha[:-1], visited.sigma[:-1]
    estimates = Estimates(prediction_type, alpha, sigma, clip, thresholding)
    rows, start = len(visited), int(visited.alpha[0] == 0)
    if method == "multistep":
        orders = _multistep_orders(rows, order, lower, euler)
    else:
        orders = _singlestep_orders(rows - start, order, lower)
    if visited.sigma[-1] == 0 or euler:
        orders[-1] = 1
    orders = [1] * (rows - len(orders)) + orders

    rec = Recorder(
        f"{_name(algorithm_type)}({order}{method[0].upper()}), {rows} steps",
        about={
            "schedule": schedule.name, "algorithm_type": algorithm_type, "order": str(order),
            "solver_type": solver_type, "prediction_type": prediction_type,
            "clip": str(estimates.clip), "thresholding": str(estimates.thresholding),
        },
        draw_dtype="float32" if method == "multistep" else "model_output",
    )  # fmt: skip
    step = _Step(visited, data, sde, solver_type == "heun")
    x = rec.begin(scale=visited.initial_scale)
    base = x
    m: list[LinearForm] = []  # newest first
    for i in range(rows):
        x, o = rec.call(x, t=visited.t[i])
        x_0, epsilon = estimates(rec, x, o, i)
        m.insert(0, x_0 if data else epsilon)
        z = rec.noise() if sde else None
        if method == "multistep":
            k = min(orders[i], i + 1 - start)  # outputs at alpha = 0 are no base for differences
            x = step.multistep(x, i, m[: max(k, 1)], z)
        else:
            base = x if orders[i] == 1 else base
            x = step.singlestep(base, i, m[: orders[i]], z)
    return rec.finish(x)


class _Step:
    """The updates between two levels."""

    def __init__(self, levels: Grid, data: bool, sde: bool, heun: bool) -> None:
        self.alpha, self.sigma = levels.alpha.tolist(), levels.sigma.tolist()
        self.lambda_ = levels.lambda_.tolist()
        self.data, self.sde, self.heun = data, sde, heun

    def multistep(
        self, x: LinearForm, i: int, m: list[LinearForm], z: LinearForm | None
    ) -> LinearForm:
        """From level i to i + 1 with the outputs m at levels i, i - 1, ..."""
        lam = self.lambda_
        h = lam[i + 1] - lam[i]
        if h == 0:
            return x
        if len(m) == 1:
            return self._advance(x, i, i + 1, m, z, self.heun)
        r0 = (lam[i] - lam[i - 1]) / h
        D1_0 = (m[0] - m[1]) / r0
        if len(m) == 2:
            return self._advance(x, i, i + 1, [m[0], D1_0], z, self.heun)
        r1 = (lam[i - 1] - lam[i - 2]) / h
        D1_1 = (m[1] - m[2]) / r1
        D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
        D2 = (D1_0 - D1_1) / (r0 + r1)
        return self._advance(x, i, i + 1, [m[0], D1, D2], z, True)

    def singlestep(
        self, base: LinearForm, i: int, m: list[LinearForm], z: LinearForm | None
    ) -> LinearForm:
        """From the sample `base` of level s = i + 1 - len(m) to level i + 1."""
        lam, s = self.lambda_, i + 1 - len(m)
        h = lam[i + 1] - lam[s]
        if h == 0:
            return base
        if len(m) == 1:
            return self._advance(base, s, i + 1, m, z, self.heun)
        r0 = (lam[i] - lam[s]) / h
        D1_1 = (m[0] - m[-1]) / r0
        if len(m) == 2:
            return self._advance(base, s, i + 1, [m[1], D1_1], z, self.heun)
        if not self.heun:
            return self._advance(base, s, i + 1, [m[2], D1_1], z, True)
        r1 = (lam[i - 1] - lam[s]) / h
        D1_0 = (m[1] - m[2]) / r1
        D1 = (r0 * D1_0 - r1 * D1_1) / (r0 - r1)
        D2 = 2.0 * (D1_1 - D1_0) / (r0 - r1)
        return self._advance(base, s, i + 1, [m[2], D1, D2], z, True)

    def _advance(
        self, x: LinearForm, s: int, t: int, D: list[LinearForm], z: LinearForm | None, heun: bool
    ) -> LinearForm:
        """x at level t from x at level s: the formulas of dpm_solver()."""
        h = self.lambda_[t] - self.lambda_[s]
        alpha_s, sigma_s, alpha_t, sigma_t = (
            self.alpha[s], self.sigma[s], self.alpha[t], self.sigma[t],
        )  # fmt: skip
        if self.data:
            y = 2 * h if self.sde else h
            x = sigma_t / sigma_s * (math.exp(-h) if self.sde else 1.0) * x
            scale, weights = alpha_t, [-math.expm1(-y)]  # y phi_1(-y)
            noise = sigma_t * math.sqrt(-math.expm1(-2 * h))
        else:
            y = -h
            x = alpha_t / alpha_s * x
            scale = -2.0 if self.sde else -1.0
            if math.isinf(h):  # sigma_t = 0: sigma_t (e^h - 1) = alpha_t sigma_s / alpha_s
                weights = [alpha_t * sigma_s / alpha_s]
            else:
                scale, weights = scale * sigma_t, [math.expm1(h)]
            noise = sigma_t * math.sqrt(math.expm1(2 * h)) if self.sde else 0.0
        if len(D) > 1:
            weights.append(abs(y) * phi(2, -y) if heun else 0.5 * weights[0])
        if len(D) > 2:
            weights.append(abs(y) * phi(3, -y))
        for weight, d in zip(weights, D, strict=True):
            x = x + scale * weight * d
        return x if z is None else x + noise * z


def _multistep_orders(rows: int, order: int, lower_order_final: bool, euler: bool) -> list[int]:
    orders = [order] * rows
    if lower_order_final and rows < FEW_STEPS:
        orders[-2:] = [min(order, 2), 1][-rows:]
    return orders


def _singlestep_orders(rows: int, order: int, lower_order_final: bool) -> list[int]:
    """The pattern 1, 2 (, 3) with a lower order at the end, as the authors' code has it."""
    pattern = list(range(1, order + 1))
    whole, rest = divmod(rows, order)
    if rest == 0 and lower_order_final and order > 1:
        last = {2: [1, 1], 3: [1, 2, 1]}[order]
        return pattern * (whole - 1) + last if rows else []
    return pattern * whole + pattern[:rest]


def _name(algorithm_type: str) -> str:
    name = "DPM-Solver++" if algorithm_type.endswith("++") else "DPM-Solver"
    return f"SDE-{name}" if algorithm_type.startswith("sde") else name
