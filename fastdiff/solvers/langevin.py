"""Langevin dynamics of score models: NCSN's annealed chain, and score SDEs' predictor-corrector.

A score model gives s(x, sigma), the gradient of log q_sigma(x). With x = alpha x_0 + sigma eps,

    s = -eps / sigma = (alpha x_0 - x) / sigma^2

so models of eps or x_0 serve as well.

Sources, cited by the names used below:
  NCSN    Song, Ermon 2019, "Generative modeling by estimating gradients of the data distribution"
  NCSNv2  Song, Ermon 2020, "Improved techniques for training score-based generative models"
  SDE     Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, "Score-based generative modeling
          through stochastic differential equations"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.plan import SolverPlan
from fastdiff.schedules import GaussianPath, NoiseSchedule, ve, ve_geometric
from fastdiff.schedules._values import FloatArray, as_flag, as_float, as_float_vector, as_int
from fastdiff.solvers.checks import check_choice
from fastdiff.tracing import LinearForm, Recorder

__all__ = ["ncsn", "ncsnv2", "ncsnv2_step_size", "score_sde_ve", "score_sde_vp"]

PREDICTION_TYPES = ("score", "epsilon", "sample")
PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow")
Sigmas = GaussianPath | Sequence[float] | FloatArray


def ncsn(
    sigmas: Sigmas,
    *,
    steps_per_level: int = 100,
    step_size: float = 2e-5,
    prediction_type: str = "score",
    denoise: bool = False,
) -> SolverPlan:
    """Annealed Langevin dynamics (NCSN algorithm 1).

        for sigma_i from sigma_1, the largest, to sigma_L:
            alpha_i = step_size sigma_i^2 / sigma_L^2
            steps_per_level times:  x' = x + alpha_i / 2 s(x, sigma_i) + sqrt(alpha_i) z

    The chain starts from sigma_1 times standard normal noise; give x_T for another start (the
    paper's is uniform). The code released with the paper takes the step of ncsnv2(), that is
    twice this step_size.

    Args:
        sigmas: (L,) noise levels, strictly monotone, > 0, which the model is given as its t; or
            schedules.ve(sigmas, timesteps=labels) for a model that takes labels.
        steps_per_level: T.
        step_size: epsilon; below 4 sigma_L^2, from where on the chain diverges.
        prediction_type: of the model: "score", "epsilon" or "sample".
        denoise: end with x + sigma_L^2 s(x, sigma_L), as ncsnv2() does.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _annealed("NCSN", sigmas, steps_per_level, step_size, 0.5, prediction_type, denoise)


def ncsnv2(
    sigmas: Sigmas,
    *,
    steps_per_level: int = 5,
    step_size: float | None = None,
    prediction_type: str = "score",
    denoise: bool = True,
) -> SolverPlan:
    """Annealed Langevin dynamics with the improved techniques (NCSNv2 algorithm 1).

        for sigma_i from sigma_1, the largest, to sigma_L:
            alpha_i = step_size sigma_i^2 / sigma_L^2
            steps_per_level times:  x' = x + alpha_i s(x, sigma_i) + sqrt(2 alpha_i) z
        x + sigma_L^2 s(x, sigma_L)                                                   denoise

    Args:
        step_size: epsilon, below 2 sigma_L^2; None: ncsnv2_step_size() of a geometric ladder.

    Other arguments and errors: see ncsn().
    """
    if step_size is None:
        step_size = ncsnv2_step_size(_ladder(sigmas).sigma_t[::-1], steps_per_level)
    return _annealed("NCSNv2", sigmas, steps_per_level, step_size, 1.0, prediction_type, denoise)


def ncsnv2_step_size(sigmas: Sequence[float] | FloatArray, steps_per_level: int) -> float:
    """epsilon that brings the chain's variance at every level closest to the level's own.

    With a = epsilon / sigma_L^2, gamma = sigma_{i-1} / sigma_i and T steps a level, for data at a
    point, the variance after a level over sigma_i^2 is (NCSNv2 proposition 3 and technique 4)

        (1 - a)^{2T} (gamma^2 - 2/(2 - a)) + 2/(2 - a)

    which is above 1 and has one minimum in a: its derivative is bisected to float64 precision.

    Args:
        sigmas: (L,) geometric, L >= 2, > 0, any direction.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    levels = np.sort(as_float_vector("sigmas", sigmas))[::-1]
    T = as_int("steps_per_level", steps_per_level, 1)
    if levels.size < 2 or not levels[-1] > 0 or not np.isfinite(levels[0]):
        raise ValueError("sigmas must be at least 2 finite levels > 0")
    ratios = np.diff(np.log(levels))
    if np.ptp(ratios) > 1e-4 * abs(ratios[0]) or ratios[0] == 0:
        raise ValueError("sigmas must be geometric (schedules.ve_geometric): give step_size")
    excess = math.expm1(-2.0 * float(ratios.mean()))  # gamma^2 - 1

    def slope(a: float) -> float:
        left = (1.0 - a) ** (2 * T)
        return 2 * (1 - left) / (2 - a) ** 2 - 2 * T * (1 - a) ** (2 * T - 1) * (
            excess - a / (2 - a)
        )

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(high * levels[-1] ** 2)


def score_sde_ve(
    sigmas: int | Sigmas = 1000,
    *,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
    sampling_eps: float = 1e-5,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    prediction_type: str = "score",
    denoise: bool = True,
) -> SolverPlan:
    """Predictor-corrector sampling of the variance-exploding SDE (SDE algorithms 2 and 4).

    At every level, from the noisiest, corrector_steps times

        eps = 2 (snr ||z|| / ||s||)^2,    x' = x + eps s + sqrt(2 eps) z

    with norms averaged over the batch and the step size measured on the device
    (fastdiff/ops/corrector.py), and then one step of the predictor to the next level sigma',
    which is 0 at the end:

        reverse_diffusion   x' = x + (sigma^2 - sigma'^2) s + sqrt(sigma^2 - sigma'^2) z    eq. 46
        ancestral           the same, noise sqrt(sigma'^2 (sigma^2 - sigma'^2) / sigma^2) z  eq. 47
        euler_maruyama      x' = x + g^2 dt s + g sqrt(dt) z,  g^2 = d sigma^2 / dt, dt = 1/N
        probability_flow    x' = x + (sigma^2 - sigma'^2) / 2 s

    The order, corrector first, is that of the released code and of diffusers (the printed
    algorithm begins with the predictor and so ends with a corrector).

    Args:
        sigmas: N levels of the SDE sigma(t) = sigma_min (sigma_max / sigma_min)^t at t from 1 to
            sampling_eps, the model given sigma(t); or a ladder of a discrete model, as in ncsn()
            (euler_maruyama is reverse_diffusion there).
        predictor: one of the above.
        corrector_steps: M; 0 leaves the predictor alone. Every one is a model call.
        snr: r > 0, the signal-to-noise ratio of the corrector.
        prediction_type: "score" or "epsilon"; without corrector "sample" too.
        denoise: no noise in the last step.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(sigmas, int | np.integer):
        low, high = as_float("sigma_min", sigma_min), as_float("sigma_max", sigma_max)
        N = as_int("sigmas", sigmas, 1)
        discrete = ve_geometric(N, low, high, append_zero=False)[::-1]
        t, index = _times(sampling_eps, N)
        sigma = low * (high / low) ** t
        here, labels = discrete[index], sigma
        there = np.where(index > 0, discrete[index - 1], 0.0)
        rate = sigma**2 * (2 * math.log(high / low) / N)
    else:
        path = _ladder(sigmas)
        sigma = here = path.sigma_t[::-1]
        labels = np.asarray(path.timesteps, np.float64)[::-1]
        there = np.append(here[1:], 0.0)
        rate = (here - there) * (here + there)
    gap = (here - there) * (here + there)
    one = np.ones_like(gap)
    steps = {
        "reverse_diffusion": (one, gap, np.sqrt(gap)),
        "ancestral": (one, gap, there * np.sqrt(gap) / here),
        "euler_maruyama": (one, rate, np.sqrt(rate)),
        "probability_flow": (one, gap / 2, 0 * one),
    }
    levels = _Levels(labels, one, sigma, one, *_choose(steps, predictor))
    return _predictor_corrector(
        f"VE SDE, {predictor}", levels, float(sigma[0]), corrector_steps, snr, prediction_type,
        denoise,
    )  # fmt: skip


