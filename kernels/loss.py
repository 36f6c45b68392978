"""Per-sample losses and their gradients (fastdiff/ops/loss.py), each in one pass over memory.

`loss` is two launches. In the first a program handles tiles of one sample and adds the elements of
every PIECE of it in pairs, which leaves one partial sum a term; in the second a program adds the
partial sums of one sample, in pairs again, and applies scale and offset. `loss_grad` is one launch.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import Launch, empty_sum, inside, sample_origin, tiling
from fastdiff.kernels.loss_tile import (
    Structure,
    coefficients_of,
    column,
    elements,
    gradient_of,
    row_of,
    store_gradient,
    values_of,
)
from fastdiff.kernels.noise import halves, sample_key
from fastdiff.kernels.policy import Policy
from fastdiff.kernels.step import DTYPES
from fastdiff.kernels.sums import pairwise, total_of
from fastdiff.ops import loss as definition
from fastdiff.ops.loss import COLUMNS, Layout, LossOperands, parse, partial_count, unpack

__all__ = ["prepare", "prepare_grad"]

SCALES = tl.constexpr(
    tuple(COLUMNS.index(name) for name in ("error_scale", "bound_scale", "x_start_scale"))
)
_TOTAL_LEVELS = 10  # a warp adds 1024 partial sums, 32 a thread


@triton.jit
def add_tile(
    values,
    partials,
    b,
    batch,
    pieces,
    start,
    mask,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leaves the sums of a tile's pieces, for every term."""
    piece = (start >> LEVELS).to(tl.int32) + tl.arange(0, BLOCK >> LEVELS)
    for k in tl.static_range(len(values)):
        value = values[k]
        if mask is not None:
            value = tl.where(mask, value, empty_sum(BLOCK))
        at = (k * batch + b) * pieces + piece
        tl.store(partials + at, pairwise(value, LEVELS), mask=piece < pieces)


