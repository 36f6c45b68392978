"""Solver steps without noise: DDIM with guidance, and multistep solvers in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks import limits
from fastdiff.benchmarks.contestants import SCHEDULE, Compiled, agree, same_bits
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.registry import Call, Contest, shape_of
from fastdiff.ops.call import call_step
from fastdiff.ops.step import HEADER
from fastdiff.program import Mode

__all__ = ["guided_step", "run_step"]

GUIDANCE = 7.5
ROW = 500  # the t of DDIM
ALPHA, SIGMA, ALPHA_PREV, SIGMA_PREV = (
    float(table[row]) for row in (ROW, ROW - 20) for table in (SCHEDULE.alpha_t, SCHEDULE.sigma_t)
)


def combined(
    rows: Sequence[Sequence[float]], tensors: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """One sum of products per row in the fewest torch calls: one per coefficient."""
    results = []
    for row in rows:
        terms = [(value, tensor) for value, tensor in zip(row, tensors, strict=True) if value]
        result = (terms[0][1] * terms[0][0]).to(dtype)
        for value, tensor in terms[1:]:
            result.add_(tensor, alpha=value)
        results.append(result)
    return results


def eager_ddim(x: Tensor, output: Tensor) -> tuple[Tensor]:
    """DDIM with guidance, its coefficients as numbers."""
    uncond, cond = output.chunk(2)
    eps = uncond + GUIDANCE * (cond - uncond)
    x0 = (x - SIGMA * eps) / ALPHA
    return (ALPHA_PREV * x0 + SIGMA_PREV * eps,)


def guided_step(text: str, dtype: torch.dtype, compiles: bool) -> Contest:
    """DDIM with guidance, the step alone: no one makes the doubled input of the next model call."""
    shape = shape_of(text)
    x, output = data(shape, 0, dtype), data((2 * shape[0], *shape[1:]), 1, dtype)
    plan = fd.solvers.ddim(SCHEDULE, timesteps=[ROW - 20, ROW], clip=None)
    tables = plan.on(x.device, torch.float32, Mode())
    spec = plan.program(Mode()).variants[0].spec(plan, torch.float32)
    scale, kept = torch.tensor([GUIDANCE]), x.clone()
    halves = list(output.chunk(2))

    def step(state: Tensor, out: list[Tensor] | None = None, backend: str | None = None) -> Tensor:
        return call_step(
            [state], spec, tables.tables[0], tables.rows[0], model_outputs=halves,
            draws=tables.draws, guidance_scale=scale, out=out, backend=backend,
        )[0]  # fmt: skip

    def fewest(x: Tensor, output: Tensor) -> tuple[Tensor]:
        a = ALPHA_PREV / ALPHA
        uncond, cond = output.chunk(2)
        eps = torch.lerp(uncond, cond, GUIDANCE)
        return (torch.add(x * a, eps, alpha=SIGMA_PREV - a * SIGMA),)

    ours: dict[str, Call] = {
        "fastdiff": lambda: step(x),
        "fastdiff in place": lambda: step(kept, [kept]),
    }
    opponents: dict[str, Call] = {
        "eager": lambda: eager_ddim(x, output),
        "eager, fewest passes": lambda: fewest(x, output),
    }
    extra = Compiled(compiles, dtype)
    extra.add("compiled eager", eager_ddim, x, output)
    opponents |= extra.calls

    def check(name: str) -> None:
        if name in ours:
            start = x.clone()
            result = step(start, [start]) if name == "fastdiff in place" else step(start)
            same_bits(result, step(x, backend="reference"))
        else:
            agree(opponents[name]()[0], step(x), growth=8)

    return Contest(
        ours, check, opponents, extra.absent,
        limits=limits.memory(4 * x.nbytes) | limits.call(),
        elements=x.numel(), bytes=4 * x.nbytes, operations=6.0 * x.numel(),
    )  # fmt: skip


def run_step(
    plan_of: Callable[[fd.NoiseSchedule], fd.SolverPlan],
    text: str,
    dtype: torch.dtype,
    compiles: bool,
    model_dtype: torch.dtype | None = None,
    guided: bool = False,
) -> Contest:
    """run.step() in the middle of a run, history and all.

    With a model dtype of its own the next model input (twice with guidance) is written too, and by
    the opponents as well. They use the coefficients and the history of our plan, which is the least
    there is; what schedulers really do is in schedulers.py.
    """
    shape = shape_of(text)
    model_dtype = model_dtype or dtype
    x, plan = data(shape, 0, dtype), plan_of(SCHEDULE)
    output = data((shape[0] * (1 + guided), *shape[1:]), 1, model_dtype)
    row = plan.rows // 2
    mixed = model_dtype != dtype

    def started(
        x: Tensor, output: Tensor, in_place: bool = False, backend: str | None = None
    ) -> fd.Run:
        run = fd.Sampler(plan, backend=backend).start(
            x, in_place=in_place, model_dtype=model_dtype,
            guidance_scale=GUIDANCE if guided else None,
        )  # fmt: skip
        for _ in range(row):
            run.step(output)
        return run

    def step(run: fd.Run) -> Tensor:
        run.index = row
        return run.step(output)

    program = plan.program(Mode())
    call = program.calls[row]
    variant = program.variants[call.variant]
    columns = len(call.reads) + 2
    rows = variant.table(plan)[row, len(HEADER) + columns - 1 :].reshape(-1, columns)
    coefficients = [[float(value) for value in values] for values in rows]
    before = started(x, output)
    everything = [before.x, *before.history]
    states = [everything[k] for k in call.reads]

    def eager(output: Tensor, *states: Tensor) -> list[Tensor]:
        o = output
        if guided:
            uncond, cond = output.chunk(2)
            o = torch.lerp(uncond, cond, GUIDANCE)
        results = combined(coefficients, [*states, o, o], dtype)
        if mixed:
            scaled = results[0].to(model_dtype)
            results.append(torch.cat([scaled, scaled]) if guided else scaled)
        return results

    tensors = [output, *(state.clone() for state in states if state is not None)]
    fresh, kept = started(x, output), started(x, output, in_place=True)
    ours: dict[str, Call] = {
        "fastdiff": lambda: step(fresh),
        "fastdiff in place": lambda: step(kept),
    }
    opponents: dict[str, Call] = {"eager, fewest passes": lambda: eager(*tensors)}
    extra = Compiled(compiles, dtype)
    extra.add("compiled eager", eager, *tensors)
    opponents |= extra.calls

    def check(name: str) -> None:
        if name in ours:
            one = torch.cat([half[:1] for half in output.chunk(1 + guided)])
            expected = started(x[:1], one, backend="reference")
            actual = started(x, output, in_place=name == "fastdiff in place")
            same_bits(actual.step(output)[:1], expected.step(one))
            if mixed:
                same_bits(actual.model_input[:1], expected.model_input[:1])
        else:
            wanted = started(x, output).step(output)
            result = opponents[name]()[0]
            agree(result, wanted, output.dtype, growth=8 if guided else 1)

    writes = len(coefficients) * x.nbytes + (output.nbytes if mixed else 0)
    nbytes = len(states) * x.nbytes + output.nbytes + writes
    operations = sum(2.0 * sum(map(bool, values)) - 1 for values in coefficients) + 3 * guided
    return Contest(
        ours, check, opponents, extra.absent, limits=limits.memory(nbytes) | limits.call(),
        elements=x.numel(), bytes=nbytes, operations=operations * x.numel(),
    )  # fmt: skip
