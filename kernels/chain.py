"""The forward chain q(x_{1:T} | x_0) (fastdiff/ops/chain.py); x stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import (
    Launch,
    empty_sum,
    inside,
    load,
    sample_origin,
    store,
    tiling,
    widened,
)
from fastdiff.kernels.noise import halves, normal_tile, sample_key
from fastdiff.kernels.policy import Policy
from fastdiff.noise import STREAM_CHAIN

__all__ = ["prepare"]


@triton.jit(
    do_not_specialize=["steps", "seed_low", "seed_high", "sample_offset", "size_units", "n_units"],
    do_not_specialize_on_alignment=["table", "slots", "keys"],
)
def chain_kernel(
    x_start,
    noise,
    table,
    slots,
    keys,
    out,
    steps: tl.int64,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    sample_offset: tl.uint32,
    size_units: tl.int64,
    n_units: tl.int64,
    STREAM: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    b, n, origin = sample_origin(n_units, UNIT, SINGLE, LARGE, SAMPLE_AXIS)
    start = tl.program_id(1 - SAMPLE_AXIS).to(n.dtype) * BLOCK
    index = origin + start + tl.arange(0, BLOCK)
    size = size_units * UNIT
    mask = inside(start, n, BLOCK)
    key = sample_key(keys, seed_low, seed_high, sample_offset, b)
    first_block = (start >> 2).to(tl.uint32)

    x = load(x_start + index, None, mask)
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
                z = widened(z.to(dtype))
            else:
                z = load(noise + t * size + index, None, mask)
            acc = acc + sigma * z
        # Rounded even where it is not stored: T single steps would have rounded it.
        x = widened(acc.to(dtype))
        slot = tl.load(slots + t)
        if slot >= 0:
            store(out + slot * size + index, x, mask)
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
    policy: Policy | None = None,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `chain`, or None when there is nothing to write."""
    if not out.numel() or not table.shape[0]:
        return None
    batch = x_start.shape[0]
    tiles = tiling(
        x_start.numel() // batch, batch, [x_start], tiles=1,
        makes_noise=noise is None, nvidia=nvidia, policy=policy, block=block,
    )  # fmt: skip
    arguments = (
        x_start, noise, table, slots, keys, out,
        table.shape[0], *halves(seed), sample_offset, batch * tiles.units, tiles.units,
    )  # fmt: skip
    constants = {"STREAM": STREAM_CHAIN, "FAST": nvidia and fast, **tiles.constants}
    del constants["PIECE"]
    return Launch(chain_kernel, tiles.grid, arguments, constants, tiles.options)
