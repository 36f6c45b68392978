"""Training of the digits model on E ||noise - epsilon(x_t, t, label)||^2 (Ho et al. 2020, eq. 14).

The label is dropped now and then (Ho & Salimans 2022, algorithm 1), so that one network serves
classifier-free guidance; what is kept is the averaged weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.files import check_writable
from fastdiff.models import digits
from fastdiff.models.problem import FitConfig
from fastdiff.models.trainer import fit, running_means
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.models.weights import require

__all__ = ["Batch", "Batches", "Digits", "DigitsConfig", "train", "trained"]


@dataclass(frozen=True)
class DigitsConfig:
    """Everything that decides the weights."""

    batch_size: int = 128
    label_dropout: float = 0.1
    model: UNetConfig = field(default_factory=UNetConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=4000, warmup=200, weight_decay=0.01, ema_decay=0.999
        )
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")


class Batch(NamedTuple):
    x_start: Tensor
    labels: Tensor
    t: Tensor


class Batches:
    """Pictures, labels and noise levels of every iteration, drawn one after another from a
    generator of the seed: each picture once per pass, the label dropped now and then."""

    def __init__(
        self, data: tuple[Tensor, Tensor], config: DigitsConfig, num_timesteps: int
    ) -> None:
        self._data, self._config, self._num_timesteps = data, config, num_timesteps
        self._draws, self._next = self._drawn(), 0

    def __call__(self, step: int) -> Batch:
        """The batch of an iteration, the same whatever was asked for before."""
        if step < self._next:
            self._draws, self._next = self._drawn(), 0
        while self._next < step:  # drawing is cheap, so a resumed run does it again
            next(self._draws)
            self._next += 1
        self._next += 1
        index, drop, t = next(self._draws)
        pictures, labels = self._data
        null_class = self._config.model.null_class
        return Batch(pictures[index], labels[index].masked_fill(drop, null_class), t)

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        config, count = self._config, len(self._data[0])
        size = min(config.batch_size, count)
        generator = torch.Generator().manual_seed(config.fit.seed)
        while True:
            order = torch.randperm(count, generator=generator)
            for i in range(0, count - size + 1, size):
                drop = torch.rand(size, generator=generator) < config.label_dropout
                t = torch.randint(self._num_timesteps, (size,), generator=generator)
                yield order[i : i + size], drop, t


class Digits:
    """The problem: the noise in a digit, given the label or not (Ho et al. 2020, eq. 14)."""

    def __init__(
        self, config: DigitsConfig | None = None, data: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """data: (pictures, labels) instead of all the digits."""
        self.config = config or DigitsConfig()
        self._schedule = digits.schedule()
        self._batches = Batches(data or digits.load_data(), self.config, digits.TIMESTEPS)

    def model(self) -> UNet:
        return digits.channels_last(UNet(self.config.model))

    def batch(self, step: int) -> Batch:
        return self._batches(step)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Of every sample, the mean square of what the predicted noise lacks: (B,)."""
        seed = self.config.fit.seed
        x_t = fd.q_sample(batch.x_start, batch.t, self._schedule, seed=seed, step=step)
        assert isinstance(x_t, Tensor)
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        output = model(x_t, batch.t, batch.labels)
        return fd.training.loss(
            output, batch.x_start, batch.t, self._schedule, seed=seed, step=step
        )

    def report(self, model: nn.Module, count: int = 20) -> dict[str, float]:
        """`measure` of `count` samples of every class, by 50 DDIM steps with guidance."""
        assert isinstance(model, UNet)
        plan = fd.solvers.ddim(self._schedule, steps=50, prediction_type="epsilon", clip=(-1, 1))
        labels = torch.arange(digits.CLASSES).repeat_interleave(count)
        x = fd.sample(
            digits.conditional(model, labels), plan, shape=(len(labels), *digits.SHAPE),
            seed=self.config.fit.seed, guidance_scale=digits.GUIDANCE_SCALE, device="cpu",
        )  # fmt: skip
        assert isinstance(x, Tensor)
        return digits.measure(x, labels).report()

    def about(self, losses: Sequence[float]) -> dict[str, Any]:
        """What the weights' file says of itself."""
        return {
            "data": "scikit-learn load_digits, values 0..16 to [-1, 1]",
            "schedule": "cosine",
            "timesteps": digits.TIMESTEPS,
            "prediction_type": "epsilon",
            **trained("digits", self.config, losses),
        }


def trained(name: str, config: DigitsConfig, losses: Sequence[float]) -> dict[str, Any]:
    """How weights were trained: the command, settings, last running mean of the loss, torch."""
    fit = config.fit
    command = f"fastdiff train {name} --steps {fit.steps} --seed {fit.seed}"
    if fit.threads != 1:
        command += f" --threads {fit.threads}"
    return {
        "command": command,
        "training": {
            "steps": fit.steps,
            "seed": fit.seed,
            "batch_size": config.batch_size,
            "learning_rate": fit.learning_rate,
            "warmup": fit.warmup,
            "weight_decay": fit.weight_decay,
            "label_dropout": config.label_dropout,
            "ema_decay": fit.ema_decay,
            "threads": fit.threads,
        },
        "loss": round(running_means(losses)[-1], 5),
        "torch": str(torch.__version__),
    }


def train(
    config: DigitsConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> UNet:
    """Train on the digits and return the model with averaged weights, on the CPU in float32.

    The noise of iteration i is stream 2 of the noise contract at step i, so it is the same on every
    backend; everything else is drawn from torch generators with the same seed. The same config
    gives the same weights, as far as torch's convolutions do: on the same kind of CPU.

    Args:
        config: see `DigitsConfig`.
        out: where to write the weights; the folder is checked before training begins.
        data: (pictures, labels) instead of all the digits.
        options: of `trainer.fit`: progress, callback, checkpoint, checkpoint_every, resume.

    Raises:
        ImportError: scikit-learn or safetensors is not installed.
        ValueError: a config that makes no sense, or `out` that cannot be written.
    """
    if out is not None:
        check_writable(out, "out")
        require("safetensors.torch", "sample")
    problem = Digits(config, data)
    model, losses = fit(problem, problem.config.fit, **options)
    assert isinstance(model, UNet)
    if out is not None:
        digits.save(model, out, problem.about(losses))
    return model
