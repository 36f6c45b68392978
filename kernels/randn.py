"""out = seeded normals, rounded to its dtype (`randn` in fastdiff/ops/schemas.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import Launch, inside, sample_origin, store, tiling
from fastdiff.kernels.noise import halves, normal_tile, sample_key
from fastdiff.kernels.policy import Policy

__all__ = ["prepare"]


@triton.jit(
    do_not_specialize=[
        "seed_low", "seed_high", "sample_offset", "step", "stream", "first_block", "n_units",
    ],
    do_not_specialize_on_alignment=["keys"],
)  # fmt: skip
def randn_kernel(
    out,
    keys,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    sample_offset: tl.uint32,
    step: tl.uint32,
    stream: tl.uint32,
    first_block: tl.uint32,
    n_units: tl.int64,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n, origin = sample_origin(n_units, UNIT, SINGLE, LARGE, SAMPLE_AXIS)
    key = sample_key(keys, seed_low, seed_high, sample_offset, b)
    step = step.to(tl.uint32)
    stream = stream.to(tl.uint32)
    tile = tl.program_id(1 - SAMPLE_AXIS)
    while tile.to(n.dtype) * BLOCK < n:
        start = tile.to(n.dtype) * BLOCK
        block = first_block.to(tl.uint32) + (start >> 2).to(tl.uint32)
        z = normal_tile(block, key, step, stream, FAST, NEIGHBOURS, BLOCK)
        pointers = out + (origin + start + tl.arange(0, BLOCK))
        if start <= n - BLOCK:
            store(pointers, z, None)
        else:
            store(pointers, z, inside(start, n, BLOCK))
        tile += tl.num_programs(1 - SAMPLE_AXIS)


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
    policy: Policy | None = None,
    block: int | None = None,
) -> Launch | None:
    """The launch of one `randn`, or None when there is nothing to write."""
    if not out.numel():
        return None
    batch = out.shape[0]
    tiles = tiling(
        out.numel() // batch, batch, [out],
        makes_noise=True, nvidia=nvidia, policy=policy, block=block,
    )  # fmt: skip
    arguments = (out, keys, *halves(seed), sample_offset, step, stream, first_block, tiles.units)
    constants = {"FAST": nvidia and fast, **tiles.constants}
    del constants["PIECE"]
    return Launch(randn_kernel, tiles.grid, arguments, constants, tiles.options)
