"""The one sampling loop: a model, a plan, a run.

plan    what to compute (immutable, shared between threads)        fastdiff/plan.py
Run     one run's state: x, history, row index, noise source
Sampler the loop around a model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.noise import STREAM_INITIAL, sample_keys
from fastdiff.ops.call import call_step, compute_dtype
from fastdiff.ops.checks import FLOATING, check_like, check_sample, resolve_seed
from fastdiff.ops.draw import randn
from fastdiff.plan import SolverPlan
from fastdiff.progress import track

__all__ = ["Run", "Sampler", "StepState", "sample"]

Model = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class StepState:
    """What a callback sees after a step.

    Attributes:
        index: steps done so far minus one, 0 .. steps - 1.
        steps: model calls of the plan.
        t: the model's t of this call, (B,).
        x: the sample after the step, (B, ...). Its own memory: keep it as long as you like.
        x_start: preview of the denoised sample, (B, ...), from the same pass.
    """

    index: int
    steps: int
    t: Tensor
    x: Tensor
    x_start: Tensor


class Run:
    """One run of a plan, stepped by the caller.

        run = Sampler(plan).start(x_T, seed=0)
        while not run.done:
            x = run.step(model(run.model_input, run.t))

    Attributes:
        x: the sample S0, (B, ...), in the run's dtype.
        t: the model's t for the coming call: (B,), or (2B,) with guidance.
        model_input: what the model takes at the coming call: c_in * x in the model's dtype, twice
            along the batch with guidance (unconditional half first).
        index: row of the coming call; `done` when all rows have run.
        x_start: the denoised preview of the last step when started with preview=True.
    """

    def __init__(
        self,
        plan: SolverPlan,
        x: Tensor,
        *,
        seed: int | Tensor | None = None,
        sample_offset: int = 0,
        generator: torch.Generator | None = None,
        noise: NoiseSource | None = None,
        guidance_scale: float | Tensor | None = None,
        model_dtype: torch.dtype | None = None,
        noise_dtype: torch.dtype | None = None,
        preview: bool = False,
        in_place: bool = False,
        fast: bool = False,
        backend: str | None = None,
    ) -> None:
        self.plan = plan
        self.preview = preview
        self.index = 0
        self.x_start: Tensor | None = None
        self._backend = backend
        self._in_place = in_place
        batch, device = x.shape[0], x.device
        compute = compute_dtype(x.dtype)
        if noise_dtype is not None and noise_dtype not in FLOATING:
            raise TypeError(f"noise_dtype must be floating, not {noise_dtype}")
        if model_dtype is not None and model_dtype not in FLOATING:
            raise TypeError(f"model_dtype must be floating, not {model_dtype}")
        self._noise_dtype = noise_dtype or x.dtype
        self._spec = plan.spec(self._noise_dtype, preview, fast)
        self._encoded = self._spec.encoded
        self._device_plan = plan.on(device, compute, preview)
        self._operation = operation("step", device, compute, backend)

        given = [s for s in (seed, generator, noise) if s is not None]
        needs_noise = bool(plan.draws_noise.any())
        if len(given) > 1 or (needs_noise and not given):
            raise ValueError(
                "exactly one of seed, generator and noise must be given"
                + (" (this plan draws noise)" if needs_noise else "")
            )
        self._keys: Tensor | None = None
        if seed is not None or not given:
            resolved = resolve_seed(0 if seed is None else seed, sample_offset, batch, device)
            self._keys = sample_keys(*resolved, batch, device)
        self._generator, self._noise = generator, noise

        self._guidance: Tensor | None = None
        if guidance_scale is not None:
            scale = torch.as_tensor(guidance_scale, dtype=torch.float32).reshape(-1)
            if scale.numel() not in (1, batch):
                raise ValueError(
                    f"guidance_scale must be a number or have shape ({batch},), "
                    f"not {tuple(scale.shape)}"
                )
            if scale.device.type == "cpu" and not bool(torch.isfinite(scale).all()):
                raise ValueError(f"guidance_scale must be finite, not {guidance_scale}")
            self._guidance = scale.to(device)
        copies = 1 if self._guidance is None else 2

        # Histories start as zeros that no row reads before it has been written.
        self._states = [x, *(torch.zeros_like(x) for _ in range(plan.states - 1))]
        model_dtype = model_dtype or x.dtype
        self._output_shape = (copies * batch, *x.shape[1:])
        if plan.learned:
            if x.dim() < 2:
                raise ValueError("x must be (B, C, ...): a learned variance doubles the channels")
            self._output_shape = (copies * batch, 2 * x.shape[1], *x.shape[2:])
        self._batch = batch
        times = self._device_plan.t[:, None].expand(plan.rows, copies * batch)
        self._times = times.unbind(0)
        trivial = plan.first_c_in == 1.0 and (plan.c_in is None or bool((plan.c_in == 1.0).all()))
        self._input: Tensor | None = None
        if not (trivial and copies == 1 and model_dtype == x.dtype):
            first = (x.to(compute) * plan.first_c_in).to(model_dtype)
            self._input = torch.cat([first] * copies) if copies > 1 else first.clone()

    @property
    def x(self) -> Tensor:
        return self._states[0]

    @property
    def done(self) -> bool:
        return self.index >= self.plan.rows

    @property
    def t(self) -> Tensor:
        if self.done:
            raise ValueError(f"the run is done: all {self.plan.rows} model calls have been stepped")
        return self._times[self.index]

    @property
    def model_input(self) -> Tensor:
        return self.x if self._input is None else self._input

    def step(self, output: Tensor) -> Tensor:
        """Advances by one model call and returns the new sample.

        Args:
            output: the model's output for (model_input, t): (B, ...), (2B, ...) with guidance
                (unconditional half first), with twice the channels when the variance is learned.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device, or the run is done; the run's
                state is unharmed.
        """
        i = self.index
        if i >= self.plan.rows:
            raise ValueError(f"the run is done: all {self.plan.rows} model calls have been stepped")
        x = self._states[0]
        if output.shape != self._output_shape:
            raise ValueError(
                f"output must have shape {tuple(self._output_shape)}, not {tuple(output.shape)}"
            )
        if output.device != x.device:
            raise ValueError(f"output is on {output.device}, but the run is on {x.device}")
        if (output.dtype == torch.float64) != (x.dtype == torch.float64) \
                or output.dtype not in FLOATING:  # fmt: skip
            raise TypeError(f"output is {output.dtype}, which does not go with x of {x.dtype}")
        halves = [output] if self._guidance is None else list(output.split(self._batch))
        noise = self._draw(i)
        device_plan, spec = self._device_plan, self._spec
        changing = self.plan.changing
        if torch.is_grad_enabled() and (output.requires_grad or x.requires_grad):
            results = call_step(
                self._states, spec, device_plan.table, device_plan.rows[i], model_outputs=halves,
                noise=noise, keys=self._keys, draws=device_plan.draws,
                guidance_scale=self._guidance, backend=self._backend,
                out_dtypes=[x.dtype] * len(spec.outputs),
            )  # fmt: skip
            if self._input is not None:
                scale = 1.0 if self.plan.c_in is None else float(self.plan.c_in[i])
                scaled = (results[0] * scale).to(self._input.dtype)
                self._input = torch.cat([scaled] * (self._input.shape[0] // self._batch))
        else:
            results = [
                self._states[k]
                if self._in_place
                else torch.empty_like(x, memory_format=torch.contiguous_format)
                for k in changing
            ]
            if self.preview:
                results.append(torch.empty_like(x, memory_format=torch.contiguous_format))
            self._operation(
                self._states, [h.contiguous() for h in halves], noise, device_plan.table,
                device_plan.rows[i], self._keys, device_plan.draws, self._guidance, None,
                self._encoded, _NO_COUNTER, results, self._input,
            )  # fmt: skip
        for k, result in zip(changing, results, strict=False):
            self._states[k] = result
        if self.preview:
            self.x_start = results[-1]
        self.index = i + 1
        return self._states[0]

    def _draw(self, row: int) -> list[Tensor]:
        """Noise tensors of a row, or none when the step makes its own."""
        if self._keys is not None:
            return []
        x = self._states[0]
        tensors = []
        for k in range(self.plan.n_draws):
            if not self.plan.draws_noise[row, k]:
                tensors.append(x)  # has a zero coefficient: never read
            elif self._generator is not None:
                tensors.append(
                    torch.randn(
                        x.shape, dtype=self._noise_dtype, device=self._generator.device,
                        generator=self._generator,
                    ).to(x.device)
                )  # fmt: skip
            else:
                assert self._noise is not None
                drawn = self._noise(row, k)
                check_like(f"noise({row}, {k})", drawn, "x", x)
                tensors.append(drawn.contiguous())
        return tensors


_NO_COUNTER = [0, 0, 0, 0]


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
            fast: approximate transcendental functions in GPU noise.
        """
        if (x_T is None) == (shape is None):
            raise ValueError("exactly one of x_T and shape must be given")
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"dtype must be floating, not {dtype}")
        if x_T is not None:
            check_sample("x_T", x_T)
            if device is not None and torch.device(device) != x_T.device:
                raise ValueError(f"x_T is on {x_T.device}, but device is {device}")
            x = x_T.to(dtype=dtype or x_T.dtype, memory_format=torch.contiguous_format)
            if in_place and x is x_T:
                x = x.clone()
        else:
            assert shape is not None
            x = self._initial(shape, seed, sample_offset, generator, device, dtype or torch.float32,
                              fast)  # fmt: skip
        return Run(
            self.plan, x, seed=seed, sample_offset=sample_offset, generator=generator, noise=noise,
            guidance_scale=guidance_scale, model_dtype=model_dtype, noise_dtype=noise_dtype,
            preview=preview, in_place=in_place, fast=fast, backend=self.backend,
        )  # fmt: skip

    def _initial(
        self,
        shape: Sequence[int],
        seed: int | Tensor | None,
        sample_offset: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
        fast: bool,
    ) -> Tensor:
        if len(shape) == 0 or any(int(size) < 0 for size in shape) or int(shape[0]) < 1:
            raise ValueError(f"shape must be (B, ...) with B >= 1, not {tuple(shape)}")
        if (seed is None) == (generator is None):
            raise ValueError("exactly one of seed and generator must be given with shape")
        if generator is not None:
            target = generator.device if device is None else device
            x = torch.randn(
                tuple(shape), dtype=dtype, device=generator.device, generator=generator
            ).to(target)
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
        if "preview" in options or "in_place" in options:
            raise TypeError("preview and in_place are the loop's own; use start() to step yourself")
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
