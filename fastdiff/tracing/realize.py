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
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastdiff.plan import MAX_DRAWS, MAX_STATES, SolverPlan
from fastdiff.tracing.linear_form import CONSTANT, NotAffineError

if TYPE_CHECKING:
    from fastdiff.tracing.linear_form import LinearForm
    from fastdiff.tracing.record import Recorder, Row

__all__ = ["from_history", "realize"]

FloatArray = NDArray[np.float64]
Terms = dict[int, float]
Slots = list[Terms | None]  # history by slot; None where a slot is free

# A direction of this relative size is rounding of the float64 arithmetic before it: a step over a
# ratio of noise levels r leaves 1e-16 r of it.
RANK = 1e-10
# The same, where only one source is left to express a functional by.
LOOSE = 1e-7
# The same, of a functional's part relative to all of it.
CANCELLED = 1e-13
# A natural candidate is taken when at least this much of it is new: bounds the condition number.
SEPARATE = 0.05


def realize(recorder: Recorder, result: LinearForm) -> SolverPlan:
    """The plan of a finished recording; `result` is the form of the final sample."""
    rows = recorder.rows
    targets = [row.seen.terms for row in rows[1:]] + [result.terms]
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        _refuse_constant(target, f"the sample after call {i}")
        if row.clamp is not None:
            _refuse_constant(row.clamp.form.terms, f"the clamped value of call {i}")
    needed = _needed(recorder, targets)
    held = _choose(recorder, needed)
    recorder.slots = held
    return _Assembly(recorder, targets, held).plan()


def _refuse_constant(terms: Terms, what: str) -> None:
    if CONSTANT in terms:
        raise NotAffineError("add", f"puts the constant {terms[CONSTANT]:g} into {what}")


def _restricted(terms: Terms, first: int) -> Terms:
    """The part over variables before `first`, unless it is what rounding left of a cancellation."""
    part = {k: v for k, v in terms.items() if k < first}
    return part if part and _size(part) > CANCELLED * _size(terms) else {}


def _size(terms: Terms) -> float:
    return max(map(abs, terms.values()))


class _Space:
    """A subspace of functionals with a fixed set of columns, orthonormal inside."""

    def __init__(self, groups: Iterable[Iterable[Terms]]) -> None:
        keys = sorted(set().union(*(terms for group in groups for terms in group)))
        self._column = {key: k for k, key in enumerate(keys)}
        self._keys = keys
        self.basis = np.zeros((0, len(keys)))

    def dense(self, terms: Terms) -> FloatArray:
        vector = np.zeros(len(self._keys))
        vector[[self._column[key] for key in terms]] = list(terms.values())
        return vector

    def sparse(self, vector: FloatArray) -> Terms:
        biggest = np.abs(vector).max()
        return {
            self._keys[k]: float(vector[k])
            for k in np.flatnonzero(np.abs(vector) > 1e-13 * biggest)
        }

    def residual(self, vector: FloatArray) -> FloatArray:
        for _ in range(2):  # once more: Gram-Schmidt loses orthogonality
            vector = vector - (vector @ self.basis.T) @ self.basis
        return vector

    def add(self, vector: FloatArray, least: float) -> bool:
        """Takes in a vector when at least that part of it is new."""
        size = np.linalg.norm(vector)
        if size == 0.0:
            return False
        rest = self.residual(vector / size)
        length = np.linalg.norm(rest)
        if length < least:
            return False
        self.basis = np.concatenate([self.basis, rest[None] / length])
        return True

    def contains(self, vector: FloatArray) -> bool:
        rest = vector - (vector @ self.basis.T) @ self.basis
        return bool(rest @ rest <= (10 * RANK) ** 2 * (vector @ vector))


