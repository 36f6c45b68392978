"""The steps of GaussianDiffusion as rows of the fused step, one row per t, float64 on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiling import constant
from fastdiff.noise import STREAM_STEP
from fastdiff.ops.call import pack_table
from fastdiff.ops.held import held, remembered
from fastdiff.ops.step import StepSpec
from fastdiff.schedules import NoiseSchedule
from fastdiff.schedules._values import FloatArray

from .types import ModelMeanType, ModelVarType

__all__ = [
    "Form", "Request", "add_forms", "log_variances", "pack_forms", "seeded_draws", "spec_of",
    "table_of",
]  # fmt: skip

# Coefficients (T,) by column.
Form = dict[str, FloatArray]

LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class Request(NamedTuple):
    """One kind of pass.

    Columns: x, h (what denoised_fn made of x_0), g (what cond_fn returned), o, c, z.

    Attributes:
        kind: "p" and "ddim" give (sample, x_start), "reverse" the same towards noise, "mean" gives
            (mean, x_start) of p(x_{t-1} | x_t), "x_start" gives x_0, which no hook has seen,
            "score" gives (x_start, mean) after condition_score, "eps" the noise between x and h,
            "shift" gives exp(log-variance) g of a learned variance, "z" the noise of a seed.
        mean, variance: what the model's output is.
        clip: clamp x_0 to [-1, 1].
        hooked: x_0 is h, not made from o.
        guided: g is read.
        eta: of DDIM.
    """

    kind: str
    mean: ModelMeanType = ModelMeanType.EPSILON
    variance: ModelVarType = ModelVarType.FIXED_SMALL
    clip: bool = False
    hooked: bool = False
    guided: bool = False
    eta: float = 0.0

    @property
    def learned(self) -> bool:
        return self.variance in LEARNED

    @property
    def makes_x_start(self) -> bool:
        """Whether x_0 is an output of the pass, not already a tensor (o or h) as it is."""
        if self.kind == "ddim" and self.guided:
            return True
        return self.clip or not (self.hooked or self.mean is ModelMeanType.START_X)

    @property
    def makes_mean(self) -> bool:
        """Whether the mean is an output of the pass, not o itself."""
        return self.mean is not ModelMeanType.PREVIOUS_X


def log_variances(schedule: NoiseSchedule, variance: ModelVarType) -> tuple[FloatArray, FloatArray]:
    """Log-variance of p(x_{t-1} | x_t) and its variance, (T,) each; see ModelVarType."""
    small = schedule.posterior_log_variance_clipped
    if variance is ModelVarType.FIXED_SMALL:
        return small, schedule.posterior_variance
    if variance is ModelVarType.FIXED_LARGE:
        large = np.append(small[:1], np.log(schedule.betas[1:]))
        return large, np.exp(large)
    raise ValueError(f"{variance} is not a table")


def add_forms(*terms: tuple[FloatArray, Form]) -> Form:
    """The linear combination of forms."""
    total: Form = {}
    for factor, form in terms:
        for column, a in form.items():
            total[column] = total.get(column, np.zeros_like(a)) + factor * a
    return total


def _x_start(schedule: NoiseSchedule, request: Request) -> Form:
    """x_0 before the clamp (Ho et al. 2020, eq. 15; eq. 7 solved for x_0)."""
    one = np.ones(schedule.num_timesteps)
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    if request.hooked:
        return {"h": one}
    if request.mean is ModelMeanType.START_X:
        return {"o": one}
    if request.mean is ModelMeanType.EPSILON:
        return {"x": one / alpha, "o": -sigma / alpha}
    c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    return {"x": -c2 / c1, "o": one / c1}


def _ddim(schedule: NoiseSchedule, request: Request, x_start: Form) -> Form:
    """Song et al. 2021, eqs. 12 and 16, epsilon derived from x_0; or towards noise (eq. 14)."""
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    one = np.ones(schedule.num_timesteps)
    if request.kind == "reverse":
        other, other_variance = schedule.alphas_cumprod_next, np.square(np.append(sigma[1:], 1.0))
    else:
        other, other_variance = schedule.alphas_cumprod_prev, np.square(np.append(0.0, sigma[:-1]))
    spread = request.eta * np.sqrt(other_variance / np.square(sigma) * schedule.betas)
    remaining = other_variance - np.square(spread)
    if (remaining < -1e-12).any():
        raise ValueError(f"eta = {request.eta} makes sigma_t^2 exceed 1 - abar_prev; lower it")
    scale_eps = np.sqrt(np.maximum(remaining, 0.0))
    eps = add_forms((1.0 / sigma, {"x": one}), (-alpha / sigma, x_start))
    return add_forms((np.sqrt(other), x_start), (scale_eps, eps), (spread, {"z": one}))


def _outputs(schedule: NoiseSchedule, request: Request) -> tuple[list[Form], Form | None]:
    """The output rows, and the clamp node's form."""
    one = np.ones(schedule.num_timesteps)
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    if request.kind in ("shift", "z"):
        return [{"z": one}], None
    if request.kind == "eps":
        return [{"x": 1.0 / sigma, "h": -alpha / sigma}], None
    before = _x_start(schedule, request)
    if request.kind == "x_start":
        return ([{"c": one}], before) if request.clip else ([before], None)
    x_start: Form = {"c": one} if request.clip else before
    # condition_score: eps - sigma_t g moves x_0 by sigma_t^2 / alpha_t g, which is not clamped.
    if request.guided and request.kind in ("ddim", "score"):
        x_start = add_forms((one, x_start), (np.square(sigma) / alpha, {"g": one}))
    clamp = before if request.clip else None
    posterior = add_forms((c2, {"x": one}), (c1, x_start))
    if request.kind == "score":
        return [x_start, posterior], clamp
    previews = [x_start] if request.makes_x_start else []
    if request.kind in ("ddim", "reverse"):
        return [_ddim(schedule, request, x_start), *previews], clamp
    mean = posterior if request.makes_mean else {"o": one}
    if request.kind == "mean":
        return ([mean] if request.makes_mean else []) + previews, clamp
    if request.learned:
        # The kernel scales z by exp(half the log-variance); g comes scaled, by "shift".
        scale, shift = one, one
    else:
        log_variance, shift = log_variances(schedule, request.variance)
        scale = np.exp(0.5 * log_variance)
    noise = np.where(np.arange(len(one)) == 0, 0.0, scale)
    terms = [(one, mean), (noise, {"z": one})]
    if request.guided:
        terms.append((shift, {"g": one}))
    return [add_forms(*terms), *previews], clamp


