"""Which steps of the training chain a sampler visits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.schedules import NoiseSchedule, timestep_spacing

__all__ = ["subsequence"]


def subsequence(
    schedule: NoiseSchedule,
    steps: int | str | None,
    spacing: str,
    timesteps: Sequence[int] | None,
) -> NoiseSchedule:
    """The chain of the kept steps; its timesteps are the training chain's own.

    Args:
        steps: None keeps all; an int is spread by `spacing`; a string is a section notation.
        timesteps: explicit indices in [0, T), any order, without repetition; instead of steps.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, not {type(schedule).__name__}")
    if timesteps is not None:
        if steps is not None:
            raise ValueError("steps and timesteps exclude each other")
        indices = np.asarray(timesteps)
        if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
            raise ValueError(f"timesteps must be a non-empty list of integers, not {timesteps!r}")
        if len(np.unique(indices)) != indices.size:
            raise ValueError("timesteps must not repeat")
        if indices.min() < 0 or indices.max() >= len(schedule):
            raise ValueError(f"timesteps must be in [0, {len(schedule)}), not {timesteps!r}")
        chain = schedule.spaced(np.sort(indices))
    elif steps is None:
        chain = schedule
    elif isinstance(steps, str):
        chain = schedule.spaced(steps)
    else:
        chain = schedule.spaced(np.sort(timestep_spacing(len(schedule), steps, spacing)))
    if (chain.sigma_t == 0).any():
        raise ValueError(
            f"schedule has no noise yet at index {int(np.argmax(chain.sigma_t == 0))} (beta 0): "
            "leave such steps out with timesteps="
        )
    return chain
