"""Paths x_t = alpha_t x_0 + sigma_t eps that are not a DDPM chain: variance exploding and flow.

Sources, cited by the names used below:
  SDE   Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, "Score-based generative modeling
        through stochastic differential equations"
  EDM   Karras, Aittala, Aila, Laine 2022, "Elucidating the design space of diffusion-based
        generative models"
  FM    Lipman, Chen, Ben-Hamu, Nickel, Le 2023, "Flow matching for generative modeling"
  VDM   Kingma, Salimans, Poole, Ho 2021, "Variational diffusion models"
  SD3   Esser et al. 2024, "Scaling rectified flow transformers for high-resolution image synthesis"
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ._values import (
    ComparedByContent,
    FloatArray,
    TimestepArray,
    as_float,
    as_float_vector,
    as_int,
    as_timesteps,
    as_vector,
    freeze,
    refuse_where,
)


class Schedule(Protocol):
    """What `NoiseSchedule` and `GaussianPath` share: x_t = alpha_t x_0 + sigma_t eps.

    alpha_t, sigma_t: float64 (T,), read-only, index = noise level, increasing = more noise.
    timesteps: int64 or float64 (T,), the model's own t at each index.
    snr, log_snr: alpha_t^2 / sigma_t^2 and its logarithm; sigmas: sigma_t / alpha_t. All (T,).
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def alpha_t(self) -> FloatArray: ...
    @property
    def sigma_t(self) -> FloatArray: ...
    @property
    def timesteps(self) -> TimestepArray: ...
    @property
    def num_timesteps(self) -> int: ...
    @property
    def sigmas(self) -> FloatArray: ...
    @property
    def snr(self) -> FloatArray: ...
    @property
    def log_snr(self) -> FloatArray: ...
    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, init=False, eq=False, repr=False)
class GaussianPath(ComparedByContent):
    """A Gaussian path on T noise levels: q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I).

    Parameters
        alpha_t, sigma_t: (T,) real, finite, >= 0, never both 0, sigma_t / alpha_t strictly
            increasing (index T-1 is the noisiest). float64, read-only here.
        timesteps: (T,), the model's own t at each index, strictly increasing. Default arange(T).
        name: shown by repr; not compared.

    Two paths are equal when the three arrays are, bit for bit.

    Source: VDM eq 1. Raises TypeError, ValueError naming the argument.
    """

    alpha_t: FloatArray
    sigma_t: FloatArray
    timesteps: TimestepArray
    name: str

    def __init__(
        self, alpha_t: Any, sigma_t: Any, timesteps: Any = None, name: str = "custom"
    ) -> None:
        alpha = as_float_vector("alpha_t", alpha_t)
        sigma = as_float_vector("sigma_t", sigma_t, length=alpha.size)
        for array_name, array in (("alpha_t", alpha), ("sigma_t", sigma)):
            wrong = (array < 0) | np.isinf(array)
            refuse_where(array_name, array, wrong, "be finite and >= 0")
        refuse_where("sigma_t", sigma, (alpha == 0) & (sigma == 0), "be > 0 where alpha_t is 0")
        noisier = sigma[1:] * alpha[:-1] > sigma[:-1] * alpha[1:]
        refuse_where("sigma_t", sigma, np.r_[False, ~noisier], "strictly increase over alpha_t")
        steps = np.arange(alpha.size) if timesteps is None else as_timesteps(timesteps, alpha.size)
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        object.__setattr__(self, "alpha_t", freeze(alpha))
        object.__setattr__(self, "sigma_t", freeze(sigma))
        object.__setattr__(self, "timesteps", freeze(steps))
        object.__setattr__(self, "name", name)
        self._identify(self.alpha_t, self.sigma_t, self.timesteps)

    def __len__(self) -> int:
        return self.num_timesteps

    @cached_property
    def sigmas(self) -> FloatArray:
        """sigma_t / alpha_t, the variance-exploding view; inf where alpha_t = 0."""
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            frozen: FloatArray = freeze(self.sigma_t / self.alpha_t)
        return frozen

    @cached_property
    def snr(self) -> FloatArray:
        """alpha_t^2 / sigma_t^2 (VDM eq 2); inf where sigma_t = 0."""
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            frozen: FloatArray = freeze((self.alpha_t / self.sigma_t) ** 2)
        return frozen

    @cached_property
    def log_snr(self) -> FloatArray:
        """2 (log alpha_t - log sigma_t); inf where sigma_t = 0, -inf where alpha_t = 0."""
        with np.errstate(divide="ignore"):
            frozen: FloatArray = freeze(2 * (np.log(self.alpha_t) - np.log(self.sigma_t)))
        return frozen

    def __reduce__(self) -> tuple[Any, ...]:
        return GaussianPath, (self.alpha_t, self.sigma_t, self.timesteps, self.name)

    def __repr__(self) -> str:
        def ends(array: Any) -> str:
            return f"{array[0]:.6g} .. {array[-1]:.6g}" if array.size > 1 else f"{array[0]:.6g}"

        return (
            f"GaussianPath({self.name!r}, T={self.num_timesteps}, alpha_t {ends(self.alpha_t)}, "
            f"sigma_t {ends(self.sigma_t)}, timesteps {ends(self.timesteps)})"
        )


