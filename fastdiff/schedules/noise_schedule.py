"""The discrete variance-preserving chain of DDPM and every table that follows from its betas.

Sources, cited by the names used below:
  DDPM       Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models"
  improved   Nichol, Dhariwal 2021, "Improved denoising diffusion probabilistic models"
  VDM        Kingma, Salimans, Poole, Ho 2021, "Variational diffusion models"
  Lin        Lin, Liu, Li, Yang 2023, "Common diffusion noise schedules and sample steps are flawed"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np

from ._values import (
    ComparedByContent,
    FloatArray,
    IntArray,
    TimestepArray,
    as_float,
    as_float_vector,
    as_timesteps,
    as_vector,
    freeze,
    refuse_where,
)
from .spacing import keep_timesteps

# The floor that DDPM's code puts under the posterior variance before its logarithm.
_VARIANCE_FLOOR = 1e-20


def _table(compute: Callable[[NoiseSchedule], FloatArray]) -> cached_property[FloatArray]:
    """A read-only (T,) table, computed at first use; infinities are values here, not warnings."""

    @wraps(compute)
    def table(self: NoiseSchedule) -> FloatArray:
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            frozen: FloatArray = freeze(compute(self))
        return frozen

    return cached_property(table)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class NoiseSchedule(ComparedByContent):
    """The variance-preserving Gaussian chain of DDPM, T steps long.

        q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                      DDPM eq 2
        q(x_t | x_0)     = N(sqrt(abar_t) x_0, (1 - abar_t) I),
        alpha_t := 1 - beta_t (`alphas`),  abar_t := prod_{s<=t} alpha_s              DDPM eq 4

    Index i of every table is the paper's t = i + 1; before the first step, abar_0 = 1. All
    tables are float64 (T,), read-only, computed once. They follow from log abar by exp and expm1,
    so 1 - abar_t keeps full relative precision at small t.

    Parameters
        betas: (T,) real, each in [0, 1); the last may be 1 (zero terminal SNR, abar_T = 0).
            Narrower floats are widened exactly.
        timesteps: (T,), the model's own t at each index, strictly increasing; integers are kept as
            int64, floats as float64. Default arange(T).
        name: shown by repr; not compared.
        log_alphas_cumprod: (T,), log abar, where it is known better than betas can say it
            (a sub-chain whose betas round to 1). Must agree with betas. Default: their sum.

    Two schedules are equal when betas, log_alphas_cumprod and timesteps are, bit for bit.

    Raises TypeError or ValueError naming the argument: NaN, not 1-D, empty, beta out of range,
    timesteps that do not increase, log_alphas_cumprod that increases or contradicts betas.
    """

    betas: FloatArray
    timesteps: TimestepArray
    name: str
    log_alphas_cumprod: FloatArray

    def __init__(
        self,
        betas: Any,
        timesteps: Any = None,
        name: str = "custom",
        *,
        log_alphas_cumprod: Any = None,
    ) -> None:
        betas = as_float_vector("betas", betas)
        T = betas.size
        refuse_where("betas", betas, ~((betas >= 0) & (betas <= 1)), "be in [0, 1)")
        if log_alphas_cumprod is None:
            early_one = np.r_[betas[:-1] == 1, False]
            refuse_where("betas", betas, early_one, "be in [0, 1) (only the last may be 1)")
            log_abar = _log_cumprod(betas)
        else:
            log_abar = as_float_vector("log_alphas_cumprod", log_alphas_cumprod, length=T)
            _check_log_alphas_cumprod(log_abar, betas)
        steps = np.arange(T) if timesteps is None else as_timesteps(timesteps, T)
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        object.__setattr__(self, "betas", freeze(betas))
        object.__setattr__(self, "timesteps", freeze(steps))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "log_alphas_cumprod", freeze(log_abar))
        self._identify(self.betas, self.log_alphas_cumprod, self.timesteps)

    def __len__(self) -> int:
        return self.num_timesteps

    @_table
    def alphas(self) -> FloatArray:
        """alpha_t = 1 - beta_t, DDPM section 2. (The alpha_t of x_t is `alpha_t`.)"""
        log_alphas = np.diff(self.log_alphas_cumprod, prepend=0.0)
        # 1 - beta is exact to rounding below 1/2; above, log abar may know alpha better.
        return np.where(self.betas < 0.5, 1 - self.betas, np.exp(log_alphas))

    @_table
    def alphas_cumprod(self) -> FloatArray:
        """abar_t = prod_{s<=t} (1 - beta_s), DDPM eq 4."""
        return np.exp(self.log_alphas_cumprod)

    @_table
    def alphas_cumprod_prev(self) -> FloatArray:
        """abar_{t-1}, with abar_0 = 1."""
        return np.r_[1.0, self.alphas_cumprod[:-1]]

    @_table
    def alphas_cumprod_next(self) -> FloatArray:
        """abar_{t+1}, with abar_{T+1} = 0 (DDIM inversion)."""
        return np.r_[self.alphas_cumprod[1:], 0.0]

    @_table
    def sqrt_alphas_cumprod(self) -> FloatArray:
        """sqrt(abar_t), the factor of x_0 in x_t, DDPM eq 4."""
        return np.exp(self.log_alphas_cumprod / 2)

    @_table
    def sqrt_one_minus_alphas_cumprod(self) -> FloatArray:
        """sqrt(1 - abar_t), the factor of eps in x_t, DDPM eq 4."""
        return np.sqrt(self._one_minus_alphas_cumprod)

    @_table
    def sqrt_recip_alphas_cumprod(self) -> FloatArray:
        """sqrt(1 / abar_t), the factor of x_t in x_0 = (x_t - sigma_t eps) / alpha_t; inf at 0."""
        return np.exp(-self.log_alphas_cumprod / 2)

    @_table
    def sqrt_recipm1_alphas_cumprod(self) -> FloatArray:
        """sqrt(1 / abar_t - 1), the factor of -eps in the same; inf where abar_t = 0."""
        return self.sqrt_one_minus_alphas_cumprod * self.sqrt_recip_alphas_cumprod

    @property
    def alpha_t(self) -> FloatArray:
        """alpha_t of x_t = alpha_t x_0 + sigma_t eps (VDM eq 1): sqrt(abar_t)."""
        return self.sqrt_alphas_cumprod

    @property
    def sigma_t(self) -> FloatArray:
        """sigma_t of x_t = alpha_t x_0 + sigma_t eps (VDM eq 1): sqrt(1 - abar_t)."""
        return self.sqrt_one_minus_alphas_cumprod

    @property
    def sigmas(self) -> FloatArray:
        """sigma_t / alpha_t = sqrt((1 - abar_t) / abar_t), the variance-exploding view; may be inf.

        In data units: x_t / alpha_t = x_0 + sigmas[t] eps.
        """
        return self.sqrt_recipm1_alphas_cumprod

    @_table
    def snr(self) -> FloatArray:
        """alpha_t^2 / sigma_t^2 = abar_t / (1 - abar_t), VDM eq 2; inf where sigma_t = 0."""
        return self.alphas_cumprod / self._one_minus_alphas_cumprod

    @_table
    def log_snr(self) -> FloatArray:
        """log(abar_t / (1 - abar_t)); -inf where abar_t = 0, inf where sigma_t = 0."""
        return self.log_alphas_cumprod - np.log(self._one_minus_alphas_cumprod)

    @_table
    def posterior_variance(self) -> FloatArray:
        """beta~_t of q(x_{t-1} | x_t, x_0), DDPM eq 7; 0 at the first step.

        beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t
        """
        return self._one_minus_prev / self._one_minus_nonzero * self.betas

    @_table
    def posterior_log_variance_clipped(self) -> FloatArray:
        """log beta~_t, always finite: the first entry is the second's, since beta~_1 = 0.

        Improved section 3.1. A variance that is still zero (T = 1, or a beta of 0) counts as the
        1e-20 of DDPM's code.
        """
        variance = self.posterior_variance.copy()
        if variance.size > 1:
            variance[0] = variance[1]
        return np.log(np.maximum(variance, _VARIANCE_FLOOR))

    @_table
    def posterior_mean_coef1(self) -> FloatArray:
        """The factor of x_0 in the mean of q(x_{t-1} | x_t, x_0), DDPM eq 7; 1 at the first step.

        sqrt(abar_{t-1}) beta_t / (1 - abar_t)
        """
        sqrt_prev = np.r_[1.0, self.sqrt_alphas_cumprod[:-1]]
        coef1 = sqrt_prev * self.betas / self._one_minus_nonzero
        # x_{t-1} = x_0 as long as no noise has been added: the posterior is a point.
        return np.where(self._one_minus_prev == 0, 1.0, coef1)

    @_table
    def posterior_mean_coef2(self) -> FloatArray:
        """The factor of x_t in the mean of q(x_{t-1} | x_t, x_0), DDPM eq 7; 0 at the first step.

        sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)
        """
        return np.sqrt(self.alphas) * self._one_minus_prev / self._one_minus_nonzero

    @_table
    def _one_minus_alphas_cumprod(self) -> FloatArray:
        return -np.expm1(self.log_alphas_cumprod) + 0.0

    @_table
    def _one_minus_prev(self) -> FloatArray:
        return np.r_[0.0, self._one_minus_alphas_cumprod[:-1]]

    @_table
    def _one_minus_nonzero(self) -> FloatArray:
        # Where 1 - abar_t is 0, so are the numerators that are divided by this.
        one_minus = self._one_minus_alphas_cumprod
        return np.where(one_minus == 0, 1.0, one_minus)

    def prior_kl(self, x_start_second_moment: float = 1.0) -> FloatArray:
        """KL(q(x_t | x_0) || N(0, I)) per element in nats, for every t: how far from the prior.

            0.5 (abar_t E[x_0^2] + (1 - abar_t) - 1 - log(1 - abar_t))

        Ho et al. 2020, the term L_T of eq. 5; float64 (T,), inf where no noise has been added.

        Args:
            x_start_second_moment: E[x_0^2] over elements, in squared data units; >= 0.
        """
        moment = as_float("x_start_second_moment", x_start_second_moment)
        if moment < 0:
            raise ValueError(f"x_start_second_moment must be >= 0, got {moment}")
        abar = self.alphas_cumprod
        with np.errstate(divide="ignore"):
            kl = 0.5 * (abar * (moment - 1.0) - np.log1p(-abar))
        frozen: FloatArray = freeze(kl)
        return frozen

    def spaced(self, spec: int | str | Sequence[int] | IntArray) -> NoiseSchedule:
        """The sub-chain that keeps only the chosen indices, for sampling with fewer steps.

            beta_{S_i} = 1 - abar_{S_i} / abar_{S_{i-1}}                         improved eq 19

        abar, alpha_t and sigma_t at the kept indices stay the same bits; `timesteps` keeps the
        model's own t, so a model trained on the full chain is called as before.

        spec: an int or a section string ("250", "10,15,20", "ddim50": see space_timesteps), or the
            indices to keep: 1-D integers in [0, T), without repetition, in any order (so what
            timestep_spacing returns may be given). A sequence here is indices, never counts.

        Raises TypeError or ValueError naming `spec`.
        """
        T = self.num_timesteps
        if isinstance(spec, str) or np.ndim(spec) == 0:
            kept = keep_timesteps("spec", T, spec)
        else:
            kept = np.sort(as_vector("spec", spec, kinds="iu").astype(np.int64))
            refuse_where("spec", kept, (kept < 0) | (kept >= T), f"hold indices in [0, {T - 1}]")
            refuse_where("spec", kept, np.r_[False, kept[1:] == kept[:-1]], "not repeat an index")
        log_abar = self.log_alphas_cumprod[kept]
        betas = -np.expm1(np.diff(log_abar, prepend=0.0))
        neighbours = np.diff(kept, prepend=-1) == 1
        betas = np.where(neighbours, self.betas[kept], betas)
        name = self.name if kept.size == T else f"{self.name}, {kept.size} of {T}"
        return NoiseSchedule(betas, self.timesteps[kept], name, log_alphas_cumprod=log_abar)

    def rescaled_zero_terminal_snr(self) -> NoiseSchedule:
        """The same chain, stretched so that x_T is pure noise: abar_T = 0, abar_1 unchanged.

            sqrt(abar'_t) = (sqrt(abar_t) - sqrt(abar_T)) sqrt(abar_1) / (sqrt(abar_1) -
                            sqrt(abar_T))                                        Lin algorithm 1

        Raises ValueError where that is not defined: T = 1, abar_1 = abar_T, or a last beta of 0.
        """
        if self.num_timesteps < 2:
            raise ValueError("rescaled_zero_terminal_snr needs at least 2 steps, got 1")
        log_abar = self.log_alphas_cumprod
        if not log_abar[-1] < log_abar[-2]:
            raise ValueError("rescaled_zero_terminal_snr needs a last beta above 0, got 0.0")
        first, head, last = log_abar[0], log_abar[:-1], log_abar[-1]
        # log (a_t - a_T)/(a_1 - a_T) with a = sqrt(abar), in the form that does not cancel:
        # near a_1 by 1 - (a_1 - a_t)/(a_1 - a_T), near a_T by (a_t/a_1) (1 - a_T/a_t)/(1 - a_T/a_1)
        drop = np.expm1((head - first) / 2) / np.expm1((last - first) / 2)
        near_first = np.log1p(-np.minimum(drop, 0.5))
        near_last = (head - first) / 2 + np.log(-np.expm1((last - head) / 2))
        near_last -= np.log(-np.expm1((last - first) / 2))
        log_ratio = np.where(drop <= 0.5, near_first, near_last)
        stretched = np.r_[first + 2 * log_ratio, -np.inf]
        return _from_log_alphas_cumprod(stretched, self.timesteps, f"{self.name}, zero SNR")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.betas, self.timesteps, self.name, self.log_alphas_cumprod)

    def __repr__(self) -> str:
        def ends(array: Any) -> str:
            return f"{array[0]:.6g} .. {array[-1]:.6g}" if array.size > 1 else f"{array[0]:.6g}"

        return (
            f"NoiseSchedule({self.name!r}, T={self.num_timesteps}, betas {ends(self.betas)}, "
            f"alphas_cumprod {ends(self.alphas_cumprod)}, timesteps {ends(self.timesteps)})"
        )


def _rebuild(betas: Any, timesteps: Any, name: str, log_alphas_cumprod: Any) -> NoiseSchedule:
    return NoiseSchedule(betas, timesteps, name, log_alphas_cumprod=log_alphas_cumprod)


def _from_log_alphas_cumprod(log_abar: FloatArray, timesteps: Any, name: str) -> NoiseSchedule:
    """The chain of a non-increasing log abar (T,): beta_t = 1 - abar_t / abar_{t-1}."""
    betas = -np.expm1(np.diff(log_abar, prepend=0.0))
    return NoiseSchedule(betas, timesteps, name, log_alphas_cumprod=log_abar)


def _log_cumprod(betas: FloatArray) -> FloatArray:
    """log abar_t = sum_{s<=t} log1p(-beta_s), summed with Neumaier's compensation."""
    with np.errstate(divide="ignore"):
        terms = np.log1p(-betas)
    sums = np.empty_like(terms)
    total = lost = 0.0
    for i, term in enumerate(terms.tolist()):
        if term == -np.inf:  # only the last beta can be 1
            sums[i] = term
            break
        new = total + term
        lost += (total - new) + term if abs(total) >= abs(term) else (term - new) + total
        total = new
        sums[i] = total + lost
    return sums


def _check_log_alphas_cumprod(log_abar: FloatArray, betas: FloatArray) -> None:
    name = "log_alphas_cumprod"
    refuse_where(name, log_abar, log_abar > 0, "be <= 0")
    early = np.r_[log_abar[:-1] == -np.inf, False]
    refuse_where(name, log_abar, early, "be finite before the last entry")
    step = np.diff(log_abar, prepend=0.0)
    refuse_where(name, log_abar, step > 0, "not increase")
    rounding = 4 * np.finfo(np.float64).eps * np.abs(np.where(np.isinf(log_abar), 0, log_abar))
    wrong = np.abs(betas + np.expm1(step)) > 1e-12 + rounding
    refuse_where(name, log_abar, wrong, "agree with betas, 1 - beta_t = abar_t / abar_{t-1}")
