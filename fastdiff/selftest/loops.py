"""Whole loops on the device: launches and waiting of a step, captured graphs, end to end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.profiling.agreement import difference
from fastdiff.selftest.part import Context

__all__ = ["captured", "end_to_end", "loops", "steps"]

SHAPE = (4, 4, 32, 32)
# Work on the GPU that no step should cause: PyTorch's kernels and copies.
_FOREIGN = ("at::", "cub::", "Memcpy", "Memset")


def _model(x: Tensor, t: Tensor) -> Tensor:
    """A model that no graph minds: no reads, no waiting."""
    return torch.sin(1.7 * x + 1e-3 * t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype))


def _sample(plan: fd.SolverPlan, **options: Any) -> Tensor:
    x = fd.sample(_model, plan, SHAPE, **options)
    assert isinstance(x, Tensor)  # no trajectory was asked for
    return x


def _plans() -> dict[str, tuple[fd.SolverPlan, float | None]]:
    """Samplers by name, with a guidance scale."""
    schedule = fd.schedules.linear(1000)
    return {
        "DDIM": (fd.solvers.ddim(schedule, 10, clip=None), None),
        "DDPM, clipped": (fd.solvers.ddpm(schedule, 10, clip=(-1, 1)), None),
        "DPM-Solver++(2M), guided": (fd.solvers.dpm_solver(schedule, 10), 7.5),
        "UniPC, guided": (fd.solvers.unipc(schedule, 10), 7.5),
    }


def _without_gpu(context: Context) -> bool:
    if context.device == "cuda" and not torch.cuda.is_available():
        context.skip("PyTorch finds no GPU")
        return True
    return False


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _waiting_raises(device: str) -> Iterator[None]:
    """Within the block an operation that waits for the GPU raises."""
    if device != "cuda":
        yield
        return
    _wait(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loops(context: Context) -> None:
    """`steps` and `captured` in one process."""
    torch.set_num_threads(1)  # tiny tensors
    steps(context)
    captured(context)


# What a step does


def steps(context: Context) -> None:
    """A warm loop waits for nothing, and its every step is one launch of ours and nothing else."""
    if _without_gpu(context):
        return
    counted = {}
    for name, (plan, guidance) in _plans().items():
        options: dict[str, Any] = {
            "seed": 0, "device": context.device, "guidance_scale": guidance,
        }  # fmt: skip
        _sample(plan, **options)  # compiles, uploads
        expected = _sample(plan, **options)
        try:
            with _waiting_raises(context.device):
                again = _sample(plan, **options)
        except RuntimeError as error:
            context.check(False, f"{name}: the warm loop waits for the GPU: {error}")
            continue
        context.check(torch.equal(again, expected), f"{name}: two runs of one seed differ")
        run = fd.Sampler(plan).start(
            shape=SHAPE, seed=0, device=context.device, guidance_scale=guidance, in_place=True
        )
        output = _model(run.model_input, run.t)

        def take_steps(run: fd.Run = run, output: Tensor = output) -> None:
            while not run.done:
                _ = run.t, run.model_input
                run.step(output)

        ours, others = _launches(take_steps, context.device)
        counted[name] = {"steps": plan.rows, "ours": len(ours), "others": others}
        if not ours and not others:
            context.note(f"{name}: the profiler sees no launches here, so none were counted")
            continue
        context.check(
            len(ours) == plan.rows,
            f"{name}: {len(ours)} launches in {plan.rows} steps, not one each",
        )
        context.check(not others, f"{name}: beside its launches a loop runs {others[:3]}")
    context.data["launches"] = counted
    if counted and not context.failures:
        context.note(f"no waiting, one launch a step: {'; '.join(counted)}")


def _launches(call: Callable[[], None], device: str) -> tuple[list[str], list[str]]:
    """Names of our launches, and of the device's other work, while `call` runs."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    _wait(device)
    with profile(activities=activities) as profiler:
        call()
        _wait(device)
    events = profiler.events() or []
    if device != "cuda":
        return [e.name for e in events if e.name.startswith("fastdiff_")], []
    names = [e.name for e in events if e.device_type == DeviceType.CUDA]
    others = [name for name in names if any(word in name for word in _FOREIGN)]
    # What is left that is no kernel is the profiler's own.
    return [name for name in names if name not in others and "_kernel" in name], others


# Captured loops


