"""What a model predicts and is trained on, and the named beta schedules."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fastdiff.schedules import cosine, linear
from fastdiff.schedules._values import FloatArray, as_float, as_int

__all__ = [
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
    "member",
]


class ModelMeanType(enum.Enum):
    """What the model's output is."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t).

    LEARNED and LEARNED_RANGE double the model's channels: the second half is the log-variance, or
    v in [-1, 1] between the log bounds of FIXED_SMALL and FIXED_LARGE (Nichol & Dhariwal 2021,
    eq. 15).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()  # the posterior variance
    FIXED_LARGE = enum.auto()  # beta_t
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What is minimized; RESCALED_ undoes the 1/T of a uniformly drawn t in the bound."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


E = TypeVar("E", bound=enum.Enum)


def member(name: str, kind: type[E], value: object) -> E:
    """`value` as a member of `kind`; the same member of another project's copy of it counts."""
    if isinstance(value, enum.Enum) and type(value).__name__ == kind.__name__:
        found = kind.__members__.get(value.name)
        if found is not None:
            return found
    allowed = ", ".join(kind.__members__)
    raise TypeError(f"{name} must be a {kind.__name__} ({allowed}), not {value!r}")


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> FloatArray:
    """beta_t (T,) in float64 by name.

    linear   from 1e-4 to 0.02, both times 1000 / T                        (Ho et al. 2020)
    cosine   abar(u) = cos^2((u + 0.008) / 1.008 pi/2), beta <= 0.999      (Nichol & Dhariwal 2021)

    Raises ValueError for another name, TypeError or ValueError unless T >= 1.
    """
    if schedule_name == "linear":
        schedule = linear(num_diffusion_timesteps, scale_endpoints=True)
    elif schedule_name == "cosine":
        schedule = cosine(num_diffusion_timesteps)
    else:
        raise ValueError(f"schedule_name must be linear or cosine, not {schedule_name!r}")
    return np.array(schedule.betas)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], Any], max_beta: float = 0.999
) -> FloatArray:
    """beta_t = min(1 - abar(t/T) / abar((t-1)/T), max_beta), t = 1 .. T, in float64.

    (Nichol & Dhariwal 2021, section 3.2.) `alpha_bar` maps [0, 1] to the cumulative product.
    """
    count = as_int("num_diffusion_timesteps", num_diffusion_timesteps, 1)
    most = as_float("max_beta", max_beta)
    if not callable(alpha_bar):
        raise TypeError(f"alpha_bar must be a function, not {type(alpha_bar).__name__}")
    abar = np.array([float(alpha_bar(i / count)) for i in range(count + 1)])
    return np.minimum(1.0 - abar[1:] / abar[:-1], most)
