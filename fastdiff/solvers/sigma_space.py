"""Sigma space, x = x_0 + sigma eps: noise levels, what the network predicts, and the recording.

Every path x_t = alpha_t x_0 + sigma_t eps is one of sigma space after division by alpha_t, with
sigma = sigma_t / alpha_t. A network F seen from there is a denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

(Karras et al. 2022, "Elucidating the design space of diffusion-based generative models" (EDM),
eq. 7). All of c_skip, c_out and c_in go into the coefficients of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import schedules
from fastdiff.plan import SolverPlan
from fastdiff.schedules._values import as_flag, as_float, as_float_vector, as_int, refuse_where
from fastdiff.solvers.prediction import check_clip
from fastdiff.solvers.prediction import denoised as x_0_of
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["Call", "Denoiser", "Levels", "Tape", "ancestral", "churned", "levels_of", "toward"]

FloatArray = NDArray[np.float64]
LADDERS = ("karras", "exponential", "polyexponential", "lu", "beta")
SPACINGS = ("linspace", "leading", "trailing")
SCALINGS = ("ve", "vp", "flow")


@dataclass(frozen=True)
class Levels:
    """The noise levels of a run.

    Attributes:
        sigmas: float64 (R + 1,), finite, > 0 but for the last, which may be 0.
        t: (R,) the model's t at sigmas[:-1], where it is known better than from sigma.
        schedule: what the levels were taken from.
    """

    sigmas: FloatArray
    t: FloatArray | None = None
    schedule: schedules.Schedule | None = None

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def steps(self) -> list[tuple[int, float, float]]:
        """(i, sigma_i, sigma_{i+1})."""
        values = self.sigmas.tolist()
        return list(zip(range(len(self)), values, values[1:], strict=False))


def levels_of(
    sigmas: Any, steps: int | None = None, ladder: str = "karras", final: str = "zero"
) -> Levels:
    """Levels from an array, or `steps` levels of a schedule and the final one.

    Args:
        sigmas: (R + 1,) real numbers, finite, > 0 but for the last; or a schedule with T levels.
        ladder: with a schedule: "karras", "exponential", "polyexponential", "lu" or "beta" between
            its ends; or "linspace", "leading" or "trailing" timesteps, sigma interpolated
            linearly between the training timesteps (as diffusers' Euler and Heun schedulers do).
        final: the level after the last call: "zero", or "sigma_min", the schedule's own.
    """
    if not hasattr(sigmas, "alpha_t"):
        if steps is not None:
            raise ValueError("steps goes with a schedule: an array of sigmas has its own number")
        values = as_float_vector("sigmas", sigmas)
        if values.size < 2:
            raise ValueError("sigmas must hold at least 2 levels: where a step starts and ends")
        refuse_where("sigmas", values, ~np.isfinite(values) | (values < 0), "be finite and >= 0")
        inner = np.append(values[:-1] == 0, False)
        refuse_where("sigmas", values, inner, "be > 0 before the last")
        return Levels(values)
    schedule: schedules.Schedule = sigmas
    if steps is None:
        raise ValueError("steps must be given with a schedule")
    n = as_int("steps", steps, 1)
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"final must be zero or sigma_min, not {final!r}")
    table = schedule.sigmas
    usable = table[(table > 0) & np.isfinite(table)]
    if usable.size != table.size:
        raise ValueError(
            "sigmas: the schedule has a level without noise or without signal (sigma = 0 or "
            "infinite, zero terminal SNR), which sigma space cannot hold"
        )
    low, high = float(table[0]), float(table[-1])
    t = None
    if ladder in LADDERS:
        kept = getattr(schedules, ladder)(n, low, high, append_zero=False)
    elif ladder in SPACINGS:
        T = len(schedule)
        index = (
            np.linspace(T - 1, 0, n)
            if ladder == "linspace"
            else schedules.timestep_spacing(T, n, ladder).astype(np.float64)
        )
        kept = np.interp(index, np.arange(T), table)
        t = np.interp(index, np.arange(T), np.asarray(schedule.timesteps, np.float64))
    else:
        allowed = ", ".join((*LADDERS, *SPACINGS))
        raise ValueError(f"ladder must be one of {allowed}, not {ladder!r}")
    return Levels(np.append(kept, 0.0 if final == "zero" else low), t, schedule)


@dataclass(frozen=True)
class Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x; t) of one network.

        prediction_type   c_skip           c_out                              t
        "sample"          0                1                                  sigma
        "epsilon"         1                -sigma                             of the schedule
        "v_prediction"    1/(sigma^2 + 1)  -sigma/sqrt(sigma^2 + 1)           of the schedule
        "edm"             s^2/(sigma^2 + s^2)  sigma s/sqrt(sigma^2 + s^2)    log(sigma) / 4
        "edm_v"           as "edm"         minus that of "edm"                log(sigma) / 4

    with s = sigma_data. c_in is alpha_t: 1/sqrt(sigma^2 + 1) for "vp" scaling, 1 for "ve",
    1/(sigma + 1) for "flow" (as are c_skip, c_out of any other type that prediction.py knows, and
    of "epsilon" and "v_prediction" above for vp); 1/sqrt(sigma^2 + s^2) for the edm types (EDM
    table 1, column "Ours").

    Attributes:
        scaling: "vp", "ve" or "flow": what the network was trained on. Default: the schedule's;
            without one "ve" for "sample", else "vp".
        schedule: gives t by interpolation over log sigma, as k-diffusion and diffusers do; without
            it, and where its timesteps are its sigmas, t is sigma itself.
        quantize: the nearest training timestep instead.
        clip: bounds of D, or None.
    """

    prediction_type: str = "sample"
    scaling: str | None = None
    sigma_data: float = 0.5
    schedule: schedules.Schedule | None = None
    quantize: bool = False
    clip: tuple[float, float] | None = None
    _log_sigmas: FloatArray | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        as_flag("quantize", self.quantize)
        object.__setattr__(self, "clip", check_clip(self.clip))
        object.__setattr__(self, "sigma_data", as_float("sigma_data", self.sigma_data))
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be > 0, not {self.sigma_data}")
        scaling = self.scaling
        if self.schedule is not None:
            object.__setattr__(self, "_log_sigmas", np.log(self.schedule.sigmas))
            scaling = scaling or _scaling_of(self.schedule)
        if scaling is None:
            scaling = "ve" if self.prediction_type == "sample" else "vp"
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, not {scaling!r}")
        object.__setattr__(self, "scaling", scaling)
        self.scalings(1.0)  # refuses unknown prediction types

    def scalings(self, sigma: float) -> tuple[float, float, float]:
        """(c_skip, c_out, c_in) at a noise level."""
        if self.prediction_type in ("edm", "edm_v"):
            s, norm = self.sigma_data, math.hypot(sigma, self.sigma_data)
            c_out = sigma * s / norm
            return (s / norm) ** 2, c_out if self.prediction_type == "edm" else -c_out, 1 / norm
        if self.scaling == "vp":
            norm = math.hypot(sigma, 1.0)
            if self.prediction_type == "epsilon":
                return 1.0, -sigma, 1.0 / norm
            alpha_t, sigma_t = 1.0 / norm, sigma / norm
        elif self.scaling == "ve":
            alpha_t, sigma_t = 1.0, sigma
        else:
            alpha_t, sigma_t = 1.0 / (1.0 + sigma), sigma / (1.0 + sigma)
        p, q = x_0_of(self.prediction_type, np.array(alpha_t), np.array(sigma_t))
        return float(p) * alpha_t, float(q), alpha_t

    def t(self, sigma: float) -> float:
        """What the network is told about a noise level."""
        if self.prediction_type in ("edm", "edm_v"):
            return 0.25 * math.log(sigma)
        if self.schedule is None or self._log_sigmas is None:
            return sigma
        log_sigma = math.log(sigma)
        index = float(np.interp(log_sigma, self._log_sigmas, np.arange(len(self._log_sigmas))))
        if self.quantize:
            index = float(np.abs(self._log_sigmas - log_sigma).argmin())
        times = np.asarray(self.schedule.timesteps, np.float64)
        if np.array_equal(times, self.schedule.sigmas):
            return sigma
        return float(np.interp(index, np.arange(len(times)), times))


def _scaling_of(schedule: schedules.Schedule) -> str:
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    for name, gap in (
        ("ve", alpha - 1), ("vp", alpha**2 + sigma**2 - 1), ("flow", alpha + sigma - 1)
    ):  # fmt: skip
        if np.abs(gap).max() < 1e-6:
            return name
    raise ValueError("scaling must be given: the schedule is neither ve, vp nor flow")


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
        described = {"prediction_type": denoiser.prediction_type, "scaling": str(denoiser.scaling)}
        if levels.schedule is not None:
            described["schedule"] = levels.schedule.name
        self._recorder = Recorder(name, described | (about or {}), draw_dtype="model_output")

    def begin(self) -> LinearForm:
        return self._recorder.begin(scale=float(self.levels.sigmas[0]))

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
    levels: Levels, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Sequence[tuple[float, float]]:
    """(sigma_hat, scale of the noise) of every step: EDM algorithm 2, lines 4 to 6."""
    s_churn, s_noise = as_float("s_churn", s_churn), as_float("s_noise", s_noise)
    if s_churn < 0:
        raise ValueError(f"s_churn must be >= 0, not {s_churn}")
    result = []
    for _, sigma, _ in levels.steps():
        inside = s_tmin <= sigma <= s_tmax
        gamma = min(s_churn / len(levels), math.sqrt(2) - 1) if inside else 0.0
        # sqrt(sigma_hat^2 - sigma^2) = sigma sqrt(gamma (2 + gamma))
        result.append((sigma * (1 + gamma), sigma * math.sqrt(gamma * (2 + gamma)) * s_noise))
    return result
