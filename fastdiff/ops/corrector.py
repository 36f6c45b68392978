"""The Langevin corrector of score SDEs, whose step size is measured on the data.

    eps = 2 (r ||z|| / ||g||)^2,    x' = x + eps g + sqrt(2 eps) z

(Song et al. 2021, algorithms 4 and 5), g the score and z the draw; ||.|| is the 2-norm of a sample
averaged over the batch, as in the code released with the paper. The step size stays on the device:
it goes into a table of one row, made there, that the fused step reads like any other. It is a
constant to automatic differentiation. The norms are plain torch reductions in the table's dtype
(float32, or float64 for float64 data), so their last bits may differ between devices, and since
they are averages over the batch, a sample depends on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.ops.step import HEADER, StepSpec

if TYPE_CHECKING:
    from fastdiff.plan import SolverPlan

__all__ = ["corrector_table", "seeded_draws"]


def seeded_draws(
    plan: SolverPlan, row: int, keys: Tensor, like: Tensor, spec: StepSpec, backend: str | None
) -> list[Tensor]:
    """The draws of a row as tensors: the same bits that the step would make itself.

    Args:
        keys: int64 (B, 2), (seed, sample) of every batch entry.
        like: the sample, (B, ...); a draw that the row does not use is `like`, never read.
    """
    dtype = spec.noise_dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    make = operation("randn", like.device, compute, backend)
    tensors = []
    for (step, stream), used in zip(plan.draws[row], plan.draws_noise[row], strict=True):
        z = like
        if used:
            z = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
            make(z, keys, 0, 0, int(step), int(stream), 0, spec.fast)
        tensors.append(z)
    return tensors


def corrector_table(
    plan: SolverPlan,
    row: int,
    snr: Tensor,
    table: Tensor,
    spec: StepSpec,
    model_outputs: Sequence[Tensor],
    draws: Sequence[Tensor],
    guidance_scale: Tensor | None,
) -> Tensor:
    """Row `row` of a table with the corrector's step size in it: (1, width), on the device.

    The coefficient q of o in the new sample is multiplied by eps, with g = q o (o after guidance),
    the coefficient of z by sqrt(2 eps). A score of zero norm gives NaN.

    Args:
        snr: () the signal-to-noise ratio r of the row, on the device in the table's dtype.
    """
    k = int(np.flatnonzero(plan.A[row, 0, plan.states + 2 :])[0])
    sample = len(HEADER) + spec.columns - 1  # where the row of the new sample begins
    with torch.no_grad():
        o = _flat(model_outputs[0], table)
        if len(model_outputs) == 2:
            assert guidance_scale is not None
            o = o + guidance_scale.to(o)[:, None] * (_flat(model_outputs[1], table) - o)
        result = table[row : row + 1].clone()
        coefficient = result[0, sample + spec.states]
        g_norm = torch.linalg.vector_norm(o, dim=1).mean() * coefficient.abs()
        z_norm = torch.linalg.vector_norm(_flat(draws[k], table), dim=1).mean()
        root = snr * z_norm / g_norm
        step_size = 2.0 * root * root
        result[0, sample + spec.states] = step_size * coefficient
        result[0, sample + spec.states + 2 + k] *= 2.0 * root  # sqrt(2 eps)
    return result


def _flat(value: Tensor, table: Tensor) -> Tensor:
    return value.detach().reshape(value.shape[0], -1).to(table.dtype)
