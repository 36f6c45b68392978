"""DPM-Solver++ and DPM-Solver-fast in sigma space, as k-diffusion has them.

With alpha = 1 the solvers' lambda is t = -log sigma, and with q = sigma_next / sigma = exp(-h)
their first-order step in x_0 is x_next = q x + (1 - q) D(x; sigma). Sources, cited by these names:

    Lu22    Lu et al. 2022, "DPM-Solver: a fast ODE solver for diffusion probabilistic model
            sampling in around 10 steps"
    Lu22+   Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion
            probabilistic models"

Arguments in common: see fastdiff/solvers/edm.py. eta >= 0 scales the noise of the stochastic ones,
s_noise multiplies it. A level that stands twice is a step of no length: its model call is made, and
no history comes of it. Noise of the SDE solvers is that of one Brownian path over sigma: a seeded
plan makes it of independent increments between the levels that are asked for.
"""

from __future__ import annotations

import math
from typing import Any

from fastdiff.plan import SolverPlan
from fastdiff.schedules._values import as_float, as_int
from fastdiff.solvers.checks import check_choice, check_positive
from fastdiff.solvers.edm import Formula, ancestral_options, build
from fastdiff.solvers.sigma_space import Tape, ancestral, toward
from fastdiff.solvers.weights import phi
from fastdiff.tracing import LinearForm

__all__ = [
    "FORMULAS", "dpm_fast", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_3m_sde",
    "dpmpp_sde",
]  # fmt: skip


