"""Whole sampling loops of other projects around a model that takes no time: what a step costs.

k-diffusion                   the functions of k_diffusion.sampling, 20 steps
GaussianDiffusion             the loops of guided- and improved-diffusion, 50 steps, against the
                              formulas evaluated an operation at a time
denoising-diffusion-pytorch   p_sample_loop and ddim_sample of its GaussianDiffusion, 50 steps

Without seed= our loops draw what upstream's draw, from torch's generator.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.benchmarks import upstream
from fastdiff.benchmarks.contestants import agree_in_the_end, drawn, same_bits
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.models import constant
from fastdiff.benchmarks.registry import (
    Call,
    Case,
    Contest,
    Unavailable,
    compiled,
    register,
    shape_of,
    smoke,
)

HOST, LATENTS = "1x1x2x2", "16x4x64x64"
LADDERS = ("euler", "heun", "lms", "dpm_2", "dpmpp_2m")
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
# With a Brownian tree, in seconds a step where samples are large: host time only.
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")


def _steps(many: int) -> int:
    return 4 if smoke() else many


# k-diffusion


def k_diffusion(name: str, size: str) -> Contest:
    from fastdiff.integrations import k_diffusion as ours_of

    shape, steps = shape_of(size), _steps(20)
    sigmas = ours_of.get_sigmas_karras(steps, 0.03, 14.6)
    x = data(shape, 0) * sigmas[0]
    denoise = constant(data(shape, 1))
    ours = getattr(ours_of, f"sample_{name}")
    calls: dict[str, Call] = {}
    absent = {}
    if name in BROWNIAN and importlib.util.find_spec("torchsde") is None:
        absent["fastdiff"] = "torchsde, which makes upstream's draws, is not installed"
    else:
        calls["fastdiff"] = lambda: ours(denoise, x, sigmas, disable=True)
    if name in (*ANCESTRAL, *BROWNIAN):
        calls["fastdiff, seed="] = lambda: ours(denoise, x, sigmas, disable=True, seed=0)
    opponents: dict[str, Call] = {}
    try:
        theirs = getattr(upstream.k_diffusion().sampling, f"sample_{name}")
        opponents["k-diffusion"] = lambda: theirs(denoise, x, sigmas, disable=True)
    except Unavailable as error:
        absent["k-diffusion"] = str(error)
    return _contest(calls, opponents, absent, x, steps, judge="k-diffusion")


# GaussianDiffusion in the form of guided-diffusion


class Eager:
    """Steps as GaussianDiffusion classes take them: tables gathered per call, an operation a line.

    epsilon prediction, the fixed posterior variance, x_0 clipped (Ho et al. 2020, eqs. 7, 11 and
    15; Song et al. 2021, eqs. 12 and 16).
    """

    def __init__(self, schedule: fd.NoiseSchedule, output: Tensor) -> None:
        self.tables = {
            name: np.array(getattr(schedule, name))
            for name in (
                "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1",
                "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped",
                "alphas_cumprod", "alphas_cumprod_prev",
            )
        }  # fmt: skip
        self.steps, self.output = len(schedule.betas), output

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        values = torch.from_numpy(self.tables[name])[t].float()
        return values.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)

    def moments(self, x: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), and x_0."""
        x0 = self.at("sqrt_recip_alphas_cumprod", t, x) * x
        x0 = (x0 - self.at("sqrt_recipm1_alphas_cumprod", t, x) * eps).clamp(-1, 1)
        mean = self.at("posterior_mean_coef1", t, x) * x0
        mean = mean + self.at("posterior_mean_coef2", t, x) * x
        variance = self.at("posterior_variance", t, x)
        return mean, variance, self.at("posterior_log_variance_clipped", t, x), x0

    def p_sample(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        mean, _, log_variance, _ = self.moments(x, t, eps)
        noise = torch.randn_like(x)
        nonzero = (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))
        return mean + nonzero * torch.exp(0.5 * log_variance) * noise

    def ddim_sample(self, x: Tensor, t: Tensor, eps: Tensor, eta: float = 0.0) -> Tensor:
        *_, x0 = self.moments(x, t, eps)
        eps = self.at("sqrt_recip_alphas_cumprod", t, x) * x - x0
        eps = eps / self.at("sqrt_recipm1_alphas_cumprod", t, x)
        abar, abar_prev = self.at("alphas_cumprod", t, x), self.at("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
        noise = torch.randn_like(x)  # drawn with eta = 0 too
        mean = x0 * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - sigma**2) * eps
        nonzero = (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))
        return mean + nonzero * sigma * noise

    def loop(self, step: Callable[..., Tensor], x: Tensor) -> Tensor:
        for i in reversed(range(self.steps)):
            x = step(x, torch.tensor([i] * x.shape[0]), self.output)
        return x


