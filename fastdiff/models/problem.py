"""What there is to train: a model, batches and a loss, all functions of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["Fit", "FitConfig", "Problem"]


class Problem(Protocol):
    """Any loop can drive it, from any step on: nothing that matters is kept between calls."""

    @property
    def config(self) -> Any:
        """All that decides the weights: a dataclass of plain values, with `fit`, a FitConfig."""

    def model(self) -> nn.Module:
        """A new model with its first weights."""

    def batch(self, step: int) -> Any:
        """The data of one iteration, with `t`, integers (B,), where losses are per sample."""

    def loss(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        """What to minimise: a scalar, or the mean of (B,) losses of the samples."""

    def report(self, model: nn.Module) -> dict[str, float]:
        """What the model has learned, in numbers."""


@dataclass(frozen=True)
class FitConfig:
    """How `trainer.fit` trains: AdamW, half a cosine from the learning rate down to zero."""

    steps: int
    learning_rate: float = 2e-3
    seed: int = 0
    threads: int = 1  # the sums depend on it; one costs little, as the models are tiny
    warmup: int = 0  # iterations in which the learning rate rises from zero
    weight_decay: float = 0.0
    ema_decay: float = 0.0  # of the average of the weights; 0: none is kept

    def __post_init__(self) -> None:
        for name in ("steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


class Fit(NamedTuple):
    """A trained model, ready to sample, and the loss of every iteration."""

    model: nn.Module
    losses: list[float]
