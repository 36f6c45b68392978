"""Backends against the definition, bit for bit: known answers, sizes, alignments, many elements.

What is expected is always computed on the CPU by the reference, from inputs made there, so a GPU
that passes has the CPU's bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import backends
from fastdiff.backends import native
from fastdiff.profiling.agreement import copied, difference, is_exact, launch, results
from fastdiff.profiling.cases import Case, cases
from fastdiff.selftest.environment import environment
from fastdiff.selftest.known_answers import KNOWN
from fastdiff.selftest.part import Context

__all__ = ["definition", "equality", "large"]

_SECONDS_KEPT = 1.0  # of a part's time, for what is under way


class Situation(NamedTuple):
    """A size and an alignment that kernels may treat in a way of its own.

    big: too big for the definition on the CPU, so that on the GPU it computes what is expected.
    """

    name: str
    shape: tuple[int, ...]
    offset: int = 0
    big: bool = False


# In order of worth, since the time may not suffice for all. 2048 elements are whole tiles; 1292 a
# multiple of 4 with a partial tile; 1155 are odd, so that every sample begins elsewhere.
SITUATIONS = (
    Situation("whole tiles", (2, 2, 32, 32)),
    Situation("odd", (3, 5, 7, 33)),
    # A GPU is full and its programs have several tiles each, the last of them partial.
    Situation("several tiles a program", (3, 4, 1025, 1022), big=True),
    Situation("multiple of 4", (2, 4, 17, 19)),
    Situation("one sample", (1, 3, 5, 77)),
    Situation("misaligned", (2, 2, 32, 32), offset=1),
    Situation("misaligned, odd", (3, 5, 7, 33), offset=3),
    Situation("one element", (2, 1, 1, 1)),
    Situation("a few elements", (5, 3, 1, 2), offset=1),
    Situation("several tiles, odd", (3, 5, 911, 923), big=True),
)
# More samples than one axis of a grid takes (65535).
MANY_SAMPLES = Situation("many samples", (66000, 1, 1, 5))
_MANY = ("randn", "q_sample", "ddim", "ddpm_clipped")


def _jobs(all_cases: list[Case], big: bool) -> Iterator[tuple[Case, Situation]]:
    """Exact float32 first: what is wrong there is wrong everywhere."""
    ranked = sorted(all_cases, key=lambda c: (c.fast, c.dtype != torch.float32, c.mixed))
    for situation in SITUATIONS:
        for case in ranked:
            if big or not situation.big:
                yield case, situation
    for case in ranked:
        if case.name in _MANY and case.dtype == torch.float32 and not case.mixed:
            yield case, MANY_SAMPLES


def _levels(backend: str, device: str) -> list[str]:
    """The instruction levels under which the CPU's native kernels are tested; [""] elsewhere."""
    return native.isa_levels() if (backend, device) == ("native", "cpu") else [""]


