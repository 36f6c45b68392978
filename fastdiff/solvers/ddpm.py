"""Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2) and improved DDPM as a plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import NoiseSchedule
from fastdiff.solvers.checks import check_choice
from fastdiff.solvers.prediction import Estimates
from fastdiff.solvers.subsequence import subsequence
from fastdiff.tracing import Recorder

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
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
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
    check_choice("variance", variance, VARIANCES)
    chain = subsequence(schedule, steps, spacing, timesteps)
    down = np.arange(len(chain))[::-1]  # row 0 is the noisiest step
    estimates = Estimates(prediction_type, chain.alpha_t[down], chain.sigma_t[down], clip)
    c1, c2 = chain.posterior_mean_coef1[down], chain.posterior_mean_coef2[down]
    smallest = chain.posterior_log_variance_clipped[down]
    largest = np.log(chain.betas)[down]
    sigma = np.sqrt(chain.posterior_variance[down])
    if variance == "fixed_large":
        sigma = np.exp(0.5 * largest)

    rec = Recorder(
        f"DDPM, {len(chain)} steps",
        about={
            "schedule": schedule.name, "prediction_type": prediction_type,
            "variance": variance, "clip": str(estimates.clip),
        },
        learned_variance=variance == "learned_range",
    )  # fmt: skip
    x = rec.begin()
    for i, t in enumerate(chain.timesteps[down]):
        x, o = rec.call(x, t=float(t))
        x_0, _ = estimates(rec, x, o, i)
        x = c1[i] * x_0 + c2[i] * x
        if i + 1 == len(chain):
            continue  # no noise at the last step
        if variance == "learned_range":
            x = x + rec.learned(rec.noise(), 0.5 * smallest[i], 0.5 * largest[i])
        else:
            x = x + sigma[i] * rec.noise()
    return rec.finish(x)
