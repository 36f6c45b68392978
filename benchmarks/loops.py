"""Whole loops around real models: images a second, and with the model left out the loop's own time.

The stock scheduler's loop as a pipeline writes it, the same loop with the scheduler accelerated,
and fd.sample with the plan of that scheduler. Images are compared: with the draws of one generator
"accelerated" makes the stock scheduler's, and seeded ones are those of the definition.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks import models, upstream
from fastdiff.benchmarks.contestants import agree_in_the_end, same_bits
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.registry import Call, Case, Contest, Unavailable, register, smoke
from fastdiff.models import digits

GUIDANCE = 2.0
SEEDED = "accelerated, seed="


@dataclass(frozen=True)
class Pipeline:
    """A model with the scheduler it is sampled with.

    Attributes:
        model: makes it.
        scheduler, config: class of diffusers and its configuration.
        schedule, plan: of the same sampler, where diffusers is not installed.
        guided: with classifier-free guidance.
    """

    model: Callable[[], models.Model]
    shape: tuple[int, ...]
    schedule: Callable[[], fd.NoiseSchedule]
    scheduler: str
    config: dict[str, Any]
    plan: Callable[[fd.NoiseSchedule, int], fd.SolverPlan]
    steps: int
    guided: bool = False

    def make(self) -> Any:
        """The stock scheduler. Raises Unavailable without diffusers."""
        return getattr(upstream.diffusers(), self.scheduler)(**self.config)


def _digits() -> models.Model:
    return digits.conditional(models.digits_model(), torch.arange(16) % digits.CLASSES)


def _latents() -> models.Model:
    model = models.latent_unet()
    return lambda x, t: model(x, t, torch.zeros(len(x), dtype=torch.int64))


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
POLICY = {"num_train_timesteps": 100, **COSINE}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DIGITS, ACTIONS, LATENTS = (16, 1, 8, 8), (1, 16, 7), (1, 4, 32, 32)
PIPELINES = {
    "digits, DDIM 50, guidance": Pipeline(
        _digits, DIGITS, digits.schedule, "DDIMScheduler", COSINE,
        lambda s, n: fd.solvers.ddim(s, n), 50, guided=True,
    ),
    "digits, DDPM 250": Pipeline(
        _digits, DIGITS, digits.schedule, "DDPMScheduler", COSINE,
        lambda s, n: fd.solvers.ddpm(s, n), 250,
    ),
    "policy, DDPM 100": Pipeline(
        models.policy, ACTIONS, lambda: fd.schedules.cosine(100), "DDPMScheduler", POLICY,
        lambda s, n: fd.solvers.ddpm(s, n), 100,
    ),
    "policy, DDIM 10": Pipeline(
        models.policy, ACTIONS, lambda: fd.schedules.cosine(100), "DDIMScheduler", POLICY,
        lambda s, n: fd.solvers.ddim(s, n), 10,
    ),
    "latents, LCM 4": Pipeline(
        _latents, LATENTS, lambda: fd.schedules.scaled_linear(1000), "LCMScheduler", SCALED,
        lambda s, n: fd.solvers.lcm(s, n), 4,
    ),
    "latents, DDIM 50": Pipeline(
        _latents, LATENTS, lambda: fd.schedules.scaled_linear(1000), "DDIMScheduler",
        {"clip_sample": False, **SCALED}, lambda s, n: fd.solvers.ddim(s, n, clip=None), 50,
    ),
}  # fmt: skip


def stock_loop(
    scheduler: Any, model: models.Model, x: Tensor, steps: int, guided: bool, seed: int | None = 0
) -> Tensor:
    """A pipeline's loop; draws, where there are any, are those of a generator of that seed."""
    options: dict[str, Any] = {"return_dict": False}
    if seed is not None and "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        output = model(seen, t.expand(seen.shape[0]))
        if guided:
            uncond, cond = output.chunk(2)
            output = uncond + GUIDANCE * (cond - uncond)
        x = scheduler.step(output, t, x, **options)[0]
    return x


