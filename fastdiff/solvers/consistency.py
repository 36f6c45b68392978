"""Samplers of distilled models: LCM, trajectory consistency (TCD), consistency models (CM)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import NoiseSchedule, karras
from fastdiff.schedules._values import IntArray, as_float, as_float_vector, as_int, as_vector
from fastdiff.solvers.checks import check_clip, check_positive
from fastdiff.solvers.prediction import Estimates
from fastdiff.tracing import Recorder

__all__ = ["consistency_model", "lcm", "tcd"]


def lcm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    original_inference_steps: int = 50,
    strength: float = 1.0,
    timesteps: Sequence[int] | None = None,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    clip: tuple[float, float] | None = None,
    thresholding: tuple[float, float] | None = None,
) -> SolverPlan:
    """Multistep sampling of latent consistency models.

        c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2)
        c_out  = s t / sqrt((s t)^2 + sigma_data^2)
        f      = c_skip x_t + c_out clip(denoised(x_t, output))                s = timestep_scaling
        x_prev = alpha_prev f + sigma_prev z;   the last call gives f itself, without a draw

    (Luo, Tan, Huang, Li & Zhao 2023, "Latent consistency models", multistep latent consistency
    sampling, with the boundary scalings of their released code.)

    Args:
        schedule: the chain the model was distilled on.
        steps: how many calls, at most original_inference_steps * strength.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
        original_inference_steps: N of the distillation schedule k, 2k, .., N k, less 1, with
            k = T // N, of which evenly spaced entries are visited.
        strength: in (0, 1]: the part of that schedule, from its clean end, that is visited
            (image to image).
        timesteps: explicit descending indices in [0, T) instead of steps; original_inference_steps
            and strength are then not used.
        timestep_scaling: s > 0. sigma_data: > 0, in data units.
        clip: (lo, hi) bounds of x_0, or None.
        thresholding: (ratio, largest) of dynamic thresholding of x_0 instead of clip, or None.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    scaling = check_positive("timestep_scaling", timestep_scaling)
    spread = check_positive("sigma_data", sigma_data)
    visited = _visited(schedule, steps, timesteps, original_inference_steps, strength)
    alpha, sigma = schedule.alpha_t[visited], schedule.sigma_t[visited]
    t = schedule.timesteps[visited].astype(np.float64)
    c_skip = spread**2 / ((scaling * t) ** 2 + spread**2)
    c_out = scaling * t / np.sqrt((scaling * t) ** 2 + spread**2)
    estimates = Estimates(prediction_type, alpha, sigma, clip, thresholding)

    rec = Recorder(
        f"LCM, {len(t)} steps",
        about={
            "schedule": schedule.name, "prediction_type": prediction_type,
            "timestep_scaling": str(scaling), "clip": str(estimates.clip),
            "thresholding": str(estimates.thresholding),
        },
    )  # fmt: skip
    x = rec.begin()
    for i in range(len(t)):
        x, o = rec.call(x, t=t[i])
        x_0, _ = estimates(rec, x, o, i)
        f = c_skip[i] * x + c_out[i] * x_0
        rec.preview(f)
        x = f if i + 1 == len(t) else alpha[i + 1] * f + sigma[i + 1] * rec.noise()
    return rec.finish(x)


