"""diffusers' schedulers in float64, closed loop: what builders and plans are compared with.

The schedulers round tables and samples to float32 on the way (`dtype=torch.float32`,
`.to(torch.float32)`, `.astype(np.float32)`). Here their modules see a torch and a NumPy whose
float32 is float64; everything else is upstream's own code.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Widened:
    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def float64(cls: type, noise: list[Tensor] | None = None):
    """Within: cls computes in float64, and its draws are those of `noise`, in order."""
    module = sys.modules[cls.__module__]
    replaced: dict[str, Any] = {"torch": _Widened(torch), "np": _Widened(np)}
    if noise is not None:
        left = iter(noise)
        replaced["randn_tensor"] = lambda *args, **kwargs: next(left)
    saved = {name: getattr(module, name) for name in replaced}
    try:
        vars(module).update(replaced)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of diffusers and of NumPy
            yield
    finally:
        vars(module).update(saved)


def model(x: Tensor, t: Any) -> Tensor:
    """Any smooth nonlinear function of (x, t); t a number or a tensor of one entry per sample."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1))
    return torch.sin(1.3 * x + 0.003 * t) * 0.8 + 0.1 * x


def run(
    cls: type,
    config: dict[str, Any],
    steps: int,
    x: Tensor,
    *,
    levels: Tensor | None = None,
    noise: list[Tensor] | None = None,
) -> list[Tensor]:
    """[x_T, .., x_0] of a scheduler around model(), in float64.

    levels: (steps + 1,) replaces the scheduler's own sigmas, which differ from ours by the
    cancellation in 1 - abar.
    """
    with float64(cls, noise):
        scheduler = cls(**config)
        scheduler.set_timesteps(steps)
        if levels is not None:
            assert levels.shape == scheduler.sigmas.shape
            torch.testing.assert_close(scheduler.sigmas, levels, rtol=1e-9, atol=1e-12)
            scheduler.sigmas = levels
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        trajectory = [x]
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
            assert x.dtype == torch.float64
            trajectory.append(x)
    return trajectory


def relative(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference along two trajectories, relative to the largest entry."""
    scale = max(float(state.abs().max()) for state in expected)
    return max(float((a - b).abs().max()) / scale for a, b in zip(got, expected, strict=True))