def _half_log_bounds(schedule: NoiseSchedule, request: Request) -> tuple[FloatArray, FloatArray]:
    """(min, max) with exp(f max + (1 - f) min), f = (v + 1) / 2, the scale of z."""
    one = np.ones(schedule.num_timesteps)
    if not request.learned or request.kind not in ("p", "shift"):
        return 0.0 * one, 0.0 * one
    half = 1.0 if request.kind == "shift" else 0.5  # the variance, or its root
    if request.variance is ModelVarType.LEARNED:
        return -half * one, half * one  # f - (1 - f) = v
    small = schedule.posterior_log_variance_clipped
    return half * small, half * np.log(schedule.betas)


def _columns(request: Request) -> list[str]:
    if request.kind == "shift":
        return ["g"]
    states = {"h": request.hooked or request.kind == "eps", "g": request.guided}
    return ["x", *(name for name, used in states.items() if used)]


def pack_forms(
    states: list[str],
    outputs: list[Form],
    clamp: Form | None = None,
    header: dict[str, FloatArray | float] | None = None,
) -> tuple[StepSpec, FloatArray]:
    """A step and its float64 table from linear forms over the columns [*states, o, c, z].

    The clamp node is clamped to [-1, 1]; a z that no row uses is no draw.
    """
    rows = next(iter(outputs[0].values())).size
    draws = ["z"] if any("z" in form and form["z"].any() for form in outputs) else []

    def packed(form: Form, columns: list[str]) -> FloatArray:
        zero = np.zeros(rows)
        array: FloatArray = np.stack([form.get(column, zero) for column in columns], axis=1)
        return array

    def mask(array: FloatArray) -> int:
        return sum(1 << int(k) for k in np.flatnonzero((array != 0).any(axis=0)))

    A = [packed(form, [*states, "o", "c", *draws]) for form in outputs]
    P = None if clamp is None else packed(clamp, [*states, "o", *draws])
    bounds: dict[str, FloatArray | float] = {} if P is None else {"lo": -1.0, "hi": 1.0}
    spec = StepSpec(
        states=len(states), outputs=tuple(mask(array) for array in A),
        clamp=None if P is None else mask(P), draws=len(draws),
    )  # fmt: skip
    return spec, pack_table(rows, A, P, bounds | (header or {}))


