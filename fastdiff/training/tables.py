"""Coefficients of the variational bound for the fused loss: float64 on the host, a row per t.

The bound's term of t is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) with
256 bins at t = 0 (Ho et al. 2020, eqs. 5, 8, 13). Both means are the posterior's, of x_0 and of its
prediction, so x_t drops out of their difference:

    d = c1_t (x_0 - prediction of x_0),  or  c1_t x_0 + c2_t x_t - o  where o is the mean itself

c1_t, c2_t of DDPM eq. 7; c1 = 1 at t = 0, where d is what the likelihood needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.held import held
from fastdiff.ops.loss import BOUND, COLUMNS, ERROR, X_START, LossSpec
from fastdiff.schedules import NoiseSchedule
from fastdiff.schedules._values import FloatArray
from fastdiff.solvers import prediction
from fastdiff.solvers.checks import check_choice

__all__ = [
    "LEARNED", "PREDICTION_TYPES", "UPSTREAM_FLOOR", "VARIANCES", "BoundKind", "Clip", "bound_spec",
    "bound_table", "pack_columns", "table_of", "target_columns", "target_mask", "x_start_columns",
]  # fmt: skip

# What the model's output is: as in fastdiff.solvers, and the mean of x_{t-1}.
PREDICTION_TYPES = (*prediction.PREDICTION_TYPES, "previous")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
LEARNED = VARIANCES[2:]  # the model's output has twice the channels

# What DDPM's code and its descendants let a bin cost at most: its probability is at least 1e-12.
UPSTREAM_FLOOR = -math.log(1e-12)

Clip = tuple[float, float] | None
X_0, X_T, OUTPUT, CLAMPED, NOISE = 1, 2, 4, 8, 16  # bits of the masks of error and bound


class BoundKind(NamedTuple):
    """Which terms one pass computes, and how.

    Attributes:
        prediction_type, variance: see PREDICTION_TYPES and VARIANCES.
        clip: bounds of the predicted x_0, or None.
        in_bits: the bound is a mean over the elements in bits, otherwise a sum in nats.
        floor: the most that an element costs at t = 0, in nats.
        scale: factor of the bound.
        bound: the bound is a term.
        target_error: the mean of (target - o)^2 is a term, the target what `prediction_type` says.
        x_start_error: the mean of (x_0 - prediction)^2 is a term.
        frozen: the bound does not train the mean.
    """

    prediction_type: str = "epsilon"
    variance: str = "fixed_small"
    clip: Clip = None
    in_bits: bool = True
    floor: float = math.inf
    scale: float = 1.0
    bound: bool = True
    target_error: bool = False
    x_start_error: bool = False
    frozen: bool = False

    @property
    def learned(self) -> bool:
        return self.variance in LEARNED

    @property
    def clamps(self) -> bool:
        """Whether there is a c. The mean of "previous" is not made of it."""
        used = self.clip is not None and self.bound and self.prediction_type != "previous"
        return used or self.x_start_error


def bound_spec(kind: BoundKind) -> LossSpec:
    """The structure of the pass; the same for every schedule.

    Raises ValueError naming prediction_type or variance.
    """
    check_choice("prediction_type", kind.prediction_type, PREDICTION_TYPES)
    check_choice("variance", kind.variance, VARIANCES)
    reads_x_t = kind.prediction_type != "sample"
    if kind.clamps and kind.prediction_type != "previous":
        mask = X_0 | CLAMPED
    else:
        mask = X_0 | OUTPUT | (X_T if reads_x_t else 0)
    spec = LossSpec(
        0, bound=mask if kind.bound else 0, clamp=2 | reads_x_t if kind.clamps else None,
        learned=kind.learned, frozen=kind.frozen,
    )  # fmt: skip
    terms = (BOUND if kind.bound else 0) | (X_START if kind.x_start_error else 0)
    if kind.target_error:
        spec = replace(spec, error=target_mask(kind.prediction_type))
        terms |= ERROR
    return replace(spec, terms=terms)


def target_mask(prediction_type: str, from_x_t: bool = False) -> int:
    """The columns of target_columns, as LossSpec.error."""
    check_choice("prediction_type", prediction_type, (*PREDICTION_TYPES, "score"))
    reads = {
        "epsilon": NOISE, "sample": X_0, "v_prediction": X_0 | NOISE, "flow": X_0 | NOISE,
        "score": NOISE, "previous": X_0 | X_T,
    }[prediction_type]  # fmt: skip
    if from_x_t and reads & NOISE:
        reads = X_0 | X_T
    return reads | OUTPUT


def target_columns(
    prediction_type: str, alpha: FloatArray, sigma: FloatArray, from_x_t: bool = False
) -> dict[str, FloatArray | float]:
    """Columns of e = target - o at x_t = alpha x_0 + sigma z: x is x_0, y is x_t.

    (Ho et al. 2020, eq. 14; Salimans & Ho 2022 for v; Vincent 2011 for the score.)

    Args:
        prediction_type: one of fastdiff.solvers.prediction.PREDICTION_TYPES, or "score".
        from_x_t: z is not read but made of x_0 and x_t; not finite where sigma is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        targets: dict[str, dict[str, FloatArray | float]] = {
            "epsilon": {"e_z": 1.0},
            "sample": {"e_x": 1.0},
            "v_prediction": {"e_x": -sigma, "e_z": alpha},
            "flow": {"e_x": -1.0, "e_z": 1.0},
            "score": {"e_z": -1.0 / sigma},
        }
        columns = targets[prediction_type]
        if from_x_t and "e_z" in columns:  # z = (x_t - alpha x_0) / sigma
            of_x_t = columns["e_z"] / sigma
            columns = {"e_x": columns.get("e_x", 0.0) - of_x_t * alpha, "e_y": of_x_t}
    return {**columns, "e_o": -1.0}


