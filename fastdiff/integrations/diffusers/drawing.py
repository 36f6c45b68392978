"""The random numbers of a step as upstream makes them: its dtype, its generator, its order."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.traced import Origin, Traced

__all__ = ["brownian_tree", "draws_of", "handed"]


def draws_of(
    traced: Traced,
    row: int,
    sample: Tensor,
    generator: Any,
    given: Tensor | None,
    dtype: torch.dtype | None,
    tree: Any,
) -> list[Tensor]:
    """The draws of a row.

    Args:
        given: the caller's variance_noise.
        dtype: of what upstream draws.
        tree: the scheduler's Brownian tree, if it has one.
    """
    assert traced.plan is not None
    draws = []
    for k, consumed in enumerate(traced.plan.consumes[row]):
        if not consumed:
            draws.append(sample)  # not read
        elif (row, k) in traced.notes.queries:
            draws.append(tree(*traced.notes.queries[row, k]).to(sample.device))
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
