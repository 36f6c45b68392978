"""One accelerated scheduler's run: which plan, which row, which noise, which dtypes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.identity import Cache, digest
from fastdiff.integrations.diffusers.observe import Observed, observe
from fastdiff.integrations.diffusers.shadow import attributes_of, copied, said
from fastdiff.ops.checks import FLOATING
from fastdiff.plan import SolverPlan
from fastdiff.run import Run
from fastdiff.tracing.linear_form import LinearForm
from fastdiff.tracing.realize import from_history
from fastdiff.tracing.trace import TraceNotes, trace_scheduler

__all__ = ["Options", "Stepper"]


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
        condensed: the new sample comes from sums that upstream keeps as several tensors.
        observed: what upstream's step does with dtypes, by dtypes and kinds of argument.
    """

    plan: SolverPlan | None
    reason: str = ""
    notes: TraceNotes = field(default_factory=TraceNotes)
    numbers: tuple[dict[str, Any], ...] = ()
    images: frozenset[str] = frozenset()
    scales: tuple[float, ...] = ()
    condensed: bool = False
    observed: dict[tuple[Any, ...], Observed] = field(default_factory=dict)

    @property
    def memoryless(self) -> bool:
        """Whether rows may be stepped in any order."""
        return self.plan is not None and self.plan.states == 1