def ve(sigmas: Any, timesteps: Any = None) -> GaussianPath:
    """The variance-exploding path: alpha_t = 1, x_t = x_0 + sigma_t eps.

    SDE eq 9, EDM section 2.

    sigmas: (T,), in data units, finite, >= 0, strictly monotone. A descending ladder (`karras`,
        ...) is turned round, with its timesteps, so that the index always counts up in noise.
    timesteps: (T,) in the order of sigmas; default sigmas themselves, which is what a denoiser
        D(x; sigma) is given. For a network with level labels (NCSN) give the labels.

    Raises TypeError, ValueError naming the argument.
    """
    sigma = as_float_vector("sigmas", sigmas)
    refuse_where("sigmas", sigma, (sigma < 0) | np.isinf(sigma), "be finite and >= 0")
    order = -1 if sigma[0] > sigma[-1] else 1
    sigma = sigma[::order]
    if not (np.diff(sigma) > 0).all():
        values = np.array2string(sigma[::order], threshold=8)
        raise ValueError(f"sigmas must be strictly monotone, got {values}")
    steps: Any = sigma
    if timesteps is not None:
        steps = as_vector("timesteps", timesteps, length=sigma.size)[::order]
    return GaussianPath(np.ones_like(sigma), sigma, steps, name="ve")


def flow(
    num_timesteps: int = 1000,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    num_train_timesteps: int = 1000,
) -> GaussianPath:
    """The straight (rectified flow) path x_t = (1 - sigma) x_0 + sigma eps on T noise levels.

        sigma_i = i / T, i = 1 .. T, then shifted (`flow_shift`);  alpha_i = 1 - sigma_i

    FM eq 22 with sigma_min = 0, time reversed (sigma = 1 is noise); SD3 eq 13.

    shift, mu: see `flow_shift`; at most one of them.
    num_train_timesteps: the model's t is sigma * num_train_timesteps, a float64 in (0, that].

    Raises TypeError, ValueError unless num_timesteps, num_train_timesteps >= 1; as `flow_shift`;
    or where the shift is so strong that noise levels coincide in float64.
    """
    T = as_int("num_timesteps", num_timesteps, 1)
    scale = as_int("num_train_timesteps", num_train_timesteps, 1)
    factor = _shift_factor(shift, mu)
    i = np.arange(1, T + 1)
    # With s = factor: sigma' = s sigma / (s sigma + 1 - sigma), and 1 - sigma' without cancelling.
    noise, data = factor * i, (T - i).astype(np.float64)
    sigma, alpha = noise / (noise + data), data / (noise + data)
    if not (np.diff(sigma * scale) > 0).all():
        said = f"shift={shift}" if mu is None else f"mu={mu}"
        raise ValueError(f"{said} is too strong for {T} distinct noise levels in float64")
    return GaussianPath(alpha, sigma, sigma * scale, name="flow")


def flow_shift(sigmas: Any, *, shift: float = 1.0, mu: float | None = None) -> FloatArray:
    """Move flow noise levels towards noise (shift > 1), as high resolutions need.

        sigma' = s sigma / (1 + (s - 1) sigma)                    static shift s, SD3 eq 23
        sigma' = e^mu / (e^mu + (1/sigma - 1))                    the same with s = e^mu

    sigmas: (n,) real in [0, 1], any order; 0 and 1 stay. mu usually comes from `resolution_mu`.
    Returns float64 (n,), in the given order.

    Raises TypeError, ValueError unless shift > 0 and |mu| <= 700, and if both are given.
    """
    sigma = as_float_vector("sigmas", sigmas)
    refuse_where("sigmas", sigma, (sigma < 0) | (sigma > 1), "be in [0, 1]")
    factor = _shift_factor(shift, mu)
    shifted: FloatArray = factor * sigma / (factor * sigma + (1 - sigma))
    return shifted


def resolution_mu(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The time shift mu for an image of `tokens` latent patches, on a line through two points.

        mu = base_shift + (tokens - base_tokens) (max_shift - base_shift)/(max_tokens - base_tokens)

    The rule of the FLUX.1 release (defaults are its); SD3 section 5.3.2 is the reason for it.
    Outside [base_tokens, max_tokens] the line goes on.

    Raises TypeError, ValueError unless tokens >= 1, 1 <= base_tokens < max_tokens.
    """
    tokens = as_int("tokens", tokens, 1)
    base_tokens = as_int("base_tokens", base_tokens, 1)
    max_tokens = as_int("max_tokens", max_tokens, base_tokens + 1)
    base_shift, max_shift = as_float("base_shift", base_shift), as_float("max_shift", max_shift)
    weight = (tokens - base_tokens) / (max_tokens - base_tokens)
    return base_shift + weight * (max_shift - base_shift)


def _shift_factor(shift: float, mu: float | None) -> float:
    shift = as_float("shift", shift)
    if shift <= 0:
        raise ValueError(f"shift must be > 0, got {shift}")
    if mu is None:
        return shift
    mu = as_float("mu", mu)
    if shift != 1:
        raise ValueError(f"shift and mu exclude each other, got shift={shift}, mu={mu}")
    if abs(mu) > 700:
        raise ValueError(f"mu must be in [-700, 700], got {mu}")
    return math.exp(mu)
