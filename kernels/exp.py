"""exp by the fixed polynomial of fastdiff/ops/exp.py: the same bits on every backend."""

import math

import torch
import triton
import triton.language as tl

from fastdiff.kernels.noise import horner
from fastdiff.ops import exp as definition

_LOWEST, _HIGHEST, _LOG2E, _LN2_HIGH, _LN2_LOW, _SHIFT = definition._FORMATS[torch.float32][:6]
LOWEST = tl.constexpr(_LOWEST)
HIGHEST = tl.constexpr(_HIGHEST)
LOG2E = tl.constexpr(_LOG2E)
MINUS_LN2_HIGH = tl.constexpr(-_LN2_HIGH)
MINUS_LN2_LOW = tl.constexpr(-_LN2_LOW)
SHIFT = tl.constexpr(_SHIFT)
TERMS = tl.constexpr(tuple(1.0 / math.factorial(j) for j in range(8)))


@triton.jit
def exp(x):
    x = tl.where(x < LOWEST, LOWEST, tl.where(x > HIGHEST, HIGHEST, x))
    shifted = x * LOG2E + SHIFT
    k = shifted - SHIFT
    r = x + k * MINUS_LN2_HIGH
    r = r + k * MINUS_LN2_LOW
    scale = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return horner(TERMS, 7, r) * scale


@triton.jit
def learned_scale(v, log_low, log_high):
    f = v * 0.5 + 0.5
    return exp(f * log_high + (1.0 - f) * log_low)
