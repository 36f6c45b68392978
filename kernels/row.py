"""A row of the coefficient table of `step`: its entries, and sums with them.

Coefficients are a tuple per sum, the clamp node's first, with an entry per column [S.., o, c, z..];
MASKS says which of them there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.launch import empty_sum

__all__ = ["all_used", "combine", "is_used", "load_coefficients", "nan_unless"]


@triton.jit
def load_coefficients(entries, MASK: tl.constexpr, COLUMNS: tl.constexpr, ABSENT: tl.constexpr):
    """The row's coefficients of the columns in MASK; the table has no entry for column ABSENT."""
    coefficients = ()
    for column in tl.static_range(COLUMNS):
        if column == ABSENT:
            entries = entries - 1
        if (MASK >> column) & 1:
            coefficients = coefficients + (tl.load(entries + column),)
        else:
            coefficients = coefficients + (0.0,)
    return coefficients


@triton.jit
def nan_unless(exists, values):
    """The values of a row; NaN where there is no such row."""
    marked = ()
    for k in tl.static_range(len(values)):
        marked = marked + (tl.where(exists, values[k], float("nan")),)
    return marked


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
    # The least of the words without their signs; LLVM makes a vector of comparisons, at a loss.
    least = tl.full((), 0xFFFFFFFF, tl.uint32)
    for i in tl.static_range(len(coefficients)):
        for column in tl.static_range(COLUMNS):
            if (MASKS[i] >> column) & 1:
                least = tl.minimum(least, coefficients[i][column].to(tl.uint32, bitcast=True) << 1)
    return least != 0


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
                more = acc + scaled(a, noise_scale, column >= FIRST_DRAW) * value
                acc = tl.where(a != 0, more, acc)
    return acc


@triton.jit
def scaled(a, noise_scale, IS_DRAW: tl.constexpr):
    """The coefficient; of a draw, times the noise scale of learned variance."""
    if IS_DRAW and noise_scale is not None:
        a = a * noise_scale
    return a
