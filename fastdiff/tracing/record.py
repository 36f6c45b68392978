"""The recorder: a sampler written, or run, on linear forms, turned into a SolverPlan.

    rec = Recorder("Euler, 20 steps")
    x = rec.begin(scale=sigmas[0])
    for i in range(20):
        x, denoised = rec.call(x, t=sigmas[i])
        rec.preview(denoised)
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
    plan = rec.finish(x)

Forms of earlier calls may be kept and used later; which tensors carry them from call to call, and
how few are enough, is worked out by fastdiff/tracing/realize.py.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fastdiff.noise import STREAM_STEP, STREAM_STEP_SECOND
from fastdiff.plan import SolverPlan
from fastdiff.tracing.linear_form import CONSTANT, LinearForm, NotAffineError

if TYPE_CHECKING:
    from fastdiff.tracing.realize import Slots

__all__ = ["Draw", "Recorder", "Row"]

# Streams of the draws of one row, in order (fastdiff/noise.py); then any unused ones.
STREAMS = (STREAM_STEP, STREAM_STEP_SECOND, 5, 6)


@dataclass
class Draw:
    """A noise draw of a row: its variable, where seeded noise comes from, what upstream drew."""

    variable: int
    step: int
    stream: int
    dtype: torch.dtype | None = None
    query: tuple[float, float] | None = None


@dataclass
class Clamp:
    variable: int
    form: LinearForm
    lo: float
    hi: float
    thresholding: tuple[float, float] | None = None


@dataclass
class Row:
    """What one model call and the arithmetic after it did."""

    t: float
    c_in: float
    first: int  # variables from here on are this call's
    seen: LinearForm  # what the model saw, before c_in, over variables of earlier calls
    x: int | None  # the variable of the sample in an open loop
    output: int
    draws: list[Draw] = field(default_factory=list)
    clamp: Clamp | None = None
    preview: LinearForm | None = None
    learned: tuple[float, float] | None = None
    scaled: dict[int, int] = field(default_factory=dict)  # draws to what they are times exp(..)
    snr: float = 0.0
    corrected: LinearForm | None = None
    hints: list[LinearForm] = field(default_factory=list)


def _natural(c_in: float) -> float:
    """The size of a sample that models see c_in times of, near size 1."""
    return 1.0 / abs(c_in) if c_in and math.isfinite(c_in) else 1.0


class Recorder:
    """Records one run of a sampler.

    Args:
        name, about: of the plan.
        open_loop: the sample is a fresh variable at every call, since callers may change it
            between calls. False when the sampler's own loop is traced, where they cannot.
        draw_dtype: SolverPlan.draw_dtype.
        shape: of the image that forms stand for; batch 1.
        learned_variance: model outputs carry a variance in a second half of the channels.
    """

    def __init__(
        self,
        name: str,
        about: dict[str, str] | None = None,
        *,
        open_loop: bool = True,
        draw_dtype: str = "sample",
        shape: Iterable[int] = (1, 3, 5, 7),
        learned_variance: bool = False,
    ) -> None:
        self.name, self.about = name, dict(about or {})
        self.open_loop, self.draw_dtype = open_loop, draw_dtype
        self.shape = torch.Size(shape)
        self.learned_variance = learned_variance
        self.rows: list[Row] = []
        self.names: list[str] = []
        self.sizes: list[float] = []  # natural sizes of the variables
        self.inputs: dict[str, dict[int, int]] = {}  # by name and call
        self.initial_scale = 1.0
        self.first_draws: list[Draw] = []
        self.initial: LinearForm | None = None
        # What finish() chose: the history before every call by slot, and the same as vectors.
        self.slots: list[list[dict[int, float] | None]] = []
        self.held: list[Slots] = []
        self._halves: dict[int, LinearForm] = {}
        self._times: list[float] = []  # of the Brownian motion, and its increment after each
        self._increments: dict[float, LinearForm] = {}

    # Variables.

    def _variable(self, name: str, size: float = 1.0) -> int:
        self.names.append(name)
        self.sizes.append(size)
        return len(self.names) - 1

    def variable_name(self, key: int) -> str:
        return "1" if key == CONSTANT else self.names[key]

    def _form(self, key: int, dtype: torch.dtype = torch.float64) -> LinearForm:
        return LinearForm(self, {key: 1.0}, dtype, magnitude=self.sizes[key])

    # The sampler's side.

    def begin(self, scale: float = 1.0) -> LinearForm:
        """x_T; `scale` is the standard deviation of the noise it is made from."""
        if self.initial is not None:
            raise ValueError("begin() was called before")
        self.initial_scale = float(scale)
        self.initial = self._form(self._variable("x_T", abs(self.initial_scale) or 1.0))
        return self.initial

    def scaled_input(self, x: LinearForm, c_in: float) -> None:
        """The model of the last call sees c_in x: said after call(), with the x that it gave."""
        row = self.rows[-1]
        assert row.x is not None
        row.c_in = c_in
        self.sizes[row.x] = x.magnitude = _natural(c_in)

    def input(self, name: str) -> LinearForm:
        """A tensor that the caller supplies at every call; this is that of the last call."""
        if not self.rows:
            raise ValueError("input() belongs to a call")
        i, given = len(self.rows) - 1, self.inputs.setdefault(name, {})
        if i not in given:
            given[i] = self._variable(f"{name}_{i}")
        return self._form(given[i])

    def call(self, x: LinearForm, t: float, c_in: float = 1.0) -> tuple[LinearForm, LinearForm]:
        """A model call: returns the sample that it saw (a fresh variable in an open loop) and the
        model's output."""
        if self.initial is None:
            raise ValueError("begin() must be called before call()")
        i, first, seen = len(self.rows), len(self.names), x
        if self.open_loop:
            x = self._form(self._variable(f"x_{i}", _natural(c_in)), x.dtype)
        output = self._variable(f"o_{i}")
        own = first if self.open_loop else None
        self.rows.append(Row(float(t), float(c_in), first, seen, own, output))
        shape = self.shape
        if self.learned_variance:
            shape = torch.Size((shape[0], 2 * shape[1], *shape[2:]))
        return x, LinearForm(self, {output: 1.0}, shape=shape)

    def noise(self) -> LinearForm:
        """A standard normal draw of the last call."""
        if not self.rows:
            raise ValueError("noise() belongs to a call; before the first one use churn()")
        return self._draw(len(self.rows) - 1, None, None)

    def churn(self) -> LinearForm:
        """A standard normal draw added to the sample before the coming call."""
        i = len(self.rows)
        stream = self._free(i, (STREAM_STEP_SECOND, *STREAMS[2:]))
        draw = Draw(self._variable(f"churn_{i}"), i, stream)
        (self.rows[-1].draws if self.rows else self.first_draws).append(draw)
        return self._form(draw.variable)

    def drawn(
        self, dtype: torch.dtype | None = None, query: tuple[float, float] | None = None
    ) -> LinearForm:
        """A draw that traced code makes, at any time."""
        if self.rows:
            return self._draw(len(self.rows) - 1, dtype, query)
        draw = Draw(self._variable("churn_0"), 0, STREAM_STEP_SECOND, dtype, query)
        self.first_draws.append(draw)
        return self._form(draw.variable)

    def _draw(
        self, i: int, dtype: torch.dtype | None, query: tuple[float, float] | None
    ) -> LinearForm:
        row = self.rows[i]
        stream = self._free(i, STREAMS)
        k = len(row.draws)
        draw = Draw(self._variable(f"z_{i}.{k}"), i, stream, dtype, query)
        row.draws.append(draw)
        return self._form(draw.variable, dtype or torch.float64)

    def _free(self, i: int, streams: Iterable[int]) -> int:
        """A stream of step i that no draw has, its churn before the call included."""
        near = [self.first_draws] + [row.draws for row in self.rows[max(i - 1, 0) : i + 1]]
        taken = {draw.stream for draws in near for draw in draws if draw.step == i}
        for stream in streams:
            if stream not in taken:
                return stream
        raise NotAffineError("noise", f"is drawn more than {len(STREAMS)} times in one step")

    def clamp(self, form: LinearForm, lo: float, hi: float) -> LinearForm:
        """clamp(form, lo, hi); one a call."""
        return self._clamp(Clamp(-1, form, float(lo), float(hi)))

    def threshold(self, form: LinearForm, ratio: float, largest: float) -> LinearForm:
        """Dynamic thresholding of a form; see SolverPlan.thresholding."""
        clamp = Clamp(-1, form, -float("inf"), float("inf"), (float(ratio), float(largest)))
        return self._clamp(clamp)

    def _clamp(self, clamp: Clamp) -> LinearForm:
        if not self.rows:
            raise NotAffineError("clamp", "before the first model call has no place in a plan")
        row = self.rows[-1]
        if row.clamp is not None:
            old = row.clamp
            same = (old.lo, old.hi, old.thresholding) == (clamp.lo, clamp.hi, clamp.thresholding)
            if not same or old.form.terms != clamp.form.terms:
                raise NotAffineError("clamp", "a second time in one step has no place in a plan")
            return self._form(old.variable, clamp.form.dtype)
        clamp.variable = self._variable(f"c_{len(self.rows) - 1}")
        row.clamp = clamp
        return self._form(clamp.variable, clamp.form.dtype)

    def learned(self, z: LinearForm, half_log_min: float, half_log_max: float) -> LinearForm:
        """z times exp(f half_log_max + (1 - f) half_log_min), f = (v + 1) / 2 with v the second
        half of the model's channels (Nichol & Dhariwal 2021, eq. 15)."""
        row = self.rows[-1]
        scale = (float(half_log_min), float(half_log_max))
        if row.learned not in (None, scale):
            raise NotAffineError("exp", "of two variances in one step")
        plain = {draw.variable: draw for draw in row.draws}
        plain = {key: draw for key, draw in plain.items() if key not in row.scaled.values()}
        if not set(z.terms) <= {*plain, *row.scaled}:
            raise NotAffineError("exp", "times anything but the step's noise is not affine")
        row.learned = scale
        for key in set(z.terms) - set(row.scaled):
            row.scaled[key] = plain[key].variable = self._variable(f"sigma {self.names[key]}")
        terms = {row.scaled[k]: v for k, v in z.terms.items()}
        return LinearForm(self, terms, z.dtype, z.shape, z.magnitude)

    def corrector(self, x: LinearForm, g: LinearForm, snr: float) -> LinearForm:
        """x + eps g + sqrt(2 eps) z with eps = 2 (snr ||z|| / ||g||)^2, which is measured when the
        plan runs (Song et al. 2021, algorithms 4 and 5; fastdiff/ops/corrector.py).

        g is a multiple of the last call's output and x does not contain it; the result is what the
        next call sees, as it is.
        """
        row = self.rows[-1]
        if row.snr or not snr > 0:
            raise ValueError(f"snr must be > 0, one corrector a call, not {snr}")
        if set(g.terms) != {row.output} or row.output in x.terms:
            raise NotAffineError("corrector", "takes a multiple of the output of this call")
        row.snr, row.corrected = float(snr), x + g + self.noise()
        return row.corrected

    def halves(self, form: LinearForm) -> list[LinearForm]:
        """Model output and variance of a model output with twice the channels."""
        (key,) = form.terms
        if key not in self._halves:
            self._halves[key] = self._form(self._variable(f"v_{len(self.rows) - 1}"), form.dtype)
        return [self._form(key, form.dtype), self._halves[key]]

    def brownian(self, begin: float, end: float) -> LinearForm:
        """(W(end) - W(begin)) / sqrt(|end - begin|) of one Brownian motion per recording.

        Independent draws become its increments: what a new interval does not know yet is drawn,
        inside of a known one by the Brownian bridge.
        """
        low, high = sorted((float(begin), float(end)))
        if low == high:
            raise ValueError(f"begin and end must differ, not {begin}")
        for time in (low, high):
            self._know(time)
        total: LinearForm | None = None
        for a, b in zip(self._times, self._times[1:], strict=False):
            if low <= a and b <= high:
                part = self._increments[a]
                total = part if total is None else total + part
        assert total is not None
        sign = 1.0 if end > begin else -1.0
        return total * (sign / math.sqrt(high - low))

    def _know(self, time: float) -> None:
        """Makes `time` an end of increments of the Brownian motion."""
        times, known = self._times, self._increments
        if time in times:
            return
        k = bisect.bisect(times, time)
        times.insert(k, time)
        if 0 < k < len(times) - 1:
            a, b = times[k - 1], times[k + 1]
            share, whole = (time - a) / (b - a), known[a]
            bridge = self.drawn() * math.sqrt(share * (b - time))
            known[a] = whole * share + bridge
            known[time] = whole * (1 - share) - bridge
        elif len(times) > 1:
            a, b = (times[0], times[1]) if k == 0 else (times[-2], times[-1])
            known[a] = self.drawn() * math.sqrt(b - a)

    def scaled_noise(self, exponent: LinearForm, z: LinearForm) -> LinearForm:
        """exp(a v + b) z as a learned variance."""
        variance = self._halves.get(self.rows[-1].output)
        variances = set() if variance is None else set(variance.terms)
        slope = sum(value for key, value in exponent.terms.items() if key in variances)
        if set(exponent.terms) - variances - {CONSTANT}:
            raise NotAffineError("exp", "of an image is not affine")
        offset = exponent.terms.get(CONSTANT, 0.0)
        return self.learned(z, offset - slope, offset + slope)

    def preview(self, form: LinearForm) -> None:
        """The denoised estimate of the last call."""
        self.rows[-1].preview = form

    def hint(self, forms: Iterable[LinearForm]) -> None:
        """Tensors that the traced code keeps after the last call: natural history. Those that it
        kept before are no news."""
        row = self.rows[-1]
        row.hints = [form for form in forms if form.terms and max(form.terms) >= row.first]

    def finish(self, x: LinearForm) -> SolverPlan:
        """The plan of what was recorded, with x the result."""
        from fastdiff.tracing.realize import realize

        if not self.rows:
            raise ValueError("no model call was recorded")
        results = [row.seen for row in self.rows[1:]] + [x]
        for row, result in zip(self.rows, results, strict=True):
            if row.corrected is not None and row.corrected.terms != result.terms:
                raise NotAffineError("corrector", "must be the last thing that a call does")
        return realize(self, x)
