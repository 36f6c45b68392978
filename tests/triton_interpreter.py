"""Mends Triton's interpreter where it differs from GPUs, so that tests can compare bits.

Casts between float32 and bfloat16 truncate there instead of rounding to nearest even, and lose
subnormal numbers. Sums begin with +0, so that one of -0 only loses its sign. The approximations of
libdevice do not exist there; they become numpy's accurate functions, which is enough to test the
formulas around them.
"""

import numpy as np
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

__all__ = ["install"]


def _round_to_bfloat16(value: np.ndarray) -> np.ndarray:
    word = np.ascontiguousarray(value, np.float32).view(np.uint32)
    even = (word >> np.uint32(16)) & np.uint32(1)
    rounded = ((word + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


@triton.jit
def _log2(x):
    return tl.log2(x)


@triton.jit
def _sin(x):
    return tl.sin(x)


@triton.jit
def _cos(x):
    return tl.cos(x)


def install() -> None:
    """Mends the interpreter of this process; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl
    if getattr(original, "mended", False):
        return

    def cast(self, src, dst):
        source, target = src.dtype.scalar, dst.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bfloat16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            word = src.data.astype(np.uint32) << np.uint32(16)
            return interpreter.TensorHandle(word.view(np.float32), target)
        return original(self, src, dst)

    def add_up(self, input):
        axis, keep = self.axis, self.keep_dims
        start = -0.0 if input.dtype.is_floating() else 0
        total = np.sum(input.handle.data, axis=axis, keepdims=keep, initial=start)
        return self.to_tensor(total, input.dtype)

    cast.mended = True
    builder.cast_impl = cast
    interpreter.ReduceOps.sum = add_up
    for name, function in (("fast_log2f", _log2), ("fast_sinf", _sin), ("fast_cosf", _cos)):
        setattr(libdevice, name, function)
