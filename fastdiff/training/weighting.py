"""Weights of a training loss by noise level: float64 tables, a number for every t of a schedule.

    weighted loss of a sample = w(t) * loss of the sample,    w = MinSNR(gamma=5)(schedule, "v")

Each weighting is defined by its source for the error of one quantity (x_0, epsilon ..). At a given
x_t = alpha x_0 + sigma epsilon all errors are multiples of the error of x_0,

    epsilon  alpha / sigma         v     (alpha^2 + sigma^2) / sigma
    score    alpha / sigma^2       flow  (alpha + sigma) / sigma

so the same weighted mean square has a weight for any of them: w times the square of the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from fastdiff.schedules import Schedule
from fastdiff.schedules._values import FloatArray, as_float, as_float_vector, refuse_where
from fastdiff.solvers.checks import check_choice, check_positive

__all__ = [
    "EDM",
    "NAMES",
    "P2",
    "TARGETS",
    "Constant",
    "CosMap",
    "LogitNormal",
    "MinSNR",
    "SigmaSquared",
    "Sigmoid",
    "TruncatedSNR",
    "Weighting",
    "from_parts",
    "parts_of",
    "weighting_of",
    "weights",
]  # fmt: skip

# What a model is trained on: the noise, x_0, v (Salimans & Ho 2022), dx/dt of the straight path,
# the score of q(x_t | x_0).
TARGETS = ("epsilon", "sample", "v", "flow", "score")


def _ratio(schedule: Schedule, source: str, target: str) -> FloatArray:
    """(error of source / error of target)^2 at the same x_t; nan or inf where there is none."""
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    powers = {"epsilon": (1, -1), "sample": (0, 0), "v": (0, -1), "flow": (0, -1), "score": (1, -2)}
    sums = {"v": alpha**2 + sigma**2, "flow": alpha + sigma}
    # Powers are subtracted before they are raised: nothing is divided that cancels.
    (a, b), (c, d) = powers[source], powers[target]
    root = alpha ** float(a - c) * sigma ** float(b - d)
    return np.square(root * sums.get(source, 1.0) / sums.get(target, 1.0))


class Weighting:
    """A weight for every t of a schedule: `weighting(schedule, target)` is float64 (T,).

    Weightings with equal parameters are equal.

    Raises ValueError for an unknown target, and where a weight is not finite, naming t.
    """

    def __call__(self, schedule: Schedule, target: str = "epsilon") -> FloatArray:
        check_choice("target", target, TARGETS)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            values = np.array(np.broadcast_to(self._values(schedule, target), len(schedule)))
        return _checked(values, f"{self!r} of {target!r}")

    def _values(self, schedule: Schedule, target: str) -> Any:
        raise NotImplementedError


def _checked(values: FloatArray, what: str) -> FloatArray:
    wrong = ~(np.isfinite(values) & (values >= 0))
    refuse_where(f"weighting {what}", values, wrong, "be finite and >= 0")
    return values


@dataclass(frozen=True)
class Constant(Weighting):
    """w = 1 whatever the target: L_simple (Ho et al. 2020, eq. 14)."""

    def _values(self, schedule: Schedule, target: str) -> Any:
        return 1.0


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(snr, gamma) on x_0 (Hang et al. 2023, eq. 8).

    That is min(snr, gamma) / snr on epsilon and, for alpha^2 + sigma^2 = 1,
    min(snr, gamma) / (snr + 1) on v. snr = alpha^2 / sigma^2.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", check_positive("gamma", self.gamma))

    def _values(self, schedule: Schedule, target: str) -> Any:
        on_x, on_epsilon = (_ratio(schedule, name, target) for name in ("sample", "epsilon"))
        return np.where(schedule.snr <= self.gamma, on_epsilon, self.gamma * on_x)


@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(snr, 1) on x_0 (Salimans & Ho 2022, section 4)."""

    def _values(self, schedule: Schedule, target: str) -> Any:
        on_x, on_epsilon = (_ratio(schedule, name, target) for name in ("sample", "epsilon"))
        return np.where(schedule.snr >= 1, on_epsilon, on_x)