_traced: Cache[Traced] = Cache(256)


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
        self._version = 0  # of _last, when it was handed out
        self._only_upstream = ""
        self._elsewhere = False  # whether the history of the run under way is another's
        self._before: dict[str, Any] = {}  # the scheduler's attributes when the run began
        self._doubled = False  # whether outputs have twice the channels: learned variance
        self._kinds: dict[str, Any] = {}  # how the run was made
        self._kind: Any = None  # shapes, dtypes and devices of the last step's tensors
        self._now: Observed | None = None
        self._drawing = self._history = False

    def end(self) -> None:
        """Gives the scheduler back the attributes that a run served from its history."""
        for name, value in self.put_away().items():
            vars(self.scheduler).setdefault(name, value)
        self.reset()

    def put_away(self) -> dict[str, Any]:
        """Attributes that the run serves from its history, as they were before it."""
        images = frozenset() if self.traced is None else self.traced.images
        return {name: self._before.get(name) for name in images}

    def saved(self) -> dict[str, Any]:
        """What a copy of the scheduler needs to go on: no more than tensors and numbers."""
        saved: dict[str, Any] = {"only_upstream": self._only_upstream}
        if self.run is not None:
            states = [self.run.x, *[h if h is None else h.clone() for h in self.run.history]]
            saved["run"] = (
                self._before, self._foreign, self.begin, self._settings, self._doubled,
                self._kinds, self.run.index, states,
            )  # fmt: skip
        return saved

    def resume(self, saved: dict[str, Any]) -> None:
        """Goes on where the stepper stood that `saved` is from."""
        self._only_upstream = saved["only_upstream"]
        self._elsewhere = "elsewhere" in saved
        if "run" in saved:
            self._before, foreign, begin, settings, doubled, kinds, index, states = saved["run"]
            self._foreign = list(foreign)
            self._digest = digest(self._shadow(begin))
            self._take_plan(begin, settings, doubled)
            assert self.traced is not None and self.traced.plan is not None
            self.run, self._kinds = Run(self.traced.plan, states[0], **kinds), kinds
            self.run.index, self.run._states = index, states

    def left(self) -> dict[str, Any]:
        """What `resume` needs in a scheduler that does not go on with this run."""
        saved: dict[str, Any] = {"only_upstream": self._only_upstream}
        run = self.run
        if run is not None and run.index and not run.done and run.plan.states > 1:
            saved["elsewhere"] = True
        return saved

    def hand_on(self, other: Stepper) -> None:
        """Lets a resumed copy take the sample that this stepper returned for its own."""
        other._last, other._version = self._last, self._version

    def __deepcopy__(self, memo: dict[int, Any]) -> Stepper:
        """For callers that put scheduler.__dict__ aside and back: another run of the scheduler."""
        other = Stepper(self.scheduler, self.upstream, self.options)
        other.resume(copy.deepcopy(self.saved(), memo))
        self.hand_on(other)
        return other

    def step(self, output: Any, timestep: Any, sample: Any, arguments: dict[str, Any]) -> Any:
        """What the scheduler's step returns for its own arguments, defaults left out."""
        return_dict = arguments.pop("return_dict", True)
        generator = arguments.pop("generator", None)
        given = arguments.pop("variance_noise", None)
        kind = _kind(output, timestep, sample)
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
            if self.options.seed is None and vars(self.scheduler).get("noise_sampler", "") is None:
                self._tree(output, timestep, sample, generator)  # drawn from or not, upstream's is
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
        if self._elsewhere:
            raise ValueError(
                f"{self.upstream.__name__} was accelerated anew in the middle of a run, whose "
                "history the first object holds: call set_timesteps() before its steps"
            )
        reason = self._only_upstream or _unfit(output, sample, arguments)
        if reason:
            return reason
        row = self._row(output, timestep, sample, arguments)
        assert self.traced is not None
        if self.traced.plan is None:
            return self.traced.reason
        try:
            self._now = self._observed(output, timestep, sample)
        except Exception:
            if self.counted and self.run is None:
                self.scheduler._step_index = None  # as upstream leaves it: no run has begun
            raise
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
                try:
                    position, traced = self._first_position(timestep), None
                except Exception:
                    # Upstream may have refused the timestep (an index, say) before it looked.
                    self.upstream.step(scheduler, output, timestep, sample, **arguments)
                    raise
        else:
            position = self._position(timestep)
        if traced is None:
            return self._begin(position, output, sample, arguments)
        row = position - self.begin
        expected = 0 if self.run is None else self.run.index
        if traced.plan is not None and row >= traced.plan.rows and not traced.memoryless:
            self._past_the_end(position, output, timestep, sample, arguments)
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

    def _past_the_end(
        self, position: int, output: Tensor, timestep: Any, sample: Tensor, arguments: Any
    ) -> None:
        """Raises what upstream raises for a step after the last."""
        shadow = self._shadow(position)
        shadow._step_index = position
        self.upstream.step(shadow, output, timestep, sample, **arguments)
        raise IndexError(f"all steps of this run are done: call set_timesteps() before {timestep}")

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
            self._before = attributes_of(self.scheduler)
        self._take_plan(position, arguments, output.shape != sample.shape)
        return 0

    def _take_plan(self, position: int, arguments: dict[str, Any], doubled: bool) -> None:
        at: Any = position if position >= 0 else ("t", self._foreign[-1 - position])
        key = (
            self.upstream, self._digest, at, tuple(sorted(arguments.items())), doubled,
            self.options.seed is None, self.options.float32_latents,
        )  # fmt: skip
        traced = _traced.get(key)
        if traced is None:
            traced = _traced.put(key, self._trace(position, arguments, doubled))
        self.traced, self.begin, self._settings, self.run = traced, position, arguments, None
        self._doubled = doubled

    def _trace(self, position: int, arguments: dict[str, Any], doubled: bool) -> Traced:
        timesteps = self._timesteps_from(position)
        # Beyond the end upstream may go on (timesteps that repeat, below) or not; and the last of
        # SCM's timesteps only ends the last step.
        beyond, ordinary = self._repeated(position), len(timesteps)
        ends = [*range(ordinary + beyond, max(ordinary - 2, 0), -1)]
        timesteps += timesteps[-1:] * beyond
        for end in ends:
            notes = TraceNotes()
            try:
                plan = trace_scheduler(
                    self._shadow(position), timesteps[:end], arguments,
                    fed=self.options.seed is None, learned_variance=doubled, notes=notes,
                )  # fmt: skip
                break
            except Exception as error:
                # Whatever upstream's code does on forms, its own step on images is the answer.
                reason = f"{type(error).__name__}: {error}"
                ended = end > ordinary or isinstance(error, IndexError | AssertionError)
                if end == ends[-1] or not ended:
                    return Traced(None, reason)
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
        return Traced(plan, "", notes, kept, frozenset(images), scales, _condensed(notes, plan))

    def _repeated(self, position: int) -> int:
        """How far before a position its timestep stands first: upstream looks for it and begins at
        the second of equal ones, so that a loop over all of them steps beyond the end."""
        if position <= 0 or getattr(self.scheduler, "_begin_index", None) is not None:
            return 0
        values = self.scheduler.timesteps[: position + 1].tolist()
        first: int = values.index(values[-1])
        return position - first

    def _timesteps_from(self, position: int) -> list[Tensor]:
        timesteps: Tensor = self.scheduler.timesteps.cpu()
        if position >= 0:
            return list(timesteps[position:])
        return [torch.tensor(self._foreign[-1 - position]).to(timesteps.dtype)]

    def _shadow(self, position: int) -> Any:
        """A copy of the scheduler as it stood before the run."""
        shadow = copied(self.upstream, self._before)
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
        if observed.kept_dtype is not None:
            dtype = torch.promote_types(dtype, observed.kept_dtype)
        if traced.condensed:
            # A sum of a sample and small terms must not lose in 16 bits what its terms would keep.
            dtype = torch.promote_types(dtype, torch.float32)
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
            sample = sample.to(torch.promote_types(dtype, torch.float32))
        else:
            kinds |= {"borrow": True, "dtype": dtype}
        run = Run(traced.plan, sample, **kinds)
        run.index = row
        self.run, self._kinds = run, kinds
        return run

    # What the scheduler is asked for between steps.

    def scale(self) -> float | None:
        """What scale_model_input multiplies by before the coming step; None before a run."""
        traced, run = self.traced, self.run
        if traced is None or traced.plan is None or run is None or run.done:
            return None
        if self.counted and vars(self.scheduler)["_step_index"] != self.begin + run.index:
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
            items = []
            for item in value:
                try:
                    items.append(self._materialized(item, name))
                except AttributeError as error:
                    items.append(error)
            return _Carried(items)
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
        unchanged = sample is self._last and _version(sample) == self._version
        x = run.x if unchanged else sample.to(run.x.dtype)
        run.renew_input()
        seeded = self.options.seed is not None
        result = run.advance(output, [x, *run.history], draws, seeded, x.dtype, dtypes[-1])
        self._last = result if run.model_input.dtype == result.dtype else run.model_input
        self._version = _version(self._last)
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
        said(self.upstream, reason)
        return self.upstream.step(self.scheduler, output, timestep, sample, **arguments)


