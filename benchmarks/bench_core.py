"""Normals, q_sample, the DDPM step and DDIM with guidance against what people run today.

    pytest benchmarks/                                   every contestant under pytest-benchmark
    python benchmarks/bench_core.py [--threads 1] [--json out.json]     the table of ratios

Opponents: the eager code of GaussianDiffusion models (tables gathered per call, one kernel per
operation), its torch.compile with torch's own generator (fallback_random) and with Inductor's, and
torch.compile of fastdiff's reference, which computes the same bits. Rounds are interleaved; a ratio
is the opponent's time over fastdiff's in the same round. Each result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.ops.call import call_step
from fastdiff.profiling.timing import interleaved, keep_memory, machine
from fastdiff.program import Mode

SHAPES = {
    "1x4x64x64": (1, 4, 64, 64),
    "16x4x64x64": (16, 4, 64, 64),
    "64x3x256x256": (64, 3, 256, 256),
}
SCHEDULE = fd.schedules.linear(1000)
TABLES = {
    name: np.array(getattr(SCHEDULE, name))
    for name in (
        "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2",
        "posterior_log_variance_clipped",
    )
}  # fmt: skip
ROW = 500  # the step that is timed, mid-run
GUIDANCE = 7.5
ALPHA, SIGMA, ALPHA_PREV, SIGMA_PREV = (
    float(table[row]) for row in (ROW, ROW - 20) for table in (SCHEDULE.alpha_t, SCHEDULE.sigma_t)
)


@dataclass(frozen=True)
class Case:
    """Contestants for one operation at one shape; `fastdiff` and `fastdiff out=` are ours.

    Attributes:
        calls: name to call.
        check: refuses a wrong result before anything is timed.
        bytes: read and written by the operation, for the share of the copy bandwidth.
    """

    calls: dict[str, Callable[[], object]]
    check: Callable[[], None]
    elements: int
    bytes: int


# The eager opponents: the formulas as GaussianDiffusion classes evaluate them.


def gathered(name: str, t: Tensor, x: Tensor) -> Tensor:
    values = torch.from_numpy(TABLES[name])[t].float()
    return values.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)


def eager_q_sample(x: Tensor, t: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    a = gathered("sqrt_alphas_cumprod", t, x)
    return a * x + gathered("sqrt_one_minus_alphas_cumprod", t, x) * noise


def eager_ddpm(x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    x0 = gathered("sqrt_recip_alphas_cumprod", t, x) * x
    x0 = (x0 - gathered("sqrt_recipm1_alphas_cumprod", t, x) * output).clamp(-1, 1)
    mean = gathered("posterior_mean_coef1", t, x) * x0
    mean = mean + gathered("posterior_mean_coef2", t, x) * x
    noise = torch.randn_like(x)
    nonzero = (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))
    log_variance = gathered("posterior_log_variance_clipped", t, x)
    return mean + nonzero * torch.exp(0.5 * log_variance) * noise


def eager_ddim(x: Tensor, output: Tensor, n: int) -> Tensor:
    """The fastest eager form: coefficients as Python floats."""
    uncond, cond = output[:n], output[n:]
    eps = uncond + GUIDANCE * (cond - uncond)
    x0 = (x - SIGMA * eps) / ALPHA
    return ALPHA_PREV * x0 + SIGMA_PREV * eps


def compiled(function: Callable, **options: bool) -> Callable:
    if os.environ.get("FASTDIFF_BENCH_COMPILE", "1") == "0":
        return function
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, options=options or None)


def data(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normals(shape: tuple[int, ...]) -> Case:
    out = torch.empty(shape)
    calls = {
        "fastdiff": lambda: fd.randn(shape, 1),
        "fastdiff out=": lambda: fd.randn(shape, 1, out=out),
        "torch normal_": lambda: out.normal_(),
        "torch.randn": lambda: torch.randn(shape),
        "compiled reference": compiled(lambda: fd.randn(shape, 1, backend="reference")),
    }

    def check() -> None:
        expected = fd.randn(shape, 1, backend="reference") if out.numel() < 1 << 22 else None
        actual = fd.randn(shape, 1)
        if expected is not None:
            assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
        assert abs(float(actual.mean())) < 5 / actual.numel() ** 0.5

    return Case(calls, check, out.numel(), 4 * out.numel())


def q_sample(shape: tuple[int, ...]) -> Case:
    x, t = data(shape, 0), torch.arange(shape[0]) * 7 % 1000
    out = torch.empty_like(x)
    by_fallback, by_inductor = (
        compiled(eager_q_sample, **o) for o in ({"fallback_random": True}, {})
    )
    reference = compiled(lambda x, t: fd.q_sample(x, t, SCHEDULE, seed=1, backend="reference"))
    calls = {
        "fastdiff": lambda: fd.q_sample(x, t, SCHEDULE, seed=1),
        "fastdiff out=": lambda: fd.q_sample(x, t, SCHEDULE, seed=1, out=out),
        "eager": lambda: eager_q_sample(x, t),
        "compiled eager, torch's generator": lambda: by_fallback(x, t),
        "compiled eager, Inductor's generator": lambda: by_inductor(x, t),
        "compiled reference": lambda: reference(x, t),
    }

    def check() -> None:
        same = fd.q_sample(x, t, SCHEDULE, seed=1).view(torch.int32)
        assert torch.equal(same, reference(x, t).view(torch.int32))
        z = torch.zeros_like(x)
        plain = gathered("sqrt_alphas_cumprod", t, x) * x
        torch.testing.assert_close(fd.q_sample(x, t, SCHEDULE, noise=z), plain)

    return Case(calls, check, x.numel(), 8 * x.numel())


def ddpm(shape: tuple[int, ...]) -> Case:
    x, output = data(shape, 0), data(shape, 1)
    t = torch.full(shape[:1], ROW)
    plan = fd.solvers.ddpm(SCHEDULE)
    fresh = fd.Sampler(plan).start(x, seed=1)
    kept = fd.Sampler(plan).start(x, seed=1, in_place=True)

    def step(run: fd.Run) -> Tensor:
        run.index = 999 - ROW
        return run.step(output)

    by_fallback = compiled(eager_ddpm, fallback_random=True)
    reference = compiled(
        lambda x, output, t: fd.p_sample(output, x, t, SCHEDULE, seed=1, backend="reference")
    )
    calls = {
        "fastdiff": lambda: step(fresh),
        "fastdiff out=": lambda: step(kept),
        "fastdiff p_sample": lambda: fd.p_sample(output, x, t, SCHEDULE, seed=1),
        "eager": lambda: eager_ddpm(x, output, t),
        "compiled eager, torch's generator": lambda: by_fallback(x, output, t),
        "compiled reference": lambda: reference(x, output, t),
    }

    def check() -> None:
        ours = fd.p_sample(output, x, t, SCHEDULE, seed=1)
        assert torch.equal(ours.view(torch.int32), reference(x, output, t).view(torch.int32))
        state = torch.get_rng_state()
        theirs = eager_ddpm(x, output, t)
        torch.set_rng_state(state)
        torch.testing.assert_close(
            fd.p_sample(output, x, t, SCHEDULE, noise=torch.randn_like(x)), theirs,
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        torch.testing.assert_close(step(fd.Sampler(plan).start(x, seed=1)), ours, rtol=0, atol=0)

    return Case(calls, check, x.numel(), 12 * x.numel())


def ddim(shape: tuple[int, ...]) -> Case:
    n = shape[0]
    x, output = data(shape, 0), data((2 * n, *shape[1:]), 1)
    plan = fd.solvers.ddim(SCHEDULE, timesteps=[ROW - 20, ROW], clip=None)
    tables = plan.on(x.device, torch.float32, Mode())
    spec = plan.program(Mode()).variants[0].spec(plan, torch.float32)
    scale, kept = torch.tensor([GUIDANCE]), x.clone()
    halves = list(output.split(n))
    source, target = (torch.randn(2 * x.numel()) for _ in range(2))

    def step(state: Tensor, out: list[Tensor] | None = None) -> Tensor:
        # The step alone: opponents do not make the doubled input of the next model call either.
        return call_step(
            [state], spec, tables.tables[0], tables.rows[0], model_outputs=halves,
            draws=tables.draws, guidance_scale=scale, out=out,
        )[0]  # fmt: skip

    by_inductor = compiled(lambda x, output: eager_ddim(x, output, n))
    calls = {
        "fastdiff": lambda: step(x),
        "fastdiff out=": lambda: step(kept, [kept]),
        "eager": lambda: eager_ddim(x, output, n),
        "compiled eager": lambda: by_inductor(x, output),
        "copy of as many bytes": lambda: target.copy_(source),
    }

    def check() -> None:
        torch.testing.assert_close(step(x), eager_ddim(x, output, n), rtol=1e-4, atol=1e-4)

    return Case(calls, check, x.numel(), 16 * x.numel())


OPERATIONS = {"normals": normals, "q_sample": q_sample, "ddpm": ddpm, "ddim+guidance": ddim}


@pytest.mark.parametrize("shape", ["1x4x64x64", "16x4x64x64"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_speed(benchmark, operation: str, shape: str) -> None:
    """fastdiff's own time, after the check; ratios are the table's business."""
    case = OPERATIONS[operation](SHAPES[shape])
    case.check()
    benchmark.group = f"{operation} {shape}"
    benchmark.extra_info["elements"] = case.elements
    benchmark(case.calls["fastdiff"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="", help="avx512, avx2 or portable; default the best")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per case")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warm = keep_memory()
    facts = machine() | {
        "cpu kernels": fd.backends.native.isa(options.isa),
        "load": f"{os.getloadavg()[0]:.1f}",
        "memory": "warm" if warm else "default allocator",
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    records = []
    for name in options.operations:
        for shape in options.shapes:
            case = OPERATIONS[name](SHAPES[shape])
            with torch.no_grad():
                case.check()
                times = interleaved(case.calls, budget=options.budget)
            ours = times["fastdiff"]
            print(f"\n{name} {shape}, {case.elements} elements")
            for contestant, timing in times.items():
                low, middle, high = ours.ratio_to(timing)
                rate = case.elements / timing.median / 1e9
                print(
                    f"  {contestant:<38}{timing.median * 1e6:>12.1f} us {rate:>8.3f} G/s "
                    f"{case.bytes / timing.median / 1e9:>7.1f} GB/s   "
                    f"{middle:>6.2f}x [{low:.2f}..{high:.2f}]"
                )
                records.append({
                    "operation": name, "shape": shape, "contestant": contestant,
                    "median_s": timing.median, "best_s": timing.best,
                    "ratio_p10_p50_p90": [low, middle, high],
                })  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": facts, "results": records}, file, indent=1)


if __name__ == "__main__":
    main()
