"""log by a fixed polynomial: the same bits on every backend.

float32: the polynomial of the noise contract (fastdiff/noise.py), which is -2 log, times -1/2;
absolute error <= 6e-8 where |log x| < 1/2, relative error <= 1.2e-7 elsewhere.
float64: x = 2^k m with m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1),
log x = k ln 2 + 2 (s + s^3/3 + .. + s^21/21).

x below the smallest normal number counts as that; NaN, infinities and negative x give NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.noise import _LOG, _MINUS_2_LN2, _horner

__all__ = ["log"]

# The two parts of ln 2, the first with 21 zero bits at its end, so that k times it is exact.
LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
TERMS = tuple(2.0 / (2 * j + 1) for j in range(11))  # of s^2, after the factor s


def log(x: Tensor) -> Tensor:
    """log(x), float32 or float64, by the polynomial above; its derivative is 1 / x."""
    value = _log_f64(x.detach()) if x.dtype == torch.float64 else _log_f32(x.detach())
    if not x.requires_grad:
        return value
    # The same number, with the derivative of the logarithm.
    return value + (x / x.detach() - 1.0)


def _log_f32(x: Tensor) -> Tensor:
    normal = torch.where(x < 2.0**-126, 2.0**-126, x)  # NaN passes
    ix = normal.view(torch.int32) - 0x3F2AAAAB
    e = (ix >> 23).to(torch.float32)
    t = ((ix & 0x7FFFFF) + 0x3F2AAAAB).view(torch.float32) - 1.0
    value = (e * _MINUS_2_LN2 + _horner(_LOG, t) * t) * -0.5
    return torch.where(x >= 0.0, value, torch.nan) + (x - x)


def _log_f64(x: Tensor) -> Tensor:
    normal = torch.where(x < 2.0**-1022, 2.0**-1022, x)
    first = 0x3FE6A09E667F3BCD  # sqrt(1/2)
    ix = normal.view(torch.int64) - first
    k = (ix >> 52).to(torch.float64)
    m = ((ix & 0xFFFFFFFFFFFFF) + first).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    p = s2 * TERMS[10] + TERMS[9]
    for j in range(8, -1, -1):
        p = p * s2 + TERMS[j]
    value = k * LN2_HIGH + (p * s + k * LN2_LOW)
    return torch.where(x >= 0.0, value, torch.nan) + (x - x)
