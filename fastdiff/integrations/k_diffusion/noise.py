"""Draws as k-diffusion makes them, and its sigma ladders as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BatchedBrownianTree", "BrownianTreeNoiseSampler", "NoiseSampler", "append_zero",
    "default_noise_sampler", "get_sigmas_exponential", "get_sigmas_karras",
    "get_sigmas_polyexponential", "get_sigmas_vp",
]  # fmt: skip

NoiseSampler = Callable[[Any, Any], Tensor]
Device = torch.device | str


def append_zero(x: Tensor) -> Tensor:
    """A 1-D tensor with a 0 at its end."""
    return torch.cat([x, x.new_zeros([1])])


def _ladder(sigmas: Tensor, device: Device) -> Tensor:
    """Levels made in float64, rounded to the default dtype, and the final 0."""
    return append_zero(sigmas.to(torch.get_default_dtype())).to(device)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu"
) -> Tensor:
    """n levels even in sigma^(1/rho) and a final 0 (Karras et al. 2022, eq. 5): (n + 1,)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = float(sigma_min) ** (1 / rho), float(sigma_max) ** (1 / rho)
    return _ladder((high + ramp * (low - high)) ** rho, device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu"
) -> Tensor:
    """n levels even in log sigma and a final 0: (n + 1,)."""
    return get_sigmas_polyexponential(n, sigma_min, sigma_max, 1.0, device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """log sigma polynomial in the step, ramp^rho with ramp from 1 to 0, and a final 0: (n + 1,)."""
    ramp = torch.linspace(1, 0, n, dtype=torch.float64) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _ladder(torch.exp(ramp * (high - low) + low), device)


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Device = "cpu",
) -> Tensor:
    """Levels of the continuous VP schedule (Song et al. 2021, eq. 32) and a final 0: (n + 1,)."""
    t = torch.linspace(1, eps_s, n, dtype=torch.float64)
    return _ladder(torch.sqrt(torch.expm1(beta_d * t**2 / 2 + beta_min * t)), device)


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """torch.randn_like(x) at every call."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class BatchedBrownianTree:
    """Brownian motions of a batch over an interval, from torchsde: one, or one for each seed.

    Args:
        x: (B, ...), gives shape, dtype and device.
        t0, t1: ends of the interval, in either order.
        seed: an int for the whole batch, or one for each sample; default from torch's global
            generator.
        kwargs: of torchsde.BrownianTree.

    Raises ImportError without torchsde.
    """

    def __init__(
        self, x: Tensor, t0: Any, t1: Any, seed: int | Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        try:
            from torchsde import BrownianTree  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError(
                "Brownian-tree noise needs torchsde: install it, or give noise_sampler= or seed="
            ) from None
        forward = bool(t0 < t1)
        self.sign = 1 if forward else -1
        begin, end = (t0, t1) if forward else (t1, t0)
        w0 = kwargs.pop("w0", None)
        w0 = torch.zeros_like(x) if w0 is None else w0
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        self.batched = not isinstance(seed, int) and hasattr(seed, "__len__")
        seeds: Any = seed if self.batched else [seed]
        if self.batched:
            if len(seeds) != x.shape[0]:
                raise ValueError(f"seed must be one, or one for each of {x.shape[0]} samples")
            w0 = w0[0]
        self.trees = [BrownianTree(begin, w0, end, entropy=s, **kwargs) for s in seeds]

    def __call__(self, t0: Any, t1: Any) -> Tensor:
        """W(t1) - W(t0), (B, ...)."""
        forward = bool(t0 < t1)
        begin, end = (t0, t1) if forward else (t1, t0)
        sign = self.sign if forward else -self.sign
        moves = [tree(begin, end) * sign for tree in self.trees]
        return torch.stack(moves) if self.batched else moves[0]


class BrownianTreeNoiseSampler:
    """Normals (W(t1) - W(t0)) / sqrt|t1 - t0| of one Brownian path over transform(sigma).

    Args:
        x, seed: as in BatchedBrownianTree.
        sigma_min, sigma_max: ends of the interval.
        transform: from sigma to the path's own time.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        t0 = transform(torch.as_tensor(sigma_min))
        t1 = transform(torch.as_tensor(sigma_max))
        self.tree = BatchedBrownianTree(x, t0, t1, seed)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        t0 = self.transform(torch.as_tensor(sigma))
        t1 = self.transform(torch.as_tensor(sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()