def score_sde_vp(
    schedule: int | NoiseSchedule = 1000,
    *,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    sampling_eps: float = 1e-3,
    timestep_scale: float = 999.0,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    prediction_type: str = "score",
    denoise: bool = True,
) -> SolverPlan:
    """Predictor-corrector sampling of the variance-preserving SDE (SDE algorithms 3 and 5).

    As score_sde_ve(), with the corrector's step size times 1 - beta and the predictors

        reverse_diffusion   x' = (2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z
        ancestral           x' = (x + beta s) / sqrt(1 - beta) + sqrt(beta) z               eq. 4
        euler_maruyama      x' = (1 + b / 2) x + b s + sqrt(b) z,  b = beta(t) / N
        probability_flow    x' = (2 - sqrt(1 - beta)) x + beta / 2 s

    Args:
        schedule: N levels of the SDE with beta(t) = beta_min + t (beta_max - beta_min) at t from 1
            to sampling_eps, beta_i even from beta_min / N to beta_max / N, the model given
            t * timestep_scale; or the chain of a discrete model (DDPM), with its own timesteps
            (b = beta_i there).

    Other arguments and errors: see score_sde_ve().
    """
    if isinstance(schedule, int | np.integer):
        low, high = as_float("beta_min", beta_min), as_float("beta_max", beta_max)
        N = as_int("schedule", schedule, 1)
        if not 0 < low <= high < N:
            raise ValueError(f"beta_min, beta_max must be 0 < beta_min <= beta_max < N = {N}")
        t, index = _times(sampling_eps, N)
        log_alpha = -0.25 * t**2 * (high - low) - 0.5 * t * low  # SDE eq. 33
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        beta = np.linspace(low / N, high / N, N)[index]
        rate = (low + t * (high - low)) / N
        labels = t * as_float("timestep_scale", timestep_scale)
    elif isinstance(schedule, NoiseSchedule):
        beta = rate = schedule.betas[::-1]
        alpha, sigma = schedule.alpha_t[::-1], schedule.sigma_t[::-1]
        labels = np.asarray(schedule.timesteps, np.float64)[::-1]
        if (beta == 1).any() or (sigma == 0).any():
            raise ValueError("schedule must have every beta below 1 and noise at every step")
    else:
        raise TypeError(
            f"schedule must be an int or a NoiseSchedule, not {type(schedule).__name__}"
        )
    root = np.sqrt(1 - beta)
    grown = 1 + beta / (1 + root)  # 2 - sqrt(1 - beta)
    steps = {
        "reverse_diffusion": (grown, beta, np.sqrt(beta)),
        "ancestral": (1 / root, beta / root, np.sqrt(beta)),
        "euler_maruyama": (1 + rate / 2, rate, np.sqrt(rate)),
        "probability_flow": (grown, beta / 2, 0 * beta),
    }
    levels = _Levels(labels, alpha, sigma, 1 - beta, *_choose(steps, predictor))
    return _predictor_corrector(
        f"VP SDE, {predictor}", levels, 1.0, corrector_steps, snr, prediction_type, denoise
    )


