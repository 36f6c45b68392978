"""diffusers' Adams, DEIS and consistency schedulers in float64, closed around a model.

diffusers rounds its tables to float32. Inside `float64(cls)` the names np.float32 and
torch.float32 that a scheduler's module sees mean float64, so that the same code, unchanged,
computes float64 tables.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def float64(cls: type, default_dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """Yields the module of a scheduler class, made to compute in float64."""
    module = sys.modules[cls.__module__]
    saved = {name: getattr(module, name) for name in ("np", "torch") if hasattr(module, name)}
    dtype = torch.get_default_dtype()
    try:
        for name, value in saved.items():
            setattr(module, name, _Wide(value))
        torch.set_default_dtype(default_dtype)
        yield module
    finally:
        torch.set_default_dtype(dtype)
        for name, value in saved.items():
            setattr(module, name, value)


def sample(
    cls: type,
    model: Any,
    x_T: torch.Tensor,
    steps: int | None = None,
    *,
    noise: Any = None,
    default_dtype: torch.dtype = torch.float64,
    set_timesteps: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[torch.Tensor, np.ndarray, int]:
    """(result, timesteps, draws made) of a scheduler in float64.

    noise: (draws, *x_T.shape), what its random draws are. set_timesteps, step: options of these
    methods; config: of the class.
    """
    drawn = 0

    def randn_tensor(shape: Any, **_: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return noise[drawn - 1]

    with float64(cls, default_dtype) as module:
        saved = getattr(module, "randn_tensor", None)
        if saved is not None:
            module.randn_tensor = randn_tensor
        try:
            scheduler = cls(**config)
            count = {} if steps is None else {"num_inference_steps": steps}
            scheduler.set_timesteps(**count, **(set_timesteps or {}))
            x = x_T
            for t in scheduler.timesteps:
                out = model(scheduler.scale_model_input(x, t), t.double().expand(len(x)))
                assert out.dtype == torch.float64
                x = scheduler.step(out, t, x, **(step or {})).prev_sample
        finally:
            if saved is not None:
                module.randn_tensor = saved
    return x, np.asarray(scheduler.timesteps.numpy(), np.float64), drawn


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth nonlinear model; t in training steps."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.sin(1.3 * x + 0.002 * t) * 0.8 + 0.1 * x


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def history(plan: Any) -> list[int]:
    """How many tensors beside x every row but the last leaves to the next."""
    return [int(plan.A[i, 1:].any(axis=1).sum()) for i in range(plan.rows - 1)]
