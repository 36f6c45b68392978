"""Terms of the variational bound, elementwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["discretized_gaussian_log_likelihood", "mean_flat", "normal_kl"]


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the batch: (B, ...) to (B,)."""
    if tensor.dim() == 1:  # no dimensions to torch.mean are all of them
        return tensor
    return tensor.mean(dim=list(range(1, tensor.dim())))


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) per element in nats; shapes broadcast.

        0.5 (logvar2 - logvar1 - 1 + e^(logvar1 - logvar2) + (mean1 - mean2)^2 e^-logvar2)

    Raises TypeError when none of the four is a tensor.
    """
    like = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, Tensor)), None)
    if like is None:
        raise TypeError("mean1, logvar1, mean2 or logvar2 must be a tensor, not all numbers")
    log1, log2 = (
        v if isinstance(v, Tensor) else torch.tensor(v, dtype=like.dtype, device=like.device)
        for v in (logvar1, logvar2)
    )
    distance = (mean1 - mean2) ** 2 * torch.exp(-log2)
    return 0.5 * (log2 - log1 - 1.0 + torch.exp(log1 - log2) + distance)


def _standard_normal_cdf(x: Tensor) -> Tensor:
    """0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of the probability of the bin of x under N(means, e^(2 log_scales)), elementwise, nats.

    Ho et al. 2020, eq. 13: 256 bins of width 2/255 on [-1, 1], the outer two open; the normal CDF
    by its tanh approximation, probabilities at least 1e-12.

    Raises ValueError unless the three shapes agree.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            "x, means and log_scales must have one shape, not "
            f"{tuple(x.shape)}, {tuple(means.shape)}, {tuple(log_scales.shape)}"
        )
    distance, inverse = x - means, torch.exp(-log_scales)
    below_upper = _standard_normal_cdf(inverse * (distance + 1.0 / 255.0))
    below_lower = _standard_normal_cdf(inverse * (distance - 1.0 / 255.0))
    last = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    return torch.where(x < -0.999, below_upper, last).clamp(min=1e-12).log()
