"""log by the fixed polynomial of fastdiff/ops/log.py: the same bits on every backend."""

import triton
import triton.language as tl

from fastdiff.kernels.noise import LOG, MINUS_2_LN2, horner


@triton.jit
def log(x):
    normal = tl.where(x < 2.0**-126, 2.0**-126, x)  # NaN passes
    ix = normal.to(tl.int32, bitcast=True) - 0x3F2AAAAB
    e = (ix >> 23).to(tl.float32)
    t = ((ix & 0x7FFFFF) + 0x3F2AAAAB).to(tl.float32, bitcast=True) - 1.0
    value = (e * MINUS_2_LN2 + horner(LOG, 7, t) * t) * -0.5
    return tl.where(x >= 0.0, value, float("nan")) + (x - x)