def _independent(rows: list[Terms], modulo: list[Terms]) -> list[Terms]:
    """A largest independent part of the rows, best conditioned first."""
    if not modulo and all(_ratio(rows[0], other) is not None for other in rows[1:]):
        return rows[:1]
    space = _Space([rows, modulo])
    for terms in modulo:
        space.add(space.dense(terms), RANK)
    vectors = [space.dense(terms) for terms in rows]
    left = {k: v / np.linalg.norm(v) for k, v in enumerate(vectors)}
    picked = []
    while left:
        rest = {k: float(np.linalg.norm(space.residual(v))) for k, v in left.items()}
        best = max(rest, key=rest.__getitem__)
        if rest[best] < RANK:
            break
        space.add(left.pop(best), RANK)
        picked.append(rows[best])
    return picked


def _needed(recorder: Recorder, targets: list[Terms]) -> list[list[Terms]]:
    """W_i for every row: functionals of the past that span what rows i.. need of it."""
    rows = recorder.rows
    needed: list[list[Terms]] = [[] for _ in rows]
    after: list[Terms] = []
    for i in range(len(rows) - 1, -1, -1):
        row = rows[i]
        wanted = [targets[i], *after]
        if row.clamp is not None:
            wanted.append(row.clamp.form.terms)
        past = [_restricted(terms, row.first) for terms in wanted]
        past = [terms for terms in past if terms]
        if past and i:
            past = _independent(past, [] if recorder.open_loop else [row.seen.terms])
        needed[i] = after = past
    # Before the first call there is what the model sees, and nothing else.
    for terms in needed[0]:
        if _ratio(rows[0].seen.terms, terms, LOOSE) is None:
            raise NotAffineError("the sampler", "uses its starting sample apart from what it shows")
    needed[0] = []
    return needed


def _choose(recorder: Recorder, needed: list[list[Terms]]) -> list[Slots]:
    """The history held before every row, by slot."""
    held: list[Slots] = [[]]
    for i, row in enumerate(recorder.rows[:-1]):
        wanted = needed[i + 1]
        if not wanted:
            held.append([])
            continue
        sample = [] if recorder.open_loop else [recorder.rows[i + 1].seen.terms]
        kept, new = _basis(recorder, row, recorder.rows[i + 1].first, wanted, held[i], sample)
        slots: Slots = [terms if k in kept else None for k, terms in enumerate(held[i])]
        for terms in new:
            if None in slots:
                slots[slots.index(None)] = terms
            else:
                slots.append(terms)
        while slots and slots[-1] is None:
            slots.pop()
        held.append(slots)
    return held


def _basis(
    recorder: Recorder, row: Row, end: int, wanted: list[Terms], held: Slots, sample: list[Terms]
) -> tuple[set[int], list[Terms]]:
    """Slots that are kept and functionals that are written after a row, spanning `wanted`."""
    before = {k: terms for k, terms in enumerate(held) if terms is not None}
    if len(wanted) == 1 and not sample:
        return _line(row, end, wanted[0], before)
    unit = [{row.output: 1.0}]
    unit.insert(0, row.seen.terms if row.x is None else {row.x: 1.0})
    hints = [_restricted(form.terms, end) for form in row.hints if form.terms]
    hints = [terms for terms in hints if terms and CONSTANT not in terms]
    every = [wanted, sample, before.values(), unit, hints]
    space, chosen = _Space(every), _Space(every)
    for terms in [*sample, *wanted]:
        space.add(space.dense(terms), RANK)
    for terms in sample:
        chosen.add(chosen.dense(terms), RANK)
    count = len(wanted) + len(chosen.basis)
    kept: set[int] = set()
    new: list[Terms] = []

    def offer(terms: Terms, least: float) -> bool:
        vector = space.dense(terms)
        return len(chosen.basis) < count and space.contains(vector) and chosen.add(vector, least)

    def offer_natural(least: float) -> None:
        for k, terms in before.items():
            if k not in kept and offer(terms, least):
                kept.add(k)
        new.extend(terms for terms in unit if offer(terms, least))
        new.extend(terms for terms in hints if offer(terms, least))

    offer_natural(SEPARATE)
    if len(chosen.basis) < count:
        new.extend(
            terms for terms in _of_this_call(space, row.first, wanted) if offer(terms, SEPARATE)
        )
    if len(chosen.basis) < count:
        offer_natural(SEPARATE / 50)
    if len(chosen.basis) < count:  # whatever remains, orthonormal to the rest
        rest = np.array([chosen.residual(vector) for vector in space.basis])
        _, _, directions = np.linalg.svd(rest, full_matrices=False)
        for direction in directions[: count - len(chosen.basis)]:
            new.append(chosen.sparse(direction / np.abs(direction).max()))
    return kept, new


