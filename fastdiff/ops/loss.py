"""Per-sample losses and bounds of a diffusion model, each in one pass over memory.

For batch entry b with row i = rows[b] of the coefficient table, over the elements of the sample:

    o = o_uncond + g * (o_cond - o_uncond)      optional classifier-free guidance
    c = clamp(P . [y, o], lo, hi)               optional: the prediction of x_0
    l = l0 + l1 * v                             log variance; v: the C further channels of o

    error     rho(e), e = E . [x, y, o, c, z]   rho: e^2, |e|, Huber, pseudo-Huber
    bound     f(d, l), d = D . [x, y, o, c]     f: KL or discretized likelihood of a step of the
                                                chain (which one, the row says), or a log-density
    x_start   (x - c)^2

    result[k, b] = scale_k * (sum over the elements of term k) + offset_k

x is x_0, or a target, or the sample whose density is asked for; y is x_t; z is noise, regenerated
from its seed or given as a tensor. With `makes`, x is not read but made,
x = sigma z - D . [y, o, c] rounded at the store: the solver step whose log-density is the bound.
Where the variance is learned, sigma is times exp(f log_scale_high + (1 - f) log_scale_low) there,
f = (v + 1) / 2, as in a step (ops/step.py).
Which terms and columns there are is static (LossSpec); a column that is in no mask is not read.

Math in float32 (float64 for a float64 table), multiply and add rounded separately, sums in the
order of their columns, exp and log by the polynomials of ops/exp.py and ops/log.py. The elements of
a sample are added pairwise: neighbours 2k and 2k+1, then neighbouring sums, and so on; a sum
without a neighbour is added to +0. So the bits do not depend on blocks, threads, batch or backend.

`loss_grad` is the derivative of the results with respect to the model outputs, again one pass.
Where `slopes` are kept it needs none: of a lone error that has no c, slope = rho'(e) times
(gradient of the result) * error_scale * e_o is the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.noise import normals, sample_keys
from fastdiff.ops.exp import exp, learned_scale
from fastdiff.ops.held import remembered
from fastdiff.ops.loss_terms import (
    discretized_nll,
    discretized_nll_slopes,
    rho_slope,
    rho_value,
)
from fastdiff.ops.row import picked
from fastdiff.ops.schemas import DTYPE_CODES

__all__ = [
    "COLUMNS", "PIECE", "Layout", "LossOperands", "LossSpec", "loss", "loss_arguments", "loss_grad",
    "loss_values", "pairwise_sum", "parse", "partial_count", "unpack",
]  # fmt: skip

# A row of the table. The masks of a LossSpec are over [x, y, o, c, z] (error), [x, y, o, c]
# (bound) and [y, o] (clamp), in bits from the first.
COLUMNS = (
    "lo", "hi", "p_y", "p_o",
    "e_x", "e_y", "e_o", "e_c", "e_z", "error_scale", "error_offset", "delta",
    "d_x", "d_y", "d_o", "d_c", "l0", "l1",
    "true_log_variance", "true_inverse_variance",  # of the posterior q, for a learned variance
    "half_inverse_variance", "inverse_std",  # of the model, for a fixed variance: of l0
    "discretized", "floor",  # not 0: the row is a likelihood, at most `floor` nats an element
    "sigma", "log_scale_low", "log_scale_high",  # logs of what a learned variance scales sigma by
    "bound_scale", "bound_offset", "x_start_scale",
)  # fmt: skip

ERROR, BOUND, X_START = 1, 2, 4  # bits of LossSpec.terms; results come in this order
PIECE = 1024  # elements whose sum is one entry of `partials`


@dataclass(frozen=True)
class LossSpec:
    """The static structure of a loss: which terms and columns exist.

    Attributes:
        terms: bits ERROR, BOUND, X_START.
        error: mask over [x, y, o, c, z].
        bound: mask over [x, y, o, c].
        clamp: mask of P over [y, o], or None without c.
        rho: index into RHOS of loss_terms.py.
        density: the bound is log N(x; x - d, e^l), not a term of the variational bound.
        learned: the model output carries C more channels v.
        frozen: the bound has no derivative by way of d (the mean of a hybrid loss; Nichol &
            Dhariwal 2021, section 3.1).
        makes: x is made, stored and used as stored.
        noise_dtype: dtype that seeded noise is rounded to before use.
        fast: approximate functions in GPU noise.
        slopes: rho'(e) of every element is stored too, in the type of the math; on CPUs only.
    """

    terms: int
    error: int = 0
    bound: int = 0
    clamp: int | None = None
    rho: int = 0
    density: bool = False
    learned: bool = False
    frozen: bool = False
    makes: bool = False
    noise_dtype: torch.dtype = torch.float32
    fast: bool = False
    slopes: bool = False

    @property
    def count(self) -> int:
        """Results per sample."""
        return self.terms.bit_count()

    @property
    def reads_x(self) -> bool:
        """Whether x is an input: a term has it as a column, and it is not made."""
        used = self.error & 1 or self.bound & 1 or self.terms & X_START
        return bool(used) and not self.makes

    @cached_property
    def keeping(self) -> LossSpec:
        """The same, with slopes."""
        return replace(self, slopes=True)

    @property
    def reads_y(self) -> bool:
        return bool(self.error & 2 or self.bound & 2 or (self.clamp or 0) & 1)

    @property
    def draws(self) -> bool:
        """Whether there is a z."""
        return bool(self.error & 16) or self.makes

    def layout(
        self, model_outputs: int, noise: int, *, keys: bool = False, guidance_scale: bool = False
    ) -> str:
        """The operation's `layout`: which tensors its inputs hold, and this. Hexadecimal digits:

        model outputs, noise tensors, optional inputs (1 keys, 2 guidance_scale), terms, error (2
        digits), bound, clamp ("-" for none), rho, noise dtype, flags (1 density, 2 learned,
        4 frozen, 8 makes), others (1 fast, 2 slopes).
        """
        optional = keys | guidance_scale << 1
        flags = self.density | self.learned << 1 | self.frozen << 2 | self.makes << 3
        others = self.fast | self.slopes << 1
        clamp = "-" if self.clamp is None else f"{self.clamp:x}"
        return (
            f"{model_outputs}{noise}{optional:x}{self.terms:x}{self.error:02x}{self.bound:x}{clamp}"
            f"{self.rho:x}{DTYPE_CODES[self.noise_dtype]:x}{flags:x}{others:x}"
        )


class Layout(NamedTuple):
    """What a `layout` says; see LossSpec.layout."""

    spec: LossSpec
    model_outputs: int
    noise: int
    keys: bool
    guidance_scale: bool


@remembered
def parse(layout: str) -> Layout:
    """Reads what LossSpec.layout() wrote."""
    clamp = None if layout[7] == "-" else int(layout[7], 16)
    model_outputs, noise, optional, terms = (int(digit, 16) for digit in layout[:4])
    error, bound = int(layout[4:6], 16), int(layout[6], 16)
    rho, code, flags, others = (int(digit, 16) for digit in layout[8:12])
    noise_dtype = next(dtype for dtype, number in DTYPE_CODES.items() if number == code)
    spec = LossSpec(
        terms, error, bound, clamp, rho, bool(flags & 1), bool(flags & 2), bool(flags & 4),
        bool(flags & 8), noise_dtype, bool(others & 1), bool(others & 2),
    )  # fmt: skip
    return Layout(spec, model_outputs, noise, bool(optional & 1), bool(optional & 2))


class LossOperands(NamedTuple):
    """The tensors of `inputs` by name, and what follows them; see loss_values."""

    model_outputs: list[Tensor]
    x: Tensor | None
    y: Tensor | None
    noise: list[Tensor]
    table: Tensor
    rows: Tensor
    keys: Tensor | None
    guidance_scale: Tensor | None
    rest: list[Tensor]


def unpack(inputs: Sequence[Tensor], layout: Layout) -> LossOperands:
    """The operation's inputs by name. `rest`: the gradients that only loss_grad has."""
    spec, remaining = layout.spec, iter(inputs)
    model_outputs = [next(remaining) for _ in range(layout.model_outputs)]
    x = next(remaining) if spec.reads_x else None
    y = next(remaining) if spec.reads_y else None
    noise = [next(remaining) for _ in range(layout.noise)]
    table, rows = next(remaining), next(remaining)
    keys = next(remaining) if layout.keys else None
    guidance_scale = next(remaining) if layout.guidance_scale else None
    return LossOperands(
        model_outputs, x, y, noise, table, rows, keys, guidance_scale, list(remaining)
    )