def captured(context: Context) -> None:
    """A captured loop against the ordinary one: new seeds, guidance, plans; time of a step.

    Options: timed, true unless given.
    """
    if _without_gpu(context):
        return
    other_schedule = fd.schedules.cosine(1000)
    figures = {}
    for name, (plan, guidance) in _plans().items():
        if context.left < 5:
            context.note(f"the time ran out before {name}")
            break
        loop = fd.Sampler(plan).capture(
            _model, SHAPE, device=context.device, guidance_scale=guidance
        )
        calls: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1, "sample_offset": 3}]
        if guidance is not None:
            calls.append({"seed": 2, "guidance_scale": 2.0})
        if name.startswith("DDIM"):
            calls.append({"seed": 3, "plan": fd.solvers.ddim(other_schedule, 10, clip=None)})
        if name.startswith("DDPM"):
            calls.append({"seed": 3, "plan": fd.solvers.ddpm(other_schedule, 10, clip=(-1, 1))})
        for call in calls:
            options = {"guidance_scale": guidance, "device": context.device, **call}
            wanted_plan = options.pop("plan", plan)
            expected = _sample(wanted_plan, **options)
            wrong = difference([loop(**call)], [expected])
            values = ", ".join(f"{k} {getattr(v, 'name', v)}" for k, v in call.items())
            context.check(wrong is None, f"{name}, {values}: {wrong}")
        if not context.options.get("timed", True):
            continue
        seconds = {
            "eager": _seconds(
                partial(_sample, plan, seed=0, device=context.device, guidance_scale=guidance),
                context.device,
            ),
            "captured": _seconds(partial(loop, seed=0, clone=False), context.device),
        }
        figures[name] = {key: value / plan.rows * 1e6 for key, value in seconds.items()}
        context.note(
            f"{name}: {figures[name]['eager']:.1f} us a step, model included; captured "
            f"{figures[name]['captured']:.1f}"
        )
    context.data["us_per_step"] = figures


def _seconds(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Median seconds from the call to the device being done."""
    call()
    times = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


# End to end


def end_to_end(context: Context) -> None:
    """The shipped model sampled as people do, and the loop's own time around a trivial model."""
    if _without_gpu(context):
        return
    _overhead(context)
    _digits(context)


def _overhead(context: Context) -> None:
    rows = int(context.options.get("steps", 50))
    schedule = fd.schedules.linear(1000)
    shape = (1, 1, 2, 2)
    plan = fd.solvers.ddim(schedule, rows, clip=None)
    alphas = schedule.alphas_cumprod[:: 1000 // rows][::-1][:rows]
    output = torch.zeros(shape, device=context.device)

    def ours() -> None:
        fd.sample(lambda x, t: output, plan, shape, seed=0, device=context.device)

    def plain() -> None:
        """DDIM as it is usually written: an operation at a time, scalars from a table."""
        x = torch.randn(shape, device=context.device)
        for i in range(rows):
            now = float(alphas[i])
            after = float(alphas[i + 1]) if i + 1 < rows else 1.0
            x_start = (x - (1 - now) ** 0.5 * output) / now**0.5
            x = after**0.5 * x_start + (1 - after) ** 0.5 * output

    loop = fd.Sampler(plan).capture(lambda x, t: output, shape, device=context.device)
    found = {
        name: _seconds(call, context.device) / rows * 1e6
        for name, call in (
            ("fastdiff", ours),
            ("captured", lambda: loop(seed=0, clone=False)),
            ("an operation at a time", plain),
        )
    }
    context.data["loop_us_per_step"] = found
    text = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    context.note(f"loop around a trivial model, 2x2 pixels, us a step: {text}")


def _digits(context: Context) -> None:
    from fastdiff.models import digits
    from fastdiff.models.unet import UNet, UNetConfig

    count = int(context.options.get("count", 16))
    rows = int(context.options.get("steps", 50))
    try:
        model = digits.load(digits.WEIGHTS, context.device)
        which = "the shipped digits model"
    except ImportError:
        model = UNet(UNetConfig()).to(context.device).eval()
        which = "a model of the shipped one's size (safetensors is not installed)"
    labels = torch.arange(digits.CLASSES, device=context.device).repeat_interleave(count)
    denoise = digits.conditional(model, labels)
    plan = fd.solvers.ddim(digits.schedule(), rows, clip=(-1, 1))
    shape = (len(labels), *digits.SHAPE)
    options: dict[str, Any] = {"device": context.device, "guidance_scale": digits.GUIDANCE_SCALE}

    def sample(seed: int = 0) -> Tensor:
        x = fd.sample(denoise, plan, shape, seed=seed, **options)
        assert isinstance(x, Tensor)
        return x

    with torch.no_grad():
        loop = fd.Sampler(plan).capture(denoise, shape, **options)
        first, second = sample(1), loop(seed=1)
        # Convolutions may choose another algorithm in a graph; the samples stay close.
        gap = float((first - second).abs().mean())
        context.check(gap < 0.05, f"captured samples are {gap:.3g} away from the others, in mean")
        context.check(
            bool(first.isfinite().all()) and float(first.abs().max()) <= 1.5,
            f"samples reach {float(first.abs().max()):.3g}; pixels are in [-1, 1]",
        )
        found = {
            "eager": _seconds(sample, context.device, 5),
            "captured": _seconds(lambda: loop(seed=0, clone=False), context.device, 5),
        }
    context.data["digits"] = {"pictures": len(labels), "steps": rows, "seconds": found, "gap": gap}
    rates = ", ".join(f"{k} {len(labels) / v:.0f} pictures/s" for k, v in found.items())
    context.note(f"{which}, {rows} DDIM steps with guidance, {len(labels)} at once: {rates}")