def _line(
    row: Row, end: int, wanted: Terms, before: dict[int, Terms]
) -> tuple[set[int], list[Terms]]:
    """_basis() of a single functional: history that is a multiple of it, a tensor that the traced
    code keeps, or itself."""
    for k, terms in before.items():
        if _ratio(terms, wanted) is not None:
            return {k}, []
    if len(wanted) == 1:
        return set(), [dict.fromkeys(wanted, 1.0)]
    for form in row.hints:
        if len(form.terms) == len(wanted) and _ratio(form.terms, wanted) is not None:
            return set(), [form.terms]
    size = _size(wanted)
    return set(), [{key: value / size for key, value in wanted.items()}]


def _ratio(a: Terms, b: Terms, tolerance: float = RANK) -> float | None:
    """b / a when one is a multiple of the other."""
    if a.keys() != b.keys():
        return None
    key = max(a, key=lambda k: abs(a[k]))
    ratio = b[key] / a[key]
    slack = tolerance * abs(b[key])
    if all(abs(value - ratio * a[k]) <= slack for k, value in b.items()):
        return ratio
    return None


def _of_this_call(space: _Space, first: int, wanted: list[Terms]) -> list[Terms]:
    """Functionals in the span of `wanted` that do not involve earlier calls."""
    matrix = np.array([space.dense(terms) for terms in wanted])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    past = np.array([key < first for key in space._keys])
    left, sizes, _ = np.linalg.svd(matrix[:, past], full_matrices=True)
    rank = int((sizes > RANK).sum())
    found = []
    for combination in left[:, rank:].T:
        vector = combination @ matrix
        vector[past] = 0.0
        found.append(space.sparse(vector / np.abs(vector).max()))
    return found