def loss_arguments(
    spec: LossSpec,
    outputs: Sequence[Tensor],
    model_outputs: Sequence[Tensor],
    x: Tensor | None,
    y: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *,
    noise: Sequence[Tensor] = (),
    keys: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    gradients: Tensor | None = None,
    counter: Sequence[int] = (0, 0, 0, 0),
) -> tuple[list[Tensor], list[Tensor], str, int, int, int, int]:
    """The arguments of `loss`, and with `gradients` those of `loss_grad`.

    Args:
        outputs: of loss: the results (K, B), the partial sums (K, B, partial_count(n)), both of
            the table's dtype, x (B, ...) where the spec makes it, and the slopes (B, ...) where it
            keeps them. Of loss_grad: one tensor of the shape and dtype of each model output.
        x, y: None where the spec does not read them.
        gradients: (K, B) of the table's dtype: the derivative by the results.
        counter: (seed, sample_offset, step, stream).
        others: as in loss_values; keys only where the spec draws and no noise is given.
    """
    inputs = [*model_outputs, *(t for t in (x, y) if t is not None), *noise, table, rows]
    inputs += [t for t in (keys, guidance_scale, gradients) if t is not None]
    layout = spec.layout(
        len(model_outputs), len(noise), keys=keys is not None,
        guidance_scale=guidance_scale is not None,
    )  # fmt: skip
    return inputs, list(outputs), layout, *counter  # type: ignore[return-value]


