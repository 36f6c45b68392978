"""The fused solver step (fastdiff/ops/step.py): every tensor is read once and written once.

A program handles tiles of one sample, so its coefficients are scalars and what it does about a zero
coefficient is the same in all threads: the column is not read, the noise is not computed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.exp import learned_scale
from fastdiff.kernels.launch import (
    Launch,
    inside,
    load,
    sample_origin,
    store,
    tiling,
    widened,
)
from fastdiff.kernels.noise import halves, low_word, normal_tile, sample_key
from fastdiff.kernels.policy import Policy
from fastdiff.kernels.row import all_used, combine, is_used, load_coefficients, nan_unless
from fastdiff.ops.step import HEADER, Layout, parse, unpack

__all__ = ["prepare"]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    first_block = (start >> 2).to(tl.uint32)
    if used is None:
        z = normal_tile(first_block, key, counter[0], counter[1], FAST, NEIGHBOURS, BLOCK)
        z = widened(z.to(NOISE_DTYPE))
    else:
        z = tl.zeros((BLOCK,), tl.float32)
        if used:
            z = normal_tile(first_block, key, counter[0], counter[1], FAST, NEIGHBOURS, BLOCK)
            z = widened(z.to(NOISE_DTYPE))
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
    origin,
    size,
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
    The noise comes first: it needs the most registers, and the compiler moves loads up to it where
    it has room for their values.
    """
    O: tl.constexpr = len(states)  # noqa: E741 - the columns are S0.., o, c, z0..
    C: tl.constexpr = O + 1
    FIRST_DRAW: tl.constexpr = C + 1
    COLUMNS: tl.constexpr = FIRST_DRAW + DRAWS
    index = origin + start + tl.arange(0, BLOCK)
    o_index = index
    if LEARNED:
        o_index = index + origin

    z = ()
    for k in tl.static_range(DRAWS):
        if (UNION >> (FIRST_DRAW + k)) & 1:
            used = is_used(coefficients, FIRST_DRAW + k, MASKS, DENSE)
            if len(noise) > 0:
                z = z + (load(noise[k] + index, used, mask),)
            else:
                z = z + (draw(used, start, key, counters[k], NOISE_DTYPE, FAST, NEIGHBOURS, BLOCK),)
        else:
            z = z + (0,)

    noise_scale = None
    # f interpolates between the two bounds of log sigma (Nichol & Dhariwal 2021, eq. 15).
    if LEARNED and (UNION >> FIRST_DRAW) > 0:
        used = is_used(coefficients, FIRST_DRAW, MASKS, DENSE)
        if not DENSE:
            for k in tl.static_range(1, DRAWS):
                used = used | is_used(coefficients, FIRST_DRAW + k, MASKS, DENSE)
        v = load(model_outputs[len(model_outputs) - 1] + (o_index + n), used, mask)
        noise_scale = learned_scale(v, log_variance[0], log_variance[1])

    s = ()
    for k in tl.static_range(O):
        if (UNION >> k) & 1:
            used = is_used(coefficients, k, MASKS, DENSE)
            s = s + (load(states[k] + index, used, mask),)
        else:
            s = s + (0,)

    o = 0
    if (UNION >> O) & 1:
        used = is_used(coefficients, O, MASKS, DENSE)
        o = load(model_outputs[0] + o_index, used, mask)
        if len(model_outputs) == 2:
            o_cond = load(model_outputs[1] + o_index, used, mask)
            o = o + guidance_scale * (o_cond - o)

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
        stored = store(out[r] + index, acc, mask)
        if r == 0:
            for copy in tl.static_range(COPIES):
                store(model_input + (index + copy * size), c_in * stored, mask)