@dataclass(frozen=True)
class _Levels:
    """(N,) arrays, noisiest first: the model's t, the path, the corrector's factor, and the
    predictor's step x' = a x + b s + c z."""

    t: FloatArray
    alpha: FloatArray
    sigma: FloatArray
    factor: FloatArray
    a: FloatArray
    b: FloatArray
    c: FloatArray


def _predictor_corrector(
    name: str,
    levels: _Levels,
    scale: float,
    corrector_steps: int,
    snr: float,
    prediction_type: str,
    denoise: bool,
) -> SolverPlan:
    M, r = as_int("corrector_steps", corrector_steps, 0), as_float("snr", snr)
    last = as_flag("denoise", denoise)
    if r <= 0:
        raise ValueError(f"snr must be > 0, got {r}")
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if M and prediction_type == "sample":
        raise ValueError(
            "prediction_type must be 'score' or 'epsilon' with a corrector: the norm that it "
            "measures is that of the model's output"
        )
    N = len(levels.t)
    about = {"prediction_type": prediction_type, "corrector_steps": str(M), "snr": str(r)}
    rec = Recorder(f"{name}, {N} levels", about=about)
    x = rec.begin(scale)
    for i in range(N):
        t, alpha, sigma = float(levels.t[i]), float(levels.alpha[i]), float(levels.sigma[i])
        for _ in range(M):
            x, o = rec.call(x, t)
            s = _score(rec, prediction_type, x, o, alpha, sigma)
            x = rec.corrector(x, s, r * math.sqrt(levels.factor[i]))
        x, o = rec.call(x, t)
        s = _score(rec, prediction_type, x, o, alpha, sigma)
        x = float(levels.a[i]) * x + float(levels.b[i]) * s
        if levels.c[i] > 0:
            x = x + (0.0 if last and i == N - 1 else float(levels.c[i])) * rec.noise()
    return rec.finish(x)


