"""What accelerate() was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.checks import check_floating
from fastdiff.schedules._values import as_float

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The arguments of accelerate() beside x; see there.

    Raises:
        TypeError, ValueError: they are no such options, or exclude each other.
    """

    seed: int | Tensor | None = None
    sample_offset: int = 0
    float32_latents: bool = False
    outputs_are_fresh: bool = False
    backend: str | None = None
    guidance_scale: float | Tensor | None = None
    model_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.float32_latents and self.makes_inputs:
            raise ValueError(
                "float32_latents goes with neither guidance_scale nor model_dtype: hand step() "
                "float32 samples and give model_dtype, which is the same"
            )
        if self.model_dtype is not None:
            check_floating("model_dtype", self.model_dtype)
        g = self.guidance_scale
        if isinstance(g, Tensor):
            check_floating("guidance_scale", g.dtype)
            if g.dim() > 1 or not g.numel():
                raise ValueError(
                    f"guidance_scale must be a number or have shape (B,), not {tuple(g.shape)}"
                )
        elif g is not None:
            as_float("guidance_scale", g)

    @property
    def makes_inputs(self) -> bool:
        """Whether steps write the next model input, and take a model's output as it comes."""
        return self.guidance_scale is not None or self.model_dtype is not None

    @property
    def copies(self) -> int:
        """How often a sample is in the model's batch."""
        return 1 if self.guidance_scale is None else 2

    @property
    def key(self) -> Any:
        """Equal for equal options."""
        return tuple(
            (str(value.dtype), str(value.device), *value.reshape(-1).tolist())
            if isinstance(value, Tensor) else value
            for value in vars(self).values()
        )  # fmt: skip
