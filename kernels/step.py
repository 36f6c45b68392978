"""The fused solver step (fastdiff/ops/step.py): every tensor is read once and written once.

A program handles one tile of one sample, so its coefficients are scalars and a zero coefficient
costs a branch that all threads take alike: the column is not read, the noise is not computed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.exp import exp
from fastdiff.kernels.launch import (
    Launch,
    empty_sum,
    inside_tile,
    load,
    store,
    tile_origin,
    tiling,
)
from fastdiff.kernels.noise import normal_tile, sample_key
from fastdiff.ops.schemas import DTYPE_CODES
from fastdiff.ops.step import HEADER

__all__ = ["prepare"]

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
NOISE_DTYPES = {code: _DTYPES[d] for d, code in DTYPE_CODES.items() if d in _DTYPES}


@triton.jit
def load_coefficients(
    entries, inside, MASK: tl.constexpr, COLUMNS: tl.constexpr, ABSENT: tl.constexpr
):
    """The row's coefficients of the columns in MASK; the table has no entry for column ABSENT."""
    coefficients = ()
    for column in tl.static_range(COLUMNS):
        if column == ABSENT:
            entries = entries - 1
        if (MASK >> column) & 1:
            coefficients = coefficients + (row_entry(entries, column, inside),)
        else:
            coefficients = coefficients + (0.0,)
    return coefficients


@triton.jit
def row_entry(row, column: tl.constexpr, inside):
    return tl.load(row + column, mask=inside, other=float("nan"))


@triton.jit
def is_used(coefficients, column: tl.constexpr, MASKS: tl.constexpr, DENSE: tl.constexpr):
    """Whether any sum has a coefficient other than zero for the column; None: all have."""
    if DENSE:
        used = None
    else:
        used = tl.full((), False, tl.int1)
        for i in tl.static_range(len(coefficients)):
            if (MASKS[i] >> column) & 1:
                used = used | (coefficients[i][column] != 0)
    return used


