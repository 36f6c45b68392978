"""How work is cut into programs, and what every kernel does with its tile.

A program works through tiles of one sample, so that what belongs to a sample (coefficients, seed,
row of the table) is a scalar. Samples that are all treated alike are one long sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.policy import Parameters, Placement, Policy, placement

__all__ = [
    "Launch", "Tiling", "empty_sum", "inside", "load", "sample_origin", "store", "tiling",
    "widened",
]  # fmt: skip

SMALLEST_BLOCK = 128
MAX_GRID_Y = 65535
# From here on offsets into a tensor are 64-bit: an offset and one more round of tiles stay below
# 2^31 otherwise.
LARGE_NUMEL = 1 << 30


@dataclass(slots=True, eq=False)
class Launch:
    """One call of a kernel: its grid, its arguments by position, its constants by name.

    then: the launch that completes it, on the same stream.
    """

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    then: Launch | None = None

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
        if self.then is not None:
            self.then()


class Tiling(NamedTuple):
    grid: tuple[int, int]
    units: int  # n / UNIT
    constants: dict[str, Any]
    options: dict[str, Any]


def tiling(
    n: int,
    batch: int,
    tensors: Sequence[Tensor],
    *,
    makes_noise: bool,
    nvidia: bool,
    policy: Policy | None,
    block: int | None,
    least: int = 1,
    elements: int | None = None,
    tiles: int | None = None,
    light: bool = False,
) -> Tiling:
    """Grid and constants for `batch` samples of n elements in the given tensors.

    Args:
        makes_noise: which of the policy's parameters to take.
        policy: a row of policy.py; that of the tensors' device when None.
        block: elements of a tile, a power of two; chosen by size when None.
        least: elements of a tile at least, whatever the policy, where a sample has as many.
        elements: of a tile in a thread; the policy's when None.
        tiles: of a program at most; the policy's when None.
        light: whether a thread needs few enough registers for all that an SM can hold of them.

    Constants: UNIT, the power of two that n is known to be a multiple of (up to a 16-byte access of
    the narrowest tensor); SINGLE, whether there is but one sample; LARGE, whether offsets take 64
    bits; SAMPLE_AXIS, the axis of the grid that counts samples; NEIGHBOURS, see noise.normal_tile;
    BLOCK, elements of a tile; PIECE, elements of a part of it, four a thread.
    """
    place = placement(tensors[0].device)
    row = policy or place.policy
    itemsize = min([tensor.element_size() for tensor in tensors])
    large = max([tensor.numel() for tensor in tensors]) >= LARGE_NUMEL
    parameters = row.noise if makes_noise else row.plain
    if elements is not None:
        parameters = parameters._replace(elements=elements)
    if tiles is not None:
        parameters = parameters._replace(tiles=tiles)
    registers = row.registers if light and nvidia else None
    return _tiling(
        n, batch, itemsize, large, nvidia, parameters, registers, place, block, least, MAX_GRID_Y
    )


@lru_cache(maxsize=4096)
def _tiling(
    n: int,
    batch: int,
    itemsize: int,
    large: bool,
    nvidia: bool,
    parameters: Parameters,
    registers: int | None,
    place: Placement,
    block: int | None,
    least: int,
    max_grid_y: int,
) -> Tiling:
    warp = 32 if nvidia else 64
    if block is None:
        largest = max(least, parameters.warps * warp * parameters.elements)
        block = max(SMALLEST_BLOCK, min(largest, triton.next_power_of_2(n)))
    warps = max(1, block // (warp * parameters.elements))
    neighbours = min(16 // itemsize, parameters.elements)
    unit = next(unit for unit in (8, 4, 1) if unit <= neighbours and n % unit == 0)
    resident = place.multiprocessors * max(1, place.threads // (warps * warp))
    programs = _programs(triton.cdiv(n, block), batch, parameters.tiles, resident)
    limit = {} if registers is None else {"maxnreg": registers}
    # Only x counts further. Not both are that many: 65536 samples of 65536 tiles are terabytes.
    samples_first = batch > max_grid_y
    return Tiling(
        grid=(batch, programs) if samples_first else (programs, batch),
        units=n // unit,
        constants={
            "UNIT": unit,
            "SINGLE": batch == 1,
            "LARGE": large,
            "SAMPLE_AXIS": 0 if samples_first else 1,
            "NEIGHBOURS": neighbours,
            "BLOCK": block,
            "PIECE": min(block, warps * warp * 4),
        },
        options={"num_warps": warps, "enable_fp_fusion": False, **limit},
    )


def _programs(tiles: int, batch: int, most: int, resident: int) -> int:
    """Programs of a sample, each for `most` tiles or fewer, that finish together.

    `resident` programs run at once. Of the tiles a program might have, those take the least time
    for which waves * (tiles + 1/2) is least, 1/2 standing for a program's beginning; of equals
    the most.
    """

    def time(each: int) -> tuple[int, int]:
        waves = triton.cdiv(triton.cdiv(tiles, each) * batch, resident)
        return waves * (2 * each + 1), -each

    return int(triton.cdiv(tiles, min(range(1, most + 1), key=time)))


@triton.jit
def sample_origin(
    n_units,
    UNIT: tl.constexpr,
    SINGLE: tl.constexpr,
    LARGE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
):
    """Batch entry, elements per sample, and the index of the sample's first element.

    The product with UNIT is how the compiler learns what n is a multiple of, and the constant
    zero of a single sample that its tiles are aligned whatever n is.
    """
    if LARGE:
        n = n_units.to(tl.int64) * UNIT
    else:
        n = n_units.to(tl.int32) * UNIT
    if SINGLE:
        b = 0
        origin = 0
    else:
        b = tl.program_id(SAMPLE_AXIS)
        origin = b * n
    return b, n, origin


@triton.jit
def inside(start, n, BLOCK: tl.constexpr):
    """Mask of the elements that the sample has."""
    return tl.arange(0, BLOCK) < tl.minimum(n - start, BLOCK).to(tl.int32)


@triton.jit
def widened(value):
    """float32 of values of any dtype that kernels serve."""
    if value.dtype == tl.bfloat16:
        # The upper half of a float32: as integers, one instruction an element instead of two.
        word = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = word.to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def load(pointers, used, mask):
    """float32 values; not read where `used`, a scalar, is false. Both may be None."""
    if used is not None:
        if mask is None:
            mask = used
        else:
            mask = mask & used
    return widened(tl.load(pointers, mask=mask))


@triton.jit
def store(pointers, value, mask):
    """Rounds to the tensor's dtype, stores, and gives the float32 of what was stored."""
    stored = value.to(pointers.dtype.element_ty)
    tl.store(pointers, stored, mask=mask)
    return widened(stored)


@triton.jit
def empty_sum(BLOCK: tl.constexpr):
    """-0.0, the identity of addition; as a literal it would lose its sign."""
    return tl.full((BLOCK,), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
