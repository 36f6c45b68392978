"""Which t to train on: uniform, by the loss so far, or logit-normal.

    timesteps, weights = sampler.sample(batch_size, device)
    loss = (losses * weights).mean()
    sampler.update_with_local_losses(timesteps, losses.detach())          # of a LossAwareSampler

Names and rules of improved-diffusion's resample module (Nichol & Dhariwal 2021, section 3.3); a
fastdiff schedule serves where that takes its diffusion object.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.schedules._values import FloatArray, as_float, as_int
from fastdiff.solvers.checks import check_choice, check_positive

__all__ = [
    "LogitNormalSampler", "LossAwareSampler", "LossSecondMomentResampler", "ScheduleSampler",
    "UniformSampler", "create_named_schedule_sampler",
]  # fmt: skip


class Timesteps(Protocol):
    """A schedule of fastdiff.schedules, or a diffusion object: anything with T indices."""

    @property
    def num_timesteps(self) -> int: ...


def create_named_schedule_sampler(name: str, diffusion: Timesteps) -> ScheduleSampler:
    """The sampler "uniform", "loss-second-moment" or "logit-normal" with its defaults.

    Raises ValueError for another name.
    """
    kinds: dict[str, type[ScheduleSampler]] = {
        "uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler,
        "logit-normal": LogitNormalSampler,
    }  # fmt: skip
    check_choice("name", name, tuple(kinds))
    return kinds[name](diffusion)


class ScheduleSampler(ABC):
    """Draws t with probability p_t proportional to weights(), and corrects for it.

    The mean over draws of weight * loss is the mean over all t of the loss, because the weight is
    1 / (T p_t).
    """

    def __init__(self, diffusion: Timesteps) -> None:
        self.num_timesteps = as_int("diffusion.num_timesteps", diffusion.num_timesteps, 1)

    @abstractmethod
    def weights(self) -> FloatArray:
        """float64 (T,), all > 0, of any scale."""

    def sample(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(t, weights): int64 and float32 (batch_size,) on the device.

        Args:
            generator: where the draw comes from; by default NumPy's global state, as upstream.
        """
        count = as_int("batch_size", batch_size, 1)
        if generator is not None and not isinstance(generator, np.random.Generator):
            raise TypeError(
                f"generator must be a numpy.random.Generator, not {type(generator).__name__}"
            )
        p = self.weights()
        p = p / p.sum()
        draw = np.random if generator is None else generator
        t = draw.choice(len(p), size=(count,), p=p)
        weights = torch.from_numpy(self._corrections(p)[t]).to(device=device, dtype=torch.float32)
        return torch.from_numpy(t).long().to(device), weights

    def _corrections(self, p: FloatArray) -> FloatArray:
        return 1.0 / (len(p) * p)


class UniformSampler(ScheduleSampler):
    """Every t alike; weights of 1."""

    def weights(self) -> FloatArray:
        return np.ones(self.num_timesteps)


