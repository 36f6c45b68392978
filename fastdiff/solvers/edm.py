"""Samplers of Karras et al. 2022 (EDM) and their kin in sigma space: Euler, Heun, DPM-2, LMS.

All solve dx/dsigma = (x - D(x; sigma)) / sigma (EDM eq. 3) down a ladder of noise levels. Arguments
of every builder:

    sigmas   (R + 1,) noise levels in data units, > 0 but for the last, which may be 0; or a
             schedule, with `steps`
    options  of the levels of a schedule: ladder, spacing, steps_offset, timesteps, rho, final: see
             scheduled_levels() in fastdiff/solvers/sigma_space.py
             of the network: prediction_type ("sample", "epsilon", "v_prediction", "flow", "edm",
             "edm_v"), scaling, sigma_data, quantize, clip: see Denoiser in the same file; and
             schedule, what it was trained with, when sigmas is an array

x_T has standard deviation sigmas[0]. Every builder raises ValueError or TypeError naming the
argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastdiff.plan import MAX_STATES, SolverPlan
from fastdiff.schedules._values import as_flag, as_float, as_int
from fastdiff.solvers.checks import check_positive
from fastdiff.solvers.sigma_space import Denoiser, Tape, ancestral, churned, levels_of, toward
from fastdiff.solvers.weights import adams_weights
from fastdiff.tracing import LinearForm

__all__ = [
    "FORMULAS", "ancestral_options", "build", "dpm_2", "dpm_2_ancestral", "euler",
    "euler_ancestral", "heun", "lms",
]  # fmt: skip

Formula = Callable[..., LinearForm]
LEVELS = ("ladder", "spacing", "steps_offset", "timesteps", "rho", "final", "schedule")
NETWORK = ("prediction_type", "scaling", "sigma_data", "quantize", "clip")


def build(
    name: str,
    formula: Formula,
    sigmas: Any,
    steps: int | None,
    options: dict[str, Any],
    **own: Any,
) -> SolverPlan:
    """The plan of a formula over tape and levels; `own` are the options of the formula."""
    for option in options:
        if option not in (*LEVELS, *NETWORK):
            raise TypeError(f"{option} is not an option; there are {', '.join(LEVELS + NETWORK)}")
    levels = levels_of(sigmas, steps, **{key: options[key] for key in LEVELS if key in options})
    network = {key: options[key] for key in NETWORK if key in options}
    denoiser = Denoiser(schedule=levels.schedule, **network)
    about = {key: str(value) for key, value in own.items()}
    tape = Tape(f"{name}, {len(levels)} steps", levels, denoiser, about=about)
    return tape.finish(formula(tape, **own))


def euler(
    sigmas: Any,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    churn_after_model: bool = False,
    **options: Any,
) -> SolverPlan:
    """Euler's method, with churn: EDM algorithm 2 without its second-order correction.

        sigma_hat = sigma_i (1 + gamma),  gamma = min(s_churn / R, sqrt(2) - 1) in [s_tmin, s_tmax]
        x_hat  = x + sqrt(sigma_hat^2 - sigma_i^2) s_noise z
        x_next = x_hat + (sigma_next - sigma_hat) (x_hat - D(x_hat; sigma_hat)) / sigma_hat

    churn_after_model: the model sees x at sigma_i and x_hat enters the rest only, as in diffusers'
        EulerDiscrete and EDMEuler schedulers.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "Euler", _euler, sigmas, steps, options, s_churn=s_churn, s_tmin=s_tmin,
        s_tmax=s_tmax, s_noise=s_noise,
        churn_after_model=as_flag("churn_after_model", churn_after_model),
    )  # fmt: skip


def _euler(tape: Tape, *, churn_after_model: bool = False, **churn: float) -> LinearForm:
    x = tape.begin()
    for i, sigma, sigma_next, sigma_hat, scale in churned(tape.levels, **churn):
        if churn_after_model:
            x, output = tape.call(x, sigma, i)
            if scale:
                x = x + scale * tape.noise(i)
            # diffusers takes a VP network's v at sigma_i, everything else at sigma_hat.
            v = tape.denoiser.prediction_type == "v_prediction"
            x_0 = tape.denoised(x, output, sigma if v else sigma_hat)
        else:
            x = tape.churn(x, scale, i)
            x, x_0 = tape.denoise(x, sigma_hat, i)
        x = toward(x, x_0, sigma_hat, sigma_next)
    return x


