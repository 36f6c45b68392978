"""exp by a fixed polynomial in multiplies and adds: the same bits on every backend.

    k = round(x log2 e);  r = x - k ln 2 (two parts);  exp(x) = 2^k * sum_j r^j / j!

x is clamped to [-87, 88] (float64: [-708, 709]) so that 2^k is a normal number; NaN passes.
Relative error <= 1.1e-7 (float32) and 2e-16 (float64); degree 7 and 13 suffice for |r| <= ln 2 / 2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["exp", "learned_scale"]

# dtype: (lowest, highest x, log2 e, ln 2 high part, low part, shift that rounds to an integer,
#         integer view, mantissa bits, exponent bias, degree)
_FORMATS = {
    torch.float32: (-87.0, 88.0, float.fromhex("0x1.715476p+0"), float.fromhex("0x1.62e400p-1"),
                    float.fromhex("0x1.7f7d1cp-20"), 1.5 * 2.0**23, torch.int32, 23, 127, 7),
    torch.float64: (-708.0, 709.0, float.fromhex("0x1.71547652b82fep+0"),
                    float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33"),
                    1.5 * 2.0**52, torch.int64, 52, 1023, 13),
}  # fmt: skip

# 1/j!, rounded to the dtype.
_TERMS = {
    torch.float32: [float(np.float32(1.0 / math.factorial(j))) for j in range(8)],
    torch.float64: [1.0 / math.factorial(j) for j in range(14)],
}


def exp(x: Tensor) -> Tensor:
    """exp(x), float32 or float64, by the polynomial above; differentiable (its own derivative)."""
    lowest, highest, log2e, ln2_high, ln2_low, shift, integer, mantissa, bias, degree = _FORMATS[
        x.dtype
    ]
    x = x.clamp(lowest, highest)
    shifted = (x * log2e + shift).detach()
    k = shifted - shift
    r = x + k * -ln2_high
    r = r + k * -ln2_low
    p = r * _TERMS[x.dtype][degree] + _TERMS[x.dtype][degree - 1]
    for j in range(degree - 2, -1, -1):
        p = p * r + _TERMS[x.dtype][j]
    return p * ((shifted.view(integer) + bias) << mantissa).view(x.dtype)


def learned_scale(v: Tensor, log_low: Tensor, log_high: Tensor) -> Tensor:
    """What a learned variance scales the noise by: v in [-1, 1] between the logs of its bounds
    (Nichol & Dhariwal 2021, eq. 15)."""
    f = v * 0.5 + 0.5
    return exp(f * log_high + (1.0 - f) * log_low)