class LogitNormalSampler(ScheduleSampler):
    """The noise level u in (0, 1) of which logit u is N(mean, std^2) (Esser et al. 2024, eq. 19).

    For the T levels of fastdiff.schedules.flow without shift: index i has the probability of
    (i/T, (i+1)/T], which is that of drawing u and rounding up to the next level. There the
    density is the loss weighting, so it is not corrected for: the weights drawn with t are 1.

    Args:
        diffusion: anything with num_timesteps.
        mean, std: of logit u; std > 0.
    """

    def __init__(self, diffusion: Timesteps, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(diffusion)
        self.mean, self.std = as_float("mean", mean), check_positive("std", std)

    def weights(self) -> FloatArray:
        edges = np.arange(1, self.num_timesteps) / self.num_timesteps
        z = (np.log(edges) - np.log1p(-edges) - self.mean) / self.std
        # From the nearer end, so that the tails do not vanish.
        below = np.array([0.0, *(_normal_cdf(v) for v in z), 1.0])
        above = np.array([1.0, *(_normal_cdf(-v) for v in z), 0.0])
        centre = below[1:] <= 0.5
        masses: FloatArray = np.where(centre, np.diff(below), -np.diff(above))
        return masses

    def _corrections(self, p: FloatArray) -> FloatArray:
        return np.ones_like(p)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all processes."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Takes this process's losses, and those of the others where torch.distributed runs.

        Every process of the group must call it; they may have different batch sizes, and all of
        them then have the same history.

        Args:
            local_ts: integers (B,); local_losses: floating (B,), one for each.
        """
        if (
            not isinstance(local_ts, Tensor)
            or local_ts.dim() != 1
            or (local_ts.is_floating_point() or local_ts.dtype == torch.bool)
        ):
            raise ValueError("local_ts must be an integer tensor (B,)")
        if not isinstance(local_losses, Tensor) or local_losses.shape != local_ts.shape:
            raise ValueError(f"local_losses must be a tensor {tuple(local_ts.shape)}")
        if not (dist.is_available() and dist.is_initialized()):
            self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())
            return
        # One gather of (t, loss) in float64, which holds both exactly, padded to one size.
        pairs = torch.stack([local_ts.double(), local_losses.detach().double()], dim=1)
        count = dist.get_world_size()
        size = torch.tensor([len(pairs)], device=pairs.device)
        sizes = [torch.zeros_like(size) for _ in range(count)]
        dist.all_gather(sizes, size)
        lengths = [int(value) for value in sizes]
        padded = pairs.new_zeros((max(lengths), 2))
        padded[: len(pairs)] = pairs
        gathered = [torch.zeros_like(padded) for _ in range(count)]
        dist.all_gather(gathered, padded)
        every = torch.cat([part[:n] for part, n in zip(gathered, lengths, strict=True)])
        self.update_with_all_losses([int(t) for t in every[:, 0].tolist()], every[:, 1].tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Iterable[float]) -> None:
        """Takes the losses of all processes, in an order that is the same in each."""


class LossSecondMomentResampler(LossAwareSampler):
    """p_t proportional to sqrt(E[L_t^2]) of the last losses (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every t has `history_per_term` losses; then mixed with the uniform distribution
    by `uniform_prob`, so that no t is forgotten.
    """

    def __init__(
        self, diffusion: Timesteps, history_per_term: int = 10, uniform_prob: float = 0.001
    ) -> None:
        super().__init__(diffusion)
        self.history_per_term = as_int("history_per_term", history_per_term, 1)
        self.uniform_prob = as_float("uniform_prob", uniform_prob)
        if not 0 < self.uniform_prob <= 1:
            raise ValueError(f"uniform_prob must be in (0, 1], not {uniform_prob}")
        self._history = np.zeros((self.num_timesteps, self.history_per_term))
        self._counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def weights(self) -> FloatArray:
        if not (self._counts == self.history_per_term).all():
            return np.ones(self.num_timesteps)
        weights = np.sqrt(np.mean(np.square(self._history), axis=-1))
        total = weights.sum()
        if total == 0.0:
            return np.ones(self.num_timesteps)
        weights = weights / total * (1.0 - self.uniform_prob)
        mixed: FloatArray = weights + self.uniform_prob / self.num_timesteps
        return mixed

    def update_with_all_losses(self, ts: Sequence[int], losses: Iterable[float]) -> None:
        """Raises ValueError for a t out of range or a loss that is not finite, taking none."""
        taken = list(losses)
        for t, value in zip(ts, taken, strict=True):
            if not 0 <= t < self.num_timesteps:
                raise ValueError(f"ts must be in [0, {self.num_timesteps}), not {t}")
            if not math.isfinite(value):
                raise ValueError(f"losses must be finite, not {value} at t = {t}")
        for t, value in zip(ts, taken, strict=True):
            if self._counts[t] == self.history_per_term:
                self._history[t, :-1] = self._history[t, 1:]
                self._history[t, -1] = value
            else:
                self._history[t, self._counts[t]] = value
                self._counts[t] += 1

    def state_dict(self) -> dict[str, Any]:
        """The history as tensors: "history" float64 (T, H) and "counts" int64 (T,)."""
        return {
            "history": torch.from_numpy(self._history.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave. Raises ValueError where it is of another shape, or not such."""
        shapes = {"history": self._history.shape, "counts": self._counts.shape}
        if set(state) != set(shapes):
            raise ValueError(f"state must have {', '.join(shapes)}, not {', '.join(state)}")
        arrays = {name: np.asarray(state[name]) for name in shapes}
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"state {name!r} must be {shape}, not {arrays[name].shape}")
        self._history = arrays["history"].astype(np.float64)
        self._counts = arrays["counts"].astype(np.int64)
