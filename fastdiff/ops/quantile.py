"""Dynamic thresholding's bound: an exact quantile of every sample (Saharia et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["threshold_of"]


def threshold_of(value: Tensor, ratio: float, largest: float) -> Tensor:
    """s = min(max(q, 1), largest), q the ratio-quantile of |value| in every sample.

    Between two order statistics the quantile is linear, as in torch.quantile; unlike there the
    size of a sample is not limited, and only the values above the quantile are sorted. NaN where a
    sample has one; 1 for samples without elements.

    Args:
        value: (B, ...) float32 or float64.

    Returns:
        float32 (B,).
    """
    magnitude = value.detach().reshape(value.shape[0], -1).abs()
    n = magnitude.shape[1]
    if n == 0:
        return torch.ones(len(value), device=value.device)
    rank = ratio * (n - 1)
    below = math.floor(rank)
    # From the largest down; NaN counts as largest.
    top = magnitude.topk(n - below, dim=1, sorted=True).values.double()
    low, high = top[:, -1], top[:, -2 if below + 1 < n else -1]
    q = torch.where(low == high, low, low + (rank - below) * (high - low))  # inf - inf is NaN
    q = low if rank == below else q
    q = q.masked_fill(top[:, 0].isnan(), torch.nan)
    return q.clamp(1.0, largest).to(torch.float32)
