"""How work is cut into programs, and what every kernel does with its tile.

A program has one tile of one sample, so that what belongs to a sample (coefficients, seed, row of
the table) is a scalar. Offsets are 64-bit up to the tile and 32-bit inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Launch", "empty_sum", "inside_tile", "load", "store", "tile_origin", "tiling"]

ELEMENTS_PER_THREAD = 8  # one 16-byte access of a 16-bit tensor, two of a float32 one
LARGEST_BLOCK = 1024
SMALLEST_BLOCK = 128
# The interpreter's time is per program and operation, hardly per element.
INTERPRETER_BLOCK = 1 << 16
MAX_GRID_Y = 65535


@dataclass(slots=True)
class Launch:
    """One call of a kernel: its grid, its arguments by position, its constants by name."""

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


class Tiling(NamedTuple):
    grid: tuple[int, int]
    units: int  # n / UNIT
    constants: dict[str, Any]
    options: dict[str, Any]


def tiling(n: int, batch: int, tensors: list[Tensor], *, nvidia: bool, block: int | None) -> Tiling:
    """Grid and block for `batch` samples of n elements in the given tensors.

    Constants: UNIT, the power of two that n is known to be a multiple of (up to a 16-byte access of
    the narrowest tensor); TAIL, whether the last tile of a sample is partial; SAMPLE_AXIS;
    NEIGHBOURS, see noise.normal_tile; BLOCK.
    """
    itemsize = min([tensor.element_size() for tensor in tensors])
    return _tiling(n, batch, itemsize, tensors[0].is_cpu, nvidia, block, MAX_GRID_Y)


@lru_cache(maxsize=4096)
def _tiling(
    n: int, batch: int, itemsize: int, cpu: bool, nvidia: bool, block: int | None, max_grid_y: int
) -> Tiling:
    if block is None:
        largest = INTERPRETER_BLOCK if cpu else LARGEST_BLOCK
        block = max(SMALLEST_BLOCK, min(largest, triton.next_power_of_2(n)))
    neighbours = 16 // itemsize
    unit = next(unit for unit in (8, 4, 1) if unit <= neighbours and n % unit == 0)
    tiles = triton.cdiv(n, block)
    # Only x counts further. Not both are that many: 65536 samples of 65536 tiles are terabytes.
    samples_first = batch > max_grid_y
    return Tiling(
        grid=(batch, tiles) if samples_first else (tiles, batch),
        units=n // unit,
        constants={
            "UNIT": unit,
            "TAIL": n % block != 0,
            "SAMPLE_AXIS": 0 if samples_first else 1,
            "NEIGHBOURS": neighbours,
            "BLOCK": block,
        },
        options={
            "num_warps": max(1, block // ((32 if nvidia else 64) * ELEMENTS_PER_THREAD)),
            "enable_fp_fusion": False,
        },
    )


@triton.jit
def tile_origin(n_units, UNIT: tl.constexpr, SAMPLE_AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Batch entry, elements per sample and this tile's first element, all int64.

    The product with UNIT is how the compiler learns what n is a multiple of.
    """
    b = tl.program_id(SAMPLE_AXIS).to(tl.int64)
    start = tl.program_id(1 - SAMPLE_AXIS).to(tl.int64) * BLOCK
    return b, n_units * UNIT, start


@triton.jit
def inside_tile(start, n, BLOCK: tl.constexpr):
    """Mask of the elements that the sample has."""
    return tl.arange(0, BLOCK) < tl.minimum(n - start, BLOCK).to(tl.int32)


@triton.jit
def load(pointer, used, mask, BLOCK: tl.constexpr):
    """float32 values of a tile; not read where `used`, a scalar, is false. Both may be None."""
    if used is not None:
        if mask is None:
            mask = used
        else:
            mask = mask & used
    return tl.load(pointer + tl.arange(0, BLOCK), mask=mask).to(tl.float32)


@triton.jit
def store(pointer, value, mask, BLOCK: tl.constexpr):
    """Rounds to the tensor's dtype, stores, and gives the float32 of what was stored."""
    stored = value.to(pointer.dtype.element_ty)
    tl.store(pointer + tl.arange(0, BLOCK), stored, mask=mask)
    return stored.to(tl.float32)


@triton.jit
def empty_sum(BLOCK: tl.constexpr):
    """-0.0, the identity of addition; as a literal it would lose its sign."""
    return tl.full((BLOCK,), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
