"""The one sampling loop: a model, a plan, a run.

plan     what to compute (immutable, shared between threads)        fastdiff/plan.py
Run      one run's state, stepped by the caller or by the loop      fastdiff/run.py
Sampler  the loop around a model
capture  that loop as one CUDA graph                                fastdiff/capture.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import select
from fastdiff.capture import CapturedLoop
from fastdiff.noise import STREAM_INITIAL
from fastdiff.ops.call import compute_dtype, drawn_from
from fastdiff.ops.checks import check_floating, check_sample, check_shape
from fastdiff.ops.draw import randn
from fastdiff.plan import SolverPlan
from fastdiff.progress import track
from fastdiff.run import NoiseSource, Run

__all__ = ["Sampler", "StepState", "sample"]

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepState:
    """What a callback sees after a step.

    Attributes:
        index: steps done so far minus one, 0 .. steps - 1.
        steps: model calls of the plan.
        t: the model's t of this call, (B,).
        x: the sample after the step, (B, ...). Its own memory: keep it as long as you like, but
            do not write to it; to steer a run, step it yourself (Sampler.start).
        x_start: preview of the denoised sample, (B, ...), from the same pass.
    """

    index: int
    steps: int
    t: Tensor
    x: Tensor
    x_start: Tensor


class Sampler:
    """Runs a plan.

        x = Sampler(plan)(model, shape=(16, 3, 64, 64), seed=0)

    A sampler holds no per-run state: one serves any number of threads.
    """

    def __init__(self, plan: SolverPlan, *, backend: str | None = None) -> None:
        if not isinstance(plan, SolverPlan):
            raise TypeError(f"plan must be a SolverPlan, not {type(plan).__name__}")
        self.plan = plan
        self.backend = backend

    def start(
        self,
        x_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
        *,
        seed: int | Tensor | None = None,
        sample_offset: int = 0,
        generator: torch.Generator | None = None,
        noise: NoiseSource | None = None,
        guidance_scale: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        model_dtype: torch.dtype | None = None,
        noise_dtype: torch.dtype | None = None,
        preview: bool = False,
        in_place: bool = False,
        outputs_are_fresh: bool = False,
        fast: bool = False,
    ) -> Run:
        """Begins a run: from a latent, or from the initial noise of a shape.

        Args:
            x_T: starting sample, (B, ...), used as it is (not multiplied by initial_scale) and
                never written to.
            shape: (B, ...); x_T is then initial_scale times noise: stream 0 of the seed, or
                torch.randn from the generator.
            seed, sample_offset: the noise contract (fastdiff/noise.py).
            generator: draws torch.randn of x's shape and `noise_dtype` for every used draw.
            noise: function (row, draw) -> tensor of x's shape, instead.
            guidance_scale: g of classifier-free guidance, a float or (B,): the model is asked
                once for a doubled batch and o = o_uncond + g (o_cond - o_uncond)
                (Ho & Salimans 2022) happens inside the step.
            device, dtype: of a run from noise; dtype (default float32) is that of the master
                latents. With x_T, its own unless dtype is given.
            model_dtype: dtype of model_input (default: the run's): float32 latents with a bfloat16
                model input lose the least.
            noise_dtype: dtype that draws are rounded to (default: the run's).
            preview: make x_start at every step, in the same pass.
            in_place: steps overwrite the sample's memory instead of allocating.
            outputs_are_fresh: the model never writes again to an output it has returned (it
                replays no CUDA graph into the same buffer): history that is an output is then kept
                instead of copied.
            fast: approximate transcendental functions in GPU noise.
        """
        if (x_T is None) == (shape is None):
            raise ValueError("exactly one of x_T and shape must be given")
        if dtype is not None:
            check_floating("dtype", dtype)
        if x_T is not None:
            check_sample("x_T", x_T)
            if device is not None and not _same_device(torch.device(device), x_T.device):
                raise ValueError(f"x_T is on {x_T.device}, but device is {device}")
            x = x_T.to(dtype=dtype or x_T.dtype)
        else:
            x = self._initial(
                check_shape(shape), seed, sample_offset, generator, device, dtype or torch.float32,
                fast,
            )  # fmt: skip
        return Run(
            self.plan, x, seed=seed, sample_offset=sample_offset, generator=generator, noise=noise,
            guidance_scale=guidance_scale, model_dtype=model_dtype, noise_dtype=noise_dtype,
            preview=preview, in_place=in_place, outputs_are_fresh=outputs_are_fresh, fast=fast,
            backend=self.backend,
        )  # fmt: skip

    def _initial(
        self,
        shape: tuple[int, ...],
        seed: int | Tensor | None,
        sample_offset: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
        fast: bool,
    ) -> Tensor:
        if (seed is None) == (generator is None):
            raise ValueError(
                "exactly one of seed and generator must be given with shape (noise= goes with x_T)"
            )
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, not {generator!r}")
            target = torch.device(generator.device if device is None else device)
            select(target, compute_dtype(dtype), self.backend)  # before the generator moves on
            x = drawn_from(generator, shape, dtype, target)
        else:
            assert seed is not None
            x = randn(
                shape, seed, sample_offset=sample_offset, stream=STREAM_INITIAL, dtype=dtype,
                device=device or "cpu", fast=fast, backend=self.backend,
            )  # fmt: skip
        return x if self.plan.initial_scale == 1.0 else x * self.plan.initial_scale

    def __call__(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        *,
        callback: Callable[[StepState], Any] | None = None,
        progress: bool = False,
        return_trajectory: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples: the loop around the model, without gradients.

        On a GPU nothing in the loop waits for the device, and none of the steps copies to it. A
        caller's own torch.cuda.graph can hold the whole call once the same call has run before it
        (the plan's tables are then there, kernels compiled), with a number or a tensor on the
        device for seed and guidance_scale; its replays repeat these values. capture() makes a
        graph that takes new ones.

        Args:
            model: any callable (x, t) -> output, x (B, ...) or (2B, ...) with guidance, t (B,) or
                (2B,): int64 timesteps, float32 when some are not whole.
            shape or x_T: see start().
            callback: called with a StepState after every step; what it returns is ignored, an
                exception stops the run.
            progress: show a progress bar on stderr.
            return_trajectory: also return (R + 1, B, ...): x_T and x after every step.
            **options: seed, generator, guidance_scale, dtype ... of start().
        """
        if not callable(model):
            raise TypeError(f"model must be callable, not {type(model).__name__}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        if "preview" in options or "in_place" in options:
            raise TypeError("preview and in_place are the loop's own; use start() to step yourself")
        if self.plan.inputs:
            names = ", ".join(self.plan.inputs)
            raise ValueError(
                f"plan takes inputs at every call ({names}); use start() to step yourself"
            )
        with torch.no_grad():
            run = self.start(
                x_T, shape, preview=callback is not None, in_place=callback is None, **options
            )
            trajectory = [run.x.clone()] if return_trajectory else []
            for i in track(range(self.plan.rows), self.plan.name, enabled=progress):
                t = run.t
                x = run.step(model(run.model_input, t))
                if return_trajectory:
                    trajectory.append(x.clone())
                if callback is not None:
                    assert run.x_start is not None
                    callback(StepState(i, self.plan.rows, t[: x.shape[0]], x, run.x_start))
            return (run.x, torch.stack(trajectory)) if return_trajectory else run.x

    def capture(self, model: Model, shape: Sequence[int], **options: Any) -> CapturedLoop:
        """The whole loop (model calls and steps) as one CUDA graph, to be replayed.

            loop = Sampler(plan).capture(model, (16, 4, 64, 64), device="cuda", guidance_scale=7.5)
            x = loop(seed=0)
            y = loop(seed=1, guidance_scale=3.0, plan=another)

        A replay takes a new seed, sample_offset, guidance scale, x_T and plan of the same
        structure; its result is that of sample() with these arguments, bit for bit. The model runs
        three times through the plan first, two of them to warm up; it must do the same work at
        every call, in memory that it keeps. On a CPU, or with graph=False, the loop runs eagerly.

        Args:
            model: as in __call__; torch.compile may have made it, but not with CUDA graphs.
            shape: (B, ...).
            device, dtype, guidance_scale, model_dtype, noise_dtype, outputs_are_fresh, fast: as
                in start(). The loop is guided if guidance_scale is given here, which is then its
                default; a (B,) tensor makes room for a scale per sample.
            graph: False does not capture; True insists; None captures on CUDA devices.

        Raises:
            ValueError, TypeError: as start() does; for a plan with inputs.
            RuntimeError: the model cannot be captured.
        """
        for name in ("generator", "noise"):
            if name in options:
                raise TypeError(f"{name} cannot be captured: give a seed when the loop is called")
        return CapturedLoop(self.plan, model, shape, backend=self.backend, **options)


def _same_device(wanted: torch.device, actual: torch.device) -> bool:
    """Whether a tensor's device is the one asked for; "cuda" means any of them."""
    return wanted.type == actual.type and wanted.index in (None, actual.index)


def sample(
    model: Model,
    plan: SolverPlan,
    shape: Sequence[int] | None = None,
    x_T: Tensor | None = None,
    *,
    backend: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples a model with a plan: `Sampler(plan, backend=backend)(model, shape, ...)`.

        x = fastdiff.sample(model, plan, shape=(16, 3, 64, 64), seed=0)

    All options and errors are those of Sampler.start and Sampler.__call__.
    """
    return Sampler(plan, backend=backend)(model, shape, x_T, **options)
