"""The fused solver step: one affine map of states, model output, clamp node and noise.

For batch entry b with row i = rows[b] of the coefficient table:

    o  = o_uncond + g * (o_cond - o_uncond)      optional classifier-free guidance
    c  = clamp(P . [S, o, z], lo, hi)            optional; or clamp to +-s, times 1/s (threshold)
    out[r] = A[r] . [S, o, c, z]                 one row per output
    model_input = cast(c_in * out[0])            optional; from the stored (rounded) out[0]

Math in float32 (float64 for a float64 table), multiply and add rounded separately, accumulated in
column order S0.., o, c, z0..; a zero coefficient means that its column is neither read nor added
(the empty sum is -0.0, the identity of addition); one rounding to nearest even at the store.

q_sample, the q-posterior mean, DDPM, DDIM and every other solver are rows of such tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.noise import normals, sample_keys
from fastdiff.ops.exp import learned_scale
from fastdiff.ops.row import index_of, picked
from fastdiff.ops.schemas import DTYPE_CODES

__all__ = [
    "HEADER", "Layout", "StepOperands", "StepSpec", "parse", "step", "step_arguments",
    "step_values", "unpack",
]  # fmt: skip

# The first columns of a table row; then P over [S, o, z], then each A[r] over [S, o, c, z].
HEADER = ("lo", "hi", "c_in", "half_log_variance_min", "half_log_variance_max")


@dataclass(frozen=True)
class StepSpec:
    """The static structure of a step: which columns exist. Coefficients live in the table.

    Attributes:
        states: number of state tensors S.
        outputs: one bit mask per output row over the columns [S0.., o, c, z0..] (bit 0 is S0):
            the columns that any row of the table may use. A backend does not touch the others.
        clamp: bit mask over [S0.., o, z0..] of the clamp node's P, or None without clamp node.
        draws: number of noise tensors z per row.
        noise_dtype: dtype that seeded noise is rounded to before use.
        learned: the model output carries C more channels v in [-1, 1]; the noise coefficient is
            multiplied by exp(f * half_log_variance_max + (1 - f) * half_log_variance_min),
            f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
        fast: approximate functions in GPU noise.
        encoded: all of this as a part of the operation's `layout`.
    """

    states: int
    outputs: tuple[int, ...]
    clamp: int | None = None
    draws: int = 0
    noise_dtype: torch.dtype = torch.float32
    learned: bool = False
    fast: bool = False
    encoded: str = field(init=False, compare=False, repr=False)

    @property
    def columns(self) -> int:
        """Columns of one A row: S, o, c, z."""
        return self.states + 2 + self.draws

    @property
    def width(self) -> int:
        """Entries of one table row."""
        return len(HEADER) + self.columns - 1 + len(self.outputs) * self.columns

    @property
    def reads_model_output(self) -> bool:
        bit = 1 << self.states
        return any(mask & bit for mask in (*self.outputs, self.clamp or 0))

    def __post_init__(self) -> None:
        if self.columns > 4 * _MASK:
            raise ValueError(f"states and draws must make at most 16 columns, not {self.columns}")
        kind = DTYPE_CODES[self.noise_dtype] | self.learned << 2 | self.fast << 3
        clamp = "-" if self.clamp is None else f"{self.clamp:04x}"
        masks = "".join([f"{mask:04x}" for mask in self.outputs])
        object.__setattr__(self, "encoded", f"{self.states:x}{self.draws:x}{kind:x}{clamp}{masks}")

    def layout(
        self,
        model_outputs: int,
        noise: int,
        *,
        keys: bool = False,
        draws: bool = False,
        guidance_scale: bool = False,
        threshold: bool = False,
    ) -> str:
        """The operation's `layout`: how many tensors of each kind its inputs hold, and this.

        Hexadecimal digits: model outputs, noise tensors, which of keys, draws, guidance_scale and
        threshold there are (1, 2, 4, 8); states, draws, noise dtype with learned (4) and fast (8);
        four digits for the clamp mask, or "-", and for each output mask. Up to 15 characters,
        which most layouts have, a std::string needs no memory of its own.
        """
        optional = keys | draws << 1 | guidance_scale << 2 | threshold << 3
        return f"{model_outputs}{noise}{optional:x}{self.encoded}"


_MASK = 4  # digits of a mask
_HEAD = 6  # digits before the masks


class Layout(NamedTuple):
    """What a `layout` says; see StepSpec.layout."""

    spec: StepSpec
    model_outputs: int
    noise: int
    keys: bool
    draws: bool
    guidance_scale: bool
    threshold: bool


def parse(layout: str) -> Layout:
    """Reads what StepSpec.layout() wrote."""
    head = [int(digit, 16) for digit in layout[:_HEAD]]
    model_outputs, noise, optional, states, draws, kind = head
    clamp, first = None, _HEAD + 1
    if layout[_HEAD] != "-":
        first = _HEAD + _MASK
        clamp = int(layout[_HEAD:first], 16)
    masks = [int(layout[k : k + _MASK], 16) for k in range(first, len(layout), _MASK)]
    noise_dtype = next(dtype for dtype, code in DTYPE_CODES.items() if code == kind & 3)
    spec = StepSpec(states, tuple(masks), clamp, draws, noise_dtype, bool(kind & 4), bool(kind & 8))
    return Layout(spec, model_outputs, noise, *(bool(optional >> k & 1) for k in range(4)))


class StepOperands(NamedTuple):
    """The tensors of an operation's `inputs` and `outputs` by name; see step_values."""

    states: list[Tensor]
    model_outputs: list[Tensor]
    noise: list[Tensor]
    table: Tensor
    rows: Tensor
    keys: Tensor | None
    draws: Tensor | None
    guidance_scale: Tensor | None
    threshold: Tensor | None
    out: list[Tensor]
    model_input: Tensor | None


