"""diffusers' schedulers in float64, closed loop: what builders and plans are compared with.

The schedulers round tables and samples to float32 on the way (`dtype=torch.float32`,
`.to(torch.float32)`, `.astype(np.float32)`). Here their modules see a torch and a NumPy whose
float32 is float64; everything else is upstream's own code.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Widened:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def float64(cls: type, default_dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """Within: a scheduler class computes in float64. Yields its module."""
    module = sys.modules[cls.__module__]
    saved = {name: getattr(module, name) for name in ("torch", "np") if hasattr(module, name)}
    default = torch.get_default_dtype()
    try:
        vars(module).update({name: Widened(value) for name, value in saved.items()})
        torch.set_default_dtype(default_dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of diffusers and of NumPy
            yield module
    finally:
        torch.set_default_dtype(default)
        vars(module).update(saved)


def model(x: Tensor, t: Any) -> Tensor:
    """Any smooth nonlinear function of (x, t); t a number or a tensor of one entry per sample."""
    t = torch.as_tensor(t).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.sin(1.3 * x + 0.003 * t) * 0.8 + 0.1 * x


class Run(NamedTuple):
    """[x_T, .., x_0], the timesteps, and how many draws were made."""

    states: list[Tensor]
    t: np.ndarray
    draws: int


def run(
    cls: type,
    x: Tensor,
    steps: int | None = None,
    *,
    model: Any = model,
    levels: Tensor | None = None,
    noise: Sequence[Tensor] | Tensor = (),
    set_timesteps: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    default_dtype: torch.dtype = torch.float64,
    **config: Any,
) -> Run:
    """A scheduler around a model, in float64.

    levels: (steps + 1,) replaces the scheduler's own sigmas, which differ from ours by the
    cancellation in 1 - abar. noise: its draws, in order. set_timesteps, step: options of these
    methods; config: of the class.
    """
    left = list(noise)

    def randn_tensor(shape: Any, **_: Any) -> Tensor:
        return left.pop(0)

    with float64(cls, default_dtype) as module:
        drawing = getattr(module, "randn_tensor", None)
        if drawing is not None:
            module.randn_tensor = randn_tensor
        try:
            scheduler = cls(**config)
            count = {} if steps is None else {"num_inference_steps": steps}
            scheduler.set_timesteps(**count, **(set_timesteps or {}))
            if levels is not None:
                assert levels.shape == scheduler.sigmas.shape
                torch.testing.assert_close(scheduler.sigmas, levels, rtol=1e-9, atol=1e-12)
                scheduler.sigmas = levels
            states = [x]
            for t in scheduler.timesteps:
                seen = x
                if hasattr(scheduler, "scale_model_input"):
                    seen = scheduler.scale_model_input(x, t)
                output = model(seen, t.double().expand(len(x)))
                x = scheduler.step(output, t, x, **(step or {})).prev_sample
                assert output.dtype == x.dtype == torch.float64
                states.append(x)
        finally:
            if drawing is not None:
                module.randn_tensor = drawing
    return Run(states, np.asarray(scheduler.timesteps.numpy(), np.float64), len(noise) - len(left))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got: Any, expected: Tensor | Sequence[Tensor]) -> float:
    """The difference of two tensors, or the largest along two trajectories, in the Euclidean norm,
    relative to the (largest) expected one."""
    if isinstance(expected, Tensor):
        got, expected = [got], [expected]
    scale = max(float(state.norm()) for state in expected)
    differences = [float((a - b).norm()) for a, b in zip(got, expected, strict=True)]
    return float(np.max(differences)) / scale  # NaN where there is one


def history(plan: Any) -> list[int]:
    """How many tensors beside x every row but the last leaves to the next."""
    return [int(plan.A[i, 1:].any(axis=1).sum()) for i in range(plan.rows - 1)]
