"""The step's share of the whole: a scheduler's step beside the model it samples.

A call is a few steps in the middle of a run on samples of the model's shape; "model" beside it is
as many calls of the model. A step that saves s seconds makes a loop s / (model + step) faster, so
it is worth 1 % of the whole where a model call takes less than 100 s: `rule` says it of a report.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks import models
from fastdiff.benchmarks.contestants import agree_in_the_end, same_bits
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.loops import PIPELINES, Pipeline
from fastdiff.benchmarks.registry import Call, Case, Contest, Unavailable, register
from fastdiff.benchmarks.schedulers import Loop
from fastdiff.profiling.timing import Prepared

OURS, WITHOUT = "accelerated", "run.step"  # the second needs no diffusers

_LINEAR = functools.partial(fd.schedules.linear, 1000)
# Small models in runs of eleven steps, those that take long in runs of four.
CASES = {
    "digits 16x1x8x8, DDIM": dataclasses.replace(
        PIPELINES["digits, DDIM 50, guidance"], guided=False, steps=11
    ),
    "policy 1x16x7, DDPM": dataclasses.replace(PIPELINES["policy, DDPM 100"], steps=11),
    "U-Net 1x3x32x32, DDPM": Pipeline(
        models.pixel_unet, (1, 3, 32, 32), _LINEAR, "DDPMScheduler", {},
        lambda s, n: fd.solvers.ddpm(s, n), 4,
    ),
    "DiT-B/2 1x4x32x32, DPM++ 2M": Pipeline(
        models.dit, (1, 4, 32, 32), _LINEAR, "DPMSolverMultistepScheduler", {},
        lambda s, n: fd.solvers.dpm_solver(s, n), 4,
    ),
}  # fmt: skip


def build(pipeline: Pipeline) -> Contest:
    model, shape, steps = pipeline.model(), pipeline.shape, pipeline.steps
    loops: dict[str, Loop] = {}
    absent = {}
    try:
        plan = fd.trace(pipeline.make(), steps=steps)
    except Unavailable as error:
        plan = pipeline.plan(pipeline.schedule(), steps)
        absent["stock"] = str(error)
    else:
        from fastdiff.integrations.diffusers import accelerate

        for name, scheduler in {
            OURS: accelerate(pipeline.make()),
            "stock": pipeline.make(),
        }.items():
            loops[name] = Loop(scheduler, shape, steps)
    x, output = data(shape, 0), data(shape, 1)

    def started(backend: str | None = None) -> fd.Run:
        run = fd.Sampler(plan, backend=backend).start(x, seed=0)
        run.step(output)
        return run

    def rest(run: fd.Run) -> Tensor:
        while not run.done:
            run.step(output)
        return run.x

    def check(name: str) -> None:
        if name == WITHOUT:
            same_bits(rest(started()), rest(started("reference")))
        else:
            agree_in_the_end(loops[name].result(), loops["stock"].result())

    t = torch.full(shape[:1], len(pipeline.schedule().betas) // 2)

    def called() -> None:
        for _ in range(steps - 1):
            model(x, t)

    contestants: dict[str, Call] = {
        name: Prepared(loop.ready, loop.run) for name, loop in loops.items()
    }
    opponents = {name: contestants.pop(name) for name in ("stock",) if name in contestants}
    return Contest(
        contestants | {WITHOUT: Prepared(started, rest)}, check, opponents, absent,
        beside={"model": called}, elements=x.numel(), work={"steps": steps - 1},
    )  # fmt: skip


def rule(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What the measured rows of this group say: the step's share, and what acceleration gains."""
    for row in rows:
        measured = row["status"] == "measured" and "stock" in row["opponents"]
        if not measured or OURS not in row["ours"]:
            continue
        steps = row["work"]["steps"]
        stock = row["opponents"]["stock"]["seconds"][1] / steps
        model = row["beside"]["model"]["seconds"][1] / steps
        ours = row["ours"][OURS]["seconds"][1] / steps
        saved = stock - ours
        shares = (_percent(step / (model + step)) for step in (stock, ours))
        line = "{}: stock's share {}, ours {}: {} more images/s".format(
            row["name"], *shares, _percent(saved / (model + ours))
        )
        yield line + (f"; 1 % if the model took {1e5 * saved:.2g} ms" if saved > 0 else "")


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"


for _name, _pipeline in CASES.items():
    register(Case("share", _name, functools.partial(build, _pipeline), "digits" in _name))
