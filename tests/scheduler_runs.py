"""Samplers of other projects run by their own code, with noise that the test supplies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

diffusers.logging.set_verbosity_error()  # deprecations and such, by logging


# Deprecations inside of diffusers: pytestmark of the tests that run it.
UPSTREAM_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("__array", "`algorithm_type", "`final_sigmas_type")
]


SHAPE = (2, 3, 4, 4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Values that float32 holds: upstream draws some in float32.
NOISE = [randn(*SHAPE, seed=1000 + k).float().double() for k in range(100)]


def draws() -> Iterator[Tensor]:
    """The same noise however often it is asked for."""
    return iter(NOISE)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6))


class Fed(TorchFunctionMode):
    """Within: torch.randn and randn_like are what `draw` returns, in the dtype asked for."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return self.draw().to(kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.randn_like:
            return self.draw().to(kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


@functools.cache
def _constructed(name: str, config: tuple[tuple[str, Any], ...]) -> Any:
    """Some constructors set 1000 timesteps, which takes them half a second."""
    return getattr(diffusers, name)(**dict(config))


def scheduler(name: str, config: dict[str, Any], steps: int | None = None) -> Any:
    made = copy.deepcopy(_constructed(name, tuple(sorted(config.items()))))
    if steps is not None:
        made.set_timesteps(steps)
    return made


def steps_of(
    stepped: Any,
    x: Tensor,
    model: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[], Tensor],
    **options: Any,
) -> Iterator[Tensor]:
    """x after every step of a scheduler whose timesteps are set, in the dtype of x throughout."""
    if hasattr(stepped, "noise_sampler"):
        stepped.noise_sampler = lambda *_: draw().to(x.dtype)
    dtype = x.dtype
    for t in stepped.timesteps:
        with Fed(draw):
            seen = stepped.scale_model_input(x, t) if hasattr(stepped, "scale_model_input") else x
            output = model(seen, t).to(dtype)
            x = stepped.step(output, t, x, return_dict=False, **options)[0].to(dtype)
        yield x
