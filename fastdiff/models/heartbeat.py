"""The binary heartbeat of Sohl-Dickstein et al. 2015, section 3.1.2: bits by binomial diffusion.

A sequence is 20 bits with a pulse at every fifth, the first of which is at one of five places, all
equally likely: log2 5 = 2.322 bits a sequence are there to be learned. The paper reaches a bound of
2.414 bits with T = 2000; its last step is fixed (see variational_bound), which costs more the
fewer steps there are, so here the model does it, and T = 200.

The model is asked for the logits of x_0. All that x_t tells about x_0 is the evidence of each bit,
+-log((1 + abar_t) / (1 - abar_t)), so that is its input, and t is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import binomial
from fastdiff.binomial import BinomialSchedule
from fastdiff.models.problem import Fit, FitConfig
from fastdiff.models.trainer import fit

__all__ = [
    "ENTROPY", "LENGTH", "PERIOD", "Heartbeat", "HeartbeatConfig", "HeartbeatModel", "data",
    "is_heartbeat", "train",
]  # fmt: skip

LENGTH, PERIOD = 20, 5
ENTROPY = math.log2(PERIOD)  # bits of a sequence


def data() -> Tensor:
    """All sequences there are: float32 (5, 20)."""
    places = torch.arange(LENGTH) % PERIOD
    return (places[None, :] == torch.arange(PERIOD)[:, None]).float()


def is_heartbeat(x: Tensor) -> Tensor:
    """Which sequences (B, 20) are one of data(): bool (B,)."""
    return (x[:, None, :] == data()[None].to(x.dtype)).all(dim=-1).any(dim=-1)


class HeartbeatModel(nn.Module):
    """Logits of x_0 = 1 from x_t, (B, 20), and t, int64 (B,)."""

    evidence: Tensor

    def __init__(self, schedule: BinomialSchedule, width: int) -> None:
        super().__init__()
        known = torch.from_numpy(schedule.alphas_cumprod.copy()).clamp(max=1 - 1e-6)
        evidence = torch.log((1 + known) / (1 - known)).float()
        self.register_buffer("evidence", evidence, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(LENGTH, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, LENGTH),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        signs: Tensor = 2 * x.float() - 1
        logits: Tensor = self.layers(signs * self.evidence[t][:, None])
        return logits


@dataclass(frozen=True)
class HeartbeatConfig:
    """Everything that decides the weights."""

    timesteps: int = 200
    width: int = 128
    batch_size: int = 400  # a multiple of PERIOD
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=3000))

    def __post_init__(self) -> None:
        for name in ("timesteps", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % PERIOD:
            raise ValueError(f"batch_size must be a multiple of {PERIOD}, got {self.batch_size}")


class Batch(NamedTuple):
    x_start: Tensor
    t: Tensor


class Heartbeat:
    """The problem: T times a term of the bound, at steps spread evenly over the chain."""

    def __init__(self, config: HeartbeatConfig | None = None) -> None:
        self.config = config or HeartbeatConfig()
        self.schedule = BinomialSchedule.erasing(self.config.timesteps)

    def model(self) -> HeartbeatModel:
        return HeartbeatModel(self.schedule, self.config.width)

    def batch(self, step: int) -> Batch:
        """Every sequence alike, each with as many t as it has entries, moved on from step to step
        by the golden ratio of the distance between two."""
        each, steps = self.config.batch_size // PERIOD, self.config.timesteps
        places = (torch.arange(each) + step * (math.sqrt(5) - 1) / 2 % 1) * steps / each
        t = places.floor().long() % steps
        return Batch(data().repeat_interleave(each, dim=0), t.repeat(PERIOD))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """The bound in bits, estimated."""
        x_t = binomial.q_sample(
            batch.x_start, batch.t, self.schedule, seed=self.config.fit.seed, step=step
        )
        terms = binomial.bound(model(x_t, batch.t), batch.x_start, x_t, batch.t, self.schedule)
        return terms.mean() * self.schedule.num_timesteps

    def bound(self, model: nn.Module, draws: int = 1000) -> tuple[float, float]:
        """The bound in bits a sequence over all five, and the standard error of its estimate.

        Args:
            draws: of x_t for every sequence and every t.
        """
        x_start = data().repeat(draws, 1)
        # Noise of its own: seeds of training are below 2^63.
        seed = self.config.fit.seed + (1 << 63)
        total = binomial.variational_bound(model, x_start, self.schedule, seed=seed).total
        return float(total.mean()), float(total.std()) / math.sqrt(len(total))

    def report(self, model: nn.Module) -> dict[str, float]:
        """The bound and its standard error, and the share of 1000 samples that are heartbeats."""
        bits, error = self.bound(model)
        x = binomial.sample(
            model, self.schedule, (1000, LENGTH), seed=self.config.fit.seed + (1 << 63)
        )
        return {
            "bound, bits": bits,
            "standard error, bits": error,
            "entropy, bits": ENTROPY,
            "valid samples": float(is_heartbeat(x).float().mean()),
        }


def train(config: HeartbeatConfig | None = None, *, progress: bool = False) -> Fit:
    """Trains the model; see HeartbeatConfig and fit()."""
    problem = Heartbeat(config)
    return fit(problem, problem.config.fit, progress=progress)