def euler_ancestral(
    sigmas: Any,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """Euler steps to sigma_down, then noise of sigma_up: see ancestral() in sigma_space.py.

        x_next = x + (sigma_down - sigma_i) (x - D(x; sigma_i)) / sigma_i + sigma_up s_noise z

    eta = 1 is DDPM's ancestral sampling in sigma space, eta = 0 is euler().

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "Euler ancestral", _euler_ancestral, sigmas, steps, options,
        **ancestral_options(eta, s_noise),
    )  # fmt: skip


def ancestral_options(eta: float, s_noise: float) -> dict[str, float]:
    return {"eta": check_positive("eta", eta, zero=True), "s_noise": as_float("s_noise", s_noise)}


def _euler_ancestral(tape: Tape, *, eta: float, s_noise: float) -> LinearForm:
    x = tape.begin()
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        x = toward(x, x_0, sigma, sigma_down)
        if sigma_next > 0:
            x = tape.noised(x, s_noise * sigma_up, i)
        elif tape.split:
            tape.noise(i)  # diffusers draws at the last step too, and does not use it
    return x


def heun(
    sigmas: Any,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """The stochastic sampler of EDM, algorithm 2; with s_churn = 0 the deterministic algorithm 1.

        d      = (x_hat - D(x_hat; sigma_hat)) / sigma_hat         x_hat, sigma_hat as in euler()
        x_2    = x_hat + (sigma_next - sigma_hat) d
        d'     = (x_2 - D(x_2; sigma_next)) / sigma_next
        x_next = x_hat + (sigma_next - sigma_hat) (d + d') / 2     x_2 where sigma_next = 0

    2 R - 1 model calls when the last sigma is 0, else 2 R.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "Heun", _heun, sigmas, steps, options, s_churn=s_churn, s_tmin=s_tmin,
        s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


def _heun(tape: Tape, **churn: float) -> LinearForm:
    x = tape.begin()
    for i, _, sigma_next, sigma_hat, scale in churned(tape.levels, **churn):
        x = tape.churn(x, scale, i)
        x, x_0 = tape.denoise(x, sigma_hat, i)
        x_2 = toward(x, x_0, sigma_hat, sigma_next)
        if sigma_next == 0:
            x = x_2
            continue
        d = (x - x_0) / sigma_hat
        x_2, x_0 = tape.denoise(x_2, sigma_next, i)
        d_prime = (x_2 - x_0) / sigma_next
        x = x + ((sigma_next - sigma_hat) / 2) * (d + d_prime)
    return x


def dpm_2(
    sigmas: Any,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """The midpoint method in log sigma: DPM-Solver-2 (Lu et al. 2022, algorithm 1) with churn.

        sigma_mid = sqrt(sigma_hat sigma_next)
        x_2    = x_hat + (sigma_mid - sigma_hat) (x_hat - D(x_hat; sigma_hat)) / sigma_hat
        x_next = x_hat + (sigma_next - sigma_hat) (x_2 - D(x_2; sigma_mid)) / sigma_mid

    An Euler step where sigma_next = 0. As k-diffusion and diffusers (KDPM2) have it.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "DPM-2", _dpm_2, sigmas, steps, options, s_churn=s_churn, s_tmin=s_tmin,
        s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


def _dpm_2(tape: Tape, **churn: float) -> LinearForm:
    x = tape.begin()
    for i, _, sigma_next, sigma_hat, scale in churned(tape.levels, **churn):
        x = tape.churn(x, scale, i)
        x = _midpoint(tape, x, sigma_hat, sigma_next, i)
    return x


def _midpoint(tape: Tape, x: LinearForm, sigma: float, sigma_next: float, i: int) -> LinearForm:
    x, x_0 = tape.denoise(x, sigma, i)
    if sigma_next == 0:
        return toward(x, x_0, sigma, 0.0)
    sigma_mid = math.sqrt(sigma * sigma_next)
    x_2 = toward(x, x_0, sigma, sigma_mid)
    x_2, x_0 = tape.denoise(x_2, sigma_mid, i)
    return x + ((sigma_next - sigma) / sigma_mid) * (x_2 - x_0)


def dpm_2_ancestral(
    sigmas: Any,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    **options: Any,
) -> SolverPlan:
    """dpm_2() to sigma_down, then noise of sigma_up (diffusers: KDPM2Ancestral).

    Where sigma_down is 0 it is an Euler step to 0 without noise, as upstream.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    return build(
        "DPM-2 ancestral", _dpm_2_ancestral, sigmas, steps, options,
        **ancestral_options(eta, s_noise),
    )  # fmt: skip


def _dpm_2_ancestral(tape: Tape, *, eta: float, s_noise: float) -> LinearForm:
    x = tape.begin()
    for i, sigma, sigma_next in tape.levels.steps():
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        x = _midpoint(tape, x, sigma, sigma_down, i)
        if sigma_down > 0:
            x = tape.noised(x, s_noise * sigma_up, i)
    return x


def lms(
    sigmas: Any,
    steps: int | None = None,
    *,
    order: int = 4,
    **options: Any,
) -> SolverPlan:
    """Linear multistep method (Adams-Bashforth on an uneven ladder) of an order in 1 .. 7.

        x_next = x + sum_j c_j d_{i-j},    d = (x - D(x; sigma)) / sigma
        c_j = integral of the j-th Lagrange polynomial over sigma_{i-j}, from sigma_i to sigma_next

    Lower orders while there is no history. As k-diffusion and diffusers (LMSDiscrete) have it, with
    the integrals exact.

    Arguments and errors in common: help(fastdiff.solvers.edm).
    """
    order = as_int("order", order, 1, MAX_STATES)
    return build("LMS", _lms, sigmas, steps, options, order=order)


def _lms(tape: Tape, *, order: int) -> LinearForm:
    x = tape.begin()
    derivatives: list[LinearForm] = []
    nodes: list[float] = []
    for i, sigma, sigma_next in tape.levels.steps():
        x, x_0 = tape.denoise(x, sigma, i)
        if nodes and nodes[-1] == sigma:  # a repeated level: the later call counts
            del derivatives[-1], nodes[-1]
        derivatives = [*derivatives, (x - x_0) / sigma][-order:]
        nodes = [*nodes, sigma][-order:]
        if len(nodes) == 1:
            x = toward(x, x_0, sigma, sigma_next)
            continue
        weights = adams_weights(np.array(nodes), sigma_next)
        for weight, d in zip(weights.tolist(), derivatives, strict=True):
            x = x + weight * d
    return x


FORMULAS: dict[str, Formula] = {
    "euler": _euler, "euler_ancestral": _euler_ancestral, "heun": _heun, "dpm_2": _dpm_2,
    "dpm_2_ancestral": _dpm_2_ancestral, "lms": _lms,
}  # fmt: skip