def dpmpp_2s_ancestral(
    sigmas: Any,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """DPM-Solver++(2S) (Lu22+ algorithm 1, r = 1/2) to sigma_down, then noise of sigma_up.

        sigma_mid = sqrt(sigma sigma_down)
        x_2    = sigma_mid / sigma x + (1 - sigma_mid / sigma) D(x; sigma)
        x_next = sigma_down / sigma x + (1 - sigma_down / sigma) D(x_2; sigma_mid) + sigma_up z

    An Euler step where sigma_down = 0.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "DPM-Solver++(2S) ancestral", _dpmpp_2s_ancestral, sigmas, steps, options,
        **ancestral_options(eta, s_noise),
    )  # fmt: skip


def _dpmpp_2s_ancestral(tape: Tape, *, eta: float, s_noise: float) -> LinearForm:
    x = tape.begin()
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        if sigma_down > 0:
            sigma_mid = math.sqrt(sigma * sigma_down)
            _, x_0 = tape.denoise(toward(x, x_0, sigma, sigma_mid), sigma_mid, i)
        x = toward(x, x_0, sigma, sigma_down)
        if sigma_next > 0:
            x = tape.noised(x, s_noise * sigma_up, i)
    return x


def dpmpp_sde(
    sigmas: Any,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    **options: Any,
) -> SolverPlan:
    """DPM-Solver++ (stochastic), two model calls a step; k-diffusion's sample_dpmpp_sde.

        sigma_s = sigma^(1-r) sigma_next^r;  (down, up) = ancestral steps to sigma_s, sigma_next
        x_2    = down_s / sigma x + (1 - down_s / sigma) D(x; sigma) + up_s z_s
        D'     = (1 - 1/(2 r)) D(x; sigma) + 1/(2 r) D(x_2; sigma_s)
        x_next = down / sigma x + (1 - down / sigma) D' + up z

    z_s and z are of one Brownian path, over [sigma_s, sigma] and [sigma_next, sigma], hence
    correlated: z = (sqrt(sigma - sigma_s) z_s + sqrt(sigma_s - sigma_next) z') /
    sqrt(sigma - sigma_next) with z' independent. 0 < r <= 1.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    r = as_float("r", r)
    if not 0 < r <= 1:
        raise ValueError(f"r must be in (0, 1], not {r}")
    return build(
        "DPM-Solver++ SDE", _dpmpp_sde, sigmas, steps, options,
        **ancestral_options(eta, s_noise), r=r,
    )  # fmt: skip


def _dpmpp_sde(tape: Tape, *, eta: float, s_noise: float, r: float) -> LinearForm:
    x = tape.begin()
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        if sigma_next in (0, sigma):
            x = toward(x, x_0, sigma, sigma_next)
            continue
        sigma_s = sigma * (sigma_next / sigma) ** r
        down, up = ancestral(sigma, sigma_s, eta)
        z_s = tape.noise(i, "first")
        x_2 = toward(x, x_0, sigma, down) + (s_noise * up) * z_s
        _, x_0_s = tape.denoise(x_2, sigma_s, i)
        down, up = ancestral(sigma, sigma_next, eta)
        z = tape.noise(i, "whole")
        if tape.split:
            # The Brownian path from sigma to sigma_next, its first part known from z_s.
            known = (sigma - sigma_s) / (sigma - sigma_next)
            rest = (sigma_s - sigma_next) / (sigma - sigma_next)
            z = math.sqrt(known) * z_s + math.sqrt(rest) * z
        weight = 1 / (2 * r)
        x = toward(x, (1 - weight) * x_0 + weight * x_0_s, sigma, down) + (s_noise * up) * z
    return x


def dpmpp_2m(sigmas: Any, steps: int | None = None, **options: Any) -> SolverPlan:
    """DPM-Solver++(2M): Lu22+ algorithm 2. One history tensor.

        D'     = D_i + h_i / (2 h_{i-1}) (D_i - D_{i-1}),        h_i = log(sigma_i / sigma_{i+1})
        x_next = sigma_next / sigma x + (1 - sigma_next / sigma) D'

    First order at the first step and at sigma_next = 0.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build("DPM-Solver++(2M)", _dpmpp_2m, sigmas, steps, options)


def _dpmpp_2m(tape: Tape) -> LinearForm:
    x, before, h_before = tape.begin(), None, 0.0
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        if sigma_next == sigma:
            continue
        x_0_ahead, h = x_0, 0.0
        if sigma_next > 0:
            h = log_ratio(sigma, sigma_next)
            if before is not None:
                x_0_ahead = x_0 + (h / (2 * h_before)) * (x_0 - before)
        x = toward(x, x_0_ahead, sigma, sigma_next)
        before, h_before = x_0, h
    return x


def dpmpp_2m_sde(
    sigmas: Any,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    **options: Any,
) -> SolverPlan:
    """DPM-Solver++(2M) SDE: Lu22+ eq. 19 in sigma space, as k-diffusion has it. One history tensor.

        H      = (1 + eta) h
        x_next = exp(-H) x + (1 - exp(-H)) D_i + w h / h_before (D_i - D_{i-1})
                 + sigma_next sqrt(1 - exp(-2 eta h)) s_noise z

    w = (1 - exp(-H)) / 2 for solver_type "midpoint", 1 - (1 - exp(-H)) / H for "heun". First order
    at the first step; x_next = D_i where sigma_next = 0.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    check_solver_type(solver_type)
    return build(
        "DPM-Solver++(2M) SDE", _dpmpp_2m_sde, sigmas, steps, options,
        **ancestral_options(eta, s_noise), solver_type=solver_type,
    )  # fmt: skip


def check_solver_type(solver_type: str) -> None:
    check_choice("solver_type", solver_type, ("midpoint", "heun"))


def _dpmpp_2m_sde(tape: Tape, *, eta: float, s_noise: float, solver_type: str) -> LinearForm:
    x, before, h_before = tape.begin(), None, 0.0
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        if sigma_next == 0:
            x = x_0
        if sigma_next in (0, sigma):
            continue
        h = _descent(sigma, sigma_next, eta)
        H = (1 + eta) * h
        x = math.exp(-H) * x - math.expm1(-H) * x_0
        if before is not None:
            w = -0.5 * math.expm1(-H) if solver_type == "midpoint" else H * phi(2, -H)
            x = x + (w * h / h_before) * (x_0 - before)
        if eta:
            scale = sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
            x = tape.noised(x, scale, i)
        before, h_before = x_0, h
    return x


def dpmpp_3m_sde(
    sigmas: Any,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """DPM-Solver++(3M) SDE, as k-diffusion has it. Two history tensors.

        H      = (1 + eta) h,  phi_k = phi_k(-H) of weights.py
        a      = h / h_1 (D_i - D_{i-1}),  b = h / h_2 (D_{i-1} - D_{i-2})
        d_1    = a + (a - b) h_1 / (h_1 + h_2),  d_2 = (a - b) h / (h_1 + h_2)
        x_next = exp(-H) x + (1 - exp(-H)) D_i + H phi_2 d_1 + H phi_3 d_2
                 + sigma_next sqrt(1 - exp(-2 eta h)) s_noise z

    with h_1, h_2 the steps before. First and second order (d_1 = a, d_2 = 0) at the
    beginning; x_next = D_i where sigma_next = 0.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "DPM-Solver++(3M) SDE", _dpmpp_3m_sde, sigmas, steps, options,
        **ancestral_options(eta, s_noise),
    )  # fmt: skip


def _dpmpp_3m_sde(tape: Tape, *, eta: float, s_noise: float) -> LinearForm:
    x = tape.begin()
    past: list[tuple[float, LinearForm]] = []  # (step after it, D), latest first
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        if sigma_next == 0:
            x = x_0
        if sigma_next in (0, sigma):
            continue
        h = _descent(sigma, sigma_next, eta)
        H = (1 + eta) * h
        x = math.exp(-H) * x - math.expm1(-H) * x_0
        if len(past) == 2:
            (h_1, x_0_1), (h_2, x_0_2) = past
            a, b = (h / h_1) * (x_0 - x_0_1), (h / h_2) * (x_0_1 - x_0_2)
            d_1 = a + (h_1 / (h_1 + h_2)) * (a - b)
            d_2 = (h / (h_1 + h_2)) * (a - b)
            x = x + H * phi(2, -H) * d_1 + H * phi(3, -H) * d_2
        elif past:
            h_1, x_0_1 = past[0]
            x = x + (H * phi(2, -H) * h / h_1) * (x_0 - x_0_1)
        if eta:
            scale = sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
            x = tape.noised(x, scale, i)
        past = [(h, x_0), *past[:1]]
    return x


def dpm_fast(
    sigma_min: float,
    sigma_max: float,
    n: int,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """DPM-Solver-fast: n model calls in steps of order 3 and one or two of lower order.

    Steps even in t = -log sigma; orders 3 .. 3, 2, 1 when n is a multiple of 3, else 3 .. 3 and the
    rest (Lu22 section 3.4 and appendix D.3, algorithms 1 and 2). With eta > 0 each step goes to
    sigma_down, not below sigma_min, and noise is added.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    levels, orders = fast_steps(sigma_min, sigma_max, n)
    return build(
        "DPM-Solver-fast", _dpm_fast, levels, None, options,
        **ancestral_options(eta, s_noise), orders=orders,
    )  # fmt: skip


def fast_steps(sigma_min: float, sigma_max: float, n: int) -> tuple[list[float], tuple[int, ...]]:
    """(noise levels, order of every step) of DPM-Solver-fast."""
    low, high = check_positive("sigma_min", sigma_min), check_positive("sigma_max", sigma_max)
    n = as_int("n", n, 1)
    m = n // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
    levels = [high * (low / high) ** (k / m) for k in range(m)]
    return [*levels, low], tuple(orders)


def _dpm_fast(tape: Tape, *, eta: float, s_noise: float, orders: tuple[int, ...]) -> LinearForm:
    x = tape.begin()
    last = float(tape.levels.sigmas[-1])
    for i, sigma, sigma_next in tape.levels.steps():
        sigma_down, sigma_up = sigma_next, 0.0
        if eta:
            sigma_down = max(last, ancestral(sigma, sigma_next, eta)[0])
            sigma_up = math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
        x, x_0 = tape.denoise(x, sigma, i)
        x = _singlestep(tape, orders[i], x, (x - x_0) / sigma, sigma, sigma_down, i)
        x = tape.noised(x, s_noise * sigma_up, i)
    return x


def _singlestep(
    tape: Tape, order: int, x: LinearForm, eps: LinearForm, sigma: float, end: float, i: int
) -> LinearForm:
    """DPM-Solver-1, 2, 3 from sigma to `end` (Lu22 eq. 3.7, algorithms 1 and 2), eps given.

    expm1(h) end is sigma - end.
    """

    def eps_at(u: LinearForm, level: float) -> LinearForm:
        u, x_0 = tape.denoise(u, level, i)
        return (u - x_0) / level

    h = log_ratio(sigma, end)
    first = x - (sigma - end) * eps
    if order == 1:
        return first
    r_1 = 1 / 2 if order == 2 else 1 / 3
    s_1 = sigma * math.exp(-r_1 * h)
    eps_1 = eps_at(x - (sigma - s_1) * eps, s_1)
    if order == 2:
        return first - ((sigma - end) / (2 * r_1)) * (eps_1 - eps)
    r_2 = 2 / 3
    s_2 = sigma * math.exp(-r_2 * h)
    u_2 = x - (sigma - s_2) * eps - (s_2 * (r_2 / r_1) * r_2 * h * phi(2, r_2 * h)) * (eps_1 - eps)
    eps_2 = eps_at(u_2, s_2)
    return first - (end / r_2 * h * phi(2, h)) * (eps_2 - eps)


def log_ratio(sigma: float, sigma_next: float) -> float:
    """h = log(sigma / sigma_next), to full precision also where they are close."""
    return math.log1p((sigma - sigma_next) / sigma_next)


def _descent(sigma: float, sigma_next: float, eta: float) -> float:
    if eta and sigma_next > sigma:
        raise ValueError(
            f"sigmas must descend when eta is not 0: a step from {sigma} to {sigma_next} has no "
            "noise to add"
        )
    return log_ratio(sigma, sigma_next)


FORMULAS: dict[str, Formula] = {
    "dpmpp_2s_ancestral": _dpmpp_2s_ancestral, "dpmpp_sde": _dpmpp_sde, "dpmpp_2m": _dpmpp_2m,
    "dpmpp_2m_sde": _dpmpp_2m_sde, "dpmpp_3m_sde": _dpmpp_3m_sde, "dpm_fast": _dpm_fast,
}  # fmt: skip
