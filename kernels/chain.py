"""The forward chain q(x_{1:T} | x_0) (fastdiff/ops/chain.py); x stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
from fastdiff.noise import STREAM_CHAIN

__all__ = ["prepare"]


@triton.jit(do_not_specialize=["steps", "seed", "sample_offset", "batch", "n_units"])
def chain_kernel(
    x_start,
    noise,
    table,
    slots,
    keys,
    out,
    steps: tl.int64,
    seed: tl.int64,
    sample_offset: tl.int64,
    batch: tl.int64,
    n_units: tl.int64,
    STREAM: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    TAIL: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    b, n, start = tile_origin(n_units, UNIT, SAMPLE_AXIS, BLOCK)
    offset = b * n + start
    size = batch * n
    mask = None
    if TAIL:
        mask = inside_tile(start, n, BLOCK)
    key = sample_key(keys, seed, sample_offset, b)
    first_block = (start // 4).to(tl.uint32)

    x = load(x_start + offset, None, mask, BLOCK)
    t = tl.full((), 0, tl.int64)
    while t < steps:
        scale = tl.load(table + 2 * t)
        sigma = tl.load(table + 2 * t + 1)
        acc = empty_sum(BLOCK)
        if scale != 0:
            acc = acc + scale * x
        if sigma != 0:
            if noise is None:
                step = t.to(tl.uint32)
                z = normal_tile(first_block, key, step, STREAM, FAST, NEIGHBOURS, BLOCK)
                z = z.to(dtype).to(tl.float32)
            else:
                z = load(noise + offset + t * size, None, mask, BLOCK)
            acc = acc + sigma * z
        # Rounded even where it is not stored: T single steps would have rounded it.
        x = acc.to(dtype).to(tl.float32)
        slot = tl.load(slots + t)
        if slot >= 0:
            store(out + offset + slot * size, x, mask, BLOCK)
        t += 1


def prepare(
    x_start: Tensor,
    noise: Tensor | None,
    table: Tensor,
    slots: Tensor,
    keys: Tensor | None,
    seed: int,
    sample_offset: int,
    fast: bool,
    out: Tensor,
    *,
    nvidia: bool = True,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `chain`, or None when there is nothing to write."""
    if not out.numel() or not table.shape[0]:
        return None
    batch = x_start.shape[0]
    tiles = tiling(x_start.numel() // batch, batch, [x_start, out], nvidia=nvidia, block=block)
    arguments = (
        x_start, noise, table, slots, keys, out,
        table.shape[0], seed, sample_offset, batch, tiles.units,
    )  # fmt: skip
    constants = {"STREAM": STREAM_CHAIN, "FAST": nvidia and fast, **tiles.constants}
    return Launch(chain_kernel, tiles.grid, arguments, constants, tiles.options)