def tcd(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.3,
    prediction_type: str = "epsilon",
    original_inference_steps: int | None = 50,
    strength: float = 1.0,
    timesteps: Sequence[int] | None = None,
) -> SolverPlan:
    """Strategic stochastic sampling of trajectory consistency models.

        s      = floor((1 - eta) t_prev)
        x_s    = alpha_s x_0 + sigma_s epsilon                       x_0, epsilon of the call at t
        x_prev = sqrt(abar_prev / abar_s) x_s + sqrt(1 - abar_prev / abar_s) z

    (Zheng et al. 2024, "Trajectory consistency distillation", strategic stochastic sampling; eta
    is the paper's gamma.) The last call goes to t = 0 and gives x_s of s = 0 without a draw, so the
    result keeps the noise of the chain's first step.

    Args:
        schedule: the chain the model was distilled on.
        steps: how many calls.
        eta: in [0, 1]; 0 is deterministic (no draws), 1 goes through x_0 as consistency models do.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow".
        original_inference_steps, strength, timesteps: as in lcm(); None spreads the steps over all
            T of the chain.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    eta = as_float("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    visited = _visited(schedule, steps, timesteps, original_inference_steps, strength)
    previous = np.append(visited[1:], 0)
    # In float32, as the code that models are sampled with: its rounding decides the floor.
    kept = np.float32(1 - eta) * previous.astype(np.float32)
    s = np.floor(kept).astype(np.int64)
    alpha, sigma = schedule.alpha_t[visited], schedule.sigma_t[visited]
    alpha_s, sigma_s = schedule.alpha_t[s], schedule.sigma_t[s]
    log_abar = schedule.log_alphas_cumprod
    log_ratio = log_abar[previous] - log_abar[s]
    back, fresh = np.exp(log_ratio / 2), np.sqrt(-np.expm1(log_ratio))
    estimates = Estimates(prediction_type, alpha, sigma)

    rec = Recorder(
        f"TCD, {len(visited)} steps",
        about={
            "schedule": schedule.name, "prediction_type": prediction_type, "eta": str(eta),
        },
    )  # fmt: skip
    x = rec.begin()
    for i in range(len(visited)):
        x, o = rec.call(x, t=float(schedule.timesteps[visited[i]]))
        x_0, eps = estimates(rec, x, o, i)
        x_s = alpha_s[i] * x_0 + sigma_s[i] * eps
        last = i + 1 == len(visited)
        x = x_s if eta == 0 or last else back[i] * x_s + fresh[i] * rec.noise()
    return rec.finish(x)


def consistency_model(
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    num_train_timesteps: int = 40,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    rho: float = 7.0,
    s_noise: float = 1.0,
    clip: tuple[float, float] | None = (-1.0, 1.0),
) -> SolverPlan:
    """Multistep consistency sampling (and one-step, at steps = 1).

        c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)
        c_out  = sigma_data (sigma - sigma_min) / sqrt(sigma^2 + sigma_data^2)
        f      = clip(c_skip x + c_out output),    the model sees x / sqrt(sigma^2 + sigma_data^2)
        x'     = f + sqrt(sigma'^2 - sigma_min^2) s_noise z          sigma' = sigma_min at the end

    (Song, Dhariwal, Chen & Sutskever 2023, "Consistency models", algorithm 1 and appendix C.) The
    state is variance exploding: x_T has standard deviation sigma_max. The model's t is
    1000/4 log(sigma). Sources draw at the last call too, where the draw has no weight; so does a
    generator here (but not with a single call).

    Args:
        steps: how many of the num_train_timesteps levels to visit, evenly from sigma_max.
        timesteps: explicit descending indices in [0, num_train_timesteps) instead, turned round as
            the original code does: the noisiest level visited is rho's ladder at timesteps[-1],
            which should be 0.
        sigmas: explicit descending levels in [sigma_min, inf) instead, in data units.
        num_train_timesteps, sigma_min, sigma_max, rho: Karras ladder of the levels, from sigma_max
            to sigma_min.
        sigma_data: standard deviation of the data, > 0.
        s_noise: >= 0, scale of the noise added.
        clip: (lo, hi) bounds of f, or None.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    bounds = check_clip(clip)
    spread = check_positive("sigma_data", sigma_data)
    lowest = check_positive("sigma_min", sigma_min)
    s_noise = check_positive("s_noise", s_noise, zero=True)
    if sum(value is not None for value in (steps, timesteps, sigmas)) != 1:
        raise ValueError("exactly one of steps, timesteps and sigmas must be given")
    if sigmas is not None:
        sigma = as_float_vector("sigmas", sigmas)
        if not (np.isfinite(sigma).all() and sigma.min() >= lowest and (np.diff(sigma) < 0).all()):
            raise ValueError(f"sigmas must descend and be >= sigma_min = {lowest}, got {sigmas!r}")
    else:
        T = as_int("num_train_timesteps", num_train_timesteps, 2)
        if steps is not None:
            count = as_int("steps", steps, 1, T)
            indices = np.arange(count) * (T // count)
        else:
            indices = _descending("timesteps", timesteps, T)[::-1]
        sigma = karras(T, lowest, sigma_max, rho, append_zero=False)[indices]
    c_skip = spread**2 / ((sigma - lowest) ** 2 + spread**2)
    c_out = spread * (sigma - lowest) / np.sqrt(sigma**2 + spread**2)
    following = np.append(sigma[1:], lowest)
    added = s_noise * np.sqrt((following - lowest) * (following + lowest))

    rec = Recorder(
        f"consistency model, {len(sigma)} steps",
        about={
            "sigma_min": str(lowest), "sigma_max": str(float(sigma[0])),
            "sigma_data": str(spread), "s_noise": str(s_noise), "clip": str(bounds),
        },
        draw_dtype="model_output",
    )  # fmt: skip
    x = rec.begin(scale=float(sigma[0]))
    for i in range(len(sigma)):
        x, o = rec.call(x, t=250.0 * np.log(sigma[i]), c_in=1 / np.sqrt(sigma[i] ** 2 + spread**2))
        f = c_skip[i] * x + c_out[i] * o
        if bounds is not None:
            f = rec.clamp(f, *bounds)
        rec.preview(f)
        x = f if len(sigma) == 1 else f + added[i] * rec.noise()
    return rec.finish(x)


def _visited(
    schedule: NoiseSchedule,
    steps: int | None,
    timesteps: Sequence[int] | None,
    original_inference_steps: int | None,
    strength: float,
) -> IntArray:
    """Indices of the chain, descending, as diffusers' LCM and TCD schedulers choose them."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, not {type(schedule).__name__}")
    T = len(schedule)
    if (steps is None) == (timesteps is None):
        raise ValueError("exactly one of steps and timesteps must be given")
    if timesteps is not None:
        return _descending("timesteps", timesteps, T)
    strength = as_float("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    if original_inference_steps is None:
        original = np.arange(int(T * strength))
    else:
        N = as_int("original_inference_steps", original_inference_steps, 1, T)
        original = np.arange(1, int(N * strength) + 1) * (T // N) - 1
    count = as_int("steps", steps, 1)
    if count > original.size:
        raise ValueError(
            f"steps must be <= {original.size}, the part of the distillation schedule that is "
            f"used (original_inference_steps = {original_inference_steps}, strength = {strength}), "
            f"got {count}"
        )
    picked = np.floor(np.linspace(0, original.size, count, endpoint=False)).astype(np.int64)
    visited: IntArray = original[::-1][picked].astype(np.int64)
    return visited


def _descending(name: str, indices: Sequence[int] | None, T: int) -> IntArray:
    """Strictly descending indices in [0, T)."""
    array = as_vector(name, indices, kinds="iu").astype(np.int64)
    if array.min() < 0 or array.max() >= T:
        raise ValueError(f"{name} must be in [0, {T}), got {indices!r}")
    if (np.diff(array) >= 0).any():
        raise ValueError(f"{name} must strictly descend, got {indices!r}")
    return array
