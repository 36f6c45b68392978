"""add_noise, scale_noise and get_velocity of a scheduler: one gather and one pass.

Each is a(t) sample + b(t) noise. The coefficients of every timestep are read off upstream's own
method, run once in float64 on ones and zeros, and kept on the device; the scheduler's tables stay
where they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.call import call_step, compute_dtype, pack_table
from fastdiff.ops.checks import FLOATING
from fastdiff.ops.step import StepSpec

__all__ = ["METHODS", "Noising"]

METHODS = ("add_noise", "scale_noise", "get_velocity")
_SPEC = StepSpec(states=2, outputs=(0b0011,))


class Noising:
    """The noising methods of one scheduler object.

    Args:
        scheduler: the accelerated object.
        shadow: makes a copy of it, of upstream's class, to be used up.
    """

    def __init__(self, scheduler: Any, upstream: Any, shadow: Callable[[], Any]) -> None:
        self.scheduler, self.upstream, self.shadow = scheduler, upstream, shadow
        self._tables: dict[Any, Tensor] = {}
        self._sources: tuple[Any, ...] = ()
        self._timesteps: Tensor | None = None

    def __call__(self, name: str, sample: Any, noise: Any, timesteps: Any) -> Tensor | None:
        """The result of method `name`, or None when upstream's own must make it."""
        kind = _kind(getattr(self.upstream, name))
        if not kind or not _fit(sample, noise, timesteps):
            return None
        scheduler = self.scheduler
        sources = tuple(vars(scheduler).get(n) for n in ("alphas_cumprod", "sigmas", "timesteps"))
        if len(sources) != len(self._sources) or any(
            a is not b for a, b in zip(sources, self._sources, strict=True)
        ):
            self._tables.clear()
            self._sources = sources
        dtype = torch.promote_types(sample.dtype, noise.dtype)
        begin = scheduler.begin_index if kind == "places" else None
        rows: Tensor
        if kind == "timesteps":
            if timesteps.is_floating_point():
                return None
            key: Any = (name, "all")
            count = scheduler.config.num_train_timesteps
            visited = torch.arange(count)
            rows = timesteps.to(sample.device, torch.int64)
            if timesteps.device.type == "cpu" and bool(((rows < 0) | (rows >= count)).any()):
                raise IndexError(f"timesteps must be in [0, {count}), not {timesteps.tolist()}")
        elif begin is None:
            key, visited = (name, "visited"), scheduler.timesteps.cpu()
            rows = self._found(timesteps, sample.device)
        else:
            step = scheduler.step_index
            key = (name, begin if step is None else step)
            visited = scheduler.timesteps[:1].cpu()
            rows = torch.zeros(1, dtype=torch.int64, device=sample.device)
        table = self._table(name, key, visited, sample.device, compute_dtype(dtype))
        (result,) = call_step([sample, noise], _SPEC, table, rows, out_dtypes=[dtype])
        return result

    def _found(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """Rows of timesteps among the scheduler's, without reading a device."""
        known = self.scheduler.timesteps.to(device)
        same = known[None] == timesteps.to(device)[:, None]
        rows = torch.where(same.any(1), same.to(torch.int8).argmax(1), -1)
        if timesteps.device.type == "cpu" and bool((rows < 0).any()):
            raise IndexError(
                f"timesteps must be among scheduler.timesteps, not {timesteps.tolist()}"
            )
        return rows

    def _table(
        self, name: str, key: Any, visited: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        full = (*key, device, dtype)
        if full not in self._tables:
            one = torch.ones(len(visited), 1, dtype=torch.float64)
            columns = []
            for sample, noise in ((one, 0 * one), (0 * one, one)):
                method = getattr(self.shadow(), name)
                order = (sample, visited, noise) if name == "scale_noise" else (
                    sample, noise, visited
                )  # fmt: skip
                columns.append(method(*order).reshape(-1))
            zero = torch.zeros(len(visited), dtype=torch.float64)
            rows = torch.stack([*columns, zero, zero], dim=1).numpy()
            table = torch.from_numpy(pack_table(len(rows), [rows]))
            self._tables[full] = table.to(device, dtype)
        return self._tables[full]


def _kind(method: Any) -> str:
    """How upstream finds coefficients: by the timestep, by its value among the scheduler's, or by
    the place in the run once that has begun; "" when it does neither."""
    names = _names(inspect.unwrap(method).__code__)
    if "index_for_timestep" in names:
        return "places" if "begin_index" in names else "values"
    return "timesteps" if "alphas_cumprod" in names else ""


def _names(code: CodeType) -> set[str]:
    """Names that a function uses, its comprehensions included."""
    inner = [_names(value) for value in code.co_consts if isinstance(value, CodeType)]
    return set(code.co_names).union(*inner)


def _fit(sample: Any, noise: Any, timesteps: Any) -> bool:
    return (
        all(isinstance(value, Tensor) for value in (sample, noise, timesteps))
        and sample.dtype in FLOATING and noise.dtype in FLOATING
        and (sample.dtype == torch.float64) == (noise.dtype == torch.float64)
        and sample.shape == noise.shape and sample.device == noise.device and sample.dim() > 0
        and timesteps.dim() == 1 and len(timesteps) in (1, len(sample)) and len(sample) > 0
    )  # fmt: skip
