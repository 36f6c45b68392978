"""One run's state: the sample, its history, the row index and the source of noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import operation
from fastdiff.density import check_has_density, density_spec, density_table
from fastdiff.noise import STREAM_STEP_SECOND, sample_keys
from fastdiff.ops.call import (
    call_step,
    compute_dtype,
    differentiated,
    drawn_from,
    written,
)
from fastdiff.ops.call_loss import call_loss
from fastdiff.ops.checks import FLOATING, check_floating, check_like, check_sample, resolve_seed
from fastdiff.ops.corrector import corrector_table, seeded_draws
from fastdiff.ops.quantile import threshold_of
from fastdiff.ops.step import HEADER
from fastdiff.plan import SolverPlan
from fastdiff.program import (
    START_CHURN,
    Mode,
    RowCall,
    check_not_capturing,
    scales_input,
    start_spec,
)
from fastdiff.schedules._values import as_float

__all__ = ["NoiseSource", "Run", "drawn_dtype", "guidance_tensor"]

NoiseSource = Callable[[int, int], Tensor]
States = list[Any]  # tensors, None where a state is not held


class Run:
    """One run of a plan, stepped by the caller.

        run = Sampler(plan).start(x_T, seed=0)
        while not run.done:
            x = run.step(model(run.model_input, run.t))

    Attributes:
        x: the sample S0, (B, ...), in the run's dtype. Assign to it to change what the model sees
            next; the run keeps a copy.
        history: the memory of the states beside x, in the plan's order; None where there is none
            (yet). What no later row reads (print(plan)), or no row has written yet, is spare.
        t: the model's t for the coming call: (B,), or (2B,) with guidance.
        model_input: what the model takes at the coming call: c_in * x in the model's dtype, twice
            along the batch with guidance (unconditional half first). Memory of the run, which the
            next step may overwrite: clone what you keep.
        index: row of the coming call; `done` when all rows have run.
        x_start: the denoised preview of the last step when started with preview=True.
        log_prob: the log-density (B,) of the last step when it was asked for, else None.
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
        outputs_are_fresh: bool = False,
        borrow: bool = False,
        dtype: torch.dtype | None = None,
        fast: bool = False,
        backend: str | None = None,
    ) -> None:
        """See Sampler.start. With borrow=True the sample stays the caller's: x is not copied, every
        step is given the sample to start from, and neither is kept or written to; `dtype` is then
        that of the history and, unless a step says otherwise, of the results."""
        if not isinstance(plan, SolverPlan):
            raise TypeError(f"plan must be a SolverPlan, not {type(plan).__name__}")
        check_sample("x", x)
        if not borrow:
            # The run's own memory: steps may overwrite it, and a model its input, which can be it.
            x = x.clone(memory_format=torch.contiguous_format)
        self.plan = plan
        self.index = 0
        self.x_start: Tensor | None = None
        self.log_prob: Tensor | None = None
        self._preview, self._borrow, self._backend = preview, borrow, backend
        batch, device = x.shape[0], x.device
        self._dtype = (dtype if borrow else None) or x.dtype
        compute = compute_dtype(self._dtype)
        model_dtype = model_dtype or x.dtype
        for name, dtype in (("model_dtype", model_dtype), ("noise_dtype", noise_dtype or x.dtype)):
            check_floating(name, dtype)
        if (model_dtype == torch.float64) != (compute == torch.float64):
            raise TypeError(
                f"model_dtype is {model_dtype} and x is {x.dtype}: float64 does not mix with "
                "other dtypes"
            )
        if plan.learned and x.dim() < 2:
            raise ValueError("x must be (B, C, ...): a learned variance doubles the channels")
        self._take_noise(x, seed, sample_offset, generator, noise, noise_dtype)
        self._guidance = guidance_tensor(guidance_scale, batch, device)

        self._operation = operation("step", device, compute, backend)
        copies = 1 if self._guidance is None else 2
        mode = Mode(preview, in_place, not borrow, outputs_are_fresh and copies == 1)
        self._mode = mode
        program = plan.program(mode)
        self._calls = program.calls
        self._specs = [v.spec(plan, self._noise_dtype, fast) for v in program.variants]
        self._clamped_specs = [
            None if v.clamp is None else v.clamped_spec(plan, self._noise_dtype)
            for v in program.variants
        ]
        self._layouts: dict[tuple[int, int, bool], str] = {}
        self._tables = plan.on(device, compute, mode)
        # The run's own t, which a model may change without harm to the plan's.
        self._times = self._tables.t[:, None].repeat(1, copies * batch)
        self._t = self._times.unbind()
        self._batch, self._device = batch, device
        self._output_shape = torch.Size((copies * batch, *x.shape[1:]))
        if plan.learned:
            self._output_shape = torch.Size((copies * batch, 2 * x.shape[1], *x.shape[2:]))
        self._states: States = [x, *[None] * (plan.states - 1)]
        for k in program.spare:
            self._states[k] = torch.empty_like(x)
        if plan.first_churn:
            self._churn(fast)
        elif plan.first_drawn and generator is not None:
            drawn_from(generator, x.shape, self._noise_dtype, x.device)
        self._input: Tensor | None = None
        if scales_input(plan) or copies == 2 or model_dtype != x.dtype:
            self._input = self._scaled_input(model_dtype, copies)

    def _scaled_input(self, dtype: torch.dtype, copies: int) -> Tensor:
        """What the model takes for the sample as it is: c_in * x, once or twice."""
        plan, i = self.plan, self.index
        c_in = 1.0 if plan.c_in is None or i == 0 else float(plan.c_in[i - 1])
        scale = plan.first_c_in if i == 0 else c_in
        scaled = (self.x.to(compute_dtype(self._dtype)) * scale).to(dtype)
        return torch.cat([scaled] * copies) if copies > 1 else scaled

    def _take_noise(
        self,
        x: Tensor,
        seed: int | Tensor | None,
        sample_offset: int,
        generator: torch.Generator | None,
        noise: NoiseSource | None,
        noise_dtype: torch.dtype | None,
    ) -> None:
        if noise is not None and not callable(noise):
            raise TypeError(f"noise must be a function, not {type(noise).__name__}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
        given = [source for source in (seed, generator, noise) if source is not None]
        needs_noise = bool(self.plan.draws_noise.any() or self.plan.first_churn)
        if len(given) > 1 or (needs_noise and not given):
            raise ValueError(
                "exactly one of seed, generator and noise must be given"
                + (" (this plan draws noise)" if needs_noise else "")
            )
        self._keys: Tensor | None = None
        if seed is not None or not given:
            batch, device = x.shape[0], x.device
            if isinstance(seed, Tensor) and seed.device != device:
                check_not_capturing("give seed as an int or a tensor there", device)
            resolved = resolve_seed(0 if seed is None else seed, sample_offset, batch, device)
            self._keys = sample_keys(*resolved, batch, device)
        self._generator, self._noise = generator, noise
        self._noise_dtype = drawn_dtype(self.plan, noise_dtype, x.dtype)
        self._as_output = noise_dtype is None and self.plan.draw_dtype == "model_output"

    def _churn(self, fast: bool) -> None:
        """x + first_churn z, what the first call of a churned sampler starts from."""
        x = self.x
        noise = []
        if self._generator is not None:
            noise = [drawn_from(self._generator, x.shape, self._noise_dtype, x.device)]
        elif self._noise is not None:
            noise = [self._noise(-1, 0)]
            check_like("noise(-1, 0)", noise[0], "x", x)
        self._states[:1] = call_step(
            [x], start_spec(self._noise_dtype, fast), self._tables.start[START_CHURN:],
            self._tables.rows[0], noise=noise, keys=self._keys,
            counter=(0, 0, 0, STREAM_STEP_SECOND), backend=self._backend,
        )  # fmt: skip

    @property
    def x(self) -> Tensor:
        x: Tensor = self._states[0]
        return x

    @x.setter
    def x(self, value: Tensor) -> None:
        """Changes the sample before the model sees it (a mask of inpainting, a projection)."""
        check_like("x", value, "the run's x", self.x)
        self._states = [value.clone(memory_format=torch.contiguous_format), *self._states[1:]]
        if self._input is not None:
            copies = self._input.shape[0] // self._batch
            self._input = self._scaled_input(self._input.dtype, copies)

    @property
    def history(self) -> list[Tensor | None]:
        return self._states[1:]

    @property
    def done(self) -> bool:
        return self.index >= len(self._calls)

    @property
    def t(self) -> Tensor:
        if self.done:
            raise ValueError(f"the run is done: all {self.plan.rows} model calls have been stepped")
        return self._t[self.index]

    @property
    def model_input(self) -> Tensor:
        return self.x if self._input is None else self._input

    def renew_input(self) -> None:
        """The coming step leaves the next model input in new memory: the last stays as it is."""
        if self._input is not None:
            self._input = torch.empty_like(self._input)

    def step(
        self,
        output: Tensor,
        x: Tensor | None = None,
        *,
        noise: Sequence[Tensor] | None = None,
        result_dtype: torch.dtype | None = None,
        preview_dtype: torch.dtype | None = None,
        log_prob: bool = False,
        **inputs: Tensor,
    ) -> Tensor:
        """Advances by one model call and returns the new sample.

        Args:
            output: the model's output for (model_input, t): (B, ...), (2B, ...) with guidance
                (unconditional half first), with twice the channels when the variance is learned.
            x: the sample to step from when something changed it since the last step (a mask of
                inpainting, a projection): (B, ...), copied unless the run borrows samples.
            noise: this step's draws, one (B, ...) tensor for each of the plan's n_draws (those that
                the row does not use are not read), instead of the run's source.
            result_dtype, preview_dtype: of the new sample and of x_start (default: the run's);
                float64 in a float64 run only.
            log_prob: leave log p(x_next | x) in `log_prob`, the bits of fastdiff.training.log_prob;
                made in the same pass as the new sample where neither a preview nor a gradient is
                wanted. In its gradient the new sample counts as given.
            inputs: the plan's own inputs, by name, (B, ...).

        Raises:
            ValueError, TypeError: wrong shape, dtype or device, or the run is done; the run's
                state is unharmed.
        """
        i = self.index
        if self.done:
            raise ValueError(f"the run is done: all {self.plan.rows} model calls have been stepped")
        self._check_output(output)
        if log_prob:
            check_has_density(self.plan)
        states = self._states
        if x is not None or inputs or self.plan.inputs:
            states = self._given(x, inputs)
        if result_dtype is not None:
            self._check_result("result_dtype", result_dtype)
        if preview_dtype is not None:
            self._check_result("preview_dtype", preview_dtype)
        seeded = noise is None and self._keys is not None
        draws: list[Tensor] = []
        if noise is not None:
            draws = self._given_draws(noise)
        elif not seeded:
            draws = self._draw(i, output)
        dtypes = result_dtype or self._dtype, preview_dtype or self._dtype
        self.log_prob = None
        if log_prob:
            return self._advance_with_density(output, states[0], draws, seeded, *dtypes)
        return self.advance(output, states, draws, seeded, *dtypes)

    def _advance_with_density(
        self,
        output: Tensor,
        x: Tensor,
        draws: list[Tensor],
        seeded: bool,
        result_dtype: torch.dtype,
        preview_dtype: torch.dtype,
    ) -> Tensor:
        """advance(), and log_prob of what it makes."""
        i, plan, guidance = self.index, self.plan, self._guidance
        if self._writes_to(output):
            output = output.clone()
        halves = [output] if guidance is None else list(output.split(self._batch))
        scales = () if guidance is None else (guidance,)
        table = density_table(
            plan, x.numel() // self._batch, False, self._device, compute_dtype(self._dtype)
        )
        makes = not self._preview and bool(plan.draws_noise[i, 0])
        if not makes or differentiated((x,), halves, draws, scales):
            before = x.clone() if self._mode.in_place else x
            result = self.advance(output, [x], draws, seeded, result_dtype, preview_dtype)
            self.log_prob = call_loss(
                density_spec(plan, i), halves, result.detach(), before, table, self._tables.rows[i],
                guidance_scale=guidance, backend=self._backend,
            )[0]  # fmt: skip
            return result
        like = self._specs[self._calls[i].variant]
        step, stream = plan.draws[i, 0].tolist()
        result = torch.empty_like(x, dtype=result_dtype, memory_format=torch.contiguous_format)
        self.log_prob = call_loss(
            density_spec(plan, i, True, like.noise_dtype, like.fast), halves, None, x, table,
            self._tables.rows[i], noise=draws, keys=self._keys if seeded else None,
            guidance_scale=guidance, counter=(0, 0, step, stream), made=result,
            backend=self._backend,
        )[0]  # fmt: skip
        self._states, self.index = [result], i + 1
        if self._input is not None:
            copies = self._input.shape[0] // self._batch
            self._input = self._scaled_input(self._input.dtype, copies)
        return result

    def advance(
        self,
        output: Tensor,
        old: States,
        draws: list[Tensor],
        seeded: bool,
        result_dtype: torch.dtype,
        preview_dtype: torch.dtype,
    ) -> Tensor:
        """step() on arguments that are known to be right.

        Args:
            old: the states before the step.
            draws: one tensor per draw, or none when the step makes its own noise (seeded) or the
                row uses none.
        """
        i = self.index
        call, tables, guidance = self._calls[i], self._tables, self._guidance
        spec, table, row = self._specs[call.variant], tables.tables[call.variant], tables.rows[i]
        keys = self._keys if seeded and spec.draws else None
        halves = [output] if guidance is None else list(output.split(self._batch))
        states = old if call.reads_all else [old[k] for k in call.reads]
        kept = output
        if call.keeps_output and self._writes_to(output):
            kept = output.clone()
        at = i
        if self.plan.snr is not None and self.plan.snr[i]:
            if keys is not None:
                draws = seeded_draws(self.plan, i, keys, old[0], spec, self._backend)
                keys = None
            assert tables.snr is not None
            table = corrector_table(
                self.plan, i, tables.snr[i], table, spec, halves, draws, guidance
            )
            at, row = 0, tables.rows[0]
        threshold = None
        if call.clamped and self.plan.thresholding is not None:
            threshold = self._threshold(i, states, halves, draws, keys)
        if differentiated(states, halves, draws, () if guidance is None else (guidance,)):
            dtypes = [result_dtype, *[self._dtype] * (len(spec.outputs) - 1)]
            if self._preview:
                dtypes[-1] = preview_dtype
            results = call_step(
                states, spec, table, row, model_outputs=halves, noise=draws, keys=keys,
                draws=tables.draws, guidance_scale=guidance, threshold=threshold,
                backend=self._backend, out_dtypes=dtypes,
            )  # fmt: skip
            if self._input is not None:
                c_in = table[at, HEADER.index("c_in")]
                scaled = (c_in * results[0].to(c_in.dtype)).to(self._input.dtype)
                self._input = torch.cat([scaled] * (self._input.shape[0] // self._batch))
        else:
            # The lists of step_arguments(), made here by hand: this is what a step's time goes to.
            inputs: list[Tensor] = []
            for tensor in states + halves:
                inputs.append(tensor if tensor.is_contiguous() else tensor.contiguous())
            results, reused = self._memory(call, old, inputs[0], result_dtype, preview_dtype)
            inputs += (*draws, table, row)
            if keys is not None:
                inputs += (keys, tables.draws)
            if guidance is not None:
                inputs.append(guidance)
            if threshold is not None:
                inputs.append(threshold)
            outputs = results
            if self._input is not None:
                outputs = [*results, self._input]
                reused.append(self._input)
            kind = call.variant, len(draws), keys is not None
            layout = self._layouts.get(kind) or self._layout(*kind)
            self._operation(inputs, outputs, layout, 0, 0, 0, 0)
            if reused:
                written(reused)
        if len(old) == 1:
            self._states = results[:1]
        else:
            new: States = [None] * len(old)
            for k, j in call.moves:
                new[k] = old[j]
            for k in call.keeps_output:
                new[k] = kept
            for k, result in zip(call.writes, results, strict=False):
                new[k] = result
            self._states = new
        if self._preview:
            self.x_start = results[-1]
        self.index = i + 1
        return results[0]

    def _layout(self, variant: int, noise: int, keyed: bool) -> str:
        """The operation's `layout` for the calls of a variant, made once."""
        spec = self._specs[variant]
        found = self._layouts[variant, noise, keyed] = spec.layout(
            1 if self._guidance is None else 2, noise, keys=keyed, draws=keyed,
            guidance_scale=self._guidance is not None,
            threshold=spec.clamp is not None and self.plan.thresholding is not None,
        )  # fmt: skip
        return found

    def _memory(
        self,
        call: RowCall,
        old: States,
        like: Tensor,
        result_dtype: torch.dtype,
        preview_dtype: torch.dtype,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Where the results go, and which of those tensors held something before.

        Args:
            like: a contiguous tensor of their shape.
        """
        given, wanted = like.dtype, result_dtype
        results, reused = [], []
        for source in call.memory:
            buffer = old[source] if source >= 0 else None
            if buffer is not None and buffer.dtype == wanted:
                reused.append(buffer)
            elif wanted == given:
                buffer = torch.empty_like(like)  # an option costs a tenth of the call
            else:
                buffer = torch.empty_like(like, dtype=wanted)
            results.append(buffer)
            wanted = self._dtype
        if self._preview:
            results.append(torch.empty_like(like, dtype=preview_dtype))
        return results, reused

    def _writes_to(self, output: Tensor) -> bool:
        """Whether a model returned what it was given: memory that the run itself writes to."""
        memory = output.untyped_storage().data_ptr()
        own = (self._states[0], self._input)
        return any(t is not None and t.untyped_storage().data_ptr() == memory for t in own)

    def _given_draws(self, noise: Sequence[Tensor]) -> list[Tensor]:
        count = self.plan.n_draws
        if not isinstance(noise, Sequence):  # a tensor is none
            raise TypeError(f"noise must be a list of tensors, not {type(noise).__name__}")
        if len(noise) != count:
            raise ValueError(f"noise must hold {count} tensors, one a draw, not {len(noise)}")
        for k, z in enumerate(noise):
            check_like(f"noise[{k}]", z, "the run's x", self.x)
        return [z.contiguous() for z in noise]

    def _check_result(self, name: str, dtype: torch.dtype) -> None:
        check_floating(name, dtype)
        if (dtype == torch.float64) != (self._dtype == torch.float64):
            raise TypeError(
                f"{name} is {dtype} and the run's dtype {self._dtype}: float64 does not mix with "
                "other dtypes"
            )

    def _given(self, x: Tensor | None, inputs: dict[str, Tensor]) -> States:
        """The states with what the caller supplies for this step."""
        states = list(self._states)
        if x is not None:
            if self._borrow:
                self._check_given(x)
            else:
                check_like("x", x, "the run's x", self.x)
                x = x.clone(memory_format=torch.contiguous_format)
            states[0] = x
        names = self.plan.inputs
        if set(inputs) != set(names):
            wanted = ", ".join(names) or "none"
            raise ValueError(f"inputs must be {wanted}, not {', '.join(inputs) or 'none'}")
        for k, name in enumerate(names, start=self.plan.states - len(names)):
            check_like(name, inputs[name], "x", self.x)
            states[k] = inputs[name]
        return states

    def _threshold(
        self,
        row: int,
        states: list[Tensor],
        halves: list[Tensor],
        noise: list[Tensor],
        keys: Tensor | None,
    ) -> Tensor:
        """s of dynamic thresholding, (B,), from the value that the clamp node would clamp."""
        variant = self._calls[row].variant
        spec, table = self._clamped_specs[variant], self._tables.clamped_tables[variant]
        assert spec is not None and table is not None and self.plan.thresholding is not None
        (value,) = call_step(
            states, spec, table, self._tables.rows[row], model_outputs=halves, noise=noise,
            keys=keys, draws=self._tables.draws, guidance_scale=self._guidance,
            backend=self._backend, out_dtypes=[table.dtype],
        )  # fmt: skip
        return threshold_of(value, *self.plan.thresholding)

    def check(self, output: Tensor, x: Tensor) -> None:
        """Refuses a model output and a sample of the caller's that do not go with the run."""
        self._check_output(output)
        self._check_given(x)

    def _check_given(self, x: Tensor) -> None:
        if x.shape != self.x.shape or x.device != self.x.device:
            raise ValueError(
                f"x must be {tuple(self.x.shape)} on {self.x.device}, as when the run began, "
                f"not {tuple(x.shape)} on {x.device}"
            )

    def _check_output(self, output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"output must be a torch.Tensor, not {type(output).__name__}")
        if output.shape != self._output_shape:
            raise ValueError(
                f"output must have shape {tuple(self._output_shape)}, not {tuple(output.shape)}"
            )
        if output.layout != torch.strided:
            raise ValueError(f"output must be a dense (strided) tensor, not {output.layout}")
        if output.device != self._device:
            raise ValueError(f"output is on {output.device}, but the run is on {self._device}")
        dtype = output.dtype
        if dtype != self._dtype:  # else it goes with x
            double = self._dtype == torch.float64
            if dtype not in FLOATING or (dtype == torch.float64) != double:
                raise TypeError(f"output is {dtype}, which does not go with x of {self._dtype}")

    def _draw(self, row: int, output: Tensor) -> list[Tensor]:
        """Noise tensors of a row, from the run's generator or function."""
        x = self.x
        tensors = []
        for k in range(self.plan.n_draws):
            if not self.plan.consumes[row, k]:
                tensors.append(x)  # has a zero coefficient: never read
            elif self._generator is not None:
                dtype = output.dtype if self._as_output else self._noise_dtype
                tensors.append(drawn_from(self._generator, x.shape, dtype, x.device))
            else:
                assert self._noise is not None
                drawn = self._noise(row, k)
                check_like(f"noise({row}, {k})", drawn, "x", x)
                tensors.append(drawn.contiguous())
        return tensors


def drawn_dtype(
    plan: SolverPlan, noise_dtype: torch.dtype | None, dtype: torch.dtype
) -> torch.dtype:
    """The dtype that draws of a run in `dtype` are rounded to."""
    if noise_dtype is None and plan.draw_dtype == "float32":
        return torch.float32
    return noise_dtype or dtype


def guidance_tensor(
    guidance_scale: float | Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """float32 (1,) or (B,) of the run's own, on the device; a number is not copied there."""
    if guidance_scale is None:
        return None
    if not isinstance(guidance_scale, Tensor):
        number = as_float("guidance_scale", guidance_scale)
        if not abs(number) <= torch.finfo(torch.float32).max:
            raise ValueError(f"guidance_scale must be finite in float32, not {guidance_scale}")
        return torch.full((1,), number, dtype=torch.float32, device=device)
    if guidance_scale.is_complex() or guidance_scale.dtype == torch.bool:
        raise TypeError(f"guidance_scale must hold real numbers, not {guidance_scale.dtype}")
    scale = guidance_scale.to(torch.float32).reshape(-1)
    if scale.numel() not in (1, batch):
        raise ValueError(
            f"guidance_scale must be a number or have shape ({batch},), not {tuple(scale.shape)}"
        )
    if scale.device.type == "cpu" and not bool(torch.isfinite(scale).all()):
        raise ValueError(f"guidance_scale must be finite, not {guidance_scale}")
    if scale.device != device:
        check_not_capturing("give guidance_scale as a number or a tensor there", device)
    return scale.to(device).clone(memory_format=torch.contiguous_format)
