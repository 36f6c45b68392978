"""Flow matching and rectified flow: samplers of the straight path, as plans.

    x_t = (1 - sigma) x_0 + sigma eps,    v = dx_t / dsigma = eps - x_0,    sigma from 1 to 0
    x_0 = x_t - sigma v,    eps = x_t + (1 - sigma) v

Sources, cited by the names used below:
  FM         Lipman, Chen, Ben-Hamu, Nickel, Le 2023, "Flow matching for generative modeling"
  RF         Liu, Gong, Liu 2023, "Flow straight and fast: learning to generate and transfer data
             with rectified flow"
  EDM        Karras, Aittala, Aila, Laine 2022, "Elucidating the design space of diffusion-based
             generative models"
  Flow-GRPO  Liu et al. 2025, "Flow-GRPO: training flow matching models via online RL"
  DanceGRPO  Xue et al. 2025, "DanceGRPO: unleashing GRPO on visual generation"
  Flow-CPS   Wang, Yu 2025, "Coefficients-preserving sampling for reinforcement learning with flow
             matching"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import beta, exponential, flow_shift, karras
from fastdiff.schedules._values import (
    FloatArray,
    as_flag,
    as_float,
    as_float_vector,
    as_int,
    refuse_where,
)
from fastdiff.solvers.checks import check_choice, check_clip, check_positive
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["flow_euler", "flow_euler_ancestral", "flow_heun", "flow_sde", "flow_sigmas"]

LADDERS = {"karras": karras, "exponential": exponential, "beta": beta}
PREDICTION_TYPES = ("flow", "sample", "epsilon")
SDE_METHODS = ("flow_grpo", "dance_grpo", "cps")
Levels = int | Sequence[float] | FloatArray


def flow_sigmas(
    steps: int | None = None,
    *,
    sigmas: Sequence[float] | FloatArray | None = None,
    shift: float = 1.0,
    mu: float | None = None,
    time_shift: str = "exponential",
    shift_terminal: float | None = None,
    ladder: str | None = None,
    num_train_timesteps: int = 1000,
) -> FloatArray:
    """The noise levels that a flow sampler steps down: (n + 1,) float64, the last is 0.

        1. n even levels from 1 to the lowest training level s(1/T)/(1 + (s - 1)/T), or `sigmas`
        2. shifted: static s = shift, or by resolution (`flow_shift`, `resolution_mu`):
           s = e^mu for time_shift "exponential", s = mu for "linear"
        3. stretched so that the last level is shift_terminal: 1 - (1 - sigma)(1 - shift_terminal)
           / (1 - sigma_n)
        4. respaced between their first and last level: "karras" (EDM eq. 5), "exponential", "beta"
        5. a final 0

    The levels of diffusers' FlowMatchEulerDiscreteScheduler, which shifts the lowest level twice.

    Args:
        steps: n.
        sigmas: (n,) levels before shifting, in [0, 1], instead of steps; linspace(1, 1/n, n) is
            what pipelines of FLUX and its kin pass.
        shift, mu: at most one of them.
        num_train_timesteps: T.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if (steps is None) == (sigmas is None):
        raise ValueError("exactly one of steps and sigmas must be given")
    check_choice("time_shift", time_shift, ("exponential", "linear"))
    if ladder is not None:
        check_choice("ladder", ladder, tuple(LADDERS))
    T = as_int("num_train_timesteps", num_train_timesteps, 1)
    if steps is not None:
        (lowest,) = flow_shift([1.0 / T], shift=shift)
        levels = np.linspace(1.0, lowest, as_int("steps", steps, 1))
    else:
        levels = as_float_vector("sigmas", sigmas)
    if mu is not None and time_shift == "linear":
        linear = as_float("mu", mu)
        if linear <= 0 or shift != 1:
            raise ValueError(f"mu must be > 0 (linear) and without shift, got mu={mu}")
        levels = flow_shift(levels, shift=linear)
    else:
        levels = flow_shift(levels, shift=shift, mu=mu)
    if shift_terminal is not None:
        terminal = as_float("shift_terminal", shift_terminal)
        if not 0 < terminal < 1 or levels[-1] == 1:
            raise ValueError(
                "shift_terminal must be in (0, 1), and the last level below 1, got "
                f"{shift_terminal} and {levels[-1]}"
            )
        levels = 1 - (1 - levels) * ((1 - terminal) / (1 - levels[-1]))
    if ladder is not None and levels.size > 1:
        first, last = float(levels[0]), float(levels[-1])
        levels = LADDERS[ladder](levels.size, last, first, append_zero=False)
    return _check_levels(np.append(levels, 0.0))


