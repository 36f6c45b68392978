"""Sigma space, x = x_0 + sigma eps: noise levels, what the network predicts, and the recording.

Every path x_t = alpha_t x_0 + sigma_t eps is one of sigma space after division by alpha_t, with
sigma = sigma_t / alpha_t. A network F seen from there is a denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

(Karras et al. 2022, "Elucidating the design space of diffusion-based generative models" (EDM),
eq. 7). All of c_skip, c_out and c_in go into the coefficients of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.plan import SolverPlan
from fastdiff.schedules import GaussianPath, NoiseSchedule, Schedule
from fastdiff.schedules._values import as_flag, as_float, as_float_vector, refuse_where
from fastdiff.solvers.checks import check_choice, check_clip, check_positive
from fastdiff.solvers.grid import LADDERS, grid, level, model_t, refuse_zero_alpha
from fastdiff.solvers.prediction import denoised as x_0_of
from fastdiff.tracing import LinearForm, Recorder

__all__ = [
    "Call", "Denoiser", "Levels", "Tape", "ancestral", "churned", "levels_of", "scheduled_levels",
    "toward",
]  # fmt: skip

FloatArray = NDArray[np.float64]
SCALINGS = ("ve", "vp", "flow")


@dataclass(frozen=True)
class Levels:
    """The noise levels of a run.

    Attributes:
        sigmas: float64 (R + 1,), finite, > 0 but for the last, which may be 0.
        t: (R,) the model's t at sigmas[:-1], where it is known better than from sigma.
        schedule: what gives t, and alpha_t where the network has no scaling of its own.
        initial_scale: standard deviation of x_T; default sigmas[0].
    """

    sigmas: FloatArray
    t: FloatArray | None = None
    schedule: Schedule | None = None
    initial_scale: float | None = None

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def steps(self) -> list[tuple[int, float, float]]:
        """(i, sigma_i, sigma_{i+1})."""
        values = self.sigmas.tolist()
        return list(zip(range(len(self)), values, values[1:], strict=False))


def levels_of(
    sigmas: Any, steps: int | None = None, *, schedule: Schedule | None = None, **options: Any
) -> Levels:
    """Levels from an array, or `steps` levels of a schedule and the final one.

    Args:
        sigmas: (R + 1,) real numbers, finite, > 0 but for the last; or a schedule, with
            scheduled_levels()' options.
        schedule: of the network, when sigmas is an array.
    """
    if isinstance(sigmas, NoiseSchedule | GaussianPath):
        if schedule is not None:
            raise ValueError("schedule goes with an array of sigmas")
        return scheduled_levels(sigmas, steps, **options)
    if steps is not None or options:
        name = next(iter(options), "steps") if steps is None else "steps"
        raise ValueError(f"{name} goes with a schedule: an array is the levels themselves")
    values = as_float_vector("sigmas", sigmas)
    if values.size < 2:
        raise ValueError("sigmas must hold at least 2 levels: where a step starts and ends")
    refuse_where("sigmas", values, ~np.isfinite(values) | (values < 0), "be finite and >= 0")
    inner = np.append(values[:-1] == 0, False)
    refuse_where("sigmas", values, inner, "be > 0 before the last")
    return Levels(values, schedule=schedule)


def scheduled_levels(
    schedule: Schedule,
    steps: int | None,
    *,
    ladder: str | None = "karras",
    spacing: str = "linspace",
    steps_offset: int = 0,
    timesteps: Any = None,
    rho: float = 7.0,
    final: str = "zero",
) -> Levels:
    """Levels of a schedule, as diffusers' Euler, Heun, LMS and KDPM2 schedulers choose them.

    Args:
        ladder: "karras" (rho), "exponential", "beta" or "lu", between the ends of what spacing
            visits; None: what it visits, with sigma interpolated between the training timesteps.
        spacing, steps_offset: solvers.grid's, convention "euler". With "leading" x_T has standard
            deviation sqrt(sigma^2 + 1), as upstream, else sigma.
        timesteps: explicit ones instead of steps and ladder.
        final: "zero", or "sigma_min", the schedule's lowest level.
    """
    if timesteps is not None:
        visited = grid(schedule, steps, timesteps=timesteps, final=final, convention="euler")
    elif steps is None:
        raise ValueError("steps must be given with a schedule")
    else:
        low = high = None
        if ladder is not None:
            check_choice("ladder", ladder, tuple(LADDERS))
        if ladder is None or spacing != "linspace":
            visited = grid(
                schedule, steps, spacing=spacing, steps_offset=steps_offset, final=final,
                convention="euler",
            )  # fmt: skip
            levels = visited.ratio[:-1][np.isfinite(visited.ratio[:-1])]
            low, high = float(levels[-1]), float(levels[0])
        if ladder is not None:
            visited = grid(
                schedule, steps, sigmas=ladder, rho=rho, final=final, convention="euler",
                sigma_min=low, sigma_max=high,
            )  # fmt: skip
    refuse_zero_alpha(visited, "sigma is infinite there: give a named ladder")
    sigmas = visited.ratio
    scale = float(np.hypot(sigmas[0], 1.0)) if spacing == "leading" else None
    return Levels(sigmas, visited.t, schedule, scale)


@dataclass(frozen=True)
class Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x; t) of one network.

        prediction_type   c_skip                 c_out                           t
        "sample"          0                      1                               of the schedule
        "epsilon"         1                      -sigma                          of the schedule
        "v_prediction"    alpha_t^2              -sigma_t                        of the schedule
        "edm"             s^2 / (sigma^2 + s^2)  sigma s / sqrt(sigma^2 + s^2)   log(sigma) / 4
        "edm_v"           as "edm"               minus that of "edm"             log(sigma) / 4

    c_in is alpha_t, and 1 / sqrt(sigma^2 + s^2) for the edm types with s = sigma_data (EDM table 1,
    column "Ours"). sigma_t = sigma alpha_t; any other type is prediction.py's.

    Attributes:
        scaling: alpha_t: "vp" 1 / sqrt(sigma^2 + 1), "ve" 1, "flow" 1 / (sigma + 1). Default: the
            schedule's own; without one "ve" for "sample", else "vp".
        schedule: gives t (solvers.grid.model_t); without one t is sigma.
        quantize: t of the nearest level of the schedule, in log sigma.
        clip: bounds of D, or None.
    """

    prediction_type: str = "sample"
    scaling: str | None = None
    sigma_data: float = 0.5
    schedule: Schedule | None = None
    quantize: bool = False
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        as_flag("quantize", self.quantize)
        object.__setattr__(self, "clip", check_clip(self.clip))
        object.__setattr__(self, "sigma_data", check_positive("sigma_data", self.sigma_data))
        if self.scaling is None and self.schedule is None:
            default = "ve" if self.prediction_type == "sample" else "vp"
            object.__setattr__(self, "scaling", default)
        if self.scaling is not None:
            check_choice("scaling", self.scaling, SCALINGS)
        self.scalings(1.0)  # refuses unknown prediction types

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        """(c_skip, c_out, c_in) at a noise level."""
        if self.prediction_type in ("edm", "edm_v"):
            s, norm = self.sigma_data, math.hypot(sigma, self.sigma_data)
            c_out = sigma * s / norm
            return (s / norm) ** 2, c_out if self.prediction_type == "edm" else -c_out, 1 / norm
        alpha_t = self._alpha(sigma)
        if self.prediction_type == "epsilon":
            return 1.0, -sigma, alpha_t
        p, q = x_0_of(self.prediction_type, np.array(alpha_t), np.array(sigma * alpha_t))
        return float(p) * alpha_t, float(q), alpha_t

    def _alpha(self, sigma: float) -> float:
        if self.scaling is None:
            assert self.schedule is not None
            return float(level(self.schedule, sigma)[0])
        return {"ve": 1.0, "vp": 1.0 / math.hypot(sigma, 1.0), "flow": 1.0 / (1.0 + sigma)}[
            self.scaling
        ]

    def t(self, sigma: float) -> float:
        """What the network is told about a noise level."""
        if self.prediction_type in ("edm", "edm_v"):
            return 0.25 * math.log(sigma)
        if self.schedule is None:
            return sigma
        if self.quantize:
            with np.errstate(divide="ignore"):
                distance = np.abs(np.log(self.schedule.sigmas) - math.log(sigma))
            return float(self.schedule.timesteps[distance.argmin()])
        return float(model_t(self.schedule, sigma))


