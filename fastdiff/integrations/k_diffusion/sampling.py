"""k_diffusion.sampling's functions; arguments, draws and results are upstream's.

Every function takes

    model       (x, sigma, **extra_args) -> denoised, sigma (B,)
    x           (B, ...), data plus noise of standard deviation sigmas[0]; never written to
    sigmas      (R + 1,), > 0 but for the last, on any device: read once
    callback    called once a step with {"x", "i", "sigma", "sigma_hat", "denoised"}
    disable     tqdm's
    noise_sampler   (sigma, sigma_next) -> standard normals, called when upstream calls it
    seed        int in [0, 2^64) or int64 (B,): fastdiff's own noise, made inside the pass; excludes
                noise_sampler

and returns x at sigmas[-1], in the dtype that upstream returns (Euler steps take the dtype of
sigmas: float32 from float16). ValueError, TypeError name the argument. What each computes is said
by the builder of the same name (sample_heun: fastdiff.solvers.heun).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.plan import MAX_STATES
from fastdiff.schedules._values import as_float, as_int
from fastdiff.solvers.dpmpp_sigma import check_solver_type, fast_steps
from fastdiff.solvers.edm import ancestral_options

from .driver import Progress, read_sigmas, run_script
from .noise import BrownianTreeNoiseSampler, NoiseSampler, default_noise_sampler

Arguments = dict[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
Sampler = NoiseSampler | None
Seed = int | Tensor | None


def _sample(
    name: str,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    options: dict[str, Any],
    extra_args: Arguments,
    callback: Callback,
    disable: bool | None,
    noise_sampler: Sampler = None,
    seed: Seed = None,
    brownian: bool = False,
) -> Tensor:
    """A formula over a ladder of sigmas; `brownian`: its default noise is a Brownian tree."""
    levels = read_sigmas(sigmas)
    _check_noise(noise_sampler, seed)
    if len(levels) < 2:
        return x
    asked = sigmas
    if noise_sampler is None and seed is None:
        noise_sampler = default_noise_sampler(x)
        if brownian:
            # The tree reads the levels that it is asked for: they are on the host already.
            asked = torch.tensor(levels, dtype=torch.float64).to(sigmas.dtype)
            noise_sampler = BrownianTreeNoiseSampler(x, asked[asked > 0].min(), asked.max())
    pairs: dict[str, list[tuple[Any, Any]]] = {}

    def query(kind: str, i: int) -> tuple[Any, Any]:
        if kind == "step":
            return asked[i], asked[i + 1]
        if not pairs:
            pairs.update(_sde_queries(sigmas, options["r"], asked.device))
        return pairs[kind][i]

    def about(i: int, sigma_hat: float) -> dict[str, Any]:
        gamma = sigma_hat / levels[i]
        sigma = sigmas[i]
        return {"sigma": sigma, "sigma_hat": sigma if gamma == 1 else sigma * gamma}

    with torch.no_grad(), Progress(len(levels) - 1, disable) as progress:
        return run_script(
            name, model, x, levels, options, dtype=sigmas.dtype, noise=noise_sampler, query=query,
            extra_args=extra_args, callback=callback, about=about, progress=progress, seed=seed,
        )  # fmt: skip


def _check_noise(noise_sampler: Sampler, seed: Seed) -> None:
    if noise_sampler is not None and not callable(noise_sampler):
        raise TypeError(f"noise_sampler must be callable, not {type(noise_sampler).__name__}")
    if seed is not None and noise_sampler is not None:
        raise ValueError("seed and noise_sampler exclude each other")


def _sde_queries(
    sigmas: Tensor, r: float, device: torch.device
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The levels that sample_dpmpp_sde asks its noise for, with upstream's own rounding.

    A Brownian path is rough: a query that is off by one unit in the last place of sigma moves the
    noise by far more. So these go through log and exp as upstream's do.
    """
    t = _elementwise(lambda value: value.log().neg(), sigmas)
    s = t[:-1] + (t[1:] - t[:-1]) * r
    at_t = _elementwise(lambda value: value.neg().exp(), t).to(device)
    at_s = _elementwise(lambda value: value.neg().exp(), s).to(device)
    steps = range(len(sigmas) - 1)
    return {
        "first": [(at_t[i], at_s[i]) for i in steps],
        "whole": [(at_t[i], at_t[i + 1]) for i in steps],
    }


