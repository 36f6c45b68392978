"""The density of a sampler's step: what a row of a plan with one state and one draw draws from.

    x_next = mean + std z,    mean = a x + b o + d clamp(P . [x, o]),    z ~ N(0, I)
    log N(x_next; mean, std^2) = -(x_next - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2

added over the elements of a sample; std is sigma, times exp of the learned half log-variance where
the model predicts it. A row without noise is a point mass: its log-density counts as 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiling import constant
from fastdiff.ops.held import held, remembered
from fastdiff.ops.loss import BOUND, COLUMNS, LossSpec
from fastdiff.plan import SolverPlan
from fastdiff.schedules._values import FloatArray

__all__ = ["check_has_density", "density_spec", "density_table"]

STATE, OUTPUT, CLAMPED, DRAW = range(4)  # columns of the plan's rows


def check_has_density(plan: SolverPlan) -> None:
    """Refuses plans whose steps do not draw from one Gaussian of x and the model output.

    Raises ValueError naming `plan`.
    """
    draws_in_clamp = plan.P is not None and bool(plan.P[:, plan.states + 1 :].any())
    reasons = {
        f"it has {plan.states} states": plan.states != 1,
        f"it has {plan.n_draws} draws a row": plan.n_draws != 1,
        "its clamp node reads the noise": draws_in_clamp,
        "it has Langevin corrector rows": plan.snr is not None,
        "it has dynamic thresholding": plan.thresholding is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"plan {plan.name!r} has no log-density of its steps: {reason}; it needs one state "
                "and one draw"
            )


@constant
def _fingerprinted(plan: SolverPlan) -> None:
    _ = plan.fingerprint


def _fingerprint(plan: SolverPlan) -> str:
    if not torch.compiler.is_compiling():
        return plan.fingerprint
    # Dynamo cannot look through a cached_property, only at what it has left.
    _fingerprinted(plan)
    found: str = plan.__dict__["fingerprint"]
    return found


@constant
def _structure(fingerprint: str, plan: SolverPlan, row: int | None) -> tuple[int, int, bool]:
    """Mask of the mean over [x_next, x, o, c], mask of the clamp or -1, whether v is there."""
    # The fingerprint makes a compiled graph guard on the plan's content.
    check_has_density(plan)
    rows = slice(None) if row is None else slice(row, row + 1)
    mask = 1
    for k in (STATE, OUTPUT, CLAMPED):
        mask |= int(plan.A[rows, 0, k].any()) << k + 1
    clamp = -1
    if mask >> CLAMPED + 1:
        assert plan.P is not None
        clamp = int(plan.P[rows, 0].any()) | int(plan.P[rows, 1].any()) << 1
    return mask, clamp, plan.learned


@remembered
def density_spec(
    plan: SolverPlan,
    row: int | None,
    makes: bool = False,
    noise_dtype: torch.dtype = torch.float32,
    fast: bool = False,
) -> LossSpec:
    """The structure of the log-density of one row, or of any (None).

    Args:
        makes: x_next is made in the same pass, with the bits of the step.

    Raises ValueError as check_has_density.
    """
    mask, clamp, learned = _structure(_fingerprint(plan), plan, row)
    return LossSpec(
        BOUND, bound=mask, clamp=None if clamp < 0 else clamp, density=True, learned=learned,
        makes=makes, noise_dtype=noise_dtype, fast=fast,
    )  # fmt: skip


def density_table(
    plan: SolverPlan, elements: int, mean: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The coefficients of every row, made once: of the sum over the elements, or of their mean."""
    return held(_fingerprint(plan), _uploaded, plan, elements, mean, device, dtype)


def _uploaded(
    plan: SolverPlan, elements: int, mean: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.from_numpy(_host_table(plan, elements, mean)).to(device=device, dtype=dtype)


def _host_table(plan: SolverPlan, elements: int, mean: bool) -> FloatArray:
    rows = plan.A[:, 0]
    noisy = rows[:, DRAW] != 0
    std = np.where(noisy, np.abs(rows[:, DRAW]), 1.0)
    scale = np.where(noisy, 1.0 / max(elements, 1) if mean else 1.0, 0.0)
    log_variance = 2.0 * np.log(std)
    columns: dict[str, FloatArray | float] = {
        "d_x": 1.0, "d_y": -rows[:, STATE], "d_o": -rows[:, OUTPUT], "d_c": -rows[:, CLAMPED],
        "sigma": rows[:, DRAW], "bound_scale": scale,
        "half_inverse_variance": 0.5 / std**2,
    }  # fmt: skip
    constant = log_variance + math.log(2.0 * math.pi)
    if plan.learned:
        # The log-variance of an element is in the sum over them: l0 + l1 v.
        low, high = plan.half_log_variance_min, plan.half_log_variance_max
        assert low is not None and high is not None
        columns |= {
            "l0": log_variance + low + high, "l1": high - low,
            "log_scale_low": low, "log_scale_high": high,
        }  # fmt: skip
        constant = np.full_like(std, math.log(2.0 * math.pi))
    columns["bound_offset"] = -0.5 * elements * constant * scale
    if plan.P is not None:
        assert plan.lo is not None and plan.hi is not None
        columns |= {"lo": plan.lo, "hi": plan.hi, "p_y": plan.P[:, 0], "p_o": plan.P[:, 1]}
    table = np.zeros((plan.rows, len(COLUMNS)))
    for name, values in columns.items():
        table[:, COLUMNS.index(name)] = values
    return table
