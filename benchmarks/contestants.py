"""What the contestants of an operation have in common: a schedule, checks, compiled opponents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks.registry import Call, compiled

__all__ = [
    "MAIN", "SCHEDULE", "SLOW", "Compiled", "agree", "agree_in_the_end", "drawn", "gathered",
    "per_sample", "same_bits",
]  # fmt: skip

# Latents of Stable Diffusion (one, and a batch), pixels.
MAIN = ("1x4x64x64", "16x4x64x64", "64x3x256x256")
NOT_HERE = "compiled in cases of group operations at the main shapes only, to keep the run short"
REFERENCE = "compiled reference"
SLOW = (REFERENCE,)
REFERENCE_ELSEWHERE = "compiled for float32 on one thread only: it takes 5 to 15 s each"


SCHEDULE = fd.schedules.linear(1000)
# The classes keep NumPy arrays of their own, so these are copies.
TABLES = {
    name: np.array(getattr(SCHEDULE, name))
    for name in (
        "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2",
        "posterior_variance", "posterior_log_variance_clipped",
    )
} | {"log_betas": np.log(SCHEDULE.betas)}  # fmt: skip


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless the two hold the same bits."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = actual.contiguous().view(view) != expected.contiguous().view(view)
    assert not different.any(), f"{int(different.sum())} of {actual.numel()} values differ in bits"


def agree(
    actual: Tensor,
    expected: Tensor,
    coarsest: torch.dtype = torch.float32,
    growth: float = 1.0,
) -> None:
    """Raises AssertionError unless the rms error is that of rounding in a few passes.

    Args:
        coarsest: a dtype on the way that rounds more than the result's.
        growth: how much larger than the result what it is made of can be (guidance, 1 / alpha).
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    epsilon = max(torch.finfo(dtype).eps for dtype in (expected.dtype, coarsest))
    error = float((actual.float() - expected.float()).square().mean().sqrt())
    allowed = 4 * epsilon * growth * float(expected.float().square().mean().sqrt())
    assert error <= allowed, f"rms error {error:.2g}, and rounding explains {allowed:.2g}"


def agree_in_the_end(actual: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless two float32 runs of many steps agree.

    1e-4 of the rms: steps that divide by a small alpha or take differences of outputs magnify the
    rounding of what went before, upstream's own as much as ours.
    """
    rms = float(expected.double().square().mean().sqrt())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * rms)


def gathered(name: str, t: Tensor, x: Tensor) -> Tensor:
    """schedule.<name>[t] in x's shape, as GaussianDiffusion classes look it up at every call."""
    return per_sample(name, t, x).expand(x.shape)


def per_sample(name: str, t: Tensor, x: Tensor) -> Tensor:
    """schedule.<name>[t] as float32 (B, 1, ...)."""
    values = torch.from_numpy(TABLES[name])[t].float()
    return values.reshape(-1, *[1] * (x.dim() - 1))


def drawn(call: Callable[[], Tensor], seed: int = 0) -> Tensor:
    """The result of a call that draws from torch's generator, from a known state of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


class Compiled:
    """The compiled opponents of a case, or why they are not here.

    Attributes:
        calls, absent: for Contest.
    """

    def __init__(self, here: bool, dtype: torch.dtype) -> None:
        self.here = here
        self.reference_here = self.here and dtype == torch.float32 and torch.get_num_threads() == 1
        self.calls: dict[str, Call] = {}
        self.absent: dict[str, str] = {}

    def add(self, name: str, function: Callable, *arguments: Tensor, **options: bool) -> None:
        if self.here:
            self.calls[name] = partial(compiled(function, **options), *arguments)
        else:
            self.absent[name] = NOT_HERE

    def add_reference(self, function: Callable, *arguments: Tensor) -> None:
        if self.reference_here:
            self.calls[REFERENCE] = partial(compiled(function), *arguments)
        else:
            self.absent[REFERENCE] = REFERENCE_ELSEWHERE if self.here else NOT_HERE
