"""From a recording to a plan with the least history, in a natural, well-conditioned basis.

What must be carried from call to call is what later results still need of earlier inputs. As
linear functionals of the inputs up to a call (samples, outputs, draws, clamp nodes) these span a
space W_i, whose dimension is the rank of the Hankel matrix of the sampler seen as a linear
time-varying system (van der Veen & Dewilde 1991): no implementation carries fewer tensors.

    backward   W_i = span(what row i needs of the past, W_{i+1} restricted to the past of row i)
    forward    a basis of W_i, chosen from natural candidates: history held already (nothing is
               written), the last call's sample or output, tensors that the traced code keeps
               itself, combinations of that call's tensors alone (the x_0 or epsilon of a
               multistep method), and what remains, orthonormal
    rows       every functional that row i computes, in terms of the basis before it and the
               inputs of the call
    check      the plan run on the functionals themselves gives what was recorded
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastdiff.plan import MAX_DRAWS, MAX_STATES, SolverPlan
from fastdiff.tracing.functionals import (
    NO_VECTOR,
    NOTHING,
    ROUNDING,
    Chosen,
    Functional,
    Space,
    independent,
    missing,
    solve,
    stacked,
)
from fastdiff.tracing.linear_form import CONSTANT, NotAffineError

if TYPE_CHECKING:
    from fastdiff.tracing.linear_form import LinearForm
    from fastdiff.tracing.record import Recorder

__all__ = ["from_history", "realize"]

FloatArray = NDArray[np.float64]
Terms = dict[int, float]
Slots = list[Functional | None]  # history by slot; None where a slot is free

# A natural candidate is taken when at least this much of it is new: bounds the condition number.
SEPARATE = 0.05
# History that may have more than this many times the least rounding of what it serves: a direction
# that matters little is known less precisely, and must not replace one that matters.
IMPRECISE = 100.0
# A plan that reproduces what was recorded worse than this, relative to its size, is refused.
ACCURATE = 1e-9


def realize(recorder: Recorder, result: LinearForm) -> SolverPlan:
    """The plan of a finished recording; `result` is the form of the final sample."""
    return _Realization(recorder, result).plan()


class _Realization:
    """A recording's functionals as vectors, the history that they need, and the plan's rows."""

    def __init__(self, recorder: Recorder, result: LinearForm) -> None:
        self.recorder, self.rows = recorder, recorder.rows
        self.weights = np.array(recorder.sizes)
        self.ends = [row.first for row in self.rows[1:]] + [len(recorder.names)]
        targets = [row.seen for row in self.rows[1:]] + [result]
        for i, (row, target) in enumerate(zip(self.rows, targets, strict=True)):
            _refuse_constant(target.terms, f"the sample after call {i}")
            if row.clamp is not None:
                _refuse_constant(row.clamp.form.terms, f"the clamped value of call {i}")
        open_loop = recorder.open_loop  # else targets are what the next call has of the sample
        self.targets = [
            self._functional(x, end, row.first if open_loop else -1)
            for x, row, end in zip(targets, self.rows, self.ends, strict=True)
        ]
        self.clamped = [
            None if row.clamp is None else self._functional(row.clamp.form, end, row.first)
            for row, end in zip(self.rows, self.ends, strict=True)
        ]
        self.seen = [self._functional(self.rows[0].seen, self.rows[0].first), *self.targets[:-1]]
        self.held = self._choose(self._needed())
        recorder.held = self.held
        recorder.slots = [
            [s.terms if s is not None else None for s in slots] for slots in self.held
        ]

    def _functional(self, form: LinearForm, end: int, first: int = -1) -> Functional:
        terms = form.terms
        if 0 <= first <= min(terms, default=first):  # nothing of earlier calls
            return Functional(terms, NO_VECTOR, 0.0)
        vector = np.zeros(end)
        if terms:
            keys = list(terms)
            vector[keys] = list(terms.values())
            vector *= self.weights[:end]
        return Functional(terms, vector, ROUNDING * form.magnitude)

    def _combination(self, vector: FloatArray, noise: float) -> Functional:
        """The functional of a vector, scaled to have a largest weighted coefficient of 1."""
        largest = float(vector[np.abs(vector).argmax()])
        vector = vector / largest
        vector[np.abs(vector) < 1e-15] = 0.0
        terms = {int(k): float(vector[k] / self.weights[k]) for k in np.flatnonzero(vector)}
        return Functional(terms, vector, noise / abs(largest))

    def _past(self, functional: Functional, first: int) -> Functional | None:
        """The part over variables before `first`, unless it is what rounding left."""
        past = functional.vector[:first]
        if not len(functional.vector) or not past.any():
            return None
        found = Functional({}, past, functional.noise)
        return found if found.size > NOTHING * found.noise else None

    def _needed(self) -> list[Space | None]:
        """W_i for every row: functionals of the past that span what rows i.. need of it."""
        rows = self.rows
        needed: list[Space | None] = [None] * len(rows)
        after: list[Functional] = []
        for i in range(len(rows) - 1, -1, -1):
            clamped, first = self.clamped[i], rows[i].first
            wanted = [self.targets[i], *after] + ([] if clamped is None else [clamped])
            past = [part for w in wanted if (part := self._past(w, first)) is not None]
            after = []
            if past:
                sample = [] if self.recorder.open_loop else [self.seen[i]]
                # Before the first call there is what the model sees, and nothing else.
                space = independent(past, sample if i else [self.seen[0]], first)
                after = space.rows
                needed[i] = space if after else None
        if after:
            raise NotAffineError("the sampler", "uses its starting sample apart from what it shows")
        return needed

    def _choose(self, needed: list[Space | None]) -> list[Slots]:
        """The history held before every row, by slot."""
        held: list[Slots] = [[]]
        for i in range(len(self.rows) - 1):
            space = needed[i + 1]
            if space is None:
                held.append([])
                continue
            kept, new = self._basis(i, space, held[i])
            slots: Slots = [s if k in kept else None for k, s in enumerate(held[i])]
            for functional in new:
                if None in slots:
                    slots[slots.index(None)] = functional
                else:
                    slots.append(functional)
            while slots and slots[-1] is None:
                slots.pop()
            held.append(slots)
        return held

    def _basis(self, i: int, space: Space, held: Slots) -> tuple[set[int], list[Functional]]:
        """Slots that are kept and functionals that are written after row i, spanning a space."""
        row, end = self.rows[i], self.ends[i]
        before = {k: s for k, s in enumerate(held) if s is not None}
        if len(space.basis) == 1:
            return self._line(i, space, before)
        x = self.seen[i] if row.x is None else self._unit(row.x, end)
        sample = [] if self.recorder.open_loop else [self.seen[i + 1]]
        candidates = [*sample, *before.values(), x, self._unit(row.output, end)]
        for hint in row.hints:
            if max(hint.terms) < end and CONSTANT not in hint.terms:
                candidates.append(self._functional(hint, end))
        vectors = stacked(candidates, end)
        coordinates = vectors @ space.basis.T
        rest = vectors - coordinates @ space.basis
        noise = np.array([c.noise for c in candidates]) + np.abs(coordinates) @ space.noise
        left = np.sqrt(np.einsum("ij,ij->i", rest, rest))
        sizes = np.sqrt(np.einsum("ij,ij->i", coordinates, coordinates))
        inside = (left <= NOTHING * noise) & (sizes > 1e3 * noise)
        shown = len(sample)
        chosen = Chosen(len(space.basis), coordinates[:shown])
        count = shown + len(space.rows)
        kept: set[int] = set()
        new: list[Functional] = []
        names = [*before] + [None] * (len(candidates) - shown - len(before))
        natural = [
            (k, candidate, at)
            for k, candidate, at, fits in zip(
                names, candidates[shown:], coordinates[shown:], inside[shown:], strict=True
            )
            if fits
        ]

        def offer_natural(least: float, most: float = math.inf) -> None:
            for k, candidate, at in natural:
                if float(np.abs(at) @ space.noise) > most:
                    continue
                if len(chosen.basis) < count and k not in kept and chosen.add(at, least):
                    if k is None:
                        new.append(candidate)
                    else:
                        kept.add(k)

        offer_natural(SEPARATE)
        precise = IMPRECISE * float(space.noise.min())
        if len(chosen.basis) < count:
            for at in self._of_this_call(space, row.first):
                level = float(np.abs(at) @ space.noise)
                if len(chosen.basis) < count and level <= precise and chosen.add(at, SEPARATE):
                    vector = at @ space.basis
                    vector[: row.first] = 0.0
                    new.append(self._combination(vector, level))
        if len(chosen.basis) < count:
            offer_natural(SEPARATE / 50, precise)
        if len(chosen.basis) < count:  # whatever remains, orthonormal to the rest where precise
            others = chosen.others()
            levels = np.abs(others) @ space.noise
            if (levels <= precise).all():
                found = zip(others @ space.basis, levels, strict=True)
                return kept, new + [self._combination(v, float(level)) for v, level in found]
        for least in (0.5, SEPARATE, 1e-3):
            for k, at in enumerate(np.eye(len(space.basis))):
                if len(chosen.basis) < count and chosen.add(at, least):
                    new.append(self._combination(space.basis[k], float(space.noise[k])))
        if (
            shown == 0
            and max(noise[inside].max(initial=0.0), *(b.noise for b in new), 0.0) > precise
        ):
            basis = [*(before[k] for k in kept), *new]
            if not all(missing(w, basis, 1.0) <= IMPRECISE * w.noise for w in space.rows):
                every = zip(space.basis, space.noise, strict=True)
                return set(), [self._combination(v, float(level)) for v, level in every]
        return kept, new

    def _line(
        self, i: int, space: Space, before: dict[int, Functional]
    ) -> tuple[set[int], list[Functional]]:
        """_basis() of a single direction: the first natural functional along it, or itself."""
        row, end = self.rows[i], self.ends[i]
        direction, level = space.basis[0], float(space.noise[0])

        def along(c: Functional) -> bool:
            part = float(direction[: len(c.vector)] @ c.vector)
            if part * part < 0.999 * c.size**2:
                return False
            rest = part * direction
            rest[: len(c.vector)] -= c.vector
            return math.sqrt(rest @ rest) <= NOTHING * (c.noise + abs(part) * level)

        for k, functional in before.items():
            if along(functional):
                return {k}, []
        keys = np.flatnonzero(direction)
        if len(keys) == 1:
            return set(), [self._unit(int(keys[0]), end)]
        for hint in row.hints:
            if (
                len(hint.terms) == len(keys)
                and CONSTANT not in hint.terms
                and max(hint.terms) < end
            ):
                functional = self._functional(hint, end)
                if along(functional):
                    return set(), [functional]
        return set(), [self._combination(direction, level)]

    def _unit(self, key: int, end: int) -> Functional:
        vector = np.zeros(end)
        vector[key] = self.weights[key]
        return Functional({key: 1.0}, vector, ROUNDING * float(vector[key]))

    @staticmethod
    def _of_this_call(space: Space, first: int) -> FloatArray:
        """Coordinates of functionals in a space that do not involve earlier calls."""
        past = space.basis[:, :first]
        if not past.any():
            return np.eye(len(space.basis))
        left, sizes, _ = np.linalg.svd(past, full_matrices=len(past) > first)
        sizes = np.concatenate([sizes, np.zeros(len(past) - len(sizes))])
        found: FloatArray = left.T[sizes <= NOTHING * (np.abs(left.T) @ space.noise)]
        return found

    # The rows.

    def plan(self) -> SolverPlan:
        recorder, rows = self.recorder, self.recorder.rows
        history = max(len(slots) for slots in self.held)
        inputs = list(recorder.inputs.values())
        N, D = 1 + history + len(inputs), max(len(row.draws) for row in rows)
        if N > MAX_STATES or D > MAX_DRAWS:
            raise NotAffineError(
                "the sampler", f"needs {N} states and {D} draws a call; at most {MAX_STATES} and "
                f"{MAX_DRAWS} are served"
            )  # fmt: skip
        self.states, self.history, self.inputs, self.draws = N, history, inputs, D
        R = len(rows)
        A, x_start = np.zeros((R, N, N + 2 + D)), np.zeros((R, N + 2 + D))
        P, lo, hi = np.zeros((R, N + 1 + D)), np.full(R, -np.inf), np.full(R, np.inf)
        draws = np.zeros((R, D, 2), np.int64)
        drawn = np.zeros((R, D), bool)
        half_log = np.zeros((2, R))
        lacks_preview = False
        for i, row in enumerate(rows):
            A[i, 0] = self._row(i, self.targets[i])
            before, after = self.held[i], self.held[i + 1] if i + 1 < R else []
            for k, functional in enumerate(after):
                if functional is None:
                    continue
                if k < len(before) and before[k] is functional:
                    A[i, 1 + k, 1 + k] = 1.0
                else:
                    A[i, 1 + k] = self._row(i, functional)
            for k in range(len(inputs)):
                A[i, 1 + history + k, 1 + history + k] = 1.0
            clamped = self.clamped[i]
            if row.clamp is not None and clamped is not None:
                P[i] = np.delete(self._row(i, clamped), N + 1)
                lo[i], hi[i] = row.clamp.lo, row.clamp.hi
            preview: FloatArray | None = A[i, 0]
            if row.preview is not None:
                preview = self._preview(i, row.preview)
            lacks_preview |= preview is None
            x_start[i] = 0.0 if preview is None else preview
            draws[i, :, 0] = i
            for k, draw in enumerate(row.draws):
                draws[i, k], drawn[i, k] = (draw.step, draw.stream), True
            if row.learned is not None:
                half_log[:, i] = row.learned
                for k, draw in enumerate(row.draws):
                    if draw.variable not in row.scaled.values() and A[i, :, N + 2 + k].any():
                        raise NotAffineError("exp", "times some of a step's draws only")
        snr = np.array([row.snr for row in rows])
        self._check(A, P)
        clamps = any(row.clamp is not None for row in rows)
        learned = recorder.learned_variance or any(row.learned is not None for row in rows)
        kinds = {row.clamp.thresholding for row in rows if row.clamp is not None}
        if len(kinds) > 1:
            raise NotAffineError("clamp", "and thresholding in one sampler")
        used = (A[:, :, N + 2 :] != 0).any(1) | (P[:, N + 1 :] != 0) | (x_start[:, N + 2 :] != 0)
        about = dict(recorder.about)
        if lacks_preview:
            about["preview"] = "needs history that no result needs"
        return SolverPlan(
            name=recorder.name, about=about, A=A, x_start=x_start, draws=draws,
            t=np.array([row.t for row in rows]),
            P=P if clamps else None, lo=lo if clamps else None, hi=hi if clamps else None,
            thresholding=kinds.pop() if kinds else None,
            c_in=np.array([row.c_in for row in rows[1:]] + [1.0]), first_c_in=rows[0].c_in,
            initial_scale=recorder.initial_scale, first_churn=self._first_churn(),
            first_drawn=bool(recorder.first_draws),
            inputs=tuple(recorder.inputs), draw_dtype=recorder.draw_dtype,
            drawn=None if (drawn == used).all() else drawn,
            half_log_variance_min=half_log[0] if learned else None,
            half_log_variance_max=half_log[1] if learned else None,
            snr=snr if snr.any() else None,
        )  # fmt: skip

    def _columns(self, i: int) -> dict[int, int]:
        """The columns over S, o, c, z of the variables of row i."""
        row, N = self.rows[i], self.states
        columns = {row.output: N}
        if row.x is not None:
            columns[row.x] = 0
        if row.clamp is not None:
            columns[row.clamp.variable] = N + 1
        columns |= {draw.variable: N + 2 + k for k, draw in enumerate(row.draws)}
        for k, given in enumerate(self.inputs):
            if i in given:
                columns[given[i]] = 1 + self.history + k
        return columns

    def _row(self, i: int, functional: Functional) -> FloatArray:
        """Coefficients of a functional over S, o, c, z of row i."""
        row, terms = self.rows[i], functional.terms
        coefficients = np.zeros(self.states + 2 + self.draws)
        columns = self._columns(i)
        for key in range(row.first, self.ends[i]):
            if key in terms:
                if key not in columns:
                    name = self.recorder.variable_name(key)
                    raise NotAffineError("the sampler", f"uses {name}")
                coefficients[columns[key]] = terms[key]
        past = self._past(functional, row.first)
        if past is not None:
            sources = self._sources(i)
            for k, value in solve(past, sources).items():
                coefficients[k] += value
        return coefficients

    def _sources(self, i: int) -> dict[int, Functional]:
        """Functionals of the past that row i has, by column."""
        sources = {1 + k: s for k, s in enumerate(self.held[i]) if s is not None}
        if self.rows[i].x is None:
            sources[0] = self.seen[i]
        return sources

    def _preview(self, i: int, form: LinearForm) -> FloatArray | None:
        """Coefficients of a form; None when they need history that is not carried."""
        if CONSTANT in form.terms:
            return None
        functional = self._functional(form, self.ends[i], self.rows[i].first)
        if not len(functional.vector):
            return self._row(i, functional)
        past, sources = self._past(functional, self.rows[i].first), self._sources(i)
        if past is not None and missing(past, [*sources.values()]) > ACCURATE * functional.size:
            return None
        return self._row(i, functional)

    def _check(self, A: FloatArray, P: FloatArray) -> None:
        """Runs the plan on functionals: refuses one that gives others than those recorded."""
        N, n = self.states, len(self.weights)
        S = np.zeros((N, n))
        for i, row in enumerate(self.rows):
            end = self.ends[i]
            after = i + 1 < len(self.rows) and self.held[i + 1]
            if not after and not self.held[i] and row.x is not None:
                continue  # the row is what was recorded itself
            if row.x is None:
                S[0, : row.first] = self.seen[i].vector
            V = np.zeros((N + 2 + self.draws, end))
            V[:N] = S[:, :end]
            for key, column in self._columns(i).items():
                V[column] = 0.0
                V[column, key] = self.weights[key]
            S[:, :end] = A[i] @ V
            pairs = [(S[0, :end], self.targets[i])]
            clamped = self.clamped[i]
            if clamped is not None:
                pairs.append((P[i] @ np.delete(V, N + 1, 0), clamped))
            for found, wanted in pairs:
                if not len(wanted.vector):
                    continue
                error = found - wanted.vector
                if not math.sqrt(error @ error) <= ACCURATE * wanted.size + 1e-300:
                    raise NotAffineError(
                        "the sampler", f"needs more than float64 to be computed from the least "
                        f"history: call {i} of {row.t:g} is off by "
                        f"{math.sqrt(error @ error):.1e} of {wanted.size:.1e}"
                    )  # fmt: skip

    def _first_churn(self) -> float:
        """The scale of noise that the first sample gets before the model sees it."""
        recorder = self.recorder
        assert recorder.initial is not None
        terms = dict(recorder.rows[0].seen.terms)
        scale = terms.pop(next(iter(recorder.initial.terms)), 0.0)
        churns = [terms.pop(draw.variable, 0.0) for draw in recorder.first_draws]
        used = [value for value in churns if value]
        if scale != 1.0 or terms or len(used) > 1:
            raise NotAffineError("the sampler", "changes its starting sample by more than noise")
        return used[0] if used else 0.0


def _refuse_constant(terms: Terms, what: str) -> None:
    if CONSTANT in terms:
        raise NotAffineError("add", f"puts the constant {terms[CONSTANT]:g} into {what}")


def from_history(recorder: Recorder, row: int, form: LinearForm) -> dict[int, float] | None:
    """A form of earlier calls as a combination of the history (1..) held after a row of the plan;
    None when that is not carried."""
    held: Slots = recorder.held[row + 1] if row + 1 < len(recorder.held) else []
    sources = {1 + k: s for k, s in enumerate(held) if s is not None}
    if not sources or not form.terms or CONSTANT in form.terms:
        return None
    vector = np.zeros(len(recorder.sizes))
    vector[list(form.terms)] = list(form.terms.values())
    target = Functional(form.terms, vector * recorder.sizes, ROUNDING * form.magnitude)
    if missing(target, [*sources.values()]) > ACCURATE * target.size:
        return None
    return solve(target, sources)
