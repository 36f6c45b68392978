"""Terms of the variational bound, elementwise, as upstream has them."""

from __future__ import annotations

from torch import Tensor

from fastdiff.training import likelihood
from fastdiff.training.likelihood import normal_kl
from fastdiff.training.tables import UPSTREAM_FLOOR

__all__ = ["discretized_gaussian_log_likelihood", "mean_flat", "normal_kl"]


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the batch: (B, ...) to (B,)."""
    if tensor.dim() == 1:  # no dimensions to torch.mean are all of them
        return tensor
    return tensor.mean(dim=list(range(1, tensor.dim())))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of the probability of the bin of x under N(means, e^(2 log_scales)), elementwise, nats.

    That of fastdiff.training.likelihood, with probabilities at least 1e-12.

    Raises ValueError unless the three shapes agree.
    """
    return likelihood.discretized_gaussian_log_likelihood(
        x, means=means, log_scales=log_scales, floor=UPSTREAM_FLOOR
    )
