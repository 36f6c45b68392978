"""The random numbers of a step as upstream makes them: its dtype, its generator, its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.traced import Origin
from fastdiff.plan import SolverPlan

__all__ = ["brownian_tree", "draws_of", "handed"]

_NONE: Mapping[tuple[int, int], tuple[float, float]] = {}


def draws_of(
    plan: SolverPlan,
    row: int,
    sample: Tensor,
    generator: Any,
    dtype: torch.dtype | None,
    given: Tensor | None = None,
    queries: Mapping[tuple[int, int], tuple[float, float]] = _NONE,
    tree: Any = None,
) -> list[Tensor]:
    """The draws of a row.

    Args:
        dtype: of what upstream draws.
        given: the caller's variance_noise.
        queries: what the scheduler's Brownian tree is asked for, by (row, draw).
        tree: that tree, if the scheduler has one.
    """
    draws = []
    for k, consumed in enumerate(plan.consumes[row]):
        if not consumed:
            draws.append(sample)  # not read
        elif (row, k) in queries:
            draws.append(tree(*queries[row, k]).to(sample.device))
        elif given is not None:
            if generator is not None:
                raise ValueError("generator and variance_noise exclude each other")
            draws.append(given.to(sample.device, dtype))
        else:
            draws.append(
                randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
            )
    return draws


def brownian_tree(
    origin: Origin, position: int, output: Tensor, timestep: Any, sample: Tensor, generator: Any
) -> Any:
    """Upstream's Brownian tree, made by its own step the way it makes it."""
    shadow = origin.shadow(position)
    shadow.noise_sampler = None
    arguments = {} if generator is None else {"generator": generator}
    shadow.scale_model_input(sample, timestep)
    origin.upstream.step(shadow, output, timestep, sample, **arguments)
    return shadow.noise_sampler


def handed(row: int, draw: int) -> Tensor:
    """A run's source of noise where every step is given its draws."""
    raise AssertionError("the draws are given to every step")
