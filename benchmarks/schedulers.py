"""Schedulers of diffusers: stock step, its torch.compile, and accelerated.

A call is a run of 30 inference steps without its first, where a plan is found and buffers are
looked up, and without set_timesteps(); return_dict=False. On 1x1x2x2 that is host time: what a step
costs before any pixel is touched. There a plan made from nothing for as many steps is timed too.

torch.compile gets the step after the first, which in most schedulers looks for the timestep in a
way that does not compile; with timesteps as integers where tensors do not compile either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.benchmarks import upstream
from fastdiff.benchmarks.contestants import agree_in_the_end, drawn
from fastdiff.benchmarks.registry import Call, Case, Contest, Unavailable, register, shape_of, smoke
from fastdiff.profiling.timing import Prepared
from fastdiff.tracing.trace import trace_scheduler

STEPS = 30
HOST, LATENTS = "1x1x2x2", "16x4x64x64"

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# Label, class, configuration. Those that pipelines use most, in both shapes:
OFTEN: list[tuple[str, str, dict[str, Any]]] = [
    ("DDIM", "DDIMScheduler", {}),
    ("DDPM", "DDPMScheduler", {}),
    ("DPM++ 2M", "DPMSolverMultistepScheduler", {}),
    ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPC", "UniPCMultistepScheduler", {}),
    ("UniPC flow", "UniPCMultistepScheduler", _FLOW),
    ("FlowMatchEuler", "FlowMatchEulerDiscreteScheduler", {}),
    ("Euler", "EulerDiscreteScheduler", {}),
    ("EulerAncestral", "EulerAncestralDiscreteScheduler", {}),
    ("LCM", "LCMScheduler", {}),
    ("PNDM PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
    ("Heun", "HeunDiscreteScheduler", {}),
    ("FlowMatchHeun", "FlowMatchHeunDiscreteScheduler", {}),
    ("DEIS", "DEISMultistepScheduler", {}),
    ("DPM++ singlestep", "DPMSolverSinglestepScheduler", {}),
    ("TCD", "TCDScheduler", {}),
    ("LMS", "LMSDiscreteScheduler", {}),
    ("SA-Solver", "SASolverScheduler", {}),
    ("KDPM2", "KDPM2DiscreteScheduler", {}),
]
# The rest, whose host time only is measured.
SELDOM: list[tuple[str, str, dict[str, Any]]] = [
    ("DPM++ 3M", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("UniPC-3", "UniPCMultistepScheduler", {"solver_order": 3}),
    ("DPM++ inverse", "DPMSolverMultistepInverseScheduler", {}),
    ("DDIM inverse", "DDIMInverseScheduler", {}),
    ("IPNDM", "IPNDMScheduler", {}),
    ("KDPM2 ancestral", "KDPM2AncestralDiscreteScheduler", {}),
    ("EDM Euler", "EDMEulerScheduler", {}),
    ("EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler", {}),
    ("CM", "CMStochasticIterativeScheduler", {}),
    ("FlowMatchLCM", "FlowMatchLCMScheduler", {}),
    ("LTX Euler ancestral", "LTXEulerAncestralRFScheduler", {}),
]


class Loop:
    """Runs of a scheduler on fixed images, without a model.

    Attributes:
        step: takes every step of a run but the first.
        whole: timesteps are handed over as integers.
    """

    step: Callable[..., Any]

    def __init__(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> None:
        self.scheduler, self.step, self.whole = scheduler, scheduler.step, False
        self.steps = steps
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=generator)
        self.output = torch.randn(shape, generator=generator)

    def ready(self) -> list[Any]:
        """Sets the timesteps, takes the first step and returns the timesteps that remain."""
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps)
        timesteps = scheduler.timesteps
        first, *others = [int(t) for t in timesteps] if self.whole else timesteps
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(self.x, first)
        scheduler.step(self.output, first, self.x, return_dict=False)
        return others

    def run(self, timesteps: list[Any]) -> Tensor:
        step, x, output = self.step, self.x, self.output
        for t in timesteps:
            x = step(output, t, x, return_dict=False)[0]
        return x

    def result(self) -> Tensor:
        """Of a run whose draws, if torch makes them, are those of manual_seed(0)."""
        return drawn(lambda: self.run(self.ready()))


class Compiled(Loop):
    """Around torch.compile of the scheduler's step, made at its first run; raises there where the
    step does not compile. Timesteps are tensors, as pipelines hand them over, or else integers."""

    _refused: ClassVar[dict[str, Exception]] = {}

    def __init__(self, make: Callable[[], Any], shape: tuple[int, ...], steps: int) -> None:
        super().__init__(make(), shape, steps)
        self._key = repr((type(self.scheduler), self.scheduler.config))
        self._compiled = smoke()

    def ready(self) -> list[Any]:
        if not self._compiled:
            if self._key in self._refused:
                raise self._refused[self._key]
            self._compile()
            self._compiled = True
        return super().ready()

    def _compile(self) -> None:
        for self.whole in (False, True):
            torch._dynamo.reset()
            self.step = torch.compile(
                self.scheduler.step, fullgraph=True, options={"fallback_random": True}
            )
            try:
                self.run(super().ready())
                self._refused.pop(self._key, None)
                return
            except Exception as error:
                self._refused.setdefault(self._key, error)
                if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
                    break
        raise self._refused[self._key]


def build(name: str, config: dict[str, Any], size: str) -> Contest:
    diffusers = upstream.diffusers()
    from fastdiff.integrations.diffusers import accelerate

    if not hasattr(diffusers, name):
        raise Unavailable(f"diffusers {diffusers.__version__} has no {name}")
    shape, steps = shape_of(size), 5 if smoke() else STEPS

    def make() -> Any:
        return getattr(diffusers, name)(**config)

    loops = {
        "accelerated": Loop(accelerate(make()), shape, steps),
        "accelerated, seed=": Loop(accelerate(make(), seed=0), shape, steps),
        "stock": Loop(make(), shape, steps),
        "compiled stock": Compiled(make, shape, steps),
    }

    @functools.cache
    def stock() -> Tensor:
        return Loop(make(), shape, steps).result()

    @functools.cache
    def definition() -> Tensor:
        return Loop(accelerate(make(), seed=0, backend="reference"), shape, steps).result()

    def check(contestant: str) -> None:
        wanted = definition() if contestant == "accelerated, seed=" else stock()
        agree_in_the_end(loops[contestant].result(), wanted)

    def ready() -> Any:
        scheduler = make()
        scheduler.set_timesteps(steps)
        return scheduler

    trace = Prepared(ready, lambda scheduler: trace_scheduler(scheduler, scheduler.timesteps))
    contestants: dict[str, Call] = {
        label: Prepared(loop.ready, loop.run) for label, loop in loops.items()
    }
    opponents = {label: contestants.pop(label) for label in ("stock", "compiled stock")}
    return Contest(
        ours=contestants, opponents=opponents, check=check, elements=loops["stock"].x.numel(),
        beside={f"trace of {steps} steps": trace} if size == HOST else {},
        work={"steps": len(loops["stock"].ready())}, slow=("compiled stock",),
    )  # fmt: skip


for _label, _class, _config in OFTEN:
    for _size in (HOST, LATENTS):
        register(Case(
            "schedulers", f"{_label} {_size}", functools.partial(build, _class, _config, _size),
            quick=_label in ("DDIM", "DDPM", "DPM++ 2M", "UniPC", "FlowMatchEuler"),
        ))  # fmt: skip
for _label, _class, _config in SELDOM:
    register(
        Case("schedulers", f"{_label} {HOST}", functools.partial(build, _class, _config, HOST))
    )