def _condensed(notes: TraceNotes, plan: SolverPlan) -> bool:
    """Whether some row takes most of the new sample from history that is a sum which upstream does
    not keep, as the second half of Heun's step does: x' = (x + h/2 d) + h/2 d'.

    Upstream keeps x and d, so that one float32 tensor moves no more bytes than its two of 16 bits.
    With more history (UniPC) sums of 16 bits are measured to lose less than upstream's own step.
    """
    assert notes.recorder is not None
    if plan.states != 2:
        return False
    samples = {row.x for row in notes.recorder.rows}
    for i, attributes in enumerate(notes.attributes[:-1]):
        slots = notes.recorder.slots[i + 1] if i + 1 < len(notes.recorder.slots) else []
        for k, terms in enumerate(slots, start=1):
            if terms is None or len(terms) == 1:
                continue
            of_samples = sum(abs(v) for key, v in terms.items() if key in samples)
            if abs(plan.A[i + 1, 0, k]) * of_samples < 0.5:
                continue
            kept = [
                item.terms for value in attributes.values()
                for item in (value if isinstance(value, list) else [value])
                if isinstance(item, LinearForm)
            ]  # fmt: skip
            if not any(_multiples(terms, other) for other in kept):
                return True
    return False


def _multiples(one: dict[int, float], other: dict[int, float]) -> bool:
    if one.keys() != other.keys():
        return False
    first = next(iter(one))
    ratio = other[first] / one[first]
    return all(abs(other[k] - ratio * one[k]) <= 1e-9 * abs(other[k]) for k in one)


class _Carried(list[Any]):
    """A list of images, of which reading one that the run does not carry raises AttributeError."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        for item in found if isinstance(index, slice) else [found]:
            if isinstance(item, AttributeError):
                raise item
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(len(self)))

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _images(value: Any) -> bool:
    """Whether an attribute holds images, alone or in a list."""
    return isinstance(value, LinearForm) or (
        isinstance(value, list) and any(isinstance(item, LinearForm) for item in value)
    )


def _handed(row: int, draw: int) -> Tensor:
    raise AssertionError("the draws are given to every step")


def _kind(output: Any, timestep: Any, sample: Any) -> Any:
    """What must stay the same from step to step for the last step's checks to hold."""
    if type(output) is not Tensor or type(sample) is not Tensor:
        return None
    return (
        output.shape, sample.shape, output.dtype, sample.dtype, output.device, sample.device,
        timestep.dtype if type(timestep) is Tensor else type(timestep),
    )  # fmt: skip


def _version(x: Tensor) -> int:
    """Changes when a tensor is written to, but for those of torch.inference_mode."""
    return 0 if x.is_inference() else x._version


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
