"""A problem for the trainer that takes no time, and a process that trains it until it is killed."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.models import trainer
from fastdiff.models.problem import FitConfig

FIT = FitConfig(steps=40, seed=3, warmup=5, weight_decay=0.1, ema_decay=0.9)


@dataclass(frozen=True)
class ToyConfig:
    width: int = 16
    fit: FitConfig = field(default_factory=lambda: FIT)


class Batch(NamedTuple):
    x: Tensor
    t: Tensor


class Toy:
    """A network with dropout that learns the sum of four numbers."""

    def __init__(self, config: ToyConfig | None = None) -> None:
        self.config = config or ToyConfig()

    def model(self) -> nn.Module:
        width = self.config.width
        return nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Dropout(0.3), nn.Linear(width, 1))

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.config.fit.seed * 1000 + step)
        x = torch.randn(8, 4, generator=generator)
        return Batch(x, torch.randint(100, (8,), generator=generator))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return (model(batch.x)[:, 0] - batch.x.sum(1)).square()

    def report(self, model: nn.Module) -> dict[str, float]:
        return {}


def main(checkpoint: str, how: str) -> None:
    """Trains with a checkpoint every 5 iterations, a line on stdout for each iteration.

    how: "run" to the end; "writing" until this process kills itself with half of the third
    checkpoint on disk.
    """
    if how == "writing":
        written, replace = 0, os.replace

        def die_third(source: Path, target: Path) -> None:
            nonlocal written
            written += 1
            if written == 3:
                Path(source).write_bytes(Path(source).read_bytes()[:1000])
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = die_third  # type: ignore[assignment]
    toy = Toy()
    trainer.fit(
        toy, toy.config.fit, checkpoint=checkpoint, checkpoint_every=5, resume=True,
        callback=lambda state: print(state.step, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
