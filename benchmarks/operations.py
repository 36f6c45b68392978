"""Normals, q_sample, the posterior and solver steps against what people run today.

Opponents, by what their names say:

    eager                   the formula as GaussianDiffusion classes evaluate it: tables gathered
                            per call, one kernel per operation; DDIM with coefficients as numbers
    eager, fewest passes    the same result in the fewest torch calls that we found
    compiled ...            torch.compile of it, with torch's generator (fallback_random) where it
                            draws; Inductor's own generator is named where it takes part
    compiled reference      torch.compile of fastdiff's definition: the same bits

A step is one in the middle of a run. Results come in new memory ("fastdiff") as the opponents' do,
or overwrite what was there ("fastdiff in place"), which is how the sampling loop runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks import limits
from fastdiff.benchmarks.contestants import (
    MAIN,
    SCHEDULE,
    SLOW,
    Compiled,
    agree,
    drawn,
    gathered,
    per_sample,
    same_bits,
)
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.registry import ALL, Call, Case, Contest, register, shape_of
from fastdiff.benchmarks.steps import guided_step, run_step

# Latents of SDXL, of Flux and SD3, of video, a batch of DiT, a robot's actions, beyond every cache.
OTHER = (
    "4x4x128x128", "1x16x128x128", "1x16x21x60x104", "256x4x32x32", "1x16x7", "8x3x1024x1024",
)  # fmt: skip
QUICK = ("normals", "q_sample", "ddpm", "ddim+guidance", "dpmpp_2m")
EVERY_SHAPE = ("normals", "q_sample", "ddpm", "ddim+guidance")
ROW = 500  # the t of q_sample, the posterior and DDPM
FLOAT, BFLOAT = torch.float32, torch.bfloat16


@cache
def chain() -> fd.SolverPlan:
    """DDPM over all 1000 steps."""
    return fd.solvers.ddpm(SCHEDULE)


def ddim(schedule: fd.NoiseSchedule) -> fd.SolverPlan:
    return fd.solvers.ddim(schedule, 50, clip=None)


def dpmpp_2m(schedule: fd.NoiseSchedule) -> fd.SolverPlan:
    return fd.solvers.dpm_solver(schedule, 20)


def unipc(schedule: fd.NoiseSchedule) -> fd.SolverPlan:
    return fd.solvers.unipc(schedule, 20)


def eager_q_sample(x: Tensor, t: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    a = gathered("sqrt_alphas_cumprod", t, x)
    return (a * x + gathered("sqrt_one_minus_alphas_cumprod", t, x) * noise).to(x.dtype)


def eager_posterior(x_start: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = gathered("posterior_mean_coef1", t, x) * x_start
    mean = mean + gathered("posterior_mean_coef2", t, x) * x
    variance = gathered("posterior_variance", t, x)
    return mean.to(x.dtype), variance, gathered("posterior_log_variance_clipped", t, x)


def eager_ddpm(x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    x0 = gathered("sqrt_recip_alphas_cumprod", t, x) * x
    x0 = (x0 - gathered("sqrt_recipm1_alphas_cumprod", t, x) * output).clamp(-1, 1)
    mean = gathered("posterior_mean_coef1", t, x) * x0
    mean = mean + gathered("posterior_mean_coef2", t, x) * x
    noise = torch.randn_like(x)
    nonzero = (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))
    log_variance = gathered("posterior_log_variance_clipped", t, x)
    return (mean + nonzero * torch.exp(0.5 * log_variance) * noise).to(x.dtype)


def normals(text: str, dtype: torch.dtype, compiles: bool) -> Contest:
    shape = shape_of(text)
    out = torch.empty(shape, dtype=dtype)
    ours: dict[str, Call] = {
        "fastdiff": lambda: fd.randn(shape, 1, dtype=dtype),
        "fastdiff in place": lambda: fd.randn(shape, 1, out=out),
    }
    opponents: dict[str, Call] = {
        "torch normal_ in place": lambda: out.normal_(),
        "torch.randn": lambda: torch.randn(shape, dtype=dtype),
    }
    absent = {}
    if dtype == FLOAT:
        array, generator = np.empty(shape, np.float32), np.random.default_rng(1)
        opponents["NumPy standard_normal in place"] = lambda: generator.standard_normal(
            dtype=np.float32, out=array
        )
    else:
        absent["NumPy standard_normal in place"] = "NumPy has no bfloat16"
    extra = Compiled(compiles, dtype)
    extra.add_reference(lambda: fd.randn(shape, 1, dtype=dtype, backend="reference"))
    opponents |= extra.calls

    def check(name: str) -> None:
        result = torch.as_tensor((ours | opponents)[name]()).float()
        count = result.numel()
        assert abs(float(result.mean())) < 6 / count**0.5 and bool(torch.isfinite(result).all())
        assert abs(float(result.square().mean()) - 1) < 9 / count**0.5 + 1e-3
        if name in ours or name == "compiled reference":
            expected = fd.randn((1, *shape[1:]), 1, dtype=dtype, backend="reference")
            same_bits((ours | opponents)[name]()[:1], expected)

    return Contest(
        ours, check, opponents, absent | extra.absent, slow=SLOW,
        limits={"memory: fill_": lambda: out.fill_(1.0)} | limits.call(),
        elements=out.numel(), bytes=out.nbytes,
    )  # fmt: skip


def q_sample(text: str, dtype: torch.dtype, compiles: bool) -> Contest:
    shape = shape_of(text)
    x, out = data(shape, 0, dtype), torch.empty(shape, dtype=dtype)
    t = torch.full(shape[:1], ROW)
    a = per_sample("sqrt_alphas_cumprod", t, x).to(dtype)
    s = per_sample("sqrt_one_minus_alphas_cumprod", t, x).to(dtype)
    ours: dict[str, Call] = {
        "fastdiff": lambda: fd.q_sample(x, t, SCHEDULE, seed=1),
        "fastdiff in place": lambda: fd.q_sample(x, t, SCHEDULE, seed=1, out=out),
    }
    opponents: dict[str, Call] = {
        "eager": lambda: eager_q_sample(x, t),
        "eager, fewest passes": lambda: out.normal_().mul_(s).addcmul_(x, a),
    }
    extra = Compiled(compiles, dtype)
    extra.add("compiled, torch's generator", eager_q_sample, x, t, fallback_random=True)
    if text == "16x4x64x64":
        extra.add("compiled, Inductor's generator", eager_q_sample, x, t)
    extra.add_reference(lambda x, t: fd.q_sample(x, t, SCHEDULE, seed=1, backend="reference"), x, t)
    opponents |= extra.calls

    def check(name: str) -> None:
        result = (ours | opponents)[name]
        expected: Any
        if name in ours or name == "compiled reference":
            expected = fd.q_sample(x[:1], t[:1], SCHEDULE, seed=1, backend="reference")
            same_bits(result()[:1], expected)
        elif name == "compiled, Inductor's generator":
            z = (result() - a * x) / s
            assert abs(float(z.mean())) < 6 / z.numel() ** 0.5
            assert abs(float(z.var()) - 1) < 9 / z.numel() ** 0.5
        else:
            noise = drawn(lambda: torch.randn_like(x))
            expected = fd.q_sample(x, t, SCHEDULE, noise=noise)
            agree(drawn(result), expected)

    return Contest(
        ours, check, opponents, extra.absent, slow=SLOW,
        limits=limits.noise(shape, dtype) | limits.memory(2 * x.nbytes) | limits.call(),
        elements=x.numel(), bytes=2 * x.nbytes,
    )  # fmt: skip


def q_posterior(text: str, dtype: torch.dtype, compiles: bool) -> Contest:
    shape = shape_of(text)
    x_start, x = data(shape, 0, dtype), data(shape, 1, dtype)
    out, t = torch.empty_like(x), torch.full(shape[:1], ROW)
    a = per_sample("posterior_mean_coef1", t, x).to(dtype)
    b = per_sample("posterior_mean_coef2", t, x).to(dtype)
    posterior = fd.q_posterior_mean_variance
    ours: dict[str, Call] = {
        "fastdiff": lambda: posterior(x_start, x, t, SCHEDULE),
        "fastdiff in place": lambda: posterior(x_start, x, t, SCHEDULE, out=out),
    }
    opponents: dict[str, Call] = {
        "eager": lambda: eager_posterior(x_start, x, t),
        "eager, fewest passes": lambda: (torch.mul(x, b, out=out).addcmul_(x_start, a),),
    }
    extra = Compiled(compiles, dtype)
    extra.add("compiled eager", eager_posterior, x_start, x, t)
    opponents |= extra.calls

    def check(name: str) -> None:
        mean = (ours | opponents)[name]()[0]
        if name in ours:
            same_bits(mean, posterior(x_start, x, t, SCHEDULE, backend="reference")[0])
        else:
            agree(mean, posterior(x_start, x, t, SCHEDULE)[0])

    return Contest(
        ours, check, opponents, extra.absent, slow=SLOW,
        limits=limits.memory(3 * x.nbytes) | limits.call(),
        elements=x.numel(), bytes=3 * x.nbytes, operations=3.0 * x.numel(),
    )  # fmt: skip


def ddpm(
    text: str, dtype: torch.dtype, compiles: bool, model_dtype: torch.dtype | None = None
) -> Contest:
    """The step of the chain, x_0 clipped; with another model dtype the next model input too."""
    shape = shape_of(text)
    model_dtype = model_dtype or dtype
    x, output = data(shape, 0, dtype), data(shape, 1, model_dtype)
    t = torch.full(shape[:1], ROW)
    plan = chain()

    def started(in_place: bool) -> fd.Run:
        return fd.Sampler(plan).start(x, seed=1, in_place=in_place, model_dtype=model_dtype)

    def step(run: fd.Run) -> Tensor:
        run.index = plan.rows - 1 - ROW
        return run.step(output)

    fresh, kept = started(False), started(True)
    ours: dict[str, Call] = {
        "fastdiff": lambda: step(fresh),
        "fastdiff in place": lambda: step(kept),
    }

    def eager(x: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        result = eager_ddpm(x, output, t)
        return (result,) if model_dtype == dtype else (result, result.to(model_dtype))

    opponents: dict[str, Call] = {"eager": lambda: eager(x, output, t)}
    extra = Compiled(compiles, dtype)
    extra.add("compiled, torch's generator", eager, x, output, t, fallback_random=True)
    reference = partial(fd.p_sample, schedule=SCHEDULE, seed=1, backend="reference")
    if dtype == model_dtype:
        ours["fastdiff p_sample"] = lambda: fd.p_sample(output, x, t, SCHEDULE, seed=1)
        extra.add_reference(lambda x, output, t: reference(output, x, t), x, output, t)
    opponents |= extra.calls

    def check(name: str) -> None:
        expected = reference(output[:1], x[:1], t[:1])
        assert isinstance(expected, Tensor)
        if name in ("fastdiff", "fastdiff in place"):
            same_bits(step(started(name != "fastdiff"))[:1], expected)
        elif name in ours or name == "compiled reference":
            same_bits((ours | opponents)[name]()[:1], expected)
        else:
            noise = drawn(lambda: torch.randn_like(x))
            wanted = fd.p_sample(output, x, t, SCHEDULE, noise=noise)
            assert isinstance(wanted, Tensor)
            agree(drawn(lambda: opponents[name]()[0]), wanted)

    nbytes = 2 * x.nbytes + output.nbytes * (1 if model_dtype == dtype else 2)
    return Contest(
        ours, check, opponents, extra.absent, slow=SLOW,
        limits=limits.noise(shape, dtype) | limits.memory(nbytes) | limits.call(),
        elements=x.numel(), bytes=nbytes,
    )  # fmt: skip


def beside_float32(make: Callable[..., Contest], text: str) -> Contest:
    """In bfloat16, with our own time for float32 taken in the same rounds."""
    contest, other = make(text, BFLOAT, True), make(text, FLOAT, False)
    return replace(contest, beside={"float32 in place": other.ours["fastdiff in place"]})


def _register() -> None:
    kinds: dict[str, Callable[..., Contest]] = {
        "normals": normals,
        "q_sample": q_sample,
        "q_posterior": q_posterior,
        "ddpm": ddpm,
        "ddim+guidance": guided_step,
        "dpmpp_2m": partial(run_step, dpmpp_2m),
        "unipc": partial(run_step, unipc),
    }
    mixed: dict[str, Callable[..., Contest]] = {
        "ddpm": ddpm,
        "ddim+guidance": partial(run_step, ddim, guided=True),
        "dpmpp_2m": partial(run_step, dpmpp_2m),
        "unipc": partial(run_step, unipc),
    }

    def add(name: str, build: Callable[[], Contest], **options: Any) -> None:
        register(Case("operations", name, build, **options))

    for kind, make in kinds.items():
        for text in MAIN:
            add(
                f"{kind} fp32 {text}", partial(make, text, FLOAT, True), threads=(1, ALL),
                quick=kind in QUICK and text == "16x4x64x64", cold=text == "64x3x256x256",
            )  # fmt: skip
            add(f"{kind} bf16 {text}", partial(beside_float32, make, text))
        for text in OTHER if kind in EVERY_SHAPE else ():
            add(f"{kind} fp32 {text}", partial(make, text, FLOAT, False))
        for text in MAIN[1:] if kind in mixed else ():
            # Samples in float32, the model in bfloat16.
            build = partial(mixed[kind], text, FLOAT, True, model_dtype=BFLOAT)
            add(f"{kind} fp32+bf16 {text}", build)


_register()
