"""The losses among the cases: structure and coefficients as fd.training makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.noise import STREAM_Q_SAMPLE
from fastdiff.ops.loss import BOUND, ERROR, LossSpec, loss_arguments, partial_count
from fastdiff.schedules import NoiseSchedule
from fastdiff.training.tables import (
    BoundKind,
    bound_spec,
    bound_table,
    pack_columns,
    target_columns,
    target_mask,
)

if TYPE_CHECKING:
    from fastdiff.profiling.cases import Case

__all__ = ["ABOUT", "arguments"]

# What is computed, in a word for the reader.
ABOUT = {
    "mse": "mean squared error of epsilon, the noise made again",
    "hybrid": "the same and the bound of a learned variance, x_0 clipped, in one pass",
    "log_prob": "log-density of a solver step's sample",
}

_HYBRID = BoundKind(
    variance="learned_range", clip=(-1.0, 1.0), in_bits=True, target_error=True, frozen=True
)


def _spec(name: str) -> LossSpec:
    if name == "mse":
        return LossSpec(ERROR, target_mask("epsilon"))
    if name == "hybrid":
        return bound_spec(_HYBRID)
    return LossSpec(BOUND, bound=0b0111, density=True)  # of x, x_t and the model output


def _table(name: str, schedule: NoiseSchedule, elements: int) -> np.ndarray:
    # A weight with which no error of fast noise grows: |d e^2 / d z| <= 2 (|o| + |z|) < 32.
    weight = {"error_scale": 1 / (32 * elements)}
    T = schedule.num_timesteps
    if name == "mse":
        columns = target_columns("epsilon", schedule.alpha_t, schedule.sigma_t)
        return pack_columns(T, columns | weight)
    if name == "hybrid":
        return bound_table(schedule, _HYBRID, elements, weight)
    variance = np.exp(schedule.posterior_log_variance_clipped)
    return pack_columns(T, {
        "d_x": 1.0, "d_y": -0.9, "d_o": 0.1, "half_inverse_variance": 0.5 / variance,
        "bound_scale": 1.0,
        "bound_offset": -0.5 * elements * np.log(2 * np.pi * variance),
    })  # fmt: skip


def arguments(
    case: Case,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    rows: Tensor,
    seed: int,
    tensor: Callable[..., Tensor],
    upload: Callable[..., Tensor],
) -> tuple[Any, ...]:
    """The arguments of a case's `loss` or `loss_grad`; see Case.arguments.

    tensor(*size, dtype) makes the tensors of samples, upload(array, dtype) those of numbers.
    """
    name = case.name.removesuffix("_grad")
    spec = replace(_spec(name), noise_dtype=case.dtype, fast=case.fast)
    batch, elements = shape[0], int(np.prod(shape[1:]))
    channels = shape[1] * (2 if spec.learned else 1)
    model_output = tensor(batch, channels, *shape[2:], dtype=case.model_dtype or case.dtype)
    x = tensor(*shape) if spec.reads_x else None
    y = tensor(*shape) if spec.reads_y else None
    results = torch.empty(spec.count, batch, device=rows.device)
    gradient = case.op == "loss_grad"
    if gradient:
        outputs = [torch.empty_like(model_output)]
    else:
        pieces = partial_count(elements)
        outputs = [results, torch.empty(spec.count, batch, pieces, device=rows.device)]
    return loss_arguments(
        spec, outputs, [model_output], x, y,
        upload(_table(name, schedule, elements), torch.float32), rows,
        gradients=torch.ones_like(results) if gradient else None,
        counter=(seed, 0, 7, STREAM_Q_SAMPLE),
    )  # fmt: skip
