"""One run's state: the sample, its history, the row index and the source of noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.noise import sample_keys
from fastdiff.ops.call import (
    call_step,
    compute_dtype,
    differentiated,
    drawn_from,
    row_major,
    written,
)
from fastdiff.ops.checks import FLOATING, check_floating, check_like, check_sample, resolve_seed
from fastdiff.ops.step import HEADER
from fastdiff.plan import SolverPlan
from fastdiff.schedules._values import as_float

__all__ = ["NoiseSource", "Run"]

NoiseSource = Callable[[int, int], Tensor]


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
        if not isinstance(plan, SolverPlan):
            raise TypeError(f"plan must be a SolverPlan, not {type(plan).__name__}")
        check_sample("x", x)
        # The run's own memory: steps may overwrite it, and a model its input, which can be it.
        x = x.clone(memory_format=torch.contiguous_format)
        self.plan = plan
        self.preview = preview
        self.index = 0
        self.x_start: Tensor | None = None
        self._backend = backend
        self._in_place = in_place
        batch, device = x.shape[0], x.device
        compute = compute_dtype(x.dtype)
        model_dtype, noise_dtype = model_dtype or x.dtype, noise_dtype or x.dtype
        for name, dtype in (("model_dtype", model_dtype), ("noise_dtype", noise_dtype)):
            check_floating(name, dtype)
        if (model_dtype == torch.float64) != (compute == torch.float64):
            raise TypeError(
                f"model_dtype is {model_dtype} and x is {x.dtype}: float64 does not mix with "
                "other dtypes"
            )
        if plan.learned and x.dim() < 2:
            raise ValueError("x must be (B, C, ...): a learned variance doubles the channels")
        if noise is not None and not callable(noise):
            raise TypeError(f"noise must be a function, not {type(noise).__name__}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
        given = [source for source in (seed, generator, noise) if source is not None]
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
        self._generator, self._noise, self._noise_dtype = generator, noise, noise_dtype
        self._guidance = _check_guidance(guidance_scale, batch, device)

        self._operation = operation("step", device, compute, backend)
        self._spec = plan.spec(noise_dtype, preview, fast)
        self._encoded = self._spec.encoded
        self._device_plan = plan.on(device, compute, preview)
        copies = 1 if self._guidance is None else 2
        # The run's own t, which a model may change without harm to the plan's.
        self._times = self._device_plan.t[:, None].repeat(1, copies * batch)
        self._batch = batch
        self._output_shape = (copies * batch, *x.shape[1:])
        if plan.learned:
            self._output_shape = (copies * batch, 2 * x.shape[1], *x.shape[2:])
        # Histories start as zeros that no row reads before it has been written.
        self._states = [x, *(torch.zeros_like(x) for _ in range(plan.states - 1))]
        trivial = plan.first_c_in == 1.0 and (plan.c_in is None or bool((plan.c_in == 1.0).all()))
        self._input: Tensor | None = None
        if not (trivial and copies == 1 and model_dtype == x.dtype):
            first = (x.to(compute) * plan.first_c_in).to(model_dtype)
            self._input = torch.cat([first] * copies) if copies > 1 else first

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
        self._check_output(output)
        halves = [output] if self._guidance is None else list(output.split(self._batch))
        noise = self._draw(i)
        device_plan, spec = self._device_plan, self._spec
        changing = self.plan.changing
        scales = [] if self._guidance is None else [self._guidance]
        if differentiated(self._states, halves, noise, scales):
            results = call_step(
                self._states, spec, device_plan.table, device_plan.rows[i], model_outputs=halves,
                noise=noise, keys=self._keys, draws=device_plan.draws,
                guidance_scale=self._guidance, backend=self._backend,
                out_dtypes=[x.dtype] * len(spec.outputs),
            )  # fmt: skip
            if self._input is not None:
                c_in = device_plan.table[i, HEADER.index("c_in")]
                scaled = (c_in * results[0].to(c_in.dtype)).to(self._input.dtype)
                self._input = torch.cat([scaled] * (self._input.shape[0] // self._batch))
        else:
            results = [self._states[k] if self._in_place else row_major(x) for k in changing]
            if self.preview:
                results.append(row_major(x))
            self._operation(
                self._states, [h.contiguous() for h in halves], noise, device_plan.table,
                device_plan.rows[i], self._keys, device_plan.draws, self._guidance, None,
                self._encoded, _NO_COUNTER, results, self._input,
            )  # fmt: skip
            if self._in_place:
                written(results)
            if self._input is not None:
                written([self._input])
        for k, result in zip(changing, results, strict=False):
            self._states[k] = result
        if self.preview:
            self.x_start = results[-1]
        self.index = i + 1
        return self._states[0]

    def _check_output(self, output: Tensor) -> None:
        x = self._states[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"output must be a torch.Tensor, not {type(output).__name__}")
        if output.shape != self._output_shape:
            raise ValueError(
                f"output must have shape {tuple(self._output_shape)}, not {tuple(output.shape)}"
            )
        if output.device != x.device:
            raise ValueError(f"output is on {output.device}, but the run is on {x.device}")
        double = x.dtype == torch.float64
        if output.dtype not in FLOATING or (output.dtype == torch.float64) != double:
            raise TypeError(f"output is {output.dtype}, which does not go with x of {x.dtype}")

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
                drawn = drawn_from(self._generator, x.shape, self._noise_dtype, x.device)
                tensors.append(drawn)
            else:
                assert self._noise is not None
                drawn = self._noise(row, k)
                check_like(f"noise({row}, {k})", drawn, "x", x)
                tensors.append(drawn.contiguous())
        return tensors


_NO_COUNTER = [0, 0, 0, 0]


def _check_guidance(
    guidance_scale: float | Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """float32 (1,) or (B,) of the run's own, on the device."""
    if guidance_scale is None:
        return None
    if isinstance(guidance_scale, Tensor):
        scale = guidance_scale.to(torch.float32).reshape(-1)
    else:
        scale = torch.tensor([as_float("guidance_scale", guidance_scale)], device="cpu")
        scale = scale.to(torch.float32)
    if scale.numel() not in (1, batch):
        raise ValueError(
            f"guidance_scale must be a number or have shape ({batch},), not {tuple(scale.shape)}"
        )
    if scale.device.type == "cpu" and not bool(torch.isfinite(scale).all()):
        raise ValueError(f"guidance_scale must be finite, not {guidance_scale}")
    return scale.to(device).clone(memory_format=torch.contiguous_format)