def _host(schedule: NoiseSchedule, request: Request) -> tuple[StepSpec, FloatArray]:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        outputs, clamp = _outputs(schedule, request)
    for form in [*outputs, clamp or {}]:
        for coefficients in form.values():
            if not np.isfinite(coefficients).all():
                t = int(np.argmin(np.isfinite(coefficients)))
                raise ValueError(
                    f"betas leave no signal at t = {t} (alphas_cumprod "
                    f"{schedule.alphas_cumprod[t]}): only START_X without cond_fn is defined there"
                )
    low, high = _half_log_bounds(schedule, request)
    header: dict[str, FloatArray | float] = {
        "half_log_variance_min": low, "half_log_variance_max": high,
    }  # fmt: skip
    spec, table = pack_forms(_columns(request), outputs, clamp, header)
    # Where it is read, a model's output with variances has twice the channels.
    learned = request.learned and (spec.reads_model_output or bool(spec.draws and low.any()))
    return replace(spec, learned=learned), table


@constant
def _structure(
    fingerprint: str, schedule: NoiseSchedule, request: tuple[Any, ...]
) -> tuple[int, ...]:
    # The fingerprint makes a compiled graph guard on the schedule's content.
    spec = _host(schedule, Request(*request))[0]
    clamp = -1 if spec.clamp is None else spec.clamp
    return spec.states, clamp, spec.draws, int(spec.learned), *spec.outputs


@remembered
def spec_of(schedule: NoiseSchedule, request: Request, noise_dtype: torch.dtype) -> StepSpec:
    """The step's structure."""
    structure = _structure(schedule.fingerprint, schedule, tuple(request))
    states, clamp, draws, learned, *outputs = structure
    return StepSpec(
        states=states, outputs=tuple(outputs), clamp=None if clamp < 0 else clamp, draws=draws,
        noise_dtype=noise_dtype, learned=bool(learned),
    )  # fmt: skip


def _uploaded(
    schedule: NoiseSchedule, request: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.from_numpy(_host(schedule, Request(*request))[1]).to(device=device, dtype=dtype)


def table_of(
    schedule: NoiseSchedule, request: Request, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The step's coefficients on the device, made once."""
    # Dynamo's constants are plain tuples.
    return held(schedule.fingerprint, _uploaded, schedule, tuple(request), device, dtype)


def _draws(count: int, device: torch.device) -> Tensor:
    steps = torch.arange(count - 1, -1, -1, device="cpu")
    draws = torch.stack([steps, torch.full_like(steps, STREAM_STEP)], dim=1)
    return draws[:, None, :].contiguous().to(device)


def seeded_draws(count: int, device: torch.device) -> Tensor:
    """(step, stream) of the noise at t: (T - 1 - t, STREAM_STEP), as in fastdiff.p_sample."""
    return held("", _draws, count, device)