def bound_table(
    schedule: NoiseSchedule,
    kind: BoundKind,
    elements: int,
    extra: Mapping[str, FloatArray | float] | None = None,
) -> FloatArray:
    """The float64 table (T, len(COLUMNS)) of bound_spec(kind).

    Args:
        schedule: T steps; betas > 0 where the variance is beta_t or in its range.
        elements: n, of a sample.
        extra: columns that replace these, arrays (T,) or numbers.

    Raises:
        ValueError: where a prediction or a variance is not defined, naming what and t.
    """
    T = schedule.num_timesteps
    t = np.arange(T)
    c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    columns: dict[str, FloatArray | float] = {}
    if kind.clamps:
        columns["lo"], columns["hi"] = kind.clip or (-math.inf, math.inf)
        columns["p_y"], columns["p_o"] = x_start_columns(schedule, kind.prediction_type)
    if kind.target_error:
        if kind.prediction_type == "previous":
            columns |= {"e_x": c1, "e_y": c2, "e_o": -1.0}
        else:
            columns |= target_columns(kind.prediction_type, schedule.alpha_t, schedule.sigma_t)
        columns["error_scale"] = _mean(elements)
    if kind.x_start_error:
        columns["x_start_scale"] = _mean(elements)
    if kind.bound:
        columns["d_x"] = c1
        if kind.prediction_type == "previous":
            columns |= {"d_y": c2, "d_o": -1.0}
        elif kind.clamps:
            columns["d_c"] = -c1
        else:
            p, q = x_start_columns(schedule, kind.prediction_type)
            columns |= {"d_y": -c1 * p, "d_o": -c1 * q}
        true = schedule.posterior_log_variance_clipped
        l0, l1 = _log_variance(schedule, kind.variance)
        # The part of the divergence that no element changes.
        constant = 0.5 * (l0 - true + np.expm1(true - l0))
        constant = np.where((t == 0) | kind.learned, 0.0, constant)
        unit = kind.scale * (_mean(elements) / math.log(2.0) if kind.in_bits else 1.0)
        columns |= {
            "l0": l0, "l1": l1, "true_log_variance": true, "true_inverse_variance": np.exp(-true),
            "half_inverse_variance": 0.5 * np.exp(-l0), "inverse_std": np.exp(-0.5 * l0),
            "discretized": t == 0, "floor": kind.floor,
            "bound_scale": unit, "bound_offset": unit * elements * constant,
        }  # fmt: skip
    return pack_columns(T, columns | dict(extra or {}))


def pack_columns(rows: int, columns: Mapping[str, FloatArray | float]) -> FloatArray:
    """A table of the fused loss (rows, len(COLUMNS)) in float64; columns not named are 0.

    Raises ValueError naming a column with a NaN.
    """
    table = np.zeros((rows, len(COLUMNS)))
    for name, values in columns.items():
        if np.isnan(values).any():
            row = int(np.argmax(np.isnan(np.broadcast_to(values, rows))))
            raise ValueError(f"schedule leaves {name} undefined at t = {row}")
        table[:, COLUMNS.index(name)] = values
    return table


def table_of(
    schedule: NoiseSchedule, kind: BoundKind, elements: int, device: torch.device,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """bound_table on the device, rounded once to dtype, made once."""
    # Dynamo's constants are plain tuples.
    return held(schedule.fingerprint, _uploaded, schedule, tuple(kind), elements, device, dtype)


def _uploaded(
    schedule: NoiseSchedule, kind: tuple, elements: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    table = bound_table(schedule, BoundKind(*kind), elements)
    return torch.from_numpy(table).to(device=device, dtype=dtype)


def _mean(elements: int) -> float:
    """The factor that makes a sum over the elements their mean; 0 of none."""
    return 1.0 / elements if elements else 0.0


def x_start_columns(schedule: NoiseSchedule, prediction_type: str) -> tuple[FloatArray, FloatArray]:
    """(p, q) with x_0 = p x_t + q o."""
    if prediction_type != "previous":
        return prediction.denoised(prediction_type, schedule.alpha_t, schedule.sigma_t)
    c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    if (c1 == 0).any():
        t = int(np.argmax(c1 == 0))
        raise ValueError(f"betas must be > 0: x_0 cannot be had of x_(t-1) at t = {t}")
    return -c2 / c1, 1.0 / c1


def _log_variance(schedule: NoiseSchedule, variance: str) -> tuple[FloatArray, FloatArray]:
    """(l0, l1): log-variance of p(x_{t-1} | x_t) is l0 + l1 v (Nichol & Dhariwal 2021, eq. 15).

    At t = 0 a fixed variance is the posterior's of t = 1, as there is none.
    """
    small = schedule.posterior_log_variance_clipped
    zero = np.zeros_like(small)
    if variance == "learned":
        return zero, zero + 1.0
    if variance == "fixed_small":
        return small, zero
    if (schedule.betas <= 0).any():
        t = int(np.argmax(schedule.betas <= 0))
        raise ValueError(f"variance {variance!r} needs betas > 0, not betas[{t}] = 0")
    large = np.log(schedule.betas)
    if variance == "fixed_large":
        return np.append(small[:1], large[1:]), zero
    return 0.5 * (large + small), 0.5 * (large - small)