@dataclass(frozen=True)
class P2(Weighting):
    """1 / (k + snr)^gamma on epsilon (Choi et al. 2022, eq. 8)."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_positive("k", self.k))
        object.__setattr__(self, "gamma", check_positive("gamma", self.gamma, zero=True))

    def _values(self, schedule: Schedule, target: str) -> Any:
        weight = (self.k + schedule.snr) ** -self.gamma
        return weight * _ratio(schedule, "epsilon", target)


@dataclass(frozen=True)
class Sigmoid(Weighting):
    """w(log snr) = sigmoid(bias - log snr) on epsilon (Kingma & Gao 2023, section 4), which is
    e^bias sigmoid(log snr - bias) on x_0 (Hoogeboom et al. 2024).

    The factor of the loss of t and no more, like the other weightings of a chain: levels count as
    often as the schedule has them. The papers' integral over log snr is the same for every
    schedule; with t drawn evenly its weight has one factor more, -d log snr / dt:

        def weighting(schedule):
            return -np.gradient(schedule.log_snr) * Sigmoid(bias)(schedule, target)
    """

    bias: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", as_float("bias", self.bias))

    def _values(self, schedule: Schedule, target: str) -> Any:
        weight = 1.0 / (1.0 + np.exp(schedule.log_snr - self.bias))
        return weight * _ratio(schedule, "epsilon", target)


@dataclass(frozen=True)
class EDM(Weighting):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0, sigma that of x_t / alpha_t
    (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma_data", check_positive("sigma_data", self.sigma_data))

    def _values(self, schedule: Schedule, target: str) -> Any:
        weight = 1.0 + (schedule.sigmas / self.sigma_data) ** 2
        return weight * _ratio(schedule, "epsilon", target)


@dataclass(frozen=True)
class SigmaSquared(Weighting):
    """lambda(sigma) = sigma^2 on the score (Song & Ermon 2019, section 4.2): 1 on epsilon."""

    def _values(self, schedule: Schedule, target: str) -> Any:
        return _ratio(schedule, "epsilon", target)


@dataclass(frozen=True)
class LogitNormal(Weighting):
    """The logit-normal density on the flow (Esser et al. 2024, eq. 19), for t drawn evenly:

        w = exp(-(logit(t) - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t))

    t = sigma / (alpha + sigma), 1 for noise.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", as_float("mean", self.mean))
        object.__setattr__(self, "std", check_positive("std", self.std))

    def _values(self, schedule: Schedule, target: str) -> Any:
        alpha, sigma = schedule.alpha_t, schedule.sigma_t
        z = (np.log(sigma / alpha) - self.mean) / self.std
        density = np.exp(-0.5 * z * z) * (alpha + sigma) ** 2 / (alpha * sigma)
        density = np.where((alpha == 0) | (sigma == 0), 0.0, density)
        weight = density / (self.std * math.sqrt(2.0 * math.pi))
        return np.where(weight == 0, 0.0, weight * _ratio(schedule, "flow", target))


@dataclass(frozen=True)
class CosMap(Weighting):
    """2 / (pi (1 - 2 t + 2 t^2)) on the flow (Esser et al. 2024, eq. 21), for t drawn evenly;
    t = sigma / (alpha + sigma)."""

    def _values(self, schedule: Schedule, target: str) -> Any:
        t = schedule.sigma_t / (schedule.alpha_t + schedule.sigma_t)
        weight = 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t * t))
        return weight * _ratio(schedule, "flow", target)


NAMES: dict[str, type[Weighting]] = {
    "constant": Constant, "min_snr": MinSNR, "truncated_snr": TruncatedSNR, "p2": P2,
    "sigmoid": Sigmoid, "edm": EDM, "sigma_squared": SigmaSquared, "logit_normal": LogitNormal,
    "cosmap": CosMap,
}  # fmt: skip

AnyWeighting = str | Weighting | Callable[[Schedule], Any] | None


def weighting_of(weighting: AnyWeighting) -> Weighting | Callable[[Schedule], Any]:
    """The weighting that an argument names: a key of NAMES with its usual parameters, a Weighting,
    a function of the schedule that returns (T,) numbers, or None, which is Constant().

    Raises ValueError or TypeError naming `weighting`.
    """
    if weighting is None:
        return Constant()
    if isinstance(weighting, str):
        check_choice("weighting", weighting, tuple(NAMES))
        return NAMES[weighting]()
    if isinstance(weighting, type) or not callable(weighting):
        raise TypeError(
            f"weighting must be a name, a Weighting or a function of the schedule, "
            f"not {weighting!r}"
        )
    return weighting


def parts_of(weighting: Any) -> Any:
    """(type, *parameters) of a weighting that has parameters, for from_parts; others as they are.

    torch.compile hands objects that compiled code makes to the function that fills a table, but
    not the attributes they were given.
    """
    if not is_dataclass(weighting):
        return weighting
    return type(weighting), *(getattr(weighting, field.name) for field in fields(weighting))


def from_parts(parts: Any) -> Any:
    """The weighting that parts_of took apart."""
    return parts[0](*parts[1:]) if isinstance(parts, tuple) else parts


def weights(weighting: AnyWeighting, schedule: Schedule, target: str = "epsilon") -> FloatArray:
    """float64 (T,): the weight of every t on the error of `target`, one of TARGETS.

    Raises ValueError or TypeError naming `weighting`: unknown, of another length than the
    schedule, or with an entry that is not finite and >= 0.
    """
    found = weighting_of(weighting)
    if isinstance(found, Weighting):
        return found(schedule, target)
    values = as_float_vector("weighting(schedule)", found(schedule), length=len(schedule))
    return _checked(values, "(schedule)")