def unpack(inputs: Sequence[Tensor], outputs: Sequence[Tensor], layout: Layout) -> StepOperands:
    """The operation's tensors by name."""
    a = layout.spec.states
    b = a + layout.model_outputs
    c = b + layout.noise
    last = c + 2
    optional: list[Tensor | None] = []
    for there in layout[3:]:
        optional.append(inputs[last] if there else None)
        last += there
    keys, draws, guidance_scale, threshold = optional
    results = len(layout.spec.outputs)
    return StepOperands(
        list(inputs[:a]), list(inputs[a:b]), list(inputs[b:c]), inputs[c], inputs[c + 1], keys,
        draws, guidance_scale, threshold, list(outputs[:results]),
        outputs[results] if len(outputs) > results else None,
    )  # fmt: skip


def step_arguments(
    spec: StepSpec,
    states: Sequence[Tensor],
    table: Tensor,
    rows: Tensor,
    out: Sequence[Tensor],
    *,
    model_outputs: Sequence[Tensor] = (),
    noise: Sequence[Tensor] = (),
    keys: Tensor | None = None,
    draws: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    threshold: Tensor | None = None,
    counter: Sequence[int] = (0, 0, 0, 0),
    model_input: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], str, int, int, int, int]:
    """The arguments of the `step` operation.

    Args:
        out: one (B, ...) tensor per output row, which a state may be.
        model_input: (B, ...), or (2B, ...) for two copies, of the model's dtype.
        counter: (seed, sample_offset, step, stream).
        others: as in step_values; keys and draws only where the step makes noise.
    """
    inputs = [*states, *model_outputs, *noise, table, rows]
    inputs += [t for t in (keys, draws, guidance_scale, threshold) if t is not None]
    layout = spec.layout(
        len(model_outputs), len(noise), keys=keys is not None, draws=draws is not None,
        guidance_scale=guidance_scale is not None, threshold=threshold is not None,
    )  # fmt: skip
    outputs = list(out) if model_input is None else [*out, model_input]
    seed, sample_offset, step, stream = counter
    return inputs, outputs, layout, seed, sample_offset, step, stream