def flow_euler(
    sigmas: Levels,
    *,
    stochastic: bool = False,
    invert_sigmas: bool = False,
    prediction_type: str = "flow",
    clip: tuple[float, float] | None = None,
    timesteps: Sequence[float] | None = None,
    num_train_timesteps: int = 1000,
) -> SolverPlan:
    """Euler's method on the flow ODE, or noising the estimate anew at every step.

        x' = x + (sigma' - sigma) v                                  (FM, RF: dx = v dsigma)
        x' = (1 - sigma') x_0 + sigma' z,  x_0 = x - sigma v         stochastic=True

    diffusers' FlowMatchEulerDiscreteScheduler; stochastic is its stochastic_sampling.

    Args:
        sigmas: (n + 1,) noise levels, in [0, 1], never rising; only the last may be 0. What
            flow_sigmas() returns; an int n stands for flow_sigmas(n).
        invert_sigmas: the model takes 1 - sigma and returns x_0 - eps (Mochi).
        prediction_type: of the model output o. "flow": o = v. "sample": o = x_0. "epsilon": o = eps
            (undefined at sigma = 1).
        clip: (lo, hi) bounds of x_0, or None.
        timesteps: (n,) the model's t at every level but the last; default
            sigma * num_train_timesteps.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    again, inverted = as_flag("stochastic", stochastic), as_flag("invert_sigmas", invert_sigmas)
    name = f"Flow Euler{' (stochastic)' if again else ''}"
    flow = _Flow(name, sigmas, prediction_type, clip, timesteps, num_train_timesteps, inverted)
    rec, sigma = flow.rec, flow.sigmas
    x = rec.begin()
    for i in range(flow.n):
        x, o = rec.call(x, t=flow.t[i])
        x_0, v, _ = flow.estimate(x, o, i)
        if again:
            x = (1.0 - sigma[i + 1]) * x_0 + sigma[i + 1] * rec.noise()
        else:
            x = flow.euler(x, x_0, v, sigma[i], sigma[i + 1])
    return rec.finish(x)


def flow_heun(
    sigmas: Levels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "flow",
    clip: tuple[float, float] | None = None,
    timesteps: Sequence[float] | None = None,
    num_train_timesteps: int = 1000,
) -> SolverPlan:
    """Heun's method on the flow ODE, second order: two model calls a step, one at the last.

        x~ = x + (sigma' - sigma) v(x, sigma)
        x' = x + (sigma' - sigma) (v(x, sigma) + v(x~, sigma')) / 2          (EDM algorithm 1)

    A step to sigma' = 0 is Euler's: there is nothing to predict from.

    s_churn, s_tmin, s_tmax, s_noise: noise as diffusers' FlowMatchHeunDiscreteScheduler adds it,
    with g = min(s_churn / (2n - 1), sqrt(2) - 1) where s_tmin <= sigma <= s_tmax:

        sigma^ = (1 + g) sigma,  x^ = x + s_noise sqrt(sigma^^2 - sigma^2) z
        x~ = x^ + (sigma' - sigma^) v sigma / sigma^,    v of x, from before the noise

    That is the rule of the variance-exploding path after the model call, kept for parity: on the
    straight path it does not preserve the marginals; flow_sde() does.

    Other arguments and errors: see flow_euler().
    """
    churn = check_positive("s_churn", s_churn, zero=True)
    noise_scale = check_positive("s_noise", s_noise, zero=True)
    if not s_tmin <= s_tmax:
        raise ValueError(f"s_tmin must not exceed s_tmax, got {s_tmin} and {s_tmax}")
    flow = _Flow("Flow Heun", sigmas, prediction_type, clip, timesteps, num_train_timesteps)
    rec, sigma = flow.rec, flow.sigmas
    rec.draw_dtype = "model_output"
    x = rec.begin()
    for i in range(flow.n):
        s, s_next = sigma[i], sigma[i + 1]
        gamma = min(churn / (2 * flow.n - 1), math.sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0.0
        x, o = rec.call(x, t=flow.t[i])
        x_0, v, _ = flow.estimate(x, o, i)
        x_hat, h = x, s_next - s
        if gamma > 0:
            x_hat = x + noise_scale * s * math.sqrt(gamma * (2 + gamma)) * rec.noise()
            v, h = v / (1 + gamma), s_next - s * (1 + gamma)
            x = x_hat + h * v
        else:
            x = flow.euler(x, x_0, v, s, s_next)
        if s_next == 0:
            continue
        x, o = rec.call(x, t=flow.t[i + 1])
        if gamma > 0:
            rec.noise()  # upstream draws it and it cancels
        _, v_next, _ = flow.estimate(x, o, i + 1)
        x = x_hat + (h / 2) * v + (h / 2) * v_next
    return rec.finish(x)


def flow_sde(
    sigmas: Levels,
    *,
    noise_level: float | Sequence[float] = 0.7,
    method: str = "flow_grpo",
    final_noise: bool = True,
    prediction_type: str = "flow",
    clip: tuple[float, float] | None = None,
    timesteps: Sequence[float] | None = None,
    num_train_timesteps: int = 1000,
) -> SolverPlan:
    """Stochastic sampling of a flow model with the marginals of its ODE.

        dx = [v + g^2 / (2 sigma) (x + (1 - sigma) v)] dsigma + g dw

    (Flow-GRPO, its ODE-to-SDE conversion), the reverse SDE whose score is
    -(x + (1 - sigma) v) / sigma. One step of Euler-Maruyama, with h = sigma - sigma' and noise
    level a:

        x' = x - h [v + g^2 / (2 sigma) (x + (1 - sigma) v)] + g sqrt(h) z
        method "flow_grpo":   g = a sqrt(sigma / (1 - sigma)); where sigma = 1, the next level below
                              stands for it in the denominator, as in the released code
        method "dance_grpo":  g = a

    Method "cps" keeps the path's own coefficients at every step instead (Flow-CPS), so the result
    carries no excess noise. It has not the marginals of the ODE, at any number of steps: x_0 and
    eps are the model's means, and replacing a share of eps by z loses spread.

        x' = (1 - sigma') x_0 + sigma' cos(a pi / 2) eps + sigma' sin(a pi / 2) z

    Args:
        noise_level: a, one number or (n,), one a step (0 for the steps of a window that follow the
            ODE); >= 0, and <= 1 for "cps".
        final_noise: whether the step to sigma' = 0 adds noise ("cps" never does there).

    Other arguments and errors: see flow_euler().
    """
    check_choice("method", method, SDE_METHODS)
    noisy_end = as_flag("final_noise", final_noise)
    name = f"Flow SDE ({method})"
    flow = _Flow(name, sigmas, prediction_type, clip, timesteps, num_train_timesteps)
    rec, sigma = flow.rec, flow.sigmas
    rec.draw_dtype = "float32"
    level = np.asarray(noise_level, np.float64)
    a = as_float_vector("noise_level", np.full(flow.n, level) if level.ndim == 0 else level)
    largest = 1.0 if method == "cps" else np.inf
    refuse_where("noise_level", a, ~((a >= 0) & (a <= largest)), f"be in [0, {largest:g}]")
    if a.size != flow.n or not np.isfinite(a).all():
        raise ValueError(f"noise_level must be one finite number or {flow.n} of them")
    below = next((s for s in sigma if s < 1), 0.0)
    x = rec.begin()
    for i in range(flow.n):
        s, s_next = sigma[i], sigma[i + 1]
        x, o = rec.call(x, t=flow.t[i])
        x_0, v, eps = flow.estimate(x, o, i)
        z = rec.noise()
        if method == "cps":
            angle = a[i] * (math.pi / 2)
            deterministic = s_next * math.cos(angle) if a[i] < 1 else 0.0
            x = (1.0 - s_next) * x_0 + deterministic * eps + s_next * math.sin(angle) * z
            continue
        h, g = s - s_next, a[i]
        if method == "flow_grpo":
            g = a[i] * math.sqrt(s / (1.0 - (s if s < 1 else below)))
        noise = g * math.sqrt(h) if s_next > 0 or noisy_end else 0.0
        x = flow.euler(x, x_0, v, s, s_next) - h * g * g / (2.0 * s) * eps + noise * z
    return rec.finish(x)


def flow_euler_ancestral(
    sigmas: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    prediction_type: str = "flow",
    clip: tuple[float, float] | None = None,
    timesteps: Sequence[float] | None = None,
    num_train_timesteps: int = 1000,
) -> SolverPlan:
    """Euler steps too far down, and noise back up, on the straight path.

        sigma_d = sigma' (1 + eta (sigma' / sigma - 1))
        x_d = (sigma_d / sigma) x + (1 - sigma_d / sigma) x_0
        x'  = (1 - sigma') / (1 - sigma_d) x_d
              + s_noise sqrt(sigma'^2 - sigma_d^2 (1 - sigma')^2 / (1 - sigma_d)^2) z

    diffusers' LTXEulerAncestralRFScheduler, after ComfyUI's sampler of that name; the step to 0
    returns x_0. eta = 0 is flow_euler().

    Args:
        eta: in [0, 1]: how much of the step is noised again.
        s_noise: scale of that noise, >= 0.

    Other arguments and errors: see flow_euler().
    """
    eta, noise_scale = as_float("eta", eta), as_float("s_noise", s_noise)
    if not 0 <= eta <= 1 or noise_scale < 0:
        raise ValueError(f"eta must be in [0, 1] and s_noise >= 0, got {eta} and {noise_scale}")
    name = f"Flow Euler ancestral (eta {eta:g})"
    flow = _Flow(name, sigmas, prediction_type, clip, timesteps, num_train_timesteps)
    rec, sigma = flow.rec, flow.sigmas
    rec.draw_dtype = "float32"
    x = rec.begin()
    for i in range(flow.n):
        s, s_next = sigma[i], sigma[i + 1]
        x, o = rec.call(x, t=flow.t[i])
        x_0, v, _ = flow.estimate(x, o, i)
        s_down = s_next * (1.0 + eta * (s_next / s - 1.0))
        x = flow.euler(x, x_0, v, s, s_down)
        # As upstream: noise also where s_noise alone makes the coefficient 0, not at the end.
        if eta > 0 and s_next > 0 and noise_scale > 0:
            z = rec.noise()
            if s_next < s:
                kept = (1.0 - s_next) / (1.0 - s_down)
                # a^2 - b^2 = (a - b)(a + b), with a - b = (sigma' - sigma_d) / (1 - sigma_d).
                lost = (s_next - s_down) / (1.0 - s_down) * (s_next + s_down * kept)
                x = kept * x + noise_scale * math.sqrt(lost) * z
    return rec.finish(x)


class _Flow:
    """What the samplers of this file share: checked levels, the model's t, the recorder."""

    def __init__(
        self,
        name: str,
        sigmas: Levels,
        prediction_type: str,
        clip: tuple[float, float] | None,
        timesteps: Sequence[float] | None,
        num_train_timesteps: int,
        inverted: bool = False,
    ) -> None:
        T = as_int("num_train_timesteps", num_train_timesteps, 1)
        given = np.ndim(sigmas) > 0
        levels = sigmas if given else flow_sigmas(sigmas, num_train_timesteps=T)  # type: ignore[arg-type]
        self.sigmas = _check_levels(levels).tolist()
        self.n = len(self.sigmas) - 1
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if prediction_type == "epsilon" and self.sigmas[0] == 1:
            raise ValueError("prediction_type 'epsilon' is undefined at sigma = 1: nothing of x_0")
        if inverted and prediction_type != "flow":
            raise ValueError(f"invert_sigmas needs prediction_type 'flow', not {prediction_type!r}")
        self.prediction_type, self.inverted = prediction_type, inverted
        self.bounds = check_clip(clip)
        shown = np.array(self.sigmas[:-1])
        t = (1.0 - shown if inverted else shown) * T
        if timesteps is not None:
            t = as_float_vector("timesteps", timesteps, length=self.n)
        self.t = [*t.tolist(), self.sigmas[-1] * T]
        about = {
            "sigmas": f"{self.sigmas[0]:.6g} .. {self.sigmas[-2]:.6g}, {self.sigmas[-1]:.6g}",
            "prediction_type": prediction_type, "clip": str(self.bounds),
        }  # fmt: skip
        self.rec = Recorder(f"{name}, {self.n} steps", about=about, draw_dtype="float32")

    def estimate(
        self, x: LinearForm, o: LinearForm, i: int
    ) -> tuple[LinearForm, LinearForm, LinearForm]:
        """(x_0, v, eps) at level i; x_0 is the call's preview."""
        s = self.sigmas[i]
        if self.prediction_type == "flow":
            v = -o if self.inverted else o
            x_0, eps = x - s * v, x + (1.0 - s) * v
        elif self.prediction_type == "sample":
            x_0, v, eps = o, (x - o) / s, (x - (1.0 - s) * o) / s
        else:
            x_0, v, eps = (x - s * o) / (1.0 - s), (o - x) / (1.0 - s), o
        if self.bounds is not None:
            x_0 = self.rec.clamp(x_0, *self.bounds)
            v, eps = (x - x_0) / s, (x - (1.0 - s) * x_0) / s
        self.rec.preview(x_0)
        return x_0, v, eps

    def euler(
        self, x: LinearForm, x_0: LinearForm, v: LinearForm, s: float, s_next: float
    ) -> LinearForm:
        """x + (sigma' - sigma) v, without a rest of x where x_0 says everything."""
        if self.prediction_type == "sample" or self.bounds is not None:
            return (s_next / s) * x + ((s - s_next) / s) * x_0
        return x + (s_next - s) * v


def _check_levels(sigmas: Any) -> FloatArray:
    """(n + 1,) in [0, 1], never rising, only the last may be 0."""
    levels = as_float_vector("sigmas", sigmas)
    if levels.size < 2:
        raise ValueError(f"sigmas must hold at least 2 noise levels, got {levels.size}")
    refuse_where("sigmas", levels, (levels < 0) | (levels > 1), "be in [0, 1]")
    refuse_where("sigmas", levels, np.r_[levels[:-1] == 0, False], "be > 0 before the last")
    refuse_where("sigmas", levels, np.r_[False, np.diff(levels) > 0], "never rise")
    return levels
