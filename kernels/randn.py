"""out = seeded normals, rounded to its dtype (`randn` in fastdiff/ops/schemas.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import Launch, inside_tile, store, tile_origin, tiling
from fastdiff.kernels.noise import normal_tile, sample_key

__all__ = ["prepare"]


@triton.jit(do_not_specialize=["seed", "sample_offset", "step", "stream", "first_block", "n_units"])
def randn_kernel(
    out,
    keys,
    seed: tl.int64,
    sample_offset: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first_block: tl.int64,
    n_units: tl.int64,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    TAIL: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n, start = tile_origin(n_units, UNIT, SAMPLE_AXIS, BLOCK)
    key = sample_key(keys, seed, sample_offset, b)
    z = normal_tile(
        (first_block + start // 4).to(tl.uint32),
        key,
        step.to(tl.uint32),
        stream.to(tl.uint32),
        FAST,
        NEIGHBOURS,
        BLOCK,
    )
    mask = None
    if TAIL:
        mask = inside_tile(start, n, BLOCK)
    store(out + b * n + start, z, mask, BLOCK)


def prepare(
    out: Tensor,
    keys: Tensor | None,
    seed: int,
    sample_offset: int,
    step: int,
    stream: int,
    first_block: int,
    fast: bool,
    *,
    nvidia: bool = True,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `randn`, or None when there is nothing to write."""
    if not out.numel():
        return None
    batch = out.shape[0]
    tiles = tiling(out.numel() // batch, batch, [out], nvidia=nvidia, block=block)
    arguments = (out, keys, seed, sample_offset, step, stream, first_block, tiles.units)
    constants = {"FAST": nvidia and fast, **tiles.constants}
    return Launch(randn_kernel, tiles.grid, arguments, constants, tiles.options)
