"""A noise-conditional score network on the digits, and annealed Langevin dynamics to draw them.

    s(x, sigma_i) = -F(x / sqrt(1 + sigma_i^2), i) / sigma_i,   F the U-Net of the digits model

trained by denoising score matching with lambda(sigma) = sigma^2 (Song & Ermon 2019, eq. 5 and 6),
on a ladder of levels chosen by Song & Ermon 2020: technique 1 for the largest, 2 for how many, 3
for the division by sigma, 4 for the sampler's step (fastdiff.solvers.ncsnv2), 5 for the averaged
weights. The network is told the level too, as in 2019, and its input has unit variance (c_in of
Karras et al. 2022, table 1, with sigma_data = 1). It is given the label, or none, as the digits
model is. The ladder of 2019, and its sampler, are one option away:

    NCSNConfig(sigma_max=1.0, levels=10)        fastdiff.solvers.ncsn(model.path, ...)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.models import digits, weights
from fastdiff.models.digits_training import Batch, Batches, DigitsConfig, trained
from fastdiff.models.problem import FitConfig
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.schedules import GaussianPath
from fastdiff.schedules._values import as_int
from fastdiff.solvers.checks import check_positive

__all__ = [
    "NCSN", "WEIGHTS", "NCSNConfig", "ScoreNetwork", "levels_between", "load",
    "max_pairwise_distance", "save",
]  # fmt: skip

WEIGHTS = Path(__file__).with_name("ncsn.safetensors")


def max_pairwise_distance(data: Tensor) -> float:
    """The largest Euclidean distance between two of (N, ...) points, N >= 2: sigma_1.

    With it a chain that begins at noise reaches every mode (Song & Ermon 2020, technique 1).
    """
    if data.ndim < 2 or len(data) < 2:
        raise ValueError(f"data must have shape (N, ...), N >= 2, got {tuple(data.shape)}")
    rows = data.detach().flatten(1).double()
    return float(torch.pdist(rows).max())


def levels_between(sigma_max: float, sigma_min: float, dimension: int, overlap: float = 0.5) -> int:
    """How many geometric levels from sigma_max to sigma_min have neighbours that overlap enough.

    The norm of sigma z in D dimensions is nearly normal, of deviation sigma / sqrt(2); the shell of
    three deviations around one level's holds as much of the next one's mass as `overlap` where

        Phi(sqrt(2D)(gamma - 1) + 3 gamma) - Phi(sqrt(2D)(gamma - 1) - 3 gamma) = overlap

    (Song & Ermon 2020, technique 2). The least number of levels with a ratio of at most gamma.

    Args:
        sigma_max, sigma_min: > 0, sigma_max the larger.
        dimension: D of the data, at least 5: in fewer the shells of any two levels overlap by half.
        overlap: in (0, 1).
    """
    high, low = check_positive("sigma_max", sigma_max), check_positive("sigma_min", sigma_min)
    D = as_int("dimension", dimension, 5)
    if not high > low:
        raise ValueError(f"sigma_max must be above sigma_min = {low}, got {high}")
    if not 0 < overlap < 0.997:  # Phi(3) - Phi(-3), of equal levels
        raise ValueError(f"overlap must be in (0, 0.997), got {overlap}")

    def phi(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))

    def shared(gamma: float) -> float:
        centre = math.sqrt(2 * D) * (gamma - 1)
        return phi(centre + 3 * gamma) - phi(centre - 3 * gamma)

    below, above = 1.0, 2.0
    while shared(above) > overlap:
        above *= 2
    for _ in range(200):
        gamma = (below + above) / 2
        below, above = (gamma, above) if shared(gamma) > overlap else (below, gamma)
    return 1 + math.ceil(math.log(high / low) / math.log(below) - 1e-9)


class ScoreNetwork(nn.Module):
    """s(x, sigma_i, label), the gradient of log q_sigma_i(x | label).

    Shapes: x (N, C, H, W) float32, t (N,) the level's index from 0, the smallest; labels int64 (N,)
    as for `UNet`. The result is like x.

    Attributes:
        path: the ladder, whose timesteps are the indices; what the samplers of fastdiff.solvers
            and q_sample take.
    """

    def __init__(self, sigmas: Sequence[float], config: UNetConfig) -> None:
        """sigmas: strictly monotone, > 0."""
        super().__init__()
        levels = np.sort(np.asarray(sigmas, np.float64))
        self.path: GaussianPath = fd.schedules.ve(levels, timesteps=np.arange(len(levels)))
        self.unet = digits.channels_last(UNet(config))
        scale = torch.from_numpy(1 / np.sqrt(1 + levels**2)).float()
        self.register_buffer("input_scale", scale, persistent=False)
        self.register_buffer(
            "output_scale", torch.from_numpy(-1 / levels).float(), persistent=False
        )

    input_scale: Tensor
    output_scale: Tensor

    @property
    def config(self) -> UNetConfig:
        return self.unet.config

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        level = t.long()
        given = x * self.input_scale[level][:, None, None, None]
        given = given.contiguous(memory_format=torch.channels_last)
        score: Tensor = self.unet(given, level, labels)
        return score * self.output_scale[level][:, None, None, None]


@dataclass(frozen=True)
class NCSNConfig(DigitsConfig):
    """Everything that decides the weights."""

    sigma_min: float = 0.01
    sigma_max: float | None = None  # None: max_pairwise_distance of the data
    levels: int | None = None  # None: levels_between them
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=4000, warmup=200, weight_decay=0.01, ema_decay=0.999
        )
    )

    def sigmas(self, pictures: Tensor) -> list[float]:
        """The ladder for this data, the smallest level first."""
        high = self.sigma_max
        if high is None:
            high = max_pairwise_distance(pictures)
        count = self.levels
        if count is None:
            count = levels_between(high, self.sigma_min, pictures[0].numel())
        ladder = fd.schedules.ve_geometric(count, self.sigma_min, high, append_zero=False)
        return sorted(ladder.tolist())


class NCSN:
    """The problem: denoising score matching at every level of the ladder alike."""

    def __init__(
        self, config: NCSNConfig | None = None, data: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """data: (pictures, labels) instead of all the digits."""
        self.config = config or NCSNConfig()
        data = data or digits.load_data()
        self.sigmas = self.config.sigmas(data[0])
        self._batches = Batches(data, self.config, len(self.sigmas))

    def model(self) -> ScoreNetwork:
        return ScoreNetwork(self.sigmas, self.config.model)

    def batch(self, step: int) -> Batch:
        return self._batches(step)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Of every sample, eq. 5 times 2 / D, which makes it the mean square of the noise that the
        network does not see, 1 at first: (B,)."""
        assert isinstance(model, ScoreNetwork)
        seed, path = self.config.fit.seed, model.path
        x_t = fd.q_sample(batch.x_start, batch.t, path, seed=seed, step=step)
        score = model(x_t, batch.t, batch.labels)
        losses = fd.training.score_matching_loss(
            score, batch.x_start, batch.t, path, seed=seed, step=step
        )
        return losses * (2 / batch.x_start[0].numel())

    def report(self, model: nn.Module, count: int = 20) -> dict[str, float]:
        """`digits.measure` of `count` samples of every class, by the samplers of 2020 and 2019."""
        assert isinstance(model, ScoreNetwork)
        found = {}
        for name, plan in (
            ("NCSNv2", fd.solvers.ncsnv2(model.path)),
            (
                "NCSN",
                fd.solvers.ncsn(
                    model.path, steps_per_level=10, step_size=0.2 * self.sigmas[0] ** 2
                ),
            ),
        ):
            labels = torch.arange(digits.CLASSES).repeat_interleave(count)
            x = fd.sample(
                digits.conditional(model, labels), plan, shape=(len(labels), *digits.SHAPE),
                seed=self.config.fit.seed, device="cpu",
            )  # fmt: skip
            assert isinstance(x, Tensor)
            for key, value in digits.measure(x, labels).report().items():
                found[f"{key}, {name}"] = value
        return found

    def about(self, losses: Sequence[float]) -> dict[str, Any]:
        """What the weights' file says of itself."""
        return {
            "data": "scikit-learn load_digits, values 0..16 to [-1, 1]",
            "sigmas": self.sigmas,
            "prediction_type": "score",
            **trained("ncsn", self.config, losses),
        }


def save(model: ScoreNetwork, path: str | os.PathLike[str], about: dict[str, Any]) -> Path:
    """Write the weights as float16 safetensors with `about`, sigmas included, as metadata."""
    return weights.save(model.unet, path, {"model": asdict(model.config), **about}, torch.float16)


def load(
    path: str | os.PathLike[str] = WEIGHTS, device: torch.device | str | None = None
) -> ScoreNetwork:
    """The shipped network, or another that `save` wrote, in float32 and ready to sample.

        model, labels = ncsn.load(), torch.arange(10)
        plan = fastdiff.solvers.ncsnv2(model.path)
        x = fastdiff.sample(digits.conditional(model, labels), plan, shape=(10, 1, 8, 8), seed=0)

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: no such file.
        ValueError: a file that holds something else.
    """
    about, tensors = weights.read(path)
    if about.get("prediction_type") != "score":
        raise ValueError(f"{os.fspath(path)} holds another model: it predicts no score")
    unet = digits.network(path, about, tensors)
    model = ScoreNetwork(about["sigmas"], unet.config)
    model.unet = unet
    return model.requires_grad_(False).eval().to(device)