@triton.jit
def all_used(coefficients, MASKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether no coefficient that MASKS allows is zero."""
    dense = tl.full((), True, tl.int1)
    for i in tl.static_range(len(coefficients)):
        for column in tl.static_range(COLUMNS):
            if (MASKS[i] >> column) & 1:
                dense = dense & (coefficients[i][column] != 0)
    return dense


@triton.jit
def combine(
    coefficients,
    values,
    noise_scale,
    MASK: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST_DRAW: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of coefficient times value in column order, columns with a zero coefficient left out."""
    acc = empty_sum(BLOCK)
    for column in tl.static_range(COLUMNS):
        if (MASK >> column) & 1:
            a = coefficients[column]
            value = values[column]
            if DENSE:
                acc = acc + scaled(a, noise_scale, column >= FIRST_DRAW) * value
            else:
                if a != 0:
                    acc = acc + scaled(a, noise_scale, column >= FIRST_DRAW) * value
    return acc


@triton.jit
def scaled(a, noise_scale, IS_DRAW: tl.constexpr):
    """The coefficient; of a draw, times the noise scale of learned variance."""
    if IS_DRAW and noise_scale is not None:
        a = a * noise_scale
    return a


@triton.jit
def draw(
    used,
    start,
    key,
    counter,
    NOISE_DTYPE: tl.constexpr,
    FAST: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Seeded noise of a tile, rounded to its dtype; not computed unless used."""
    first_block = (start // 4).to(tl.uint32)
    if used is None:
        z = normal_tile(first_block, key, counter[0], counter[1], FAST, NEIGHBOURS, BLOCK)
        z = z.to(NOISE_DTYPE).to(tl.float32)
    else:
        z = tl.zeros((BLOCK,), tl.float32)
        if used:
            z = normal_tile(first_block, key, counter[0], counter[1], FAST, NEIGHBOURS, BLOCK)
            z = z.to(NOISE_DTYPE).to(tl.float32)
    return z


@triton.jit
def step_tile(
    states,
    model_outputs,
    noise,
    out,
    model_input,
    coefficients,
    bounds,
    c_in,
    log_variance,
    guidance_scale,
    key,
    counters,
    b,
    batch,
    n,
    start,
    mask,
    DENSE: tl.constexpr,
    MASKS: tl.constexpr,
    UNION: tl.constexpr,
    CLAMP: tl.constexpr,
    DRAWS: tl.constexpr,
    NOISE_DTYPE: tl.constexpr,
    LEARNED: tl.constexpr,
    COPIES: tl.constexpr,
    FAST: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile; mask is None inside a sample. `coefficients`: of the clamp node, then per output.

    bounds: low, high and, with a threshold, its reciprocal. counters: (step, stream) per draw.
    """
    O: tl.constexpr = len(states)  # noqa: E741 - the columns are S0.., o, c, z0..
    C: tl.constexpr = O + 1
    FIRST_DRAW: tl.constexpr = C + 1
    COLUMNS: tl.constexpr = FIRST_DRAW + DRAWS
    offset = b * n + start
    o_offset = offset
    if LEARNED:
        o_offset = offset + b * n

    s = ()
    for k in tl.static_range(O):
        if (UNION >> k) & 1:
            used = is_used(coefficients, k, MASKS, DENSE)
            s = s + (load(states[k] + offset, used, mask, BLOCK),)
        else:
            s = s + (0,)

    o = 0
    if (UNION >> O) & 1:
        used = is_used(coefficients, O, MASKS, DENSE)
        o = load(model_outputs[0] + o_offset, used, mask, BLOCK)
        if len(model_outputs) == 2:
            o_cond = load(model_outputs[1] + o_offset, used, mask, BLOCK)
            o = o + guidance_scale * (o_cond - o)

    noise_scale = None
    # f interpolates between the two bounds of log sigma (Nichol & Dhariwal 2021, eq. 15).
    if LEARNED and (UNION >> FIRST_DRAW) > 0:
        used = is_used(coefficients, FIRST_DRAW, MASKS, DENSE)
        if not DENSE:
            for k in tl.static_range(1, DRAWS):
                used = used | is_used(coefficients, FIRST_DRAW + k, MASKS, DENSE)
        v = load(model_outputs[len(model_outputs) - 1] + o_offset + n, used, mask, BLOCK)
        f = v * 0.5 + 0.5
        noise_scale = exp(f * log_variance[1] + (1.0 - f) * log_variance[0])

    z = ()
    for k in tl.static_range(DRAWS):
        if (UNION >> (FIRST_DRAW + k)) & 1:
            used = is_used(coefficients, FIRST_DRAW + k, MASKS, DENSE)
            if len(noise) > 0:
                z = z + (load(noise[k] + offset, used, mask, BLOCK),)
            else:
                z = z + (draw(used, start, key, counters[k], NOISE_DTYPE, FAST, NEIGHBOURS, BLOCK),)
        else:
            z = z + (0,)

    values = s + (o, 0) + z
    if CLAMP:
        p = coefficients[0]
        c = combine(p, values, noise_scale, MASKS[0], COLUMNS, FIRST_DRAW, DENSE, BLOCK)
        # Written so that NaN passes.
        c = tl.where(c < bounds[0], bounds[0], tl.where(c > bounds[1], bounds[1], c))
        if len(bounds) == 3:
            c = c * bounds[2]
        values = s + (o, c) + z

    for r in tl.static_range(len(out)):
        a = coefficients[r + 1]
        acc = combine(a, values, noise_scale, MASKS[r + 1], COLUMNS, FIRST_DRAW, DENSE, BLOCK)
        stored = store(out[r] + offset, acc, mask, BLOCK)
        if r == 0:
            for copy in tl.static_range(COPIES):
                pointer = model_input + offset + copy * batch * n
                store(pointer, c_in * stored, mask, BLOCK)


@triton.jit(
    do_not_specialize=[
        "table_rows", "seed", "sample_offset", "noise_step", "stream", "batch", "n_units",
    ]
)  # fmt: skip
def step_kernel(
    states,
    model_outputs,
    noise,
    out,
    model_input,
    table,
    rows,
    keys,
    draws,
    guidance_scale,
    threshold,
    table_rows: tl.int64,
    seed: tl.int64,
    sample_offset: tl.int64,
    noise_step: tl.int64,
    stream: tl.int64,
    batch: tl.int64,
    n_units: tl.int64,
    MASKS: tl.constexpr,
    UNION: tl.constexpr,
    CLAMP: tl.constexpr,
    DRAWS: tl.constexpr,
    NOISE_DTYPE: tl.constexpr,
    LEARNED: tl.constexpr,
    COPIES: tl.constexpr,
    FAST: tl.constexpr,
    HEADER: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GUIDANCE_STRIDE: tl.constexpr,
    THRESHOLD_STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    TAIL: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n, start = tile_origin(n_units, UNIT, SAMPLE_AXIS, BLOCK)
    C: tl.constexpr = len(states) + 1
    COLUMNS: tl.constexpr = C + 1 + DRAWS
    FIRST: tl.constexpr = HEADER + COLUMNS - 1
    NEVER: tl.constexpr = COLUMNS

    index = tl.load(rows + b * ROW_STRIDE)
    inside = (index >= 0) & (index < table_rows)
    row = table + index * (FIRST + COLUMNS * len(out))
    # P has no entry for c itself, which leaves a gap in its columns.
    coefficients = (load_coefficients(row + HEADER, inside, MASKS[0], COLUMNS, C),)
    for r in tl.static_range(len(out)):
        entries = row + FIRST + r * COLUMNS
        a = load_coefficients(entries, inside, MASKS[r + 1], COLUMNS, NEVER)
        coefficients = coefficients + (a,)

    bounds = ()
    if CLAMP:
        if threshold is None:
            bounds = (row_entry(row, 0, inside), row_entry(row, 1, inside))
        else:
            high = tl.load(threshold + b * THRESHOLD_STRIDE)
            bounds = (-high, high, tl.div_rn(tl.full((), 1.0, tl.float32), high))
    c_in = None
    if COPIES > 0:
        c_in = row_entry(row, 2, inside)
    log_variance = ()
    if LEARNED:
        log_variance = (row_entry(row, 3, inside), row_entry(row, 4, inside))
    guidance = None
    if guidance_scale is not None:
        guidance = tl.load(guidance_scale + b * GUIDANCE_STRIDE)

    key = ()
    counters = ()
    if len(noise) == 0 and DRAWS > 0:
        key = sample_key(keys, seed, sample_offset, b)
        for k in tl.static_range(DRAWS):
            if draws is None:
                counters = counters + ((noise_step.to(tl.uint32), stream.to(tl.uint32)),)
            else:
                pair = draws + (tl.where(inside, index, 0) * DRAWS + k) * 2
                counters = counters + (
                    (tl.load(pair).to(tl.uint32), tl.load(pair + 1).to(tl.uint32)),
                )

    mask = None
    dense = all_used(coefficients, MASKS, COLUMNS)
    if TAIL:
        dense = dense & (start + BLOCK <= n)
        mask = inside_tile(start, n, BLOCK)
    # The common tile, whole and without a zero coefficient, is straight-line code.
    if dense:
        step_tile(
            states, model_outputs, noise, out, model_input, coefficients, bounds, c_in,
            log_variance, guidance, key, counters, b, batch, n, start, None, True,
            MASKS, UNION, CLAMP, DRAWS, NOISE_DTYPE, LEARNED, COPIES, FAST, NEIGHBOURS, BLOCK,
        )  # fmt: skip
    else:
        step_tile(
            states, model_outputs, noise, out, model_input, coefficients, bounds, c_in,
            log_variance, guidance, key, counters, b, batch, n, start, mask, False,
            MASKS, UNION, CLAMP, DRAWS, NOISE_DTYPE, LEARNED, COPIES, FAST, NEIGHBOURS, BLOCK,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _constants(spec: tuple[int, ...], states: int) -> dict[str, object]:
    """What the encoded StepSpec says to the compiler; masks over [S.., o, c, z..], P's first."""
    draws, noise_code, learned, _, clamp, *outputs = spec
    if noise_code not in NOISE_DTYPES:
        raise TypeError("fastdiff_triton::step: float64 noise is not served")
    low = (1 << (states + 1)) - 1  # S.., o
    p = 0 if clamp < 0 else (clamp & low) | (clamp & ~low) << 1
    masks = (p, *outputs)
    union = 0
    for mask in masks:
        union |= mask
    return {
        "MASKS": masks,
        "UNION": union,
        "CLAMP": clamp >= 0,
        "DRAWS": draws,
        "NOISE_DTYPE": NOISE_DTYPES[noise_code],
        "LEARNED": bool(learned),
        "HEADER": len(HEADER),
    }


def prepare(
    states: list[Tensor],
    model_outputs: list[Tensor],
    noise: list[Tensor],
    table: Tensor,
    rows: Tensor,
    keys: Tensor | None,
    draws: Tensor | None,
    guidance_scale: Tensor | None,
    threshold: Tensor | None,
    spec: list[int],
    counter: list[int],
    out: list[Tensor],
    model_input: Tensor | None,
    *,
    nvidia: bool = True,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `step`, or None when there is nothing to write.

    Args:
        nvidia: whether the device has the approximations of noise="fast".
        block: elements per program, a power of two; chosen by size when None.
    """
    size = out[0].numel()
    if not size:
        return None
    batch = out[0].shape[0]
    written = [*out] if model_input is None else [*out, model_input]
    tensors = [*states, *model_outputs, *noise, *written]
    tiles = tiling(size // batch, batch, tensors, nvidia=nvidia, block=block)
    arguments = (
        tuple(states), tuple(model_outputs), tuple(noise), tuple(out), model_input,
        table, rows, keys, draws, guidance_scale, threshold,
        table.shape[0], *counter, batch, tiles.units,
    )  # fmt: skip
    constants = {
        **_constants(tuple(spec), len(states)),
        "COPIES": 0 if model_input is None else model_input.numel() // size,
        "FAST": nvidia and bool(spec[3]),
        "ROW_STRIDE": int(rows.numel() > 1),
        "GUIDANCE_STRIDE": int(guidance_scale is not None and guidance_scale.numel() > 1),
        "THRESHOLD_STRIDE": int(threshold is not None and threshold.numel() > 1),
        **tiles.constants,
    }
    return Launch(step_kernel, tiles.grid, arguments, constants, tiles.options)
