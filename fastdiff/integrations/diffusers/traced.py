"""From a scheduler to a plan: its own code traced once, and what the trace saw beside the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.identity import Cache, digest
from fastdiff.integrations.diffusers.observe import Observed, observe
from fastdiff.integrations.diffusers.options import Options
from fastdiff.integrations.diffusers.shadow import copied
from fastdiff.plan import SolverPlan
from fastdiff.tracing.trace import TraceNotes, forms_in, trace_scheduler

__all__ = ["Origin", "Traced"]


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


class Origin:
    """A scheduler as it stood before a run.

    Args:
        attributes: its own, lists apart from it.
        counted: whether upstream counts its steps or goes by the value of the timestep.
        foreign: timesteps that set_timesteps() did not make; they stand at positions -1, -2, ...
    """

    def __init__(
        self, upstream: Any, attributes: dict[str, Any], counted: bool, foreign: Sequence[float]
    ) -> None:
        self.upstream, self.attributes = upstream, attributes
        self.counted, self.foreign = counted, foreign
        self._digest = digest(copied(upstream, attributes))

    def shadow(self, position: int) -> Any:
        """A copy of the scheduler, to be used up, whose steps begin at a position."""
        shadow = copied(self.upstream, self.attributes)
        if self.counted:
            shadow._step_index, shadow._begin_index = None, position
        return shadow

    def traced(
        self, position: int, arguments: dict[str, Any], doubled: bool, options: Options
    ) -> Traced:
        """The plan from a position on, from the cache if it is there.

        Args:
            arguments: of step, beside the model output, the timestep and the sample.
            doubled: outputs have twice the channels: learned variance.
        """
        at: Any = position if position >= 0 else ("t", self.foreign[-1 - position])
        fed = options.seed is None
        key = (
            self.upstream, self._digest, at, tuple(sorted(arguments.items())), doubled, fed,
            options.makes_inputs,
        )  # fmt: skip
        found = _traced.get(key)
        if found is None:
            found = self._trace(position, arguments, doubled, fed)
            if found.plan is not None and not options.makes_inputs:
                # scale_model_input is then an operation of its own.
                found = replace(found, plan=replace(found.plan, c_in=None, first_c_in=1.0))
            found = _traced.put(key, found)
        return found

    def observed(
        self,
        traced: Traced,
        position: int,
        arguments: dict[str, Any],
        output: Tensor,
        timestep: Any,
        sample: Tensor,
    ) -> Observed:
        """What upstream's step does with dtypes and random numbers, for such arguments."""
        kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep)
        key = (sample.dtype, output.dtype, sample.dim(), kind)
        found = traced.observed.get(key)
        if found is None:
            assert traced.plan is not None
            first = timestep.cpu() if isinstance(timestep, Tensor) else timestep
            timesteps = [first, *self._timesteps_from(position)[1:]]
            found = traced.observed[key] = observe(
                self.shadow(position), timesteps, sample, output, arguments,
                bool(traced.plan.consumes.any()),
            )  # fmt: skip
        return found

    def _trace(self, position: int, arguments: dict[str, Any], doubled: bool, fed: bool) -> Traced:
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
                    self.shadow(position), timesteps[:end], arguments, fed=fed,
                    learned_variance=doubled, notes=notes,
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
        numbers = [{k: v for k, v in row.items() if not forms_in([v])} for row in notes.attributes]
        images = {k for row in notes.attributes for k, v in row.items() if forms_in([v])}
        changing = {
            k for row in numbers for k, v in row.items()
            if k != "_begin_index" and (k in images or self.attributes.get(k, self) is not v)
        }  # fmt: skip
        kept = tuple({k: v for k, v in row.items() if k in changing} for row in numbers)
        return Traced(plan, "", notes, kept, frozenset(images), scales, _condensed(notes, plan))

    def _repeated(self, position: int) -> int:
        """How far before a position its timestep stands first: upstream looks for it and begins at
        the second of equal ones, so that a loop over all of them steps beyond the end."""
        if position <= 0 or self.attributes.get("_begin_index") is not None:
            return 0
        values = self.attributes["timesteps"][: position + 1].tolist()
        first: int = values.index(values[-1])
        return position - first

    def _timesteps_from(self, position: int) -> list[Tensor]:
        timesteps: Tensor = self.attributes["timesteps"].cpu()
        if position >= 0:
            return list(timesteps[position:])
        return [torch.tensor(self.foreign[-1 - position]).to(timesteps.dtype)]


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
            kept = [form.terms for form in forms_in(attributes.values())]
            if not any(_multiples(terms, other) for other in kept):
                return True
    return False


def _multiples(one: dict[int, float], other: dict[int, float]) -> bool:
    if one.keys() != other.keys():
        return False
    first = next(iter(one))
    ratio = other[first] / one[first]
    return all(abs(other[k] - ratio * one[k]) <= 1e-9 * abs(other[k]) for k in one)