@triton.jit
def loss_tile(
    model_outputs,
    x,
    y,
    noise,
    made,
    partials,
    out,
    weights,
    coefficients,
    guidance_scale,
    key,
    counter,
    b,
    batch,
    pieces,
    origin,
    n,
    start,
    mask,
    SPEC: tl.constexpr,
    NOISE_DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: its sums, or its gradients where there are weights."""
    index = origin + start + tl.arange(0, BLOCK)
    o_index = index
    if SPEC.learned:
        o_index = index + origin
    x_value, c, clamped, e, d, v = elements(
        model_outputs, x, y, noise, made, coefficients, guidance_scale, key, counter, index,
        o_index, n, start, mask, SPEC, NOISE_DTYPE, NEIGHBOURS, BLOCK,
    )  # fmt: skip
    if len(out) > 0:
        by_o, by_v = gradient_of(x_value, c, clamped, e, d, v, weights, coefficients, SPEC, BLOCK)
        store_gradient(out, o_index, by_o, by_v, guidance_scale, n, mask, SPEC, BLOCK)
    else:
        values = values_of(x_value, c, e, d, v, coefficients, SPEC)
        add_tile(values, partials, b, batch, pieces, start, mask, LEVELS, BLOCK)


@triton.jit(
    do_not_specialize=[
        "last_row", "seed_low", "seed_high", "sample_offset", "noise_step", "stream",
        "batch", "pieces", "n_units",
    ],
    do_not_specialize_on_alignment=[
        "partials", "gradients", "table", "rows", "keys", "guidance_scale",
    ],
)  # fmt: skip
def loss_kernel(
    model_outputs,
    x,
    y,
    noise,
    made,
    partials,
    gradients,
    out,
    table,
    rows,
    keys,
    guidance_scale,
    last_row: tl.uint32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    sample_offset: tl.uint32,
    noise_step: tl.uint32,
    stream: tl.uint32,
    batch: tl.int64,
    pieces: tl.int64,
    n_units: tl.int64,
    SPEC: tl.constexpr,
    NOISE_DTYPE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GUIDANCE_STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    LEVELS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums (and x, where it is made), or with `gradients` those of the model outputs."""
    b, n, origin = sample_origin(n_units, UNIT, SINGLE, LARGE, SAMPLE_AXIS)
    row, exists = row_of(table, rows, last_row, b, ROW_STRIDE)
    coefficients = coefficients_of(row, exists)
    guidance = None
    if guidance_scale is not None:
        guidance = tl.load(guidance_scale + b * GUIDANCE_STRIDE)
    key = ()
    counter = ()
    if SPEC.draws and len(noise) == 0:
        key = sample_key(keys, seed_low, seed_high, sample_offset, b)
        counter = (noise_step.to(tl.uint32), stream.to(tl.uint32))
    weights = ()
    if gradients is not None:
        k = 0
        for term in tl.static_range(3):
            weight = 0.0
            if (SPEC.terms >> term) & 1:
                scale = column(row, exists, SCALES[term])
                weight = tl.load(gradients + (k * batch + b)) * scale
                k += 1
            weights = weights + (weight,)

    tile = tl.program_id(1 - SAMPLE_AXIS)
    while tile.to(n.dtype) * BLOCK < n:
        start = tile.to(n.dtype) * BLOCK
        if start <= n - BLOCK:
            loss_tile(
                model_outputs, x, y, noise, made, partials, out, weights, coefficients, guidance,
                key, counter, b, batch, pieces, origin, n, start, None, SPEC, NOISE_DTYPE, LEVELS,
                NEIGHBOURS, BLOCK,
            )  # fmt: skip
        else:
            loss_tile(
                model_outputs, x, y, noise, made, partials, out, weights, coefficients, guidance,
                key, counter, b, batch, pieces, origin, n, start, inside(start, n, BLOCK), SPEC,
                NOISE_DTYPE, LEVELS, NEIGHBOURS, BLOCK,
            )  # fmt: skip
        tile += tl.num_programs(1 - SAMPLE_AXIS)


@triton.jit(
    do_not_specialize=["last_row", "batch", "pieces", "n"],
    do_not_specialize_on_alignment=["partials", "results", "table", "rows"],
)
def total_kernel(
    partials,
    results,
    table,
    rows,
    last_row: tl.uint32,
    batch: tl.int64,
    pieces: tl.int64,
    n: tl.int64,
    TERMS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """The results of one sample from its partial sums, which are used up."""
    b = tl.program_id(0)
    row, exists = row_of(table, rows, last_row, b, ROW_STRIDE)
    k = 0
    for term in tl.static_range(3):
        if (TERMS >> term) & 1:
            at = partials + (k * batch + b) * pieces
            total = total_of(at, pieces.to(tl.int32), n, LEVELS)
            result = total * column(row, exists, SCALES[term])
            if term < 2:  # scales of these are followed by their offsets
                result = result + column(row, exists, SCALES[term] + 1)
            tl.store(results + (k * batch + b), result)
            k += 1


def _structure_of(layout: Layout, nvidia: bool) -> Structure:
    spec = layout.spec
    if spec.noise_dtype not in DTYPES:
        raise TypeError("fastdiff_triton::loss: float64 noise is not served")
    if spec.slopes:
        raise TypeError("fastdiff_triton::loss: slopes are kept on CPUs only")
    clamp = spec.clamp or 0
    by_o = 0
    for term, mask in ((definition.ERROR, spec.error), (definition.BOUND, spec.bound)):
        moved = mask & 4 or (mask & 8 and clamp & 2)
        if spec.terms & term and moved and not (term == definition.BOUND and spec.frozen):
            by_o |= term
    if clamp & 2:
        by_o |= spec.terms & definition.X_START
    return Structure(
        spec.terms, spec.error, spec.bound, clamp, spec.rho, spec.density, spec.learned,
        spec.makes, by_o, spec.draws, nvidia and spec.fast,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _parsed(text: str, nvidia: bool) -> tuple[Layout, Structure]:
    layout = parse(text)
    return layout, _structure_of(layout, nvidia)


def _tiles(
    inputs: list[Tensor],
    written: list[Tensor],
    layout: str,
    counter: tuple[int, int, int, int],
    *,
    partials: Tensor | None,
    made: Tensor | None,
    out: tuple[Tensor, ...],
    nvidia: bool,
    policy: Policy | None,
    block: int | None,
) -> Launch:
    """The launch of loss_kernel for samples that have elements; `written`, of their size."""
    parsed, structure = _parsed(layout, nvidia)
    t = unpack(inputs, parsed)
    images = [*t.model_outputs, *(v for v in (t.x, t.y) if v is not None), *t.noise, *written]
    n = _sample_size(t, structure)
    batch = t.model_outputs[0].shape[0]
    tiles = tiling(
        n, batch, images, makes_noise=structure.draws and not t.noise, nvidia=nvidia,
        policy=policy, block=block, least=1 if out else definition.PIECE,
        elements=4 if _is_heavy(structure) else None,
    )  # fmt: skip
    seed, *others = counter
    arguments = (
        tuple(t.model_outputs), t.x, t.y, tuple(t.noise), made, partials,
        t.rest[0] if t.rest else None, out, t.table, t.rows, t.keys, t.guidance_scale,
        t.table.shape[0] - 1, *halves(seed), *others, batch, partial_count(n), tiles.units,
    )  # fmt: skip
    constants = {
        "SPEC": structure,
        "NOISE_DTYPE": DTYPES[parsed.spec.noise_dtype],
        "ROW_STRIDE": int(t.rows.numel() > 1),
        "GUIDANCE_STRIDE": int(t.guidance_scale is not None and t.guidance_scale.numel() > 1),
        "LEVELS": min(tiles.constants["BLOCK"], definition.PIECE).bit_length() - 1,
        **tiles.constants,
    }
    del constants["PIECE"]
    return Launch(loss_kernel, tiles.grid, arguments, constants, tiles.options)


def _is_heavy(structure: Structure) -> bool:
    """Whether the kernel has a likelihood, whose registers for 8 elements would be too many."""
    return bool(structure.terms & definition.BOUND) and not structure.density


def _sample_size(t: LossOperands, structure: Structure) -> int:
    first = t.model_outputs[0]
    return first.numel() // first.shape[0] // (2 if structure.learned else 1)


def _total(t: LossOperands, structure: Structure, results: Tensor, partials: Tensor) -> Launch:
    batch, n = results.shape[1], _sample_size(t, structure)
    arguments = (
        partials, results, t.table, t.rows, t.table.shape[0] - 1, batch, partial_count(n), n
    )  # fmt: skip
    constants = {
        "TERMS": structure.terms,
        "ROW_STRIDE": int(t.rows.numel() > 1),
        "LEVELS": _TOTAL_LEVELS,
    }
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return Launch(total_kernel, (batch, 1), arguments, constants, options)


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
    """The launches of one `loss`, or None when there is nothing to write.

    Args:
        nvidia: whether the device has the approximations of noise="fast".
        policy: launch parameters; those of the tensors' device when None.
        block: elements of a tile, a power of two and a multiple of PIECE unless it holds a sample;
            chosen by size when None.
    """
    results, partials, *made = outputs
    if not results.numel():
        return None
    parsed, structure = _parsed(layout, nvidia)
    total = _total(unpack(inputs, parsed), structure, results, partials)
    if not inputs[0].numel():
        return total
    launch = _tiles(
        inputs, made, layout, (seed, sample_offset, step, stream), partials=partials,
        made=made[0] if made else None, out=(), nvidia=nvidia, policy=policy, block=block,
    )  # fmt: skip
    launch.then = total
    return launch


def prepare_grad(
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
    """The launch of one `loss_grad`, or None when there is nothing to write; see prepare."""
    if not outputs[0].numel():
        return None
    return _tiles(
        inputs, outputs, layout, (seed, sample_offset, step, stream), partials=None, made=None,
        out=tuple(outputs), nvidia=nvidia, policy=policy, block=block,
    )  # fmt: skip
