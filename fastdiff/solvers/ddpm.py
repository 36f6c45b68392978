"""Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2) and improved DDPM as a plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.noise import STREAM_STEP
from fastdiff.plan import SolverPlan
from fastdiff.schedules import NoiseSchedule
from fastdiff.solvers.prediction import check_clip, denoised
from fastdiff.solvers.subsequence import subsequence

__all__ = ["ddpm"]

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def ddpm(
    schedule: NoiseSchedule,
    steps: int | str | None = None,
    *,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip: tuple[float, float] | None = (-1.0, 1.0),
    spacing: str = "trailing",
    timesteps: Sequence[int] | None = None,
) -> SolverPlan:
    """DDPM ancestral sampling.

        x_0     = clip(denoised(x_t, output))
        x_{t-1} = c1_t x_0 + c2_t x_t + sigma_t z          (Ho et al. 2020, eqs. 6, 7, 11, 15)

    On a subsequence the chain is that of the kept steps, with betas 1 - abar_t / abar_prev
    (Nichol & Dhariwal 2021, section 4).

    Args:
        schedule: the chain the model was trained with.
        steps: how many of its T steps to keep (default all): an int, spread by `spacing`, or a
            section string such as "250", "10,15,20" or "ddim50".
        prediction_type: "epsilon", "sample" or "v_prediction".
        variance: sigma_t^2. "fixed_small": beta~_t, the posterior variance. "fixed_large": beta_t
            (beta~_1 at the last step). "learned_range": exp(f log beta_t + (1 - f) log beta~_t),
            f = (v + 1) / 2 from the second half of the model's channels (Nichol & Dhariwal 2021,
            eq. 15). No noise is added at the last step.
        clip: (lo, hi) bounds of x_0, or None.
        spacing: "leading", "linspace" or "trailing".
        timesteps: explicit indices to keep instead of steps.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
    bounds = check_clip(clip)
    chain = subsequence(schedule, steps, spacing, timesteps)
    rows = len(chain)
    down = np.arange(rows)[::-1]  # row 0 is the noisiest step
    p, q = denoised(prediction_type, chain.alpha_t[down], chain.sigma_t[down])
    c1, c2 = chain.posterior_mean_coef1[down], chain.posterior_mean_coef2[down]

    smallest = chain.posterior_log_variance_clipped[down]
    largest = np.log(chain.betas)[down]
    largest_sigma = np.exp(0.5 * largest)
    largest_sigma[-1] = np.exp(0.5 * smallest[-1])
    sigma = {
        "fixed_small": np.sqrt(chain.posterior_variance[down]),
        "fixed_large": largest_sigma,
        "learned_range": np.ones(rows),
    }[variance]
    sigma = np.where(np.arange(rows) == rows - 1, 0.0, sigma)

    zero, one = np.zeros(rows), np.ones(rows)
    if bounds is None:  # columns x, o, c, z
        A = np.stack([c2 + c1 * p, c1 * q, zero, sigma], axis=1)
        x_start = np.stack([p, q, zero, zero], axis=1)
    else:
        A = np.stack([c2, zero, c1, sigma], axis=1)
        x_start = np.stack([zero, zero, one, zero], axis=1)
    learned = variance == "learned_range"
    steps_streams = np.stack([np.arange(rows), np.full(rows, STREAM_STEP)], axis=1)
    return SolverPlan(
        name=f"DDPM, {rows} steps",
        A=A[:, None],
        x_start=x_start,
        t=np.asarray(chain.timesteps[down], np.float64),
        draws=steps_streams[:, None],
        P=None if bounds is None else np.stack([p, q, zero], axis=1),
        lo=None if bounds is None else np.full(rows, bounds[0]),
        hi=None if bounds is None else np.full(rows, bounds[1]),
        half_log_variance_min=0.5 * smallest if learned else None,
        half_log_variance_max=0.5 * largest if learned else None,
        about={
            "schedule": schedule.name, "prediction_type": prediction_type,
            "variance": variance, "clip": str(bounds),
        },
    )  # fmt: skip
