"""Kernels that measure the others: a copy to compare with, and fast noise against exact."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import Launch
from fastdiff.kernels.noise import box_muller, philox4x32

__all__ = ["THRESHOLDS", "WAYS", "copy", "deviation", "normals_of"]

THRESHOLDS = (1e-6, 1e-5, 2e-5, 1e-4, 4e-4)  # the columns of deviation's counts, then NaN
_LIMITS = tl.constexpr(THRESHOLDS)
_COLUMNS = tl.constexpr(len(THRESHOLDS) + 1)
WAYS = ("radius", "angle", "random")


@triton.jit
def copy_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


def copy(source: Tensor, target: Tensor, block: int) -> Launch:
    """The launch that copies a tensor whose size is a multiple of `block` elements."""
    if source.numel() % block:
        raise ValueError(f"block must divide the {source.numel()} elements, not be {block}")
    constants, options = {"BLOCK": block}, {"num_warps": 4}
    grid = (source.numel() // block, 1)
    return Launch(copy_kernel, grid, (source, target), constants, options)


@triton.jit
def _count(gap, counts, BLOCK: tl.constexpr):
    for k in tl.static_range(_COLUMNS - 1):
        tl.store(counts + k, tl.sum((gap > _LIMITS[k]).to(tl.int32), 0))
    tl.store(counts + (_COLUMNS - 1), tl.sum((gap != gap).to(tl.int32), 0))


@triton.jit(do_not_specialize=["first", "fixed"])
def deviation_kernel(
    largest, counts, first: tl.int64, fixed: tl.int64, WAY: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    index = first + program * BLOCK + tl.arange(0, BLOCK)
    same = fixed.to(tl.uint32) + tl.zeros((BLOCK,), tl.uint32)
    if WAY == 0:  # every word of the radius, whose lowest bit does not count
        a = (index * 2).to(tl.uint32)
        b = same
    elif WAY == 1:
        a = same
        b = index.to(tl.uint32)
    else:
        high = (index >> 32).to(tl.uint32)
        a, b, _, _ = philox4x32(index.to(tl.uint32), high, same, same, same, same)
    exact0, exact1 = box_muller(a, b, False)
    fast0, fast1 = box_muller(a, b, True)
    gap0 = tl.abs(fast0 - exact0)
    gap1 = tl.abs(fast1 - exact1)
    # Where either is NaN the sum is, and counted as such.
    gap = tl.where(gap0 > gap1, gap0, gap1)
    gap = tl.where((gap0 != gap0) | (gap1 != gap1), gap0 + gap1, gap)
    tl.store(largest + program, tl.max(tl.where(gap == gap, gap, 0.0), 0))
    _count(gap, counts + program * _COLUMNS, BLOCK)


def deviation(
    largest: Tensor, counts: Tensor, way: str, first: int, fixed: int, block: int
) -> Launch:
    """Fast pairs of normals against exact ones, `block` pairs a program.

    Args:
        largest: float32 (programs,): the largest distance in each.
        counts: int32 (programs, len(THRESHOLDS) + 1): pairs farther apart than each, and NaN.
        way: "radius": first words 2 (first + k), every second one `fixed`; "angle": second words
            first + k, every first one `fixed`; "random": words of Philox, counter first + k.
    """
    arguments = (largest, counts, first, fixed)
    constants = {"WAY": WAYS.index(way), "BLOCK": block}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return Launch(deviation_kernel, (largest.numel(), 1), arguments, constants, options)


@triton.jit
def normals_of_kernel(words, out, FAST: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.arange(0, BLOCK)
    a = tl.load(words + 2 * pair).to(tl.uint32)
    b = tl.load(words + 2 * pair + 1).to(tl.uint32)
    z0, z1 = box_muller(a, b, FAST)
    tl.store(out + 2 * pair, z0)
    tl.store(out + 2 * pair + 1, z1)


def normals_of(words: Tensor, out: Tensor, fast: bool) -> Launch:
    """float32 (pairs, 2) of given int64 words (pairs, 2); a power of two of pairs."""
    constants = {"FAST": fast, "BLOCK": words.shape[0]}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return Launch(normals_of_kernel, (1, 1), (words, out), constants, options)