def equality(context: Context) -> None:
    """One backend (option `backend`) over every case and situation, shared among processes.

    Options: backend; cases, the names of some, and all unless given.
    """
    backend, device = context.options["backend"], torch.device(context.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return
    torch.set_num_threads(1)  # small tensors, and processes beside this one
    reason = backends.probe(backend, device, torch.float32)
    if reason is not None:
        context.skip(f"{backend} does not serve here: {reason}")
        return
    wanted = context.options.get("cases")
    chosen = [case for case in cases() if wanted is None or case.name in wanted]
    known_answers(context, backend)
    # A case stays with one process, which compiles its kernels once.
    mine = set(context.mine(chosen))
    # For the definition itself there is nothing to compare with there.
    big = device.type == "cuda" and backend != "reference"
    jobs = [job for job in _jobs(chosen, context.options.get("big", big)) if job[0] in mine]
    left_out: list[str] = []
    tally = {"exact": 0, "fast": 0}
    begin = time.monotonic()
    for done, (case, situation) in enumerate(jobs):
        if context.left < _SECONDS_KEPT:
            left_out = [f"{case.id}, {situation.name}" for case, situation in jobs[done:]]
            break
        _compare(context, backend, device, case, situation)
        tally["exact" if is_exact(case, backend, device) else "fast"] += 1
    context.data.update(
        backend=backend, launches=tally, left_out=left_out, seconds=[time.monotonic() - begin]
    )
    if left_out:
        context.note(f"the time ran out for {len(left_out)} comparisons, from {left_out[0]} on")


def _compare(
    context: Context, backend: str, device: torch.device, case: Case, situation: Situation
) -> None:
    where = device if situation.big else torch.device("cpu")
    try:
        arguments = case.arguments(situation.shape, where, seed=1)
        expected = results(case, "reference", copied(arguments, where))
    except torch.cuda.OutOfMemoryError:
        context.note(f"{case.id}, {situation.name}: the GPU has not enough memory for it")
        return
    levels = _levels(backend, device.type)
    for level in levels:
        if level:
            native.isa(level)
        title = f"{backend}{' ' + level if level else ''}, {case.id}, {situation.name}"
        try:
            actual = results(case, backend, copied(arguments, device, offset=situation.offset))
            wrong = difference(actual, expected, exact=is_exact(case, backend, device))
        except Exception as error:
            if device.type == "cuda" and "CUDA error" in str(error):
                raise  # after such an error nothing in this process can work
            wrong = f"{type(error).__name__}: {str(error).strip()[:200]}"
        context.check(wrong is None, f"{title}: {wrong}")
    if levels[0]:
        native.isa(levels[0])  # the best, as before


def definition(context: Context) -> None:
    """What this machine is, and the known answers of the reference."""
    environment(context)
    known_answers(context, "reference")


def known_answers(context: Context, backend: str) -> None:
    """The noise of a few counters, as the tests' file of known answers has it."""
    device = torch.device(context.device)
    randn = backends.operation("randn", device, torch.float32, backend)
    for known in KNOWN:
        out = torch.full((1, known.n), torch.nan, device=device)
        seed, sample, step, stream = known.seed, known.sample, known.step, known.stream
        randn(out, None, seed, sample, step, stream, known.first // 4, False)
        words = out[0].cpu().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        context.check(
            tuple(words[:4].tolist()) == known.bits and int(words.sum()) == known.total,
            f"{backend}: the noise of seed {known.seed}, sample {known.sample}, step "
            f"{known.step}, stream {known.stream}, element {known.first} is not the known one",
        )


# More elements than 32 bits count


def large(context: Context) -> None:
    """Tensors of more than 2^31 elements, compared with the definition in windows.

    Options: backends; elements, more than which the tensors have (2^31 unless given).
    """
    device = torch.device(context.device)
    elements = int(context.options.get("elements", 2**31))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            context.skip("PyTorch finds no GPU")
            return
        free = torch.cuda.mem_get_info(device)[0]
        if free < 10 * elements:
            context.skip(
                f"{10 * elements / 2**30:.0f} GiB of free memory are needed, the GPU has "
                f"{free / 2**30:.0f}"
            )
            return
    for backend in context.options["backends"]:
        reason = backends.probe(backend, device, torch.float32)
        if reason is not None:
            context.note(f"{backend} does not serve here: {reason}")
            continue
        for check in (_large_noise, _large_step):
            if context.left > _SECONDS_KEPT:
                check(context, backend, device, elements)
            else:
                context.note(f"the time ran out before {check.__name__[1:]} on {backend}")


def _windows(n: int, bounds: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of 4096 elements at the beginning, the end and around the bounds inside."""
    for bound in (0, *bounds, n):
        start = min(max(bound - 2048, 0), max(n - 4096, 0)) // 4 * 4
        yield start, min(start + 4100, n)


def _large_noise(context: Context, backend: str, device: torch.device, elements: int) -> None:
    """One sample of bfloat16 noise; its element numbers pass 2^31."""
    n = elements + 1029
    out = torch.full((1, n), torch.nan, dtype=torch.bfloat16, device=device)
    backends.operation("randn", device, torch.float32, backend)(out, None, 3, 1, 4, 1, 0, False)
    _check_written(context, out, f"{backend}, {n} normals")
    reference = torch.ops.fastdiff_reference.randn
    for start, stop in _windows(n, (elements // 2, elements)):
        expected = torch.empty(1, stop - start, dtype=torch.bfloat16)
        reference(expected, None, 3, 1, 4, 1, start // 4, False)
        wrong = difference([out[:, start:stop].cpu()], [expected])
        context.check(wrong is None, f"{backend}, normals {start}..{stop} of {n}: {wrong}")


def _large_step(context: Context, backend: str, device: torch.device, elements: int) -> None:
    """A DDIM step of three bfloat16 samples of odd size; their offsets pass 2^31."""
    case = Case("ddim", torch.bfloat16)
    n = elements // 2 - 1
    batch = 3
    (_, _, *small), _, *rest = case.arguments((batch, 1, 1, 4), "cpu")

    def replaced(sample: Callable[[], Tensor], where: torch.device | str) -> tuple[Any, ...]:
        """The launch on one state, in place, and one model output."""
        x = sample()
        return [x, sample(), *copied(small, where)], [x], *rest

    def make() -> Tensor:
        value = torch.empty(batch, 1, 1, n, dtype=torch.bfloat16, device=device)
        return value.normal_(generator=torch.Generator(device).manual_seed(5))

    arguments = replaced(make, device)
    x, output = arguments[0][:2]
    windows = [(b, *window) for b in range(batch) for window in _windows(n, (n // 2,))]
    before = [
        (x[b, ..., i:j].clone().cpu()[None], output[b, ..., i:j].clone().cpu()[None])
        for b, i, j in windows
    ]
    launch(case, backend, arguments)
    _check_written(context, x.view(1, -1), f"{backend}, DDIM step of {batch * n} elements")
    for (b, i, j), (old, model_output) in zip(windows, before, strict=True):
        small_arguments = replaced(partial(next, iter((old, model_output))), "cpu")
        launch(case, "reference", small_arguments)
        wrong = difference([x[b, ..., i:j][None].cpu()], [small_arguments[0][0]])
        title = f"{backend}, DDIM step, elements {i}..{j} of sample {b} of {n} elements each"
        context.check(wrong is None, f"{title}: {wrong}")


def _check_written(context: Context, out: Tensor, title: str) -> None:
    unwritten = sum(int(part.isnan().sum()) for part in out.split(2**28, dim=1))
    context.check(unwritten == 0, f"{title}: {unwritten} were not written")