def _annealed(
    name: str,
    sigmas: Sigmas,
    steps_per_level: int,
    step_size: float,
    drift: float,
    prediction_type: str,
    denoise: bool,
) -> SolverPlan:
    """x' = x + drift alpha_i s + sqrt(2 drift alpha_i) z at every level."""
    path = _ladder(sigmas)
    T, epsilon = as_int("steps_per_level", steps_per_level, 1), as_float("step_size", step_size)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    smallest = float(path.sigma_t[0])
    if not 0 < drift * epsilon < 2 * smallest**2:
        raise ValueError(
            f"step_size must be in (0, {2 / drift:g} sigma_L^2 = {2 * smallest**2 / drift:g}), "
            f"beyond which the chain diverges, got {epsilon}"
        )
    about = {"prediction_type": prediction_type, "step_size": f"{epsilon:.6g}"}
    rec = Recorder(f"{name}, {len(path)} levels of {T} steps", about=about)
    x = rec.begin(float(path.sigma_t[-1]))
    for i in reversed(range(len(path))):
        t, sigma = float(path.timesteps[i]), float(path.sigma_t[i])
        alpha = epsilon * (sigma / smallest) ** 2
        for _ in range(T):
            x, o = rec.call(x, t)
            s = _score(rec, prediction_type, x, o, 1.0, sigma)
            x = x + drift * alpha * s + math.sqrt(2 * drift * alpha) * rec.noise()
    if as_flag("denoise", denoise):
        x, o = rec.call(x, float(path.timesteps[0]))
        s = _score(rec, prediction_type, x, o, 1.0, smallest)
        x = o if prediction_type == "sample" else x + smallest**2 * s
    return rec.finish(x)


def _score(
    rec: Recorder, kind: str, x: LinearForm, o: LinearForm, alpha: float, sigma: float
) -> LinearForm:
    """s(x, sigma); x_0 = (x + sigma^2 s) / alpha (Tweedie) is the call's preview."""
    if kind == "sample":
        rec.preview(o)
        return (alpha * o - x) / sigma**2
    s = o if kind == "score" else -o / sigma
    rec.preview((x + sigma**2 * s) / alpha)
    return s


def _ladder(sigmas: Sigmas) -> GaussianPath:
    """Variance-exploding levels > 0, index counting up in noise."""
    path = sigmas if isinstance(sigmas, GaussianPath) else ve(sigmas)
    if (path.alpha_t != 1).any() or path.sigma_t[0] == 0:
        raise ValueError("sigmas must be a variance-exploding path (alpha 1) with every level > 0")
    return path


def _times(sampling_eps: float, N: int) -> tuple[FloatArray, np.ndarray]:
    """t from 1 to sampling_eps, and the discrete level of every t: floor(t (N - 1))."""
    eps = as_float("sampling_eps", sampling_eps)
    if not 0 < eps < 1:
        raise ValueError(f"sampling_eps must be in (0, 1), got {eps}")
    t = np.linspace(1.0, eps, N)
    return t, np.floor(t * (N - 1)).astype(np.int64)


def _choose(
    steps: dict[str, tuple[FloatArray, FloatArray, FloatArray]], predictor: str
) -> tuple[FloatArray, FloatArray, FloatArray]:
    check_choice("predictor", predictor, PREDICTORS)
    return steps[predictor]
