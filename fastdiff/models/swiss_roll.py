"""The swiss roll of Sohl-Dickstein et al. 2015, section 3.1.1: a Gaussian chain that learns beta_t.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I),  beta_1 fixed, the others learned
    p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t)),  x_T ~ N(0, I)

The model gives (epsilon, v), as in improved DDPM: f_mu is the posterior mean at the x_0 that
epsilon stands for, log f_Sigma lies v's share of the way from log beta~_t to log beta_t (Nichol &
Dhariwal 2021, eq. 15). What is minimised is the bound on -log p(x_0), in nats:

    KL(q(x_T | x_0) || p(x_T)) + sum_t E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
                               - E log p(x_0 | x_1)

Learned betas take its derivative by way of every coefficient, x_t included, whose noise stays what
it is ("frozen noise", section 2.4.1 there). Fused operations read their coefficients from tables
made on the host, which have no gradient, so the bound is written in PyTorch here, for two numbers a
sample; for betas that are given too, so that both are the same bound. Noise is the library's, and a
trained chain is an ordinary NoiseSchedule, which samples with the fused steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.models.problem import Fit, FitConfig
from fastdiff.models.trainer import fit

__all__ = ["SwissRoll", "SwissRollConfig", "SwissRollModel", "curve", "data", "train"]

TURNS = (1.5 * math.pi, 4.5 * math.pi)  # the angle's first and last value
SCALE = 1 / 7.5  # to a standard deviation of about 1
THICKNESS = 0.03  # standard deviation of the noise around the curve
FREQUENCIES = (2.0, 4.0, 8.0)  # of the features in which the model sees a point


def curve(angle: Tensor) -> Tensor:
    """Points of the roll: angles (N,) to (N, 2)."""
    return torch.stack([angle * torch.cos(angle), angle * torch.sin(angle)], dim=1) * SCALE


def data(count: int, *, seed: int, step: int = 0) -> Tensor:
    """`count` points, float32 (count, 2): a function of (seed, step) and of which point it is."""
    z = fd.randn((count, 3), seed, step=step)
    share = torch.special.ndtr(z[:, 0])  # uniform on [0, 1]
    return curve(TURNS[0] + (TURNS[1] - TURNS[0]) * share) + THICKNESS * z[:, 1:]


@dataclass(frozen=True)
class SwissRollConfig:
    """Everything that decides the weights."""

    timesteps: int = 40  # the paper's
    width: int = 128
    batch_size: int = 800
    learned_betas: bool = True  # else beta_t = 1 / (T - t + 1), but for the first and the last
    first_beta: float = 1e-3
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=4000, learning_rate=3e-3))

    def __post_init__(self) -> None:
        for name, least in (("timesteps", 2), ("width", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.first_beta < 1:
            raise ValueError(f"first_beta must be in (0, 1), got {self.first_beta}")


class Chain(NamedTuple):
    """The coefficients of every t, float64 (T,) each, differentiable."""

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_before: Tensor
    posterior_variance: Tensor  # beta~_t; at the first t that of the second


class SwissRollModel(nn.Module):
    """(epsilon, v) from x_t, (B, 2) to (B, 4), and the betas of the chain."""

    first_beta: Tensor

    def __init__(self, config: SwissRollConfig) -> None:
        super().__init__()
        steps = config.timesteps
        # beta_t = s(logit): in (0, 1) whatever is learned. The paper's betas to begin with.
        others = 1.0 / torch.arange(steps - 1, 0, -1, dtype=torch.float64)
        logits = torch.logit(others.clamp(max=0.5))
        self.beta_logits = nn.Parameter(logits, requires_grad=config.learned_betas)
        self.register_buffer("first_beta", torch.tensor([config.first_beta], dtype=torch.float64))
        self.when = nn.Embedding(steps, config.width)
        self.place = nn.Linear(2 * (1 + 2 * len(FREQUENCIES)), config.width)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Linear(config.width, config.width), nn.SiLU(),
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, 4),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = torch.cat([x * frequency for frequency in FREQUENCIES], dim=1)
        features = torch.cat([x, torch.sin(waves), torch.cos(waves)], dim=1)
        result: Tensor = self.layers(self.place(features) + self.when(t.long()))
        return result

    def chain(self) -> Chain:
        betas = torch.cat([self.first_beta, torch.sigmoid(self.beta_logits)])
        known = torch.cumprod(1 - betas, dim=0)
        before = torch.cat([torch.ones_like(known[:1]), known[:-1]])
        variance = betas * (1 - before) / (1 - known)
        return Chain(betas, known, before, torch.cat([variance[1:2], variance[1:]]))

    def schedule(self) -> fd.NoiseSchedule:
        """The chain as it is now."""
        return fd.NoiseSchedule(self.chain().betas.detach().numpy(), name="swiss roll")


class Batch(NamedTuple):
    x_start: Tensor
    t: Tensor


class SwissRoll:
    """The problem: the bound, with one t for every point, spread evenly over the chain."""

    def __init__(self, config: SwissRollConfig | None = None) -> None:
        self.config = config or SwissRollConfig()

    def model(self) -> SwissRollModel:
        return SwissRollModel(self.config)

    def batch(self, step: int) -> Batch:
        count, steps = self.config.batch_size, self.config.timesteps
        t = (torch.arange(count) + step * count) % steps
        return Batch(data(count, seed=self.config.fit.seed, step=step), t)

    def terms(self, model: SwissRollModel, batch: Batch, seed: int, step: int) -> Tensor:
        """T times term t of the bound plus the prior's, in nats: (B,), its mean is the bound."""
        chain, t, x_start = model.chain(), batch.t, batch.x_start
        z = fd.randn(tuple(x_start.shape), seed, step=step, stream=fd.noise.STREAM_Q_SAMPLE)
        beta, known, _, smallest = (values[t, None].float() for values in chain)
        rest = (1 - chain.alphas_cumprod)[t, None].float()  # cancels less in float64
        x_t = known.sqrt() * x_start + rest.sqrt() * z
        epsilon, v = model(x_t, t).chunk(2, dim=1)
        # Means of the posterior at x_0 and at the model's differ by this multiple of epsilon - z.
        error = (beta / (rest * (1 - beta)).sqrt()) * (epsilon - z)
        low, high = smallest.log(), beta.log()
        log_variance = low + (high - low) * (v + 1) / 2
        square = error.square() * torch.exp(-log_variance)
        divergence = log_variance - low - 1 + torch.exp(low - log_variance) + square
        likelihood = log_variance + square + math.log(2 * math.pi)
        terms = torch.where(t[:, None] == 0, likelihood, divergence).sum(1) / 2
        return terms * len(chain.betas) + self._prior(chain, x_start)

    @staticmethod
    def _prior(chain: Chain, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)), (B,)."""
        known, variance = chain.alphas_cumprod[-1].float(), 1 - chain.alphas_cumprod[-1].float()
        return (known * x_start.square() + variance - 1 - variance.log()).sum(1) / 2

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """The bound in nats, estimated."""
        assert isinstance(model, SwissRollModel)
        return self.terms(model, batch, self.config.fit.seed, step).mean()

    def bound(self, model: nn.Module, points: int = 2000) -> tuple[float, float]:
        """The bound in nats over new points, every one at every t, and its standard error."""
        assert isinstance(model, SwissRollModel)
        steps = self.config.timesteps
        seed = self.config.fit.seed + (1 << 63)  # of its own: those of training are below
        x_start = data(points, seed=seed)
        with torch.no_grad():
            each = torch.stack([
                self.terms(model, Batch(x_start, torch.full((points,), t)), seed, t)
                for t in range(steps)
            ])  # fmt: skip
        total = each.mean(0)
        return float(total.mean()), float(total.std()) / math.sqrt(points)

    def gaussian(self, points: int = 2000) -> float:
        """-log p(x_0) in nats of the normal distribution that fits the same points best."""
        x = data(points, seed=self.config.fit.seed + (1 << 63)).double()
        return float(torch.logdet(2 * math.pi * math.e * torch.cov(x.T, correction=0))) / 2

    def sample(self, model: nn.Module, count: int, *, seed: int) -> Tensor:
        """float32 (count, 2), by the fused steps of the learned chain."""
        assert isinstance(model, SwissRollModel)
        plan = fd.solvers.ddpm(model.schedule(), variance="learned_range", clip=None)
        with torch.no_grad():
            x = fd.sample(model, plan, shape=(count, 2), seed=seed)
        assert isinstance(x, Tensor)
        return x

    def report(self, model: nn.Module) -> dict[str, float]:
        """The bound, the Gaussian's fit, and mean distances of samples and data from the curve."""
        nats, error = self.bound(model)
        samples = self.sample(model, 1000, seed=self.config.fit.seed + (1 << 63))
        points = data(1000, seed=self.config.fit.seed + (1 << 63))
        return {
            "bound, nats": nats,
            "standard error, nats": error,
            "Gaussian fit, nats": self.gaussian(),
            "samples' distance": float(distance(samples).mean()),
            "data's distance": float(distance(points).mean()),
        }


def distance(x: Tensor) -> Tensor:
    """From points (N, 2) to the nearest of 2000 on the curve: (N,)."""
    return torch.cdist(x, curve(torch.linspace(*TURNS, 2000))).amin(dim=1)


def train(config: SwissRollConfig | None = None, *, progress: bool = False) -> Fit:
    """Trains model and betas; see SwissRollConfig and fit()."""
    problem = SwissRoll(config)
    return fit(problem, problem.config.fit, progress=progress)
