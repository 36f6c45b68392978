"""Sampling with fewer steps than the model was trained with (Nichol & Dhariwal 2021, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from fastdiff import schedules
from fastdiff.schedules import NoiseSchedule

from .arguments import chain_of
from .diffusion import GaussianDiffusion

__all__ = ["SpacedDiffusion", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: int | str | Sequence[int]) -> set[int]:
    """The timesteps to keep, as a set: "250", "10,15,20", [10, 15, 20] or "ddim50".

    See fastdiff.schedules.space_timesteps, also for the errors.
    """
    return set(schedules.space_timesteps(num_timesteps, section_counts).tolist())


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over some of the training chain's steps.

    Args:
        use_timesteps: the kept indices of the training chain, any collection of ints.
        kwargs: those of GaussianDiffusion; `betas` are the training chain's.

    The betas become 1 - abar_{S_i} / abar_{S_{i-1}} (Nichol & Dhariwal 2021, eq. 19), t indexes
    the kept steps, and the model is called with the training chain's t (`timestep_map[t]`, times
    1000 / `original_num_steps` as float32 where rescale_timesteps).
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        if "betas" not in kwargs:
            raise TypeError("betas must be given by name")
        whole = chain_of(kwargs["betas"])
        training = NoiseSchedule(whole.betas, log_alphas_cumprod=whole.log_alphas_cumprod)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = training.num_timesteps
        chain = training.spaced(sorted(self.use_timesteps))
        self.timestep_map: list[int] = [int(t) for t in chain.timesteps]
        super().__init__(**kwargs | {"betas": chain})

    @property
    def _model_times_of(self) -> tuple[bool, float | None]:
        mapped = len(self.timestep_map) != self.original_num_steps
        factor = 1000.0 / self.original_num_steps if self.rescale_timesteps else None
        return mapped, factor

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model does it

    def _wrap_model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        return model if isinstance(model, _WrappedModel) else _WrappedModel(model, self)


class _WrappedModel:
    """A model, or cond_fn, called with the training chain's t."""

    def __init__(self, model: Callable[..., Any], diffusion: SpacedDiffusion) -> None:
        self.model = model
        self.diffusion = diffusion

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        return self.model(x, self.diffusion._model_times(ts), **kwargs)