def _elementwise(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """On CPUs one by one, as upstream does: a library may round a vector's elements otherwise."""
    if values.device.type != "cpu":
        return function(values)
    return torch.stack([function(value) for value in values.unbind()])


def _churn(
    sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> dict[str, Any]:
    """Options of the churned samplers; the bounds are compared in the dtype of sigmas."""
    return {
        "s_churn": as_float("s_churn", s_churn),
        "s_tmin": _rounded(s_tmin, sigmas),
        "s_tmax": _rounded(s_tmax, sigmas),
        "s_noise": as_float("s_noise", s_noise),
    }


def _rounded(bound: float, sigmas: Tensor) -> float:
    bound = float(bound)
    if bound in (0.0, math.inf) or not isinstance(sigmas, Tensor):
        return bound
    return float(torch.tensor(bound, dtype=sigmas.dtype))


def sample_euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, s_churn: float = 0.0,
    s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """Euler's method with churn (Karras et al. 2022, algorithm 2 without the correction)."""
    options = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    return _sample(
        "euler", model, x, sigmas, options, extra_args, callback, disable, seed=seed
    )  # fmt: skip


def sample_euler_ancestral(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: Sampler = None, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """Ancestral sampling with Euler steps."""
    return _sample(
        "euler_ancestral", model, x, sigmas, ancestral_options(eta, s_noise), extra_args, callback,
        disable, noise_sampler, seed,
    )  # fmt: skip


def sample_heun(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, s_churn: float = 0.0,
    s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """The stochastic sampler of Karras et al. 2022, algorithm 2."""
    options = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    return _sample("heun", model, x, sigmas, options, extra_args, callback, disable, seed=seed)


def sample_dpm_2(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, s_churn: float = 0.0,
    s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 (Lu et al. 2022) with churn."""
    options = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    return _sample("dpm_2", model, x, sigmas, options, extra_args, callback, disable, seed=seed)


def sample_dpm_2_ancestral(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: Sampler = None, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """Ancestral sampling with DPM-Solver-2 steps."""
    return _sample(
        "dpm_2_ancestral", model, x, sigmas, ancestral_options(eta, s_noise), extra_args, callback,
        disable, noise_sampler, seed,
    )  # fmt: skip


def sample_lms(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, order: int = 4,
) -> Tensor:  # fmt: skip
    """Linear multistep method, order 1 .. 7."""
    options = {"order": as_int("order", order, 1, MAX_STATES)}
    return _sample("lms", model, x, sigmas, options, extra_args, callback, disable)


def sample_dpmpp_2s_ancestral(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: Sampler = None, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """Ancestral sampling with DPM-Solver++(2S) steps (Lu et al. 2022)."""
    return _sample(
        "dpmpp_2s_ancestral", model, x, sigmas, ancestral_options(eta, s_noise), extra_args,
        callback, disable, noise_sampler, seed,
    )  # fmt: skip


def sample_dpmpp_sde(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: Sampler = None, r: float = 1 / 2, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ (stochastic), two model calls a step. With a seed 0 < r <= 1."""
    r = as_float("r", r)
    if r == 0 or (seed is not None and not 0 < r <= 1):
        raise ValueError(f"r must be in (0, 1], not {r}")
    return _sample(
        "dpmpp_sde", model, x, sigmas, ancestral_options(eta, s_noise) | {"r": r}, extra_args,
        callback, disable, noise_sampler, seed, brownian=True,
    )  # fmt: skip


def sample_dpmpp_2m(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022)."""
    return _sample("dpmpp_2m", model, x, sigmas, {}, extra_args, callback, disable)


def sample_dpmpp_2m_sde(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: Sampler = None, solver_type: str = "midpoint", *,
    seed: Seed = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) SDE; solver_type "midpoint" or "heun"."""
    check_solver_type(solver_type)
    return _sample(
        "dpmpp_2m_sde", model, x, sigmas,
        ancestral_options(eta, s_noise) | {"solver_type": solver_type}, extra_args, callback,
        disable, noise_sampler, seed, brownian=True,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: Sampler = None, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) SDE."""
    return _sample(
        "dpmpp_3m_sde", model, x, sigmas, ancestral_options(eta, s_noise), extra_args, callback,
        disable, noise_sampler, seed, brownian=True,
    )  # fmt: skip


def sample_dpm_fast(
    model: Any, x: Tensor, sigma_min: float, sigma_max: float, n: int,
    extra_args: Arguments = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: Sampler = None, *, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast with n model calls (Lu et al. 2022); the callback is told t and t_up too."""
    levels, orders = fast_steps(sigma_min, sigma_max, n)
    _check_noise(noise_sampler, seed)
    ends = torch.tensor([levels[0], levels[-1]]).log().neg()
    t = torch.linspace(ends[0], ends[1], len(levels), device=x.device)
    sigmas = t.neg().exp()
    if noise_sampler is None and seed is None:
        noise_sampler = default_noise_sampler(x)

    def about(i: int, sigma_hat: float) -> dict[str, Any]:
        return {"sigma": sigmas[i], "sigma_hat": sigmas[i], "t": t[i], "t_up": t[i]}

    with torch.no_grad(), Progress(n, disable) as progress:
        return run_script(
            "dpm_fast", model, x, tuple(levels),
            ancestral_options(eta, s_noise) | {"orders": orders}, dtype=t.dtype,
            noise=noise_sampler, query=lambda _, i: (sigmas[i], sigmas[i + 1]),
            extra_args=extra_args, callback=callback, about=about, progress=progress,
            per_call=True, seed=seed,
        )  # fmt: skip