@dataclass
class Call:
    """One model call of a recording.

    Attributes:
        step: i of the step it belongs to.
        sigma: the level that the model is told.
        opens: the first of its step.
        draws: what is drawn after it, in order: ("churn", i) for step i, or the name and step of
            a solver's draw.
    """

    step: int
    sigma: float
    opens: bool
    draws: list[tuple[str, int]] = field(default_factory=list)


class Tape:
    """A recorder in sigma space.

    Args:
        split: draws of one Brownian path are made of independent increments; False gives every
            query of the path a variable of its own, for noise that the caller supplies.
        first_churn: record the churn before the first call; False leaves it to the caller, its
            scale in `first_churn`.
    """

    def __init__(
        self,
        name: str,
        levels: Levels,
        denoiser: Denoiser,
        *,
        split: bool = True,
        first_churn: bool = True,
        about: dict[str, str] | None = None,
    ) -> None:
        self.levels, self.denoiser, self.split = levels, denoiser, split
        self.calls: list[Call] = []
        self.first_churn = 0.0
        self._records_first_churn = first_churn
        described = {
            "prediction_type": denoiser.prediction_type,
            "scaling": denoiser.scaling or "of the schedule",
        }
        if levels.schedule is not None:
            described["schedule"] = levels.schedule.name
        self._recorder = Recorder(name, described | (about or {}), draw_dtype="model_output")

    def begin(self) -> LinearForm:
        scale = self.levels.initial_scale
        return self._recorder.begin(float(self.levels.sigmas[0]) if scale is None else scale)

    def denoise(self, x: LinearForm, sigma: float, i: int) -> tuple[LinearForm, LinearForm]:
        """A model call of step i: (x, D(x; sigma))."""
        x, output = self.call(x, sigma, i)
        return x, self.denoised(x, output, sigma)

    def call(self, x: LinearForm, sigma: float, i: int) -> tuple[LinearForm, LinearForm]:
        """A model call of step i at a level: (x, model output)."""
        t, c_in = self.denoiser.t(sigma), self.denoiser.scalings(sigma)[2]
        if self.levels.t is not None:
            for k in (i, i + 1):
                if k < len(self.levels) and sigma == self.levels.sigmas[k]:
                    t = float(self.levels.t[k])
        self.calls.append(Call(i, sigma, not self.calls or self.calls[-1].step != i))
        return self._recorder.call(x, t=t, c_in=c_in)

    def denoised(self, x: LinearForm, output: LinearForm, sigma: float) -> LinearForm:
        """D from the sample and the model's output; the preview of the call."""
        c_skip, c_out, _ = self.denoiser.scalings(sigma)
        x_0 = c_skip * x + c_out * output
        if self.denoiser.clip is not None:
            x_0 = self._recorder.clamp(x_0, *self.denoiser.clip)
        self._recorder.preview(x_0)
        return x_0

    def churn(self, x: LinearForm, scale: float, i: int) -> LinearForm:
        """x + scale z before the first call of step i."""
        if self.calls:
            self.calls[-1].draws.append(("churn", i))
        elif not self._records_first_churn:
            self.first_churn = scale
            return x
        return x + scale * self._recorder.churn() if scale else x

    def noise(self, i: int, name: str = "step") -> LinearForm:
        """A standard normal draw of step i after the last call."""
        self.calls[-1].draws.append((name, i))
        return self._recorder.noise()

    def noised(self, x: LinearForm, scale: float, i: int) -> LinearForm:
        """x + scale z; a draw with scale 0 is in the list of calls only."""
        if scale:
            return x + scale * self.noise(i)
        self.calls[-1].draws.append(("step", i))
        return x

    def finish(self, x: LinearForm) -> SolverPlan:
        return self._recorder.finish(x)


