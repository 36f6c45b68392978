"""One accelerated scheduler's run: which plan, which row, which noise, which dtypes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.identity import Cache, digest
from fastdiff.integrations.diffusers.observe import Observed, observe
from fastdiff.ops.checks import FLOATING
from fastdiff.plan import SolverPlan
from fastdiff.run import Run
from fastdiff.tracing.linear_form import LinearForm
from fastdiff.tracing.realize import from_history
from fastdiff.tracing.trace import TraceNotes, trace_scheduler

__all__ = ["Options", "Stepper"]

log = logging.getLogger("fastdiff")


@dataclass(frozen=True)
class Options:
    """What accelerate() was asked for."""

    seed: int | Tensor | None = None
    sample_offset: int = 0
    float32_latents: bool = False
    outputs_are_fresh: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class Traced:
    """A scheduler's plan from one position on, or the reason why there is none.

    Attributes:
        notes: what the trace saw beside the plan.
        numbers: the scheduler's attributes after every row, as far as they are not images.
        images: names of those that are images or lists of images.
        scales: what scale_model_input multiplies by before every row.
        observed: what upstream's step does with dtypes, by dtypes and kinds of argument.
    """

    plan: SolverPlan | None
    reason: str = ""
    notes: TraceNotes = field(default_factory=TraceNotes)
    numbers: tuple[dict[str, Any], ...] = ()
    images: frozenset[str] = frozenset()
    scales: tuple[float, ...] = ()
    observed: dict[tuple[Any, ...], Observed] = field(default_factory=dict)

    @property
    def memoryless(self) -> bool:
        """Whether rows may be stepped in any order."""
        return self.plan is not None and self.plan.states == 1


_traced: Cache[Traced] = Cache(256)
_said: set[tuple[type, str]] = set()


class Stepper:
    """The steps of one scheduler object.

    A run begins at the first step after set_timesteps(): the scheduler's own code is traced from
    there on (or its plan found in the cache) and every step is a row of the plan. What cannot be
    traced runs on upstream's own step from the start.

    Args:
        scheduler: the accelerated object, whose attributes say where it stands.
        upstream: its class in diffusers.
    """

    def __init__(self, scheduler: Any, upstream: Any, options: Options) -> None:
        self.scheduler, self.upstream, self.options = scheduler, upstream, options
        # Whether upstream counts its steps or goes by the value of the timestep.
        self.counted = "_step_index" in vars(scheduler)
        self.reset()

    def reset(self) -> None:
        """Before the next step a new run begins."""
        self.run: Run | None = None
        self.traced: Traced | None = None
        self.begin = 0
        self._settings: dict[str, Any] = {}
        self._timesteps: Tensor | None = None
        self._values: list[float] = []
        self._foreign: list[Any] = []  # timesteps that set_timesteps() did not make
        self._digest: str | None = None
        self._last: Tensor | None = None
        self._only_upstream = ""
        self._before: dict[str, Any] = {}  # the scheduler's attributes when the run began
        self._kind: Any = None  # shapes, dtypes and devices of the last step's tensors
        self._now: Observed | None = None
        self._drawing = self._history = False

    def end(self) -> None:
        """Gives the scheduler back the attributes that a run served from its history."""
        if self.traced is not None:
            for name in self.traced.images:
                vars(self.scheduler).setdefault(name, self._before.get(name))
        self.reset()

    def step(self, output: Any, timestep: Any, sample: Any, arguments: dict[str, Any]) -> Any:
        """What the scheduler's step returns for its own arguments, defaults left out."""
        return_dict = arguments.pop("return_dict", True)
        generator = arguments.pop("generator", None)
        given = arguments.pop("variance_noise", None)
        kind = _kind(output, sample)
        row = self._next_row(timestep) if kind == self._kind and arguments == self._settings else -1
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
        run, traced, observed = self.run, self.traced, self._now
        assert run is not None and traced is not None and observed is not None
        row, dtypes = run.index, observed.result_dtypes
        seeded = self.options.seed is not None
        draws: list[Tensor] = []
        if self._drawing and not seeded:
            draws = self._noise(row, output, timestep, sample, generator, given, observed)
        if self.options.float32_latents:
            result = self._master_step(run, output, sample, draws, dtypes)
        else:
            states = [sample, *run.history] if self._history else [sample]
            result = run.advance(output, states, draws, seeded, dtypes[0], dtypes[-1])
        attributes = vars(self.scheduler)
        attributes.update(traced.numbers[row])
        for name in traced.images:
            attributes.pop(name, None)
        results = (result,) if len(dtypes) == 1 else (result, run.x_start)
        if not return_dict or observed.output_class is None:
            return results
        return observed.output_class(**dict(zip(observed.fields, results, strict=True)))

    def _next_row(self, timestep: Any) -> int:
        """The run's coming row when this timestep is the one that follows, else -1."""
        run, traced = self.run, self.traced
        if run is None or traced is None or traced.plan is None or run.done:
            return -1
        at = vars(self.scheduler)["_step_index"] if self.counted else self._position(timestep)
        return run.index if at == self.begin + run.index else -1

    def _prepare(self, output: Any, timestep: Any, sample: Any, arguments: dict[str, Any]) -> str:
        """Sets the run to the row of this step; the reason why upstream's own step must do it."""
        reason = self._only_upstream or _unfit(output, sample, arguments)
        if reason:
            return reason
        row = self._row(output, timestep, sample, arguments)
        assert self.traced is not None
        if self.traced.plan is None:
            return self.traced.reason
        self._now = self._observed(output, timestep, sample)
        run = self.run
        if run is None or run.index != row or run.x.shape != sample.shape:
            run = self._start(row, output, sample, self._now)
        run.check(output, sample)
        plan = self.traced.plan
        self._drawing, self._history = bool(plan.consumes.any()), plan.states > 1
        return ""

    # Which row.

    def _row(self, output: Tensor, timestep: Any, sample: Tensor, arguments: dict[str, Any]) -> int:
        """The row of this step, after beginning a run where one begins; nothing else changes."""
        scheduler, traced = self.scheduler, self.traced
        if self.counted:
            position = scheduler._step_index
            if position is None:
                _check_shapes(output, sample)
                position, traced = self._first_position(timestep), None
        else:
            position = self._position(timestep)
        if traced is None:
            return self._begin(position, output, sample, arguments)
        row = position - self.begin
        expected = 0 if self.run is None else self.run.index
        if (row == expected and arguments == self._settings) or traced.plan is None:
            return row
        if traced.memoryless:
            if arguments == self._settings and 0 <= row < traced.plan.rows:
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
            f"step was given {arguments} after {self._settings}: {name} carries history, so the "
            "arguments must stay the same until set_timesteps()"
        )

    def _first_position(self, timestep: Any) -> int:
        """Where upstream's own count begins."""
        scheduler = self.scheduler
        if hasattr(scheduler, "_init_step_index"):
            scheduler._init_step_index(timestep)
        elif scheduler._begin_index is None:
            scheduler._step_index = scheduler.index_for_timestep(timestep)
        else:
            scheduler._step_index = scheduler._begin_index
        position: int = scheduler._step_index
        return position

    def _position(self, timestep: Any) -> int:
        """Where a timestep stands in scheduler.timesteps, read from a device only if it must be."""
        timesteps: Tensor = self.scheduler.timesteps
        if timesteps is not self._timesteps:
            self._timesteps, self._values = timesteps, timesteps.tolist()
        if isinstance(timestep, Tensor) and timestep.numel() == 1:
            offset = timestep.data_ptr() - timesteps.data_ptr()
            position = offset // timesteps.element_size()
            alike = timestep.dtype == timesteps.dtype and timestep.device == timesteps.device
            if alike and 0 <= position < len(self._values):
                return position
        value = float(timestep)
        expected = self.begin + (0 if self.run is None else self.run.index)
        if 0 <= expected < len(self._values) and self._values[expected] == value:
            return expected
        if value in self._values:
            return self._values.index(value)
        if value not in self._foreign:
            self._foreign.append(value)
        return -1 - self._foreign.index(value)

    # The beginning of a run.

    def _begin(
        self, position: int, output: Tensor, sample: Tensor, arguments: dict[str, Any]
    ) -> int:
        _check_shapes(output, sample)
        if self._digest is None:
            self._digest = digest(self.scheduler)
            self._before = _copied(vars(self.scheduler))
        at: Any = position if position >= 0 else ("t", self._foreign[-1 - position])
        doubled = output.shape != sample.shape
        key = (
            self.upstream, self._digest, at, tuple(sorted(arguments.items())), doubled,
            self.options.seed is None, self.options.float32_latents,
        )  # fmt: skip
        traced = _traced.get(key)
        if traced is None:
            traced = _traced.put(key, self._trace(position, arguments, doubled))
        self.traced, self.begin, self._settings, self.run = traced, position, arguments, None
        return 0

    def _trace(self, position: int, arguments: dict[str, Any], doubled: bool) -> Traced:
        notes = TraceNotes()
        try:
            plan = trace_scheduler(
                self._shadow(position), self._timesteps_from(position), arguments,
                fed=self.options.seed is None, learned_variance=doubled, notes=notes,
            )  # fmt: skip
        except Exception as error:
            # Whatever upstream's code does on forms, its own step on images is the answer.
            return Traced(None, f"{type(error).__name__}: {error}")
        if "preview" in plan.about:
            return Traced(None, f"its second result {plan.about['preview']}")
        assert plan.c_in is not None
        scales = (plan.first_c_in, *plan.c_in[:-1].tolist())
        if self.options.float32_latents:
            plan = replace(plan, c_in=None, first_c_in=1.0)
        numbers = [{k: v for k, v in row.items() if not _images(v)} for row in notes.attributes]
        images = {k for row in notes.attributes for k, v in row.items() if _images(v)}
        changing = {
            k for row in numbers for k, v in row.items()
            if k != "_begin_index" and (k in images or self._before.get(k, self) is not v)
        }  # fmt: skip
        kept = tuple({k: v for k, v in row.items() if k in changing} for row in numbers)
        return Traced(plan, "", notes, kept, frozenset(images), scales)

    def _timesteps_from(self, position: int) -> list[Tensor]:
        timesteps: Tensor = self.scheduler.timesteps.cpu()
        if position >= 0:
            return list(timesteps[position:])
        return [torch.tensor(self._foreign[-1 - position]).to(timesteps.dtype)]

    def copied(self, attributes: dict[str, Any] | None = None) -> Any:
        """A copy of the scheduler, of upstream's class and on the host, to be used up."""
        shadow = self.upstream.__new__(self.upstream)
        for name, value in _copied(attributes or vars(self.scheduler)).items():
            vars(shadow)[name] = value.cpu() if isinstance(value, Tensor) else value
        return shadow

    def _shadow(self, position: int) -> Any:
        """A copy of the scheduler as it stood before the run."""
        shadow = self.copied(self._before)
        if self.counted:
            shadow._step_index, shadow._begin_index = None, position
        return shadow

    def _observed(self, output: Tensor, timestep: Any, sample: Tensor) -> Observed:
        assert self.traced is not None and self.traced.plan is not None
        kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep)
        key = (sample.dtype, output.dtype, sample.dim(), kind)
        observed = self.traced.observed.get(key)
        if observed is None:
            timesteps = self._timesteps_from(self.begin)
            first = timestep.cpu() if isinstance(timestep, Tensor) else timestep
            observed = observe(
                self._shadow(self.begin), [first, *timesteps[1:]], sample, output, self._settings,
                bool(self.traced.plan.consumes.any()),
            )  # fmt: skip
            self.traced.observed[key] = observed
        return observed

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
        kinds: dict[str, Any] = {
            "outputs_are_fresh": options.outputs_are_fresh, "backend": options.backend,
            "preview": len(observed.result_dtypes) > 1,
        }  # fmt: skip
        if options.seed is not None:
            kinds |= {"seed": options.seed, "sample_offset": options.sample_offset}
        elif traced.plan.draws_noise.any():
            kinds["noise"] = _handed
        if options.float32_latents:
            kinds["model_dtype"] = observed.result_dtypes[0]
            run = Run(traced.plan, sample.to(torch.promote_types(dtype, torch.float32)), **kinds)
        else:
            run = Run(traced.plan, sample, borrow=True, dtype=dtype, **kinds)
        run.index = row
        self.run = run
        return run

    # What the scheduler is asked for between steps.

    def scale(self) -> float | None:
        """What scale_model_input multiplies by before the coming step; None before a run."""
        traced, run = self.traced, self.run
        if traced is None or traced.plan is None or run is None or run.done:
            return None
        return traced.scales[run.index]

    def serves(self, name: str) -> bool:
        """Whether `attribute` knows a name."""
        traced, run = self.traced, self.run
        return traced is not None and name in traced.images and run is not None and run.index > 0

    def attribute(self, name: str) -> Any:
        """An attribute that upstream keeps images in, from the history of the run."""
        traced, run = self.traced, self.run
        assert traced is not None and run is not None
        return self._materialized(traced.notes.attributes[run.index - 1].get(name), name)

    def _materialized(self, value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [self._materialized(item, name) for item in value]
        if not isinstance(value, LinearForm):
            return value
        assert self.traced is not None and self.run is not None
        recorder = self.traced.notes.recorder
        assert recorder is not None
        weights = from_history(recorder, self.run.index - 1, value)
        if weights is None:
            raise AttributeError(
                f"{name} is not carried: the steps of this run need fewer tensors than "
                f"{self.upstream.__name__} keeps; use the scheduler of diffusers to read it"
            )
        states = [self.run.x, *self.run.history]
        total = torch.zeros_like(self.run.x)
        for k, weight in weights.items():
            held = states[k]
            assert held is not None
            total = total + weight * held
        return total

    # The parts of a step.

    def _master_step(
        self,
        run: Run,
        output: Tensor,
        sample: Tensor,
        draws: list[Tensor],
        dtypes: tuple[torch.dtype, ...],
    ) -> Tensor:
        """The run keeps the sample in float32; the caller gets it rounded, from the same pass."""
        x = run.x if sample is self._last else sample.to(run.x.dtype)
        run.renew_input()
        seeded = self.options.seed is not None
        result = run.advance(output, [x, *run.history], draws, seeded, x.dtype, dtypes[-1])
        self._last = result if run.model_input.dtype == result.dtype else run.model_input
        return self._last

    def _noise(
        self,
        row: int,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any,
        given: Tensor | None,
        observed: Observed,
    ) -> list[Tensor]:
        """The draws of a row as upstream makes them: its dtype, its generator, its order."""
        assert self.traced is not None and self.traced.plan is not None
        draws = []
        for k, consumed in enumerate(self.traced.plan.consumes[row]):
            if not consumed:
                draws.append(sample)  # not read
            elif (row, k) in self.traced.notes.queries:
                tree = self._tree(output, timestep, sample, generator)
                draws.append(tree(*self.traced.notes.queries[row, k]).to(sample.device))
            elif given is not None:
                if generator is not None:
                    raise ValueError("generator and variance_noise exclude each other")
                draws.append(given.to(sample.device, observed.draw_dtype))
            else:
                draws.append(
                    randn_tensor(
                        sample.shape, generator=generator, device=output.device,
                        dtype=observed.draw_dtype,
                    )
                )  # fmt: skip
        return draws

    def _tree(self, output: Tensor, timestep: Any, sample: Tensor, generator: Any) -> Any:
        """Upstream's Brownian tree, made by its own step the way it makes it."""
        scheduler = self.scheduler
        if scheduler.noise_sampler is None:
            shadow = self._shadow(self.begin)
            shadow.noise_sampler = None
            arguments = {} if generator is None else {"generator": generator}
            shadow.scale_model_input(sample, timestep)
            self.upstream.step(shadow, output, timestep, sample, **arguments)
            scheduler.noise_sampler = shadow.noise_sampler
        return scheduler.noise_sampler

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
            self._only_upstream = reason
        if (self.upstream, reason) not in _said:
            _said.add((self.upstream, reason))
            log.warning("%s runs on its own step: %s", self.upstream.__name__, reason)
        return self.upstream.step(self.scheduler, output, timestep, sample, **arguments)


def _images(value: Any) -> bool:
    """Whether an attribute holds images, alone or in a list."""
    return isinstance(value, LinearForm) or (
        isinstance(value, list) and any(isinstance(item, LinearForm) for item in value)
    )


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's own attributes, lists apart from it."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in attributes.items() if not name.startswith("_fastdiff")
    }  # fmt: skip


