"""What this machine can do: memory traffic, noise, the price of a call.

The functions give other cases their limits, timed in the same rounds; the cases registered here
show the same figures by themselves, and how our own passes over memory compare with torch's.

Two copies stand for the memory limit and the faster one counts: torch's copy_, which leaves its
result in the caches, and our own step with one state and coefficient 1, which stores past the
caches when the result is larger than they are. Both move as many bytes as the case does.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.benchmarks.registry import ALL, Call, Case, Contest, register, smoke
from fastdiff.ops.call import call_step, pack_table
from fastdiff.ops.step import StepSpec

__all__ = ["call", "data", "memory", "noise", "our_pass", "torch_pass"]

SIZES = {
    "64 KiB": 1 << 16,
    "1 MiB": 1 << 20,
    "4 MiB": 1 << 22,
    "48 MiB": 48 << 20,
    "256 MiB": 1 << 28,
}
QUICK = ("4 MiB", "48 MiB")


def data(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normals of torch's generator of that seed, times scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(scale).to(dtype)


def _filled(numel: int) -> Tensor:
    """Memory that has been written to: pages that were never touched read faster than any."""
    return torch.ones(max(numel, 1))


def our_pass(reads: int, nbytes: int) -> tuple[Call, Tensor, list[Tensor]]:
    """The fused step as the sum of `reads` float32 tensors, in nbytes of traffic in all.

    Returns:
        the call, its result and what it reads.
    """
    numel = nbytes // (4 * (reads + 1))
    states, out = [_filled(numel)[None] for _ in range(reads)], _filled(numel)[None]
    coefficients = np.zeros((1, reads + 2))
    coefficients[:, :reads] = 1.0
    table = torch.from_numpy(pack_table(1, [coefficients])).float()
    spec = StepSpec(states=reads, outputs=((1 << reads) - 1,))
    rows = torch.zeros(1, dtype=torch.int64)
    return partial(call_step, states, spec, table, rows, out=[out]), out, states


def torch_pass(reads: int, nbytes: int) -> tuple[Call, Tensor, list[Tensor]]:
    """The same with torch: one operation that reads 1, 2 or 3 tensors and writes one."""
    numel = nbytes // (4 * (reads + 1))
    sources, out = [_filled(numel) for _ in range(reads)], _filled(numel)
    calls: dict[int, Call] = {
        1: lambda: out.copy_(sources[0]),
        2: lambda: torch.add(sources[0], sources[1], out=out),
        3: lambda: torch.addcmul(sources[0], sources[1], sources[2], out=out),
    }
    return calls[reads], out, sources


def memory(nbytes: int) -> dict[str, Call]:
    """The memory limit of a case: copies of as many bytes."""
    ours, out, (source,) = our_pass(1, nbytes)
    return {"memory: copy_": lambda: out.copy_(source), "memory: copy by our step": ours}


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The noise of a case alone, into memory that is there already."""
    out = torch.empty(shape, dtype=dtype)
    return {"noise: fd.randn into out": lambda: fd.randn(shape, 1, out=out)}


def call() -> dict[str, Call]:
    """The price of one operation: a multiplication of one element in place."""
    one, other = torch.ones(1), torch.ones(1)
    return {"call: one multiplication": lambda: one.mul_(other)}


def bandwidth(nbytes: int) -> Contest:
    """Passes that read one, two or three tensors and write one, in the same bytes."""
    nbytes = 1 << 10 if smoke() else nbytes
    ours = {f"fastdiff {n}r1w": our_pass(n, nbytes) for n in (1, 2, 3)}
    torchs = {
        "copy_ 1r1w": torch_pass(1, nbytes),
        "add 2r1w": torch_pass(2, nbytes),
        "addcmul 3r1w": torch_pass(3, nbytes),
    }
    source, target = (np.ones(nbytes // 8, np.float32) for _ in range(2))
    opponents: dict[str, Call] = {name: made[0] for name, made in torchs.items()}
    opponents["NumPy copyto 1r1w"] = lambda: np.copyto(target, source)

    def check(name: str) -> None:
        if name in ours:
            _, out, states = ours[name]
            torch.testing.assert_close(out, torch.stack(states).sum(0), rtol=0, atol=0)
        elif name in torchs:
            _, out, sources = torchs[name]
            assert bool((out == (1.0 if len(sources) == 1 else 2.0)).all())
        else:
            assert bool((target == source).all())

    return Contest(
        {name: made[0] for name, made in ours.items()}, check, opponents,
        elements=nbytes // 8, bytes=nbytes,
    )  # fmt: skip


def dispatch() -> Contest:
    """What a call costs before any work: a sample of one element."""
    x, out, t = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    schedule = fd.schedules.linear(1000)
    run = fd.Sampler(fd.solvers.ddim(schedule, steps=50, clip=None)).start(x, in_place=True)

    def step() -> Tensor:
        run.index = 25
        return run.step(out)

    ours: dict[str, Call] = {
        "fd.randn": lambda: fd.randn((1, 1), 1),
        "fd.q_sample": lambda: fd.q_sample(x, t, schedule, seed=1),
        "run.step": step,
        "the operation of a step": our_pass(1, 8)[0],
    }
    one = torch.ones(1)
    opponents: dict[str, Call] = {
        "torch.empty_like": lambda: torch.empty_like(one),
        "torch.randn": lambda: torch.randn(1, 1),
        "x.mul_(number)": lambda: one.mul_(1.0),
    }

    def check(name: str) -> None:
        result = ours[name]() if name in ours else opponents[name]()
        first = result[0] if isinstance(result, list) else result
        assert isinstance(first, Tensor) and (
            name == "torch.empty_like" or bool(torch.isfinite(first).all())
        )

    return Contest(ours, check, opponents, limits=call(), elements=1, bytes=8)


for _name, _bytes in SIZES.items():
    register(
        Case("limits", f"traffic {_name}", partial(bandwidth, _bytes), _name in QUICK, (1, ALL))
    )
register(Case("limits", "one element", dispatch, quick=True))