@dataclass
class _Assembly:
    """Coefficients of every row from the functionals before and after it."""

    recorder: Recorder
    targets: list[Terms]
    held: list[Slots]

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
        missing = False
        for i, row in enumerate(rows):
            A[i, 0] = self._row(i, self.targets[i])
            before, after = self.held[i], self.held[i + 1] if i + 1 < R else []
            for k, terms in enumerate(after):
                if terms is not None:
                    same = k < len(before) and before[k] is terms
                    A[i, 1 + k] = np.eye(N + 2 + D)[1 + k] if same else self._row(i, terms)
            for k in range(len(inputs)):
                A[i, 1 + history + k, 1 + history + k] = 1.0
            if row.clamp is not None:
                P[i] = np.delete(self._row(i, row.clamp.form.terms), N + 1)
                lo[i], hi[i] = row.clamp.lo, row.clamp.hi
            preview: FloatArray | None = A[i, 0]
            if row.preview is not None:
                preview = self._expressed(i, row.preview.terms)
            missing |= preview is None
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
        clamped = any(row.clamp is not None for row in rows)
        learned = recorder.learned_variance or any(row.learned is not None for row in rows)
        kinds = {row.clamp.thresholding for row in rows if row.clamp is not None}
        if len(kinds) > 1:
            raise NotAffineError("clamp", "and thresholding in one sampler")
        used = (A[:, :, N + 2 :] != 0).any(1) | (P[:, N + 1 :] != 0) | (x_start[:, N + 2 :] != 0)
        about = dict(recorder.about)
        if missing:
            about["preview"] = "needs history that no result needs"
        return SolverPlan(
            name=recorder.name, about=about, A=A, x_start=x_start, draws=draws,
            t=np.array([row.t for row in rows]),
            P=P if clamped else None, lo=lo if clamped else None, hi=hi if clamped else None,
            thresholding=kinds.pop() if kinds else None,
            c_in=np.array([row.c_in for row in rows[1:]] + [1.0]), first_c_in=rows[0].c_in,
            initial_scale=recorder.initial_scale, first_churn=self._first_churn(),
            inputs=tuple(recorder.inputs), draw_dtype=recorder.draw_dtype,
            drawn=None if (drawn == used).all() else drawn,
            half_log_variance_min=half_log[0] if learned else None,
            half_log_variance_max=half_log[1] if learned else None,
            snr=snr if snr.any() else None,
        )  # fmt: skip

    def _row(self, i: int, terms: Terms) -> FloatArray:
        """Coefficients of a functional over S, o, c, z of row i."""
        coefficients = self._expressed(i, terms)
        if coefficients is None:
            raise AssertionError(f"{self.recorder.name}: row {i} is not in the span of its history")
        return coefficients

    def _expressed(self, i: int, terms: Terms) -> FloatArray | None:
        row = self.recorder.rows[i]
        N = self.states
        coefficients = np.zeros(N + 2 + self.draws)
        columns = {row.output: N}
        if row.x is not None:
            columns[row.x] = 0
        if row.clamp is not None:
            columns[row.clamp.variable] = N + 1
        columns |= {draw.variable: N + 2 + k for k, draw in enumerate(row.draws)}
        for k, given in enumerate(self.inputs):
            if i in given:
                columns[given[i]] = 1 + self.history + k
        past: Terms = {}
        for key, value in terms.items():
            column = columns.get(key)
            if column is not None:
                coefficients[column] = value
            elif key < row.first:
                past[key] = value
            else:
                raise NotAffineError("the sampler", f"uses {self.recorder.variable_name(key)}")
        past = _restricted(terms, row.first) if past else past
        if not past:
            return coefficients
        sources = {1 + k: s for k, s in enumerate(self.held[i]) if s is not None}
        if row.x is None:
            sources[0] = row.seen.terms
        solved = _solve(past, sources, 10 * CANCELLED * _size(terms))
        if solved is None:
            return None
        for k, value in solved.items():
            coefficients[k] += value
        return coefficients

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


def from_history(recorder: Recorder, row: int, form: LinearForm) -> dict[int, float] | None:
    """A form of earlier calls as a combination of the history (1..) held after a row of the plan;
    None when that is not carried."""
    held: Slots = recorder.slots[row + 1] if row + 1 < len(recorder.slots) else []
    return _solve(form.terms, {1 + k: terms for k, terms in enumerate(held) if terms is not None})


def _solve(target: Terms, sources: dict[int, Terms], least: float = 0.0) -> dict[int, float] | None:
    """target = sum_k a_k source_k, or None when there is no such sum; what is missing may be
    `least`."""
    for k, source in sources.items():
        ratio = _ratio(source, target, LOOSE if len(sources) == 1 else 1e-15)
        if ratio is not None:
            return {k: ratio}
    if len(sources) < 2:
        return None
    space = _Space([sources.values(), [target]])
    vector = space.dense(target)
    matrix = np.array([space.dense(source) for source in sources.values()])
    sizes = np.linalg.norm(matrix, axis=1)
    values = np.linalg.lstsq((matrix / sizes[:, None]).T, vector, rcond=None)[0]
    size = float(np.linalg.norm(vector))
    missing = float(np.linalg.norm(values @ (matrix / sizes[:, None]) - vector))
    if missing > max(100 * RANK * size, least):
        return None
    values[np.abs(values) < 1e-13 * size] = 0.0
    return dict(zip(sources, (float(v) for v in values / sizes), strict=True))