def gaussian_diffusion(kind: str, size: str) -> Contest:
    from fastdiff.integrations import gaussian_diffusion as gd

    shape, steps = shape_of(size), _steps(50)
    schedule = fd.schedules.linear(steps)
    x, output = data(shape, 0), data(shape, 1)
    diffusion = gd.GaussianDiffusion(
        betas=np.array(schedule.betas), model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL, loss_type=gd.LossType.MSE,
    )  # fmt: skip
    loop = {"DDPM": diffusion.p_sample_loop, "DDIM": diffusion.ddim_sample_loop}[kind]
    eager = Eager(schedule, output)
    step = {"DDPM": eager.p_sample, "DDIM": eager.ddim_sample}[kind]
    calls: dict[str, Call] = {
        "fastdiff": lambda: loop(constant(output), shape, noise=x),
        "fastdiff, seed=": lambda: loop(constant(output), shape, noise=x, seed=0),
    }
    fast = _compiled_step(step)
    opponents: dict[str, Call] = {
        "eager": lambda: eager.loop(step, x),
        "compiled eager": lambda: eager.loop(fast(), x),
    }
    return _contest(calls, opponents, {}, x, steps)


def _compiled_step(step: Callable[..., Tensor]) -> Callable[[], Callable[..., Tensor]]:
    """torch.compile of a step, made at the first call."""
    return cache(lambda: compiled(step, fallback_random=True))


# denoising-diffusion-pytorch


class Constant(nn.Module):
    """A model as that package wants it, which takes no time."""

    random_or_learned_sinusoidal_cond = self_condition = False

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.channels = self.out_dim = output.shape[1]
        self.register_buffer("output", output)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Any:
        return self.output


def denoising_diffusion_pytorch(kind: str, size: str) -> Contest:
    package = upstream.denoising_diffusion_pytorch()
    from fastdiff.integrations.denoising_diffusion_pytorch import accelerate

    shape, steps = shape_of(size), _steps(50)
    options: dict[str, Any] = {"timesteps": steps}
    if kind == "DDIM":
        options = {"timesteps": 20 * steps, "sampling_timesteps": steps}
    diffusion = package.GaussianDiffusion(
        Constant(data(shape, 1)), image_size=shape[2:], objective="pred_noise", **options
    )
    name = {"DDPM": "p_sample_loop", "DDIM": "ddim_sample"}[kind]
    calls: dict[str, Call] = {"fastdiff": partial(getattr(accelerate(diffusion), name), shape)}
    opponents: dict[str, Call] = {"upstream": partial(getattr(diffusion, name), shape)}
    return _contest(calls, opponents, {}, data(shape, 0), steps, judge="upstream")


# What they share


def _contest(
    ours: dict[str, Call],
    opponents: dict[str, Call],
    absent: dict[str, str],
    x: Tensor,
    steps: int,
    judge: str = "fastdiff",
) -> Contest:
    """All that draw from torch's generator make the same images from one state of it; the judge's
    are right. Ours leave the bits of the reference."""
    calls = ours | opponents

    @cache
    def expected() -> Tensor:
        return drawn(calls.get(judge, next(iter(ours.values()))))

    def check(name: str) -> None:
        result = drawn(calls[name])
        if name in ours:
            with fd.use_backend("reference"):
                same_bits(result, drawn(calls[name]))
        if name != "fastdiff, seed=":
            agree_in_the_end(result, expected())

    return Contest(ours, check, opponents, absent, elements=x.numel(), work={"steps": steps})


def _register() -> None:
    for size in (HOST, LATENTS):
        for kind in ("DDPM", "DDIM"):
            for name, build in (
                ("GaussianDiffusion", gaussian_diffusion),
                ("denoising-diffusion-pytorch", denoising_diffusion_pytorch),
            ):
                quick = name == "GaussianDiffusion"
                register(
                    Case("samplers", f"{name} {kind} {size}", partial(build, kind, size), quick)
                )
        for name in (*LADDERS, *ANCESTRAL, *(BROWNIAN if size == HOST else ())):
            case = f"k-diffusion {name} {size}"
            register(Case("samplers", case, partial(k_diffusion, name, size), name == "dpmpp_2m"))


_register()
