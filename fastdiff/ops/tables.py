"""Step tables of the forward operations: a row per t, float64 on the host, kept on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.call import compute_dtype, pack_table
from fastdiff.ops.held import held
from fastdiff.schedules import NoiseSchedule, Schedule

__all__ = ["per_sample", "table_of", "uploaded"]


def host_table(schedule: Schedule, kind: str) -> np.ndarray:
    """The float64 step table of one kind of forward operation; a row per t."""
    rows = schedule.num_timesteps
    zero, one = np.zeros(rows), np.ones(rows)

    def output(*columns: np.ndarray) -> np.ndarray:
        return np.stack(columns, axis=1)

    if kind == "posterior":
        assert isinstance(schedule, NoiseSchedule)
        coefficients = (schedule.posterior_mean_coef1, schedule.posterior_mean_coef2)
        return pack_table(rows, [output(*coefficients, zero, zero)])
    if kind == "mean":
        return pack_table(rows, [output(schedule.alpha_t, zero, zero)])
    if kind == "step":
        assert isinstance(schedule, NoiseSchedule)
        steps = output(np.sqrt(schedule.alphas), zero, zero, np.sqrt(schedule.betas))
        return pack_table(rows, [steps])
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    available = {
        "x_t": output(alpha, zero, zero, sigma),
        "noise": output(zero, zero, zero, one),
        "epsilon": output(zero, zero, zero, one),
        "sample": output(one, zero, zero, zero),
        "v": output(-sigma, zero, zero, alpha),
        "flow": output(-one, zero, zero, one),
    }
    return pack_table(rows, [available[name] for name in kind.split("+")])


def uploaded(schedule: Schedule, kind: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """host_table on the device, rounded once."""
    return torch.from_numpy(host_table(schedule, kind)).to(device=device, dtype=dtype)


def table_of(schedule: Schedule, kind: str, like: Tensor) -> Tensor:
    dtype = compute_dtype(like.dtype)
    return held(schedule.fingerprint, uploaded, schedule, kind, like.device, dtype)


def per_sample(
    schedule: Schedule, names: tuple[str, ...], rows: Tensor, like: Tensor
) -> tuple[Tensor, ...]:
    """schedule.<name>[t] for each name as a view of the shape of `like`; NaN where t is out of
    range."""
    values = held(schedule.fingerprint, _uploaded_values, schedule, names, like.device, like.dtype)
    picked = values.index_select(0, rows.clamp(-1, values.shape[0] - 2) + 1)
    ones = [1] * (like.dim() - 1)
    return picked.view(-1, len(names), *ones).expand(like.shape[0], -1, *like.shape[1:]).unbind(1)


def _uploaded_values(
    schedule: Schedule, names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(T + 2, K): a column per name between two rows of NaN, those before and after every t."""
    table = np.full((schedule.num_timesteps + 2, len(names)), np.nan)
    for k, name in enumerate(names):
        table[1:-1, k] = _values(schedule, name)
    return torch.from_numpy(table).to(device=device, dtype=dtype)


def _values(schedule: Schedule, name: str) -> np.ndarray:
    if name == "variance":
        return np.square(schedule.sigma_t)
    if name == "log_variance":
        with np.errstate(divide="ignore"):
            return 2.0 * np.log(schedule.sigma_t)
    values: np.ndarray = getattr(schedule, name)
    return values
