"""How cost grows: with the size of the sample, the threads, the states of a step, rows of its own
for every sample.

Per element the cost is flat once the call itself no longer counts, and flat again beyond the
caches.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks import limits
from fastdiff.benchmarks.contestants import SCHEDULE, agree, drawn, gathered, same_bits
from fastdiff.benchmarks.limits import data
from fastdiff.benchmarks.operations import normals, q_sample
from fastdiff.benchmarks.registry import (
    Call,
    Case,
    Contest,
    Unavailable,
    register,
    shape_of,
    smoke,
)
from fastdiff.benchmarks.steps import guided_step

POWERS = range(10, 29, 2)
OPPONENTS_UP_TO = 1 << 24  # elements; larger ones take seconds a call
ROW = 500


def sized(power: int) -> tuple[int, ...]:
    """2^power elements, samples of at most 65536."""
    n = 1 << (4 if smoke() else power)
    return (max(1, n >> 16), min(n, 1 << 16))


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def require(nbytes: int) -> None:
    """Raises Unavailable unless that much memory, and some to spare, is free."""
    free = available_bytes()
    if nbytes * 1.25 > free:
        raise Unavailable(f"needs {nbytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")


def size_of_q_sample(power: int) -> Contest:
    shape = sized(power)
    n = shape[0] * shape[1]
    require(7 * 4 * n)
    x, out, t = data(shape, 0), torch.empty(shape), torch.full(shape[:1], ROW)
    ours: dict[str, Call] = {
        "fastdiff in place": lambda: fd.q_sample(x, t, SCHEDULE, seed=1, out=out)
    }
    opponents: dict[str, Call] = {}
    absent: dict[str, str] = {}
    a, s = float(SCHEDULE.alpha_t[ROW]), float(SCHEDULE.sigma_t[ROW])
    if n <= OPPONENTS_UP_TO:
        opponents["eager, fewest passes"] = lambda: out.normal_().mul_(s).add_(x, alpha=a)
    else:
        absent["eager, fewest passes"] = "takes seconds a call at this size"

    def check(name: str) -> None:
        if name in ours:
            expected: Any = fd.q_sample(x[:1], t[:1], SCHEDULE, seed=1, backend="reference")
            same_bits(ours[name]()[:1], expected)
        else:
            noise = drawn(lambda: torch.randn_like(x))
            expected = fd.q_sample(x, t, SCHEDULE, noise=noise)
            agree(drawn(opponents[name]), expected)

    return Contest(
        ours, check, opponents, absent,
        limits=limits.noise(shape) | limits.memory(8 * n) | limits.call(), elements=n, bytes=8 * n,
    )  # fmt: skip


def size_of_ddim(power: int) -> Contest:
    """A step without noise or guidance: reads two tensors and writes one, over the first."""
    shape = sized(power)
    n = shape[0] * shape[1]
    require(9 * 4 * n)
    x, output = data(shape, 0), data(shape, 1)
    plan = fd.solvers.ddim(SCHEDULE, 50, clip=None)

    def step(run: fd.Run) -> Tensor:
        run.index = plan.rows // 2
        return run.step(output)

    run = fd.Sampler(plan).start(x, in_place=True)
    a, b = (float(value) for value in plan.A[plan.rows // 2, 0, :2])
    ours: dict[str, Call] = {"fastdiff in place": lambda: step(run)}
    opponents: dict[str, Call] = {}
    absent: dict[str, str] = {}
    if n <= OPPONENTS_UP_TO:
        opponents["eager, fewest passes"] = lambda: torch.add(x * a, output, alpha=b)
    else:
        absent["eager, fewest passes"] = "takes seconds a call at this size"

    def check(name: str) -> None:
        one = fd.Sampler(plan, backend="reference").start(x[:1])
        one.index = plan.rows // 2
        expected = one.step(output[:1])
        if name in ours:
            run.x = x
            same_bits(ours[name]()[:1], expected)
        else:
            agree(opponents[name]()[:1], expected)

    return Contest(
        ours, check, opponents, absent, limits=limits.memory(12 * n) | limits.call(),
        elements=n, bytes=12 * n, operations=3.0 * n,
    )  # fmt: skip


def states(count: int, text: str) -> Contest:
    """A step that reads `count` states beside the sample and writes one result."""
    elements = 1
    for size in shape_of(text):
        elements *= size
    nbytes = 4 * elements * (count + 2)
    call, out, sources = limits.our_pass(count + 1, nbytes)

    def eager() -> Tensor:
        result = sources[0] * 1.0
        for source in sources[1:]:
            result.add_(source, alpha=1.0)
        return result

    def check(name: str) -> None:
        expected = torch.full_like(out, count + 1.0)
        torch.testing.assert_close(out if name in ours else eager(), expected, rtol=0, atol=0)

    ours: dict[str, Call] = {"fastdiff in place": call}
    return Contest(
        ours, check, {"eager, fewest passes": eager},
        limits=limits.memory(nbytes) | limits.call(),
        elements=elements, bytes=nbytes, operations=(2.0 * count + 1) * elements,
    )  # fmt: skip


def rows(text: str) -> Contest:
    """q_sample with one t for the batch, and with a t of its own for every sample."""
    shape = shape_of(text)
    x, out = data(shape, 0), torch.empty(shape)
    same = torch.full(shape[:1], ROW)
    mixed = torch.linspace(0, 999, shape[0]).long()
    noise = torch.randn_like(x)

    def eager() -> Tensor:
        a = gathered("sqrt_alphas_cumprod", mixed, x)
        return a * x + gathered("sqrt_one_minus_alphas_cumprod", mixed, x) * torch.randn_like(x)

    ours: dict[str, Call] = {
        "fastdiff in place, a row per sample": lambda: fd.q_sample(
            x, mixed, SCHEDULE, seed=1, out=out
        ),
        "fastdiff in place, one row": lambda: fd.q_sample(x, same, SCHEDULE, seed=1, out=out),
    }

    def check(name: str) -> None:
        t = same if name == "fastdiff in place, one row" else mixed
        expected: Any
        if name in ours:
            expected = fd.q_sample(x, t, SCHEDULE, seed=1, backend="reference")
            same_bits(ours[name](), expected)
        else:
            noise = drawn(lambda: torch.randn_like(x))
            expected = fd.q_sample(x, t, SCHEDULE, noise=noise)
            agree(drawn(eager), expected)

    return Contest(
        ours, check, {"eager": eager},
        limits=limits.noise(shape) | limits.memory(2 * x.nbytes) | limits.call(),
        elements=noise.numel(), bytes=2 * x.nbytes,
    )  # fmt: skip


def thread_counts() -> tuple[int, ...]:
    """1, 2, 4 ... and every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    return tuple(sorted({cores, *(1 << k for k in range(cores.bit_length()) if 1 << k <= cores)}))


for _power in POWERS:
    _quick = _power in (10, 16, 22)
    register(Case("scaling", f"size q_sample 2^{_power}", partial(size_of_q_sample, _power)))
    register(Case("scaling", f"size ddim 2^{_power}", partial(size_of_ddim, _power), _quick))
for _name, _build in {
    "normals 16x4x64x64": partial(normals, "16x4x64x64", torch.float32, False),
    "q_sample 16x4x64x64": partial(q_sample, "16x4x64x64", torch.float32, False),
    "ddim+guidance 64x3x256x256": partial(guided_step, "64x3x256x256", torch.float32, False),
}.items():
    register(Case("scaling", f"threads {_name}", _build, threads=thread_counts()))
for _count in range(6):
    for _text in ("16x4x64x64", "64x3x256x256"):
        register(Case("scaling", f"states {_count} {_text}", partial(states, _count, _text)))
register(Case("scaling", "rows of a batch 16x4x64x64", partial(rows, "16x4x64x64"), quick=True))