def partial_count(n: int) -> int:
    """Entries per sample and result of the buffer of partial sums, n elements a sample."""
    return max(1, -(-n // PIECE))


def pairwise_sum(values: Tensor) -> Tensor:
    """Sums over the last dimension by the fixed tree: (..., n) to (...)."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


class _Row:
    """The coefficients of every sample by name, (B, 1); NaN where its row is outside the table."""

    def __init__(self, table: Tensor, rows: Tensor) -> None:
        self._values = picked(table, rows)

    def __getattr__(self, name: str) -> Tensor:
        column = COLUMNS.index(name)
        return self._values[:, column : column + 1]


class _Elements(NamedTuple):
    """What the terms are made of, (B, n) each; None where the spec has no use for it."""

    row: _Row
    x: Tensor | None
    c: Tensor | None
    clamped: Tensor | None  # bool: the clamp is at work
    e: Tensor | None
    d: Tensor | None
    v: Tensor | None
    made: Tensor | None


def _sum(mask: int, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    acc = None
    for bit, (coefficient, value) in enumerate(pairs):
        if not mask >> bit & 1:
            continue
        assert value is not None
        acc = coefficient * value if acc is None else acc + coefficient * value
    assert acc is not None
    return acc


def _elements(
    model_outputs: Sequence[Tensor],
    x: Tensor | None,
    y: Tensor | None,
    noise: Sequence[Tensor],
    table: Tensor,
    rows: Tensor,
    keys: Tensor | None,
    guidance_scale: Tensor | None,
    spec: LossSpec,
    counter: Sequence[int],
    made_dtype: torch.dtype,
) -> _Elements:
    first = model_outputs[0]
    batch, compute = first.shape[0], table.dtype
    n = first.numel() // batch // (2 if spec.learned else 1)
    row = _Row(table, rows)

    def flat(value: Tensor) -> Tensor:
        return value.reshape(batch, -1).to(compute)

    halves = [flat(value) for value in model_outputs]
    v = halves[-1][:, n:] if spec.learned else None
    o = halves[0][:, :n]
    if len(halves) == 2:
        assert guidance_scale is not None
        o = o + guidance_scale.to(compute)[:, None] * (halves[1][:, :n] - o)
    z = None
    if spec.draws:
        if noise:
            z = flat(noise[0])
        else:
            all_keys = sample_keys(keys, counter[0], counter[1], batch, first.device)
            z = normals(all_keys, counter[2], counter[3], n).to(spec.noise_dtype).to(compute)

    state = None if y is None else flat(y)
    c, clamped = None, None
    if spec.clamp is not None:
        c = _sum(spec.clamp, [(row.p_y, state), (row.p_o, o)])
        below, above = c < row.lo, c > row.hi  # NaN passes
        clamped = below | above
        c = torch.where(below, row.lo, torch.where(above, row.hi, c))
    columns = [(row.d_x, None), (row.d_y, state), (row.d_o, o), (row.d_c, c)]
    made = None
    if spec.makes:
        assert z is not None
        mean, sigma = -_sum(spec.bound & ~1, columns), row.sigma
        if v is not None:
            sigma = sigma * learned_scale(v, row.log_scale_low, row.log_scale_high)
        made = (mean + sigma * z).to(made_dtype)
        x_values: Tensor | None = made.to(compute)
    else:
        x_values = None if x is None else flat(x)
    columns[0] = (row.d_x, x_values)
    d = _sum(spec.bound, columns) if spec.terms & BOUND else None
    e = None
    if spec.terms & ERROR:
        pairs = [(row.e_x, x_values), (row.e_y, state), (row.e_o, o), (row.e_c, c), (row.e_z, z)]
        e = _sum(spec.error, pairs)
    return _Elements(row, x_values, c, clamped, e, d, v, made)


def _bound_value(spec: LossSpec, elements: _Elements) -> Tensor:
    row, d = elements.row, elements.d
    assert d is not None
    if spec.frozen:
        d = d.detach()
    square = d * d
    if elements.v is None:
        closed = square * row.half_inverse_variance
        if spec.density:
            return -closed
        s: Tensor = row.inverse_std
    else:
        log_variance = row.l0 + row.l1 * elements.v
        if spec.density:
            return (log_variance + square * exp(-log_variance)) * -0.5
        difference = log_variance - row.true_log_variance
        ratio = exp(-difference)
        distance = square * (ratio * row.true_inverse_variance)
        closed = (difference - 1.0 + ratio + distance) * 0.5
        s = exp(log_variance * -0.5)
    assert elements.x is not None
    likelihood = discretized_nll(elements.x, d, s, row.floor)
    return torch.where(row.discretized != 0, likelihood, closed)


def loss_values(
    model_outputs: Sequence[Tensor],
    x: Tensor | None,
    y: Tensor | None,
    noise: Sequence[Tensor],
    table: Tensor,
    rows: Tensor,
    keys: Tensor | None,
    guidance_scale: Tensor | None,
    spec: LossSpec,
    counter: Sequence[int],
    made_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """The definition in plain PyTorch, differentiable: results (K, B), and what else is stored.

    That is the x that was made, or the slopes, (B, n).

    Args:
        model_outputs: [o] or [o_uncond, o_cond]; (B, ...), with twice the channels (dim 1) when
            the variance is learned.
        x, y: (B, ...), or None where the spec does not read them.
        noise: [z] (B, ...), or none for seeded noise.
        table: float32 or float64 (R, len(COLUMNS)), on the device.
        rows: int64 (B,) or (1,); a row outside the table gives NaN.
        keys, counter: where seeded noise comes from; counter = (seed, sample_offset, step, stream).
        guidance_scale: float32 (B,) or (1,).
        made_dtype: dtype of the x that is made.
    """
    elements = _elements(
        model_outputs, x, y, noise, table, rows, keys, guidance_scale, spec, counter, made_dtype
    )
    row, results, stored = elements.row, [], elements.made
    if spec.terms & ERROR:
        assert elements.e is not None
        if spec.slopes:
            stored = rho_slope(spec.rho, elements.e, row.delta)
        total = pairwise_sum(rho_value(spec.rho, elements.e, row.delta))
        results.append(total * row.error_scale[:, 0] + row.error_offset[:, 0])
    if spec.terms & BOUND:
        total = pairwise_sum(_bound_value(spec, elements))
        results.append(total * row.bound_scale[:, 0] + row.bound_offset[:, 0])
    if spec.terms & X_START:
        assert elements.x is not None and elements.c is not None
        difference = elements.x - elements.c
        results.append(pairwise_sum(difference * difference) * row.x_start_scale[:, 0])
    return torch.stack([result.expand(model_outputs[0].shape[0]) for result in results]), stored


def loss(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
) -> None:
    """The `loss` operation of the reference backend: loss_values, stored."""
    parsed = parse(layout)
    given = unpack(inputs, parsed)
    made_dtype = outputs[2].dtype if parsed.spec.makes else torch.float32
    results, stored = loss_values(
        given.model_outputs, given.x, given.y, given.noise, given.table, given.rows, given.keys,
        given.guidance_scale, parsed.spec, (seed, sample_offset, step, stream), made_dtype,
    )  # fmt: skip
    outputs[0].copy_(results)
    if stored is not None:
        outputs[2].copy_(stored.reshape(outputs[2].shape))


def loss_grad(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
) -> None:
    """The `loss_grad` operation of the reference backend.

    The derivative by o is the sum over the terms, in their order, of slope * weight, the weight
    (gradient of the result) * scale * (derivative of the argument by o), made once per sample and
    another one where the clamp is at work. Where x was made it counts as given.
    """
    parsed = parse(layout)
    spec = parsed.spec
    given = unpack(inputs, parsed)
    elements = _elements(
        given.model_outputs, given.x, given.y, given.noise, given.table, given.rows, given.keys,
        given.guidance_scale, spec, (seed, sample_offset, step, stream), torch.float32,
    )  # fmt: skip
    row, gradients = elements.row, iter(given.rest[0])
    total: Tensor | None = None

    def add(slope: Tensor, weight: Tensor, direct: Tensor | None, by_c: Tensor | None) -> None:
        """Adds slope * weight * (direct + by_c p_o), without by_c where the clamp is at work."""
        nonlocal total
        zero = torch.zeros_like(weight)
        at_bound = zero if direct is None else weight * direct
        factor = at_bound
        if by_c is not None:
            through = by_c * row.p_o
            inside = weight * (through if direct is None else direct + through)
            assert elements.clamped is not None
            factor = torch.where(elements.clamped, at_bound, inside)
        term = slope * factor
        total = term if total is None else total + term

    def column(mask: int, bit: int, value: Tensor) -> Tensor | None:
        return value if mask >> bit & 1 else None

    clamp_reads_o = (spec.clamp or 0) >> 1 & 1
    by_v: Tensor | None = None
    if spec.terms & ERROR:
        weight = next(gradients)[:, None] * row.error_scale
        direct = column(spec.error, 2, row.e_o)
        by_c = column(spec.error & (8 if clamp_reads_o else 0), 3, row.e_c)
        if direct is not None or by_c is not None:
            assert elements.e is not None
            add(rho_slope(spec.rho, elements.e, row.delta), weight, direct, by_c)
    if spec.terms & BOUND:
        weight = next(gradients)[:, None] * row.bound_scale
        by_d, by_l = _bound_slopes(spec, elements)
        direct = column(spec.bound, 2, row.d_o)
        by_c = column(spec.bound & (8 if clamp_reads_o else 0), 3, row.d_c)
        if not spec.frozen and (direct is not None or by_c is not None):
            add(by_d, weight, direct, by_c)
        if by_l is not None:
            by_v = by_l * (weight * row.l1)
    if spec.terms & X_START and clamp_reads_o:
        weight = next(gradients)[:, None] * row.x_start_scale
        assert elements.x is not None and elements.c is not None
        difference = elements.x - elements.c
        add(difference + difference, weight, None, torch.full_like(weight, -1.0))

    like = given.model_outputs[0].reshape(outputs[0].shape[0], -1)
    n = like.shape[1] // (2 if spec.learned else 1)
    if total is None:
        total = torch.zeros_like(like[:, :n], dtype=row.l0.dtype)
    parts = [total]
    if len(outputs) == 2:
        assert given.guidance_scale is not None
        g = given.guidance_scale.to(total.dtype)[:, None]
        parts = [total * (1.0 - g), total * g]
    if spec.learned:
        v_part = torch.zeros_like(total) if by_v is None else by_v
        parts = [torch.cat([part, torch.zeros_like(part)], dim=1) for part in parts[:-1]] + [
            torch.cat([parts[-1], v_part], dim=1)
        ]
    for output, part in zip(outputs, parts, strict=True):
        output.copy_(part.reshape(output.shape))


def _bound_slopes(spec: LossSpec, elements: _Elements) -> tuple[Tensor, Tensor | None]:
    """Derivatives of the bound's function by d, and by the log variance when it is learned."""
    row, d = elements.row, elements.d
    assert d is not None
    if elements.v is None:
        closed_d = (d + d) * row.half_inverse_variance
        if spec.density:
            return -closed_d, None
        closed_l, s = torch.zeros_like(d), row.inverse_std
    else:
        log_variance = row.l0 + row.l1 * elements.v
        if spec.density:
            inverse = exp(-log_variance)
            by_d = d * inverse
            return -by_d, (d * by_d - 1.0) * 0.5
        ratio = exp(-(log_variance - row.true_log_variance))
        closed_d = d * (ratio * row.true_inverse_variance)
        closed_l = (1.0 - ratio - d * closed_d) * 0.5
        s = exp(log_variance * -0.5)
    assert elements.x is not None
    by_d, by_l = discretized_nll_slopes(elements.x, d, s, row.floor)
    discretized = row.discretized != 0
    by_d = torch.where(discretized, by_d, closed_d)
    return by_d, None if elements.v is None else torch.where(discretized, by_l, closed_l)
