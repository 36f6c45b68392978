"""Checks of what users pass, and the dtype rule of upstream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.checks import FLOATING, check_sample
from fastdiff.schedules import NoiseSchedule

__all__ = [
    "Hook", "Kwargs", "Model", "Seed", "chain_of", "check_function", "check_kwargs",
    "check_shaped", "check_t", "promoted",
]  # fmt: skip

Model = Callable[..., Any]
Hook = Callable[..., Tensor] | None
Kwargs = dict[str, Any] | None
Seed = int | Tensor | None

_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def chain_of(betas: Any) -> NoiseSchedule:
    """The chain of (T,) betas, each in (0, 1]; a NoiseSchedule is taken as it is."""
    chain = betas if isinstance(betas, NoiseSchedule) else NoiseSchedule(betas)
    if (chain.betas <= 0).any():
        t = int(np.argmin(chain.betas))
        raise ValueError(f"betas must be in (0, 1], not betas[{t}] = {chain.betas[t]}")
    return chain


def check_function(name: str, value: object, optional: bool = True) -> None:
    if not callable(value) and not (optional and value is None):
        also = " or None" if optional else ""
        raise TypeError(f"{name} must be a function{also}, not {type(value).__name__}")


def check_kwargs(value: object) -> None:
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"model_kwargs must be a dict or None, not {type(value).__name__}")


def check_t(name: str, x: Tensor, t: object, count: int) -> Tensor:
    """t as int64 (B,) on the device of x, which is called `name`.

    As resolve_rows, but upstream's t is always a tensor (B,), and on a CPU it is read without
    launching an operation.
    """
    check_sample(name, x)
    if not isinstance(t, Tensor) or t.dtype not in _INTEGER:
        what = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be an integer tensor, not {what}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape ({x.shape[0]},), not {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"t is on {t.device}, but {name} is on {x.device}")
    if type(t) is Tensor and t.device.type == "cpu" and not torch.compiler.is_compiling():
        values = t.numpy()
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= count:
            raise ValueError(f"t must be in [0, {count}), but has {low} to {high}")
    return t.to(torch.int64).contiguous()


def check_shaped(
    name: str, value: object, like_name: str, like: Tensor, shape: Sequence[int] | None = None
) -> None:
    """As check_like, but float64 may meet other dtypes: upstream promotes."""
    shape = tuple(like.shape if shape is None else shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {shape}, not {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but {like_name} is on {like.device}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating, not {value.dtype}")


def promoted(*tensors: Tensor) -> torch.dtype:
    """float64 where a tensor is, else float32: upstream's float tables lift the narrow dtypes."""
    return torch.float64 if any(v.dtype == torch.float64 for v in tensors) else torch.float32