def guided_loop(scheduler: Any, model: models.Model, x: Tensor, steps: int) -> Tensor:
    """The same around a scheduler whose steps also do what stands around the model."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(seen, t.expand(seen.shape[0])), t, x, return_dict=False)[0]
    return x


def build(pipeline: Pipeline, left_out: bool) -> Contest:
    shape, guided = pipeline.shape, pipeline.guided
    steps = min(pipeline.steps, 4) if smoke() else pipeline.steps
    x = data(shape, 0)
    model = pipeline.model()
    if left_out:
        model = models.constant(data((shape[0] * (1 + guided), *shape[1:]), 1))
    sample: Callable[..., Any] = functools.partial(fd.sample, model, x_T=x, seed=0)
    if guided:
        sample = functools.partial(sample, guidance_scale=GUIDANCE)
    ours: dict[str, Call] = {"fd.sample": lambda: sample(plan)}
    opponents: dict[str, Call] = {}
    absent = {}
    start = time.perf_counter()
    try:
        plan = fd.trace(pipeline.make(), steps=steps)
    except Unavailable as error:
        plan = pipeline.plan(pipeline.schedule(), steps)
        absent["stock"] = str(error)
    spent = {"fd.sample": time.perf_counter() - start}
    drawn = bool(plan.draws_noise.any())
    if not absent:
        ours |= _accelerated(pipeline, model, x, steps, left_out, drawn)
        opponents["stock"] = functools.partial(
            stock_loop, pipeline.make(), model, x, steps, pipeline.guided
        )
    made: dict[str, Tensor] = {}

    def kept(name: str, call: Call) -> Call:
        def run() -> object:
            made[name] = cast(Tensor, call())
            return made[name]

        return run

    ours = {name: kept(name, call) for name, call in ours.items()}
    opponents = {name: kept(name, call) for name, call in opponents.items()}

    def check(name: str) -> None:
        if name == "stock":
            return
        if name == "fd.sample" and (drawn or absent):
            same_bits(made[name], sample(plan, backend="reference"))
            return
        wanted = "fd.sample" if name == SEEDED else "stock"
        if wanted not in made:
            opponents[wanted]()
        agree_in_the_end(made[name], made[wanted])

    work: dict[str, float] = {"steps": steps}
    if not left_out:
        work["images"] = shape[0]
    return Contest(
        ours, check, opponents, absent, elements=x.numel(), work=work, compile_seconds=spent
    )


def _accelerated(
    pipeline: Pipeline, model: models.Model, x: Tensor, steps: int, more: bool, drawn: bool
) -> dict[str, Call]:
    """The stock loop with the scheduler accelerated; `more`: with its options too."""
    from fastdiff.integrations.diffusers import accelerate

    loop = functools.partial(stock_loop, model=model, x=x, steps=steps, guided=pipeline.guided)
    calls: dict[str, Call] = {
        "accelerated": functools.partial(loop, accelerate(pipeline.make())),
    }
    if more and drawn:
        calls[SEEDED] = functools.partial(loop, accelerate(pipeline.make(), seed=0), seed=None)
    if more and pipeline.guided:
        calls["accelerated, guidance in the step"] = functools.partial(
            guided_loop, accelerate(pipeline.make(), guidance_scale=GUIDANCE), model, x, steps
        )
    return calls


for _name, _pipeline in PIPELINES.items():
    register(Case(
        "loops", _name, functools.partial(build, _pipeline, False),
        quick=_name in ("digits, DDIM 50, guidance", "policy, DDIM 10"),
    ))  # fmt: skip
for _name, _pipeline in PIPELINES.items():
    register(Case(
        "loops", f"{_name}, model left out", functools.partial(build, _pipeline, True),
        quick=_name == "policy, DDIM 10",
    ))  # fmt: skip