def toward(x: LinearForm, x_0: LinearForm, sigma: float, sigma_next: float) -> LinearForm:
    """x + (sigma_next - sigma) (x - x_0) / sigma: an Euler step, exact for constant x_0.

    EDM eq. 3, written as a mean of x and x_0, so that x drops out where sigma_next is 0.
    """
    return (sigma_next / sigma) * x + ((sigma - sigma_next) / sigma) * x_0


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): go down to sigma_down, add noise of sigma_up, arrive at sigma_next.

        sigma_up^2 = eta^2 sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2, at most sigma_next^2
        sigma_down^2 = sigma_next^2 - sigma_up^2

    The posterior of DDPM at eta = 1 (Song et al. 2021, "Denoising diffusion implicit models",
    eq. 16), written without the cancellation of the second line.
    """
    if eta == 0 or sigma_next == 0:
        return sigma_next, 0.0
    ratio = sigma_next / sigma
    if ratio > 1:
        raise ValueError(
            f"sigmas must descend when eta is not 0: a step from {sigma} to {sigma_next} has no "
            "noise to add"
        )
    kept = (1 - eta) * (1 + eta) + (eta * ratio) ** 2
    if kept <= 0:
        return 0.0, sigma_next
    return sigma_next * math.sqrt(kept), eta * sigma_next * math.sqrt((1 - ratio) * (1 + ratio))


def churned(
    levels: Levels,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> list[tuple[int, float, float, float, float]]:
    """(i, sigma, sigma_next, sigma_hat, scale of the noise): EDM algorithm 2, lines 4 to 6."""
    s_churn, s_noise = check_positive("s_churn", s_churn, zero=True), as_float("s_noise", s_noise)
    for name, bound in (("s_tmin", s_tmin), ("s_tmax", s_tmax)):
        if bound not in (-math.inf, math.inf):
            as_float(name, bound)  # refuses
    result = []
    for i, sigma, sigma_next in levels.steps():
        inside = s_tmin <= sigma <= s_tmax
        gamma = min(s_churn / len(levels), math.sqrt(2) - 1) if inside else 0.0
        # sqrt(sigma_hat^2 - sigma^2) = sigma sqrt(gamma (2 + gamma))
        scale = sigma * math.sqrt(gamma * (2 + gamma)) * s_noise
        result.append((i, sigma, sigma_next, sigma * (1 + gamma), scale))
    return result