def _handed(row: int, draw: int) -> Tensor:
    raise AssertionError("the draws are given to every step")


def _kind(output: Any, sample: Any) -> Any:
    """What must stay the same from step to step for the last step's checks to hold."""
    if type(output) is not Tensor or type(sample) is not Tensor:
        return None
    return (
        output.shape, sample.shape, output.dtype, sample.dtype, output.device, sample.device,
    )  # fmt: skip


def _unfit(output: Any, sample: Any, arguments: dict[str, Any]) -> str:
    """Why the arguments of a step are not those of a plan: two tensors of images and numbers."""
    if not isinstance(output, Tensor) or not isinstance(sample, Tensor):
        return "model_output or sample is not a tensor"
    for name, value in arguments.items():
        if not isinstance(value, int | float | str | None):
            return f"{name} is a {type(value).__name__}"
    if output.dtype not in FLOATING or sample.dtype not in FLOATING:
        return "model_output or sample is not a floating-point tensor"
    if output.dtype != sample.dtype and torch.float64 in (output.dtype, sample.dtype):
        return f"model_output is {output.dtype} and sample {sample.dtype}"
    return ""


def _check_shapes(output: Tensor, sample: Tensor) -> None:
    shape = output.shape
    if shape != sample.shape and (
        sample.dim() < 2 or shape != (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
    ):
        raise ValueError(
            f"model_output has shape {tuple(shape)}, which does not go with sample of "
            f"{tuple(sample.shape)}"
        )
