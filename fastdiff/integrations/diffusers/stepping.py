"""The steps of one accelerated scheduler: which row of which plan each is, and the step itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.diffusers import drawing, saving, serving
from fastdiff.integrations.diffusers.model_input import check_shapes, input_of, output_of
from fastdiff.integrations.diffusers.observe import Observed
from fastdiff.integrations.diffusers.options import Options
from fastdiff.integrations.diffusers.places import Places
from fastdiff.integrations.diffusers.shadow import attributes_of, said
from fastdiff.integrations.diffusers.traced import Origin, Traced
from fastdiff.ops.call import compute_dtype
from fastdiff.ops.checks import FLOATING
from fastdiff.run import Run

__all__ = ["Stepper"]


class Stepper:
    """The steps of one scheduler object.

    A run begins at the first step after set_timesteps(): the scheduler's own code is traced from
    there on (or its plan found in the cache) and every step is a row of the plan. What cannot be
    traced runs on upstream's own step from the start.

    Args:
        scheduler: the accelerated object, whose attributes say where it stands.
        upstream: its class in diffusers.

    Attributes:
        run, traced: the run under way, from position `begin` on, and where its plan comes from.
        origin: the scheduler before the first run after set_timesteps().
        settings, doubled: arguments of the run's steps; whether its outputs have twice the
            channels (learned variance).
        kinds: how the run was made.
        last, version: the sample that the last step returned, where that must be known.
        only_upstream: why every step is upstream's own.
        elsewhere: whether the history of the run under way is another object's.
    """

    def __init__(self, scheduler: Any, upstream: Any, options: Options) -> None:
        self.scheduler, self.upstream, self.options = scheduler, upstream, options
        self._fused_input = options.makes_inputs
        self._knows_last = options.float32_latents or options.makes_inputs
        self._seeded = options.seed is not None
        self.reset()

    def reset(self) -> None:
        """Before the next step a new run begins."""
        self.run: Run | None = None
        self.traced: Traced | None = None
        self.origin: Origin | None = None
        self.places = Places(self.scheduler)
        self.begin = 0
        self.settings: dict[str, Any] = {}
        self.doubled = False
        self.kinds: dict[str, Any] = {}
        self.last: Tensor | None = None
        self.version = 0
        self.only_upstream = ""
        self.elsewhere = False
        self._input: Tensor | None = None  # the model input of `last`, until it is handed out
        self._kind: Any = None  # shapes, dtypes and devices of the last step's tensors
        self._now: Observed | None = None
        self._drawing = self._history = False

    def end(self) -> None:
        """Gives the scheduler back the attributes that a run served from its history."""
        for name, value in saving.put_away(self).items():
            vars(self.scheduler).setdefault(name, value)
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stepper:
        """For callers that put scheduler.__dict__ aside and back: another run of the scheduler."""
        other = Stepper(self.scheduler, self.upstream, self.options)
        saving.resume(other, copy.deepcopy(saving.saved(self), memo))
        saving.hand_on(self, other)
        return other

    def step(self, output: Any, timestep: Any, sample: Any, arguments: dict[str, Any]) -> Any:
        """What the scheduler's step returns for its own arguments, defaults left out."""
        return_dict = arguments.pop("return_dict", True)
        generator = given = None
        if arguments:
            generator = arguments.pop("generator", None)
            given = arguments.pop("variance_noise", None)
        kind = _kind(output, timestep, sample)
        row = self._next_row(timestep) if kind == self._kind and arguments == self.settings else -1
        if row < 0:
            reason = self._prepare(output, timestep, sample, arguments)
            if reason:
                if generator is not None:
                    arguments["generator"] = generator
                if given is not None:
                    arguments["variance_noise"] = given
                arguments["return_dict"] = return_dict
                return self._upstream_step(output, timestep, sample, arguments, reason)
            self._kind = kind
            if not self._seeded and vars(self.scheduler).get("noise_sampler", "") is None:
                self._plant_tree(output, timestep, sample, generator)
        run, traced, observed = self.run, self.traced, self._now
        assert run is not None and traced is not None and observed is not None
        row, dtypes, attributes = run.index, observed.result_dtypes, vars(self.scheduler)
        draws: list[Tensor] = []
        if self._drawing and not self._seeded:
            assert traced.plan is not None
            draws = drawing.draws_of(
                traced.plan, row, sample, generator, observed.draw_dtype, given,
                traced.notes.queries, attributes.get("noise_sampler"),
            )  # fmt: skip
        if self._knows_last:
            result = self._remembered_step(run, output, sample, draws, dtypes)
        else:
            states = [sample, *run.history] if self._history else [sample]
            result = run.advance(output, states, draws, self._seeded, dtypes[0], dtypes[-1])
        attributes.update(traced.numbers[row])
        for name in traced.images:
            attributes.pop(name, None)
        results = (result,) if len(dtypes) == 1 else (result, run.x_start)
        if not return_dict or observed.output_class is None:
            return results
        return observed.output_class(**dict(zip(observed.fields, results, strict=True)))

    def _remembered_step(
        self,
        run: Run,
        output: Tensor,
        sample: Tensor,
        draws: list[Tensor],
        dtypes: tuple[torch.dtype, ...],
    ) -> Tensor:
        """A step whose result is looked for when it comes back as a sample.

        With float32_latents the run keeps the sample in float32, and the caller gets it rounded,
        from the same pass; else the next model input comes from that pass.
        """
        if torch.is_inference_mode_enabled():
            # Tensors made there do not count the writes to them.
            with torch.inference_mode(False), torch.no_grad():
                return self._remembered_step(run, output, sample, draws, dtypes)
        run.renew_input()
        if self._fused_input:
            states = [sample, *run.history]
            result = run.advance(output, states, draws, self._seeded, dtypes[0], dtypes[-1])
            self._input = run.model_input
        else:
            unchanged = sample is self.last and sample._version == self.version
            x = run.x if unchanged else sample.to(run.x.dtype)
            states = [x, *run.history]
            result = run.advance(output, states, draws, self._seeded, x.dtype, dtypes[-1])
            if run.model_input.dtype != result.dtype:
                result = run.model_input
        self.last, self.version = result, result._version
        return result

    def _next_row(self, timestep: Any) -> int:
        """The run's coming row when this timestep is the one that follows, else -1."""
        run = self.run
        if run is None or run.done:
            return -1
        expected = self.begin + run.index
        places = self.places
        at = self.scheduler._step_index if places.counted else places.of(timestep, expected)
        return run.index if at == expected else -1

    def _prepare(self, output: Any, timestep: Any, sample: Any, arguments: dict[str, Any]) -> str:
        """Sets the run to the row of this step; the reason why upstream's own step must do it."""
        if self.elsewhere:
            raise ValueError(
                f"{self.upstream.__name__} was accelerated anew in the middle of a run, whose "
                "history the first object holds: call set_timesteps() before its steps"
            )
        reason = self.only_upstream or _unfit(output, sample, arguments, self.options)
        if reason:
            return reason
        row = self._row(output, timestep, sample, arguments)
        traced, origin = self.traced, self.origin
        assert traced is not None and origin is not None
        if traced.plan is None:
            return traced.reason
        # With guidance or a model dtype outputs count as being of the sample's dtype.
        like = output[:1].to(sample.dtype) if self._fused_input else output
        try:
            self._now = origin.observed(traced, self.begin, self.settings, like, timestep, sample)
        except Exception:
            if self.places.counted and self.run is None:
                self.scheduler._step_index = None  # as upstream leaves it: no run has begun
            raise
        run = self.run
        if run is None or run.index != row or run.x.shape != sample.shape:
            run = self._start(row, output, sample, self._now)
        run.check(output, sample)
        self._drawing, self._history = bool(traced.plan.consumes.any()), traced.plan.states > 1
        return ""

    def _row(self, output: Tensor, timestep: Any, sample: Tensor, arguments: dict[str, Any]) -> int:
        """The row of this step, after beginning a run where one begins; nothing else changes."""
        scheduler, traced, places = self.scheduler, self.traced, self.places
        expected = 0 if self.run is None else self.run.index
        if places.counted:
            position = scheduler._step_index
            if position is None:
                check_shapes(output, sample, self.options.copies)
                try:
                    position, traced = places.first(timestep), None
                except Exception:
                    # Upstream may have refused the timestep (an index, say) before it looked.
                    self.upstream.step(
                        scheduler, self._plain(output, sample), timestep, sample, **arguments
                    )
                    raise
        else:
            position = places.of(timestep, self.begin + expected)
        if traced is None:
            return self._begin(position, output, sample, arguments)
        row = position - self.begin
        if traced.plan is not None and row >= traced.plan.rows and not traced.memoryless:
            self._past_the_end(position, output, timestep, sample, arguments)
        if (row == expected and arguments == self.settings) or traced.plan is None:
            return row
        if traced.memoryless:
            if arguments == self.settings and 0 <= row < traced.plan.rows:
                return row
            return self._begin(position, output, sample, arguments)
        name = self.upstream.__name__
        if row != expected:
            raise ValueError(
                f"timestep {timestep} is step {row} of this run, but step {expected} of "
                f"{traced.plan.rows} follows: {name} carries history, so its steps must follow the "
                "order of set_timesteps()"
            )
        raise ValueError(
            f"step was given {arguments} after {self.settings}: {name} carries history, so the "
            "arguments must stay the same until set_timesteps()"
        )

    def _past_the_end(
        self, position: int, output: Tensor, timestep: Any, sample: Tensor, arguments: Any
    ) -> None:
        """Raises what upstream raises for a step after the last."""
        assert self.origin is not None
        shadow = self.origin.shadow(position)
        shadow._step_index = position
        self.upstream.step(shadow, self._plain(output, sample), timestep, sample, **arguments)
        raise IndexError(f"all steps of this run are done: call set_timesteps() before {timestep}")

    def _begin(
        self, position: int, output: Tensor, sample: Tensor, arguments: dict[str, Any]
    ) -> int:
        doubled = check_shapes(output, sample, self.options.copies)
        if self.origin is None:
            self.take_origin(attributes_of(self.scheduler))
        self.take_plan(position, arguments, doubled)
        return 0

    def take_origin(self, attributes: dict[str, Any]) -> None:
        """Plans are from now on those of a scheduler with these attributes."""
        places = self.places
        self.origin = Origin(self.upstream, attributes, places.counted, places.foreign)

    def take_plan(self, position: int, arguments: dict[str, Any], doubled: bool) -> Traced:
        """The next step is the first one of the plan from this position on."""
        assert self.origin is not None
        traced = self.origin.traced(position, arguments, doubled, self.options)
        self.traced, self.begin, self.settings, self.run = traced, position, arguments, None
        self.doubled = doubled
        return traced

    def _start(self, row: int, output: Tensor, sample: Tensor, observed: Observed) -> Run:
        traced, options = self.traced, self.options
        assert traced is not None and traced.plan is not None
        if row and not traced.memoryless:
            assert self.run is not None
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}, but this run began with "
                f"{tuple(self.run.x.shape)}"
            )
        dtype = torch.promote_types(sample.dtype, output.dtype)
        if observed.kept_dtype is not None:
            dtype = torch.promote_types(dtype, observed.kept_dtype)
        if traced.condensed:
            # A sum of a sample and small terms must not lose in 16 bits what its terms would keep.
            dtype = torch.promote_types(dtype, torch.float32)
        kinds: dict[str, Any] = {
            "outputs_are_fresh": options.outputs_are_fresh, "backend": options.backend,
            "preview": len(observed.result_dtypes) > 1, "guidance_scale": options.guidance_scale,
        }  # fmt: skip
        if self._seeded:
            kinds |= {"seed": options.seed, "sample_offset": options.sample_offset}
        elif traced.plan.draws_noise.any():
            kinds["noise"] = drawing.handed
        if options.float32_latents:
            kinds["model_dtype"] = observed.result_dtypes[0]
            sample = sample.to(torch.promote_types(dtype, torch.float32))
        else:
            kinds |= {"borrow": True, "dtype": dtype, "model_dtype": options.model_dtype}
        run = Run(traced.plan, sample, **kinds)
        run.index = row
        self.run, self.kinds = run, kinds
        return run

    def _plant_tree(self, output: Tensor, timestep: Any, sample: Tensor, generator: Any) -> None:
        """Makes the Brownian tree where upstream makes it, whether or not the run draws from it."""
        assert self.origin is not None
        self.scheduler.noise_sampler = drawing.brownian_tree(
            self.origin, self.begin, self._plain(output, sample), timestep, sample, generator
        )

    def _plain(self, output: Any, sample: Any) -> Any:
        """The model output that upstream's own step takes."""
        if not self._fused_input or not isinstance(output, Tensor):
            return output
        return output_of(output, sample, self.options)

    def _upstream_step(
        self, output: Any, timestep: Any, sample: Any, arguments: dict[str, Any], reason: str
    ) -> Any:
        """Upstream's own step, from here to the end of the run."""
        traced = self.traced
        if self.run is not None and self.run.index and traced is not None:
            if not traced.memoryless:
                raise ValueError(
                    f"{reason}, but {self.upstream.__name__} carries history in this run; such "
                    "steps must begin right after set_timesteps()"
                )
        else:
            self.only_upstream = reason
        said(self.upstream, reason)
        output = self._plain(output, sample)
        return self.upstream.step(self.scheduler, output, timestep, sample, **arguments)

    # What the scheduler is asked for between steps.

    def scale(self) -> float | None:
        """What scale_model_input multiplies by before the coming step; None before a run."""
        traced, run = self.traced, self.run
        if traced is None or traced.plan is None or run is None or run.done:
            return None
        if self.places.counted and vars(self.scheduler)["_step_index"] != self.begin + run.index:
            return None
        return traced.scales[run.index]

    def model_input(self, sample: Tensor, *others: Any) -> Tensor:
        """What scale_model_input returns with guidance or a model dtype: what the last step's pass
        wrote, if that is of this very sample."""
        scale = self.scale()
        if scale is not None and sample is self.last and sample._version == self.version:
            made, self._input = self._input, None  # once: it is the caller's, who may write to it
            if made is not None:
                return made
        wide = sample.to(compute_dtype(sample.dtype))
        if scale is not None:
            wide = wide if scale == 1.0 else wide * scale
        elif hasattr(self.upstream, "scale_model_input"):
            wide = self.upstream.scale_model_input(self.scheduler, wide, *others)
        return input_of(wide, sample.dtype, self.options)

    def serves(self, name: str) -> bool:
        """Whether `attribute` knows a name."""
        traced, run = self.traced, self.run
        return traced is not None and name in traced.images and run is not None and run.index > 0

    def attribute(self, name: str) -> Any:
        """An attribute that upstream keeps images in, from the history of the run."""
        assert self.traced is not None and self.run is not None
        return serving.attribute(name, self.traced.notes, self.run, self.upstream)


def _kind(output: Any, timestep: Any, sample: Any) -> Any:
    """What must stay the same from step to step for the last step's checks to hold."""
    if type(output) is not Tensor or type(sample) is not Tensor:
        return None
    return (
        output.shape, sample.shape, output.dtype, sample.dtype, output.device, sample.device,
        timestep.dtype if type(timestep) is Tensor else type(timestep),
    )  # fmt: skip


def _unfit(output: Any, sample: Any, arguments: dict[str, Any], options: Options) -> str:
    """Why the arguments of a step are not those of a plan: two tensors of images and numbers."""
    if not isinstance(output, Tensor) or not isinstance(sample, Tensor):
        return "model_output or sample is not a tensor"
    for name, value in arguments.items():
        if not isinstance(value, int | float | str | None):
            return f"{name} is a {type(value).__name__}"
    if output.dtype not in FLOATING or sample.dtype not in FLOATING:
        return "model_output or sample is not a floating-point tensor"
    dtypes = {"model_output": output.dtype, "sample": sample.dtype}
    if options.model_dtype is not None:
        dtypes["model_dtype"] = options.model_dtype
    if len(set(dtypes.values())) > 1 and torch.float64 in dtypes.values():
        return " and ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
    return ""
