"""DDIM (Song, Meng & Ermon 2021) and its reverse as a plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import NoiseSchedule
from fastdiff.schedules._values import as_flag, as_float
from fastdiff.solvers.prediction import Estimates
from fastdiff.solvers.subsequence import subsequence
from fastdiff.tracing import Recorder

__all__ = ["ddim"]


def ddim(
    schedule: NoiseSchedule,
    steps: int | str | None = None,
    *,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    clip: tuple[float, float] | None = (-1.0, 1.0),
    use_clipped_model_output: bool = True,
    reverse: bool = False,
    spacing: str = "trailing",
    timesteps: Sequence[int] | None = None,
) -> SolverPlan:
    """DDIM sampling, deterministic at eta = 0.

        x_0     = clip(denoised(x_t, output))
        sigma_t = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
        x_prev  = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma_t^2) epsilon + sigma_t z

    (Song et al. 2021, eqs. 12 and 16; eta = 1 is DDPM with the posterior variance.) With
    reverse=True the ODE runs from data to noise: x_0 and epsilon at t make x at the next kept t.

    Args:
        schedule: the chain the model was trained with.
        steps, spacing, timesteps: the kept steps, as in ddpm().
        eta: stochasticity, >= 0; must be 0 in reverse. Values whose sigma_t^2 exceeds
            1 - abar_prev are refused.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
        clip: (lo, hi) bounds of x_0, or None.
        use_clipped_model_output: derive epsilon again from the clipped x_0 (as guided-diffusion
            does); False keeps the model's own epsilon (diffusers' default).
        reverse: from x_0 to x_T (DDIM inversion).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    eta = as_float("eta", eta)
    if eta < 0:
        raise ValueError(f"eta must be >= 0, not {eta}")
    reverse = as_flag("reverse", reverse)
    rederive = as_flag("use_clipped_model_output", use_clipped_model_output)
    if reverse and eta != 0:
        raise ValueError(f"eta must be 0 in reverse: the reverse ODE is deterministic, not {eta}")
    chain = subsequence(schedule, steps, spacing, timesteps)
    order = np.arange(len(chain)) if reverse else np.arange(len(chain))[::-1]
    other = (chain.alphas_cumprod_next if reverse else chain.alphas_cumprod_prev)[order]
    alpha_t, sigma_t = chain.alpha_t[order], chain.sigma_t[order]
    # 1 - abar of the step we go to, without cancellation: its own sigma_t squared.
    other_beta_bar = np.square(np.append(sigma_t[1:], 1.0 if reverse else 0.0))
    sigma = eta * np.sqrt(other_beta_bar / np.square(sigma_t) * chain.betas[order])
    remaining = other_beta_bar - np.square(sigma)
    if (remaining < -1e-12).any():
        raise ValueError(f"eta = {eta} makes sigma_t^2 exceed 1 - abar_prev; lower it")
    scale_x_0, scale_eps = np.sqrt(other), np.sqrt(np.maximum(remaining, 0.0))
    estimates = Estimates(prediction_type, alpha_t, sigma_t, clip)

    rec = Recorder(
        f"DDIM{' reverse' if reverse else ''}, {len(chain)} steps",
        about={
            "schedule": schedule.name, "prediction_type": prediction_type, "eta": str(float(eta)),
            "clip": str(estimates.clip),
        },
    )  # fmt: skip
    x = rec.begin()
    for i, t in enumerate(chain.timesteps[order]):
        x, o = rec.call(x, t=float(t))
        x_0, _ = estimates(rec, x, o, i)
        if rederive and estimates.clip is not None:
            direction = scale_eps[i] * (x - alpha_t[i] * x_0) / sigma_t[i]
        else:
            direction = scale_eps[i] * estimates.own_epsilon(x, o, i)
        x = scale_x_0[i] * x_0 + direction
        if sigma[i] > 0:
            x = x + sigma[i] * rec.noise()
    return rec.finish(x)
