"""diffusers schedulers: stock step against accelerated step, and what a trace costs.

    pytest benchmarks/bench_diffusers.py                 the accelerated step under pytest-benchmark
    python benchmarks/bench_diffusers.py [--shape 1x1x2x2] [--only Euler] [--json out.json]

A measurement is a run of 30 inference steps without its first (where a plan is made or found and
buffers are looked up), set_timesteps() outside, return_dict=False. On 1x1x2x2 that is host time:
what a step costs before any pixel is touched. Stock and accelerated results are compared first,
and take turns within a round. "trace" is the plan made from nothing over one stock run of as many
steps on 1x1x2x2.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff.integrations.diffusers import accelerate
from fastdiff.profiling.timing import Timing, interleaved, keep_memory, machine
from fastdiff.tracing.trace import trace_scheduler

STEPS = 30
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDIMScheduler", {}, {}),
    ("DDPMScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("FlowMatchEulerDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("LCMScheduler", {}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("FlowMatchHeunDiscreteScheduler", {}, {}),
    ("DEISMultistepScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", {}, {}),
    ("TCDScheduler", {}, {}),
    ("LMSDiscreteScheduler", {}, {}),
    ("SASolverScheduler", {}, {}),
    ("KDPM2DiscreteScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {},
    ),
]  # fmt: skip


def name_of(case: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
    name, config, _ = case
    extra = {"algorithm_type": "SDE", "use_flow_sigmas": "flow", "skip_prk_steps": "PLMS"}
    marks = [mark for key, mark in extra.items() if key in config]
    return " ".join([name.removesuffix("Scheduler").removesuffix("Discrete"), *marks])


class Loop:
    """A run of a scheduler on fixed images, without a model."""

    def __init__(self, scheduler: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.scheduler, self.options = scheduler, options
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=generator)
        self.output = torch.randn(shape, generator=generator)

    def ready(self) -> list[Tensor]:
        """Sets the timesteps, takes the first step and returns the timesteps that remain."""
        scheduler = self.scheduler
        scheduler.set_timesteps(STEPS)
        first, *others = scheduler.timesteps
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(self.x, first)
        scheduler.step(self.output, first, self.x, return_dict=False, **self.options)
        return others

    def run(self, timesteps: list[Tensor]) -> Tensor:
        step, x, output, options = self.scheduler.step, self.x, self.output, self.options
        for t in timesteps:
            x = step(output, t, x, return_dict=False, **options)[0]
        return x


def loops(case: tuple[str, dict[str, Any], dict[str, Any]], shape: tuple[int, ...]) -> dict:
    name, config, options = case
    cls = getattr(diffusers, name)
    made = {
        "stock": cls(**config), "accelerated": accelerate(cls(**config)),
        "seeded": accelerate(cls(**config), seed=0),
    }  # fmt: skip
    return {kind: Loop(scheduler, shape, options) for kind, scheduler in made.items()}


def check(contestants: dict[str, Loop]) -> None:
    results = []
    for kind in ("stock", "accelerated"):
        torch.manual_seed(0)
        results.append(contestants[kind].run(contestants[kind].ready()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def per_step(contestants: dict[str, Loop], rounds: int) -> dict[str, Timing]:
    """Seconds a step; the first step of every run, and set_timesteps(), are outside."""
    seconds: dict[str, list[float]] = {kind: [] for kind in contestants}
    for _ in range(rounds):
        for kind, loop in contestants.items():
            timesteps = loop.ready()
            start = time.perf_counter()
            loop.run(timesteps)
            seconds[kind].append((time.perf_counter() - start) / len(timesteps))
    return {kind: Timing(torch.tensor(values).numpy()) for kind, values in seconds.items()}


def trace_cost(case: tuple[str, dict[str, Any], dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a trace, and its time over that of one stock run of its steps."""
    name, config, options = case
    stock = Loop(getattr(diffusers, name)(**config), (1, 1, 2, 2), options)

    def traced() -> None:
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(STEPS)
        start = time.perf_counter()
        trace_scheduler(scheduler, scheduler.timesteps, options)
        spent.append(time.perf_counter() - start)

    def ran() -> None:
        timesteps = stock.ready()
        start = time.perf_counter()
        stock.run(timesteps)
        alone.append((time.perf_counter() - start) * (len(timesteps) + 1) / len(timesteps))

    spent: list[float] = []
    alone: list[float] = []
    interleaved({"trace": traced, "stock": ran}, rounds=10, seconds=0.0)
    ratios = sorted(a / b for a, b in zip(spent, alone, strict=True))
    return min(spent), ratios[len(ratios) // 2]


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:diffusers\.")  # NumPy's, of its own code
@pytest.mark.parametrize("case", CASES[:5], ids=name_of)
def test_speed(benchmark: Callable, case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    """The accelerated step, after the check; ratios are the table's business."""
    contestants = loops(case, (1, 1, 2, 2))
    check(contestants)
    loop = contestants["accelerated"]
    benchmark.pedantic(loop.run, setup=lambda: ((loop.ready(),), {}), rounds=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1x1x2x2")
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = tuple(int(n) for n in arguments.shape.split("x"))
    about = machine() | {"load": str(os.getloadavg()[0]), "shape": arguments.shape}
    about |= {"diffusers": diffusers.__version__, "warm memory": str(keep_memory())}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':24}{'stock':>10}{'accelerated':>13}{'seeded':>10}{'stock/accelerated':>28}"
          f"{'trace':>10}{'/ stock run':>12}")  # fmt: skip
    rows = []
    with torch.no_grad():
        for case in CASES:
            if arguments.only not in case[0]:
                continue
            contestants = loops(case, shape)
            check(contestants)
            times = per_step(contestants, arguments.rounds)
            low, middle, high = times["accelerated"].ratio_to(times["stock"])
            spent, ratio = trace_cost(case)
            micro = {kind: 1e6 * timing.median for kind, timing in times.items()}
            print(
                f"{name_of(case):24}{micro['stock']:8.1f}us{micro['accelerated']:11.1f}us"
                f"{micro['seeded']:8.1f}us{middle:12.1f}x ({low:.1f}..{high:.1f})"
                f"{1e3 * spent:12.1f}ms{ratio:10.1f}x"
            )
            rows.append({"scheduler": name_of(case), "us": micro, "ratio": [low, middle, high],
                         "trace_s": spent, "trace_over_stock_run": ratio})  # fmt: skip
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