@triton.jit(
    do_not_specialize=[
        "last_row", "seed_low", "seed_high", "sample_offset", "noise_step", "stream",
        "size_units", "n_units",
    ],
    # A plan's steps point at their own row: every second one is not at a multiple of 16 bytes.
    do_not_specialize_on_alignment=[
        "table", "rows", "keys", "draws", "guidance_scale", "threshold",
    ],
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
    last_row: tl.uint32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    sample_offset: tl.uint32,
    noise_step: tl.uint32,
    stream: tl.uint32,
    size_units: tl.int64,
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
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    b, n, origin = sample_origin(n_units, UNIT, SINGLE, LARGE, SAMPLE_AXIS)
    C: tl.constexpr = len(states) + 1
    COLUMNS: tl.constexpr = C + 1 + DRAWS
    FIRST: tl.constexpr = HEADER + COLUMNS - 1
    NEVER: tl.constexpr = COLUMNS
    size = (size_units * UNIT).to(n.dtype)  # of a tensor: how far apart copies of the output are

    # An index outside the table reads the last row, whose entries then become NaN.
    asked = tl.load(rows + b * ROW_STRIDE)
    index = tl.minimum(asked.to(tl.uint32), last_row.to(tl.uint32)).to(tl.int64)
    exists = index == asked
    row = table + index * (FIRST + COLUMNS * len(out))
    # P has no entry for c itself, which leaves a gap in its columns.
    coefficients = (load_coefficients(row + HEADER, MASKS[0], COLUMNS, C),)
    for r in tl.static_range(len(out)):
        entries = row + FIRST + r * COLUMNS
        coefficients = coefficients + (load_coefficients(entries, MASKS[r + 1], COLUMNS, NEVER),)

    bounds = ()
    if CLAMP:
        if threshold is None:
            bounds = (tl.load(row), tl.load(row + 1))
        else:
            high = tl.load(threshold + b * THRESHOLD_STRIDE)
            bounds = (-high, high, tl.div_rn(tl.full((), 1.0, tl.float32), high))
    c_in = None
    if COPIES > 0:
        c_in = tl.load(row + 2)
    log_variance = ()
    if LEARNED:
        log_variance = (tl.load(row + 3), tl.load(row + 4))
    guidance = None
    if guidance_scale is not None:
        guidance = tl.load(guidance_scale + b * GUIDANCE_STRIDE)

    key = ()
    counters = ()
    if len(noise) == 0 and DRAWS > 0:
        key = sample_key(keys, seed_low, seed_high, sample_offset, b)
        for k in tl.static_range(DRAWS):
            if draws is None:
                counters = counters + ((noise_step.to(tl.uint32), stream.to(tl.uint32)),)
            else:
                pair = draws + (index * DRAWS + k) * 2
                counters = counters + ((low_word(pair, 0), low_word(pair, 1)),)

    tile = tl.program_id(1 - SAMPLE_AXIS)
    stride = tl.num_programs(1 - SAMPLE_AXIS)
    # The common tile, whole and without a zero coefficient, is straight-line code.
    if exists & all_used(coefficients, MASKS, COLUMNS):
        while tile.to(n.dtype) * BLOCK <= n - BLOCK:
            start = tile.to(n.dtype) * BLOCK
            step_tile(
                states, model_outputs, noise, out, model_input, coefficients, bounds, c_in,
                log_variance, guidance, key, counters, origin, size, n, start, None, True,
                MASKS, UNION, CLAMP, DRAWS, NOISE_DTYPE, LEARNED, COPIES, FAST, NEIGHBOURS, BLOCK,
            )  # fmt: skip
            tile += stride

    # What is left, in pieces of four elements a thread: to choose among terms takes registers.
    PIECES: tl.constexpr = BLOCK // PIECE
    piece = tile * PIECES
    if piece.to(n.dtype) * PIECE < n:
        marked = (nan_unless(exists, coefficients[0]),)
        for r in tl.static_range(len(out)):
            marked = marked + (nan_unless(exists, coefficients[r + 1]),)
        if threshold is None:
            bounds = nan_unless(exists, bounds)
        if COPIES > 0:
            c_in = tl.where(exists, c_in, float("nan"))
        log_variance = nan_unless(exists, log_variance)
        while piece.to(n.dtype) * PIECE < n:
            start = piece.to(n.dtype) * PIECE
            step_tile(
                states, model_outputs, noise, out, model_input, marked, bounds, c_in,
                log_variance, guidance, key, counters, origin, size, n, start,
                inside(start, n, PIECE), False, MASKS, UNION, CLAMP, DRAWS, NOISE_DTYPE, LEARNED,
                COPIES, FAST, 4, PIECE,
            )  # fmt: skip
            piece += 1
            if piece % PIECES == 0:
                piece += (stride - 1) * PIECES


class _Structure(NamedTuple):
    """A layout, and what it says to the compiler."""

    layout: Layout
    constants: dict[str, object]


@lru_cache(maxsize=4096)
def _structure(text: str) -> _Structure:
    layout = parse(text)
    spec = layout.spec
    if spec.noise_dtype not in DTYPES:
        raise TypeError("fastdiff_triton::step: float64 noise is not served")
    low = (1 << (spec.states + 1)) - 1  # S.., o
    clamp = spec.clamp or 0
    masks = ((clamp & low) | (clamp & ~low) << 1, *spec.outputs)  # over [S.., o, c, z..], P's first
    union = 0
    for mask in masks:
        union |= mask
    return _Structure(layout, {
        "MASKS": masks,
        "UNION": union,
        "CLAMP": spec.clamp is not None,
        "DRAWS": spec.draws,
        "NOISE_DTYPE": DTYPES[spec.noise_dtype],
        "LEARNED": spec.learned,
        "HEADER": len(HEADER),
    })  # fmt: skip


def _is_light(layout: Layout, written: list[Tensor]) -> bool:
    """Whether the compiler fits the step into a full SM's registers without spilling any."""
    spec = layout.spec
    read = spec.states + layout.model_outputs
    if spec.learned or spec.clamp is not None or len(written) > 1 or read > 3:
        return False
    if not spec.draws or not layout.model_outputs or spec.fast:
        return True
    # Eight exact normals at once, as 16-bit noise is made, leave no room for a model output.
    return spec.noise_dtype == torch.float32


def prepare(
    inputs: list[Tensor],
    outputs: list[Tensor],
    layout: str,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
    *,
    nvidia: bool = True,
    policy: Policy | None = None,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `step`, or None when there is nothing to write.

    Args:
        nvidia: whether the device has the approximations of noise="fast".
        policy: launch parameters; those of the tensors' device when None.
        block: elements of a tile, a power of two; chosen by size when None.
    """
    size = outputs[0].numel()
    if not size:
        return None
    found = _structure(layout)
    spec = found.layout.spec
    t = unpack(inputs, outputs, found.layout)
    draws_seeded = spec.draws > 0 and not t.noise
    # Samples that are all treated alike are one long sample, whose tiles are whole and aligned
    # whatever the size of a sample.
    alike = not (draws_seeded or spec.learned) and all(
        value is None or value.numel() == 1 for value in (t.rows, t.guidance_scale, t.threshold)
    )
    batch = 1 if alike else outputs[0].shape[0]
    tiles = tiling(
        size // batch, batch, [*t.states, *t.model_outputs, *t.noise, *outputs],
        makes_noise=draws_seeded, nvidia=nvidia, policy=policy, block=block,
        light=_is_light(found.layout, outputs),
    )  # fmt: skip
    arguments = (
        tuple(t.states), tuple(t.model_outputs), tuple(t.noise), tuple(t.out), t.model_input,
        t.table, t.rows, t.keys, t.draws, t.guidance_scale, t.threshold, t.table.shape[0] - 1,
        *halves(seed), sample_offset, step, stream, batch * tiles.units, tiles.units,
    )  # fmt: skip
    constants = {
        **found.constants,
        "COPIES": 0 if t.model_input is None else t.model_input.numel() // size,
        "FAST": nvidia and spec.fast,
        "ROW_STRIDE": int(t.rows.numel() > 1),
        "GUIDANCE_STRIDE": int(t.guidance_scale is not None and t.guidance_scale.numel() > 1),
        "THRESHOLD_STRIDE": int(t.threshold is not None and t.threshold.numel() > 1),
        **tiles.constants,
    }
    return Launch(step_kernel, tiles.grid, arguments, constants, tiles.options)
