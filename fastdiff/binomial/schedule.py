"""The schedule of a binomial chain, and the tables of the operations that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.held import held
from fastdiff.schedules._values import (
    ComparedByContent,
    FloatArray,
    as_float_vector,
    as_int,
    freeze,
    refuse_where,
)

__all__ = ["BinomialSchedule", "entropy", "table_of"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class BinomialSchedule(ComparedByContent):
    """The forward chain: T steps, each of which replaces a bit by a coin's with probability beta_t.

    Args:
        betas: (T,) real, each in (0, 1].

    Attributes, float64 and read-only:
        betas: (T,).
        alphas_cumprod: (T,), abar_t.
        posterior: (T, 2, 2), q(x_{t-1} = 1 | x_t, x_0) by [t, x_t, x_0]; at t = 0 it is x_0.

    Two schedules are equal when their betas are. Raises TypeError or ValueError naming betas.
    """

    betas: FloatArray
    alphas_cumprod: FloatArray
    posterior: FloatArray

    def __init__(self, betas: Any) -> None:
        values = as_float_vector("betas", betas)
        refuse_where("betas", values, ~((values > 0) & (values <= 1)), "be in (0, 1]")
        object.__setattr__(self, "betas", freeze(values))
        object.__setattr__(self, "alphas_cumprod", freeze(np.cumprod(1 - values)))
        object.__setattr__(self, "posterior", freeze(_posterior(self)[0]).reshape(-1, 2, 2))
        self._identify(self.betas)

    @classmethod
    def erasing(cls, steps: int) -> BinomialSchedule:
        """beta_t = 1 / (T - t + 1): each step erases 1/T of what is known, abar_t = 1 - t/T.

        Source: Sohl-Dickstein et al. 2015, section 2.4.1 and appendix B.
        """
        steps = as_int("steps", steps, 1)
        return cls(1.0 / np.arange(steps, 0, -1))

    def __repr__(self) -> str:
        return f"BinomialSchedule({self.num_timesteps} steps, abar_T = {self.alphas_cumprod[-1]:g})"


def _posterior(schedule: BinomialSchedule) -> tuple[FloatArray, FloatArray]:
    """q(x_{t-1} = 1 | x_t, x_0) and its complement, (T, 2, 2) by [t, x_t, x_0]."""
    stay = 1 - schedule.betas / 2  # a bit that is kept, or replaced by itself
    known = np.r_[1.0, schedule.alphas_cumprod[:-1]]
    one = np.empty((schedule.betas.size, 2, 2))
    zero = np.empty_like(one)
    for x_t in (0, 1):
        for x_start in (0, 1):
            before = (1 + known) / 2 if x_start else (1 - known) / 2
            after = (1 - known) / 2 if x_start else (1 + known) / 2
            one[:, x_t, x_start] = (stay if x_t else 1 - stay) * before
            zero[:, x_t, x_start] = (1 - stay if x_t else stay) * after
    return one / (one + zero), zero / (one + zero)


def entropy(p: FloatArray, rest: FloatArray) -> FloatArray:
    """Of a bit, in nats; rest = 1 - p."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(q > 0, -q * np.log(q), 0.0) for q in (p, rest)]
    return terms[0] + terms[1]


def _host_table(schedule: BinomialSchedule, kind: str) -> FloatArray:
    """The float64 table of an operation of ops/bits.py; a row per t."""
    steps = schedule.num_timesteps
    if kind == "x_t":
        return np.stack([(1 - schedule.alphas_cumprod) / 2, (1 + schedule.alphas_cumprod) / 2], 1)
    if kind == "step":
        return np.stack([schedule.betas / 2, 1 - schedule.betas / 2], 1)
    if kind == "end":
        return np.array([[0.5, 0.5]])
    if kind == "previous":
        return np.tile([0.0, 1.0], (steps, 2))
    if kind == "sample":
        return schedule.posterior.reshape(steps, 4)
    assert kind == "bound"
    q, rest = (value.reshape(steps, 4) for value in _posterior(schedule))
    scale = np.full((steps, 1), 1 / math.log(2))
    return np.concatenate([q, rest, entropy(q, rest), scale], 1)


def _uploaded(
    schedule: BinomialSchedule, kind: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.from_numpy(np.array(_host_table(schedule, kind))).to(device=device, dtype=dtype)


def table_of(
    schedule: BinomialSchedule, kind: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The table of one kind, made once, rounded once to `dtype`, on the device."""
    return held(schedule.fingerprint, _uploaded, schedule, kind, device, dtype)