def step_values(
    states: Sequence[Tensor],
    model_outputs: Sequence[Tensor],
    noise: Sequence[Tensor],
    table: Tensor,
    rows: Tensor,
    keys: Tensor | None,
    draws: Tensor | None,
    guidance_scale: Tensor | None,
    threshold: Tensor | None,
    spec: StepSpec,
    counter: Sequence[int],
    out_dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """The definition of the step in plain PyTorch, differentiable: the values of `out`.

    Args:
        states: N tensors (B, ...).
        model_outputs: none, [o] or [o_uncond, o_cond]; (B, ...), with twice the channels (dim 1)
            when the variance is learned.
        noise: one (B, ...) tensor per draw, or none for seeded noise.
        table: float32 or float64 (R, width), on the device.
        rows: int64 (B,) or (1,); a row outside the table gives NaN.
        keys, counter: where seeded noise comes from; counter = (seed, sample_offset, step, stream),
            its step and stream used when draws is None.
        draws: int64 (R, D, 2), (step, stream) of every draw of every row.
        guidance_scale: float32 (B,) or (1,) g; threshold: float32 (B,) or (1,) s.
        out_dtypes: dtype of every output.
    """
    n_states, n_draws, learned = spec.states, spec.draws, spec.learned
    shape, batch = states[0].shape, states[0].shape[0]
    compute = table.dtype

    coefficient = picked(table, rows)
    counters = None if draws is None else draws[index_of(table, rows)[0]]

    def flat(value: Tensor) -> Tensor:
        return value.reshape(batch, -1).to(compute)

    def per_sample(value: Tensor) -> Tensor:
        return value.to(compute)[:, None]

    n = states[0].numel() // batch if batch else 0
    v = None
    o = None
    if model_outputs:
        halves = [flat(value) for value in model_outputs]
        if learned:
            v = halves[-1][:, n:]
        o = halves[0][:, :n]
        if len(halves) == 2:
            assert guidance_scale is not None
            o = o + per_sample(guidance_scale) * (halves[1][:, :n] - o)

    z: list[Tensor | None] = []
    for k in range(n_draws):
        bit = 1 << n_states + 2 + k
        if not any(mask & bit for mask in (*spec.outputs, (spec.clamp or 0) << 1)):
            z.append(None)
        elif noise:
            z.append(flat(noise[k]))
        else:
            all_keys = sample_keys(keys, counter[0], counter[1], batch, states[0].device)
            step: Tensor | int = counter[2] if counters is None else counters[:, k, 0]
            stream: Tensor | int = counter[3] if counters is None else counters[:, k, 1]
            z.append(normals(all_keys, step, stream, n).to(spec.noise_dtype).to(compute))

    noise_scale = None
    if learned:
        assert v is not None
        noise_scale = learned_scale(v, coefficient[:, 3:4], coefficient[:, 4:5])

    def combine(mask: int, first: int, values: list[Tensor | None]) -> Tensor:
        acc = None
        for column, value in enumerate(values):
            if not mask >> column & 1:
                continue
            assert value is not None
            a = coefficient[:, first + column, None]
            used = a != 0
            if noise_scale is not None and column >= len(values) - n_draws:
                a = a * noise_scale
            # -0.0 + term == term for every term, so the sum starts at the first used column.
            before = torch.full_like(value, -0.0) if acc is None else acc
            acc = torch.where(used, before + a * value, before)
        if acc is None:
            acc = torch.full((batch, n), -0.0, dtype=compute, device=table.device)
        return acc

    s = [flat(state) for state in states]
    c = None
    if spec.clamp is not None:
        c = combine(spec.clamp, len(HEADER), [*s, o, *z])
        if threshold is None:
            lo, hi = coefficient[:, 0:1], coefficient[:, 1:2]
            c = torch.where(c < lo, lo, torch.where(c > hi, hi, c))  # NaN passes
        else:
            bound = per_sample(threshold)
            c = torch.where(c < -bound, -bound, torch.where(c > bound, bound, c))
            c = c * (1.0 / bound)
    results = []
    first = len(HEADER) + spec.columns - 1
    for mask, dtype in zip(spec.outputs, out_dtypes, strict=True):
        results.append(combine(mask, first, [*s, o, c, *z]).to(dtype).reshape(shape))
        first += spec.columns
    return results


def step(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
) -> None:
    """The `step` operation of the reference backend: step_values, stored."""
    parsed = parse(layout)
    given = unpack(inputs, outputs, parsed)
    table, rows, model_input = given.table, given.rows, given.model_input
    values = step_values(
        given.states, given.model_outputs, given.noise, table, rows, given.keys, given.draws,
        given.guidance_scale, given.threshold, parsed.spec, (seed, sample_offset, step, stream),
        [tensor.dtype for tensor in given.out],
    )  # fmt: skip
    if model_input is not None:
        c_in = picked(table, rows)[:, 2]
        stored = values[0].reshape(values[0].shape[0], -1).to(table.dtype)
        scaled = (c_in[:, None] * stored).to(model_input.dtype)
        copies = model_input.numel() // max(values[0].numel(), 1)
        model_input.copy_(torch.cat([scaled] * copies).reshape(model_input.shape))
    for target, value in zip(given.out, values, strict=True):
        target.copy_(value)
