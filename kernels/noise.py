"""The noise contract (fastdiff/noise.py) in Triton: the same words, the same float32 bits.

Kernels that use these functions are compiled with enable_fp_fusion=False, else the compiler turns
`a * b + c` into an FMA and the bits differ.
"""

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastdiff import noise as definition

M0, M1 = (tl.constexpr(word) for word in definition._MULTIPLIERS)
KEY0, KEY1 = (tl.constexpr(word) for word in definition._KEY_INCREMENTS)
MINUS_2_LN2 = tl.constexpr(definition._MINUS_2_LN2)
LOG = tl.constexpr(definition._LOG)
SIN = tl.constexpr(definition._SIN)
COS = tl.constexpr(definition._COS)
QUARTER_PI = tl.constexpr(math.pi / 4)


@triton.jit
def horner(coefficients: tl.constexpr, DEGREE: tl.constexpr, x):
    """Polynomial with ascending coefficients, multiply and add rounded separately."""
    acc = x * coefficients[DEGREE] + coefficients[DEGREE - 1]
    for k in tl.static_range(2, DEGREE + 1):
        acc = acc * x + coefficients[DEGREE - k]
    return acc


@triton.jit
def multiply_high_low(a, multiplier):
    # One 64-bit product is one IMAD.WIDE; tl.umulhi beside a product would be two instructions.
    product = a.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; words that are scalars stay scalar for as long as they can."""
    for _ in tl.static_range(10):
        high0, low0 = multiply_high_low(c0, M0)
        high1, low1 = multiply_high_low(c2, M1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + KEY0
        k1 = k1 + KEY1
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b, FAST: tl.constexpr):
    """Two words to two normals; FAST has the hardware's log2, sqrt, sin and cos (NVIDIA only)."""
    half = (a >> 1).to(tl.int32).to(tl.float32)  # 2^31 u - 1/2
    quarter = (b << 2).to(tl.int32, bitcast=True).to(tl.float32)  # 2^31 y
    if FAST:
        u = tl.fma(half, 2.0**-31, 2.0**-32)
        phi = quarter * (QUARTER_PI * 2.0**-31)
        # -2 ln u >= 2 - 2 u: beside u = 1 the error of log2 would move the root by more than 4e-4.
        square = tl.maximum(libdevice.fast_log2f(u) * MINUS_2_LN2, tl.fma(u, -2.0, 2.0))
        r = tl.sqrt(square)  # allow-trap: approximate by request
        s = libdevice.fast_sinf(phi)
        c = libdevice.fast_cosf(phi)
    else:
        # u's bits are those of 2^31 u but for the exponent.
        ix = (half + 0.5).to(tl.int32, bitcast=True) - (0x3F2AAAAB + (31 << 23))
        e = (ix >> 23).to(tl.float32)
        t = ((ix & 0x7FFFFF) + 0x3F2AAAAB).to(tl.float32, bitcast=True) - 1.0
        r = tl.sqrt_rn(e * MINUS_2_LN2 + horner(LOG, 7, t) * t)
        y = quarter * 2.0**-31
        y2 = y * y
        s = horner(SIN, 3, y2) * y
        c = horner(COS, 3, y2)
    c = (c.to(tl.uint32, bitcast=True) ^ (b & 0x80000000)).to(tl.float32, bitcast=True)
    s = s * r
    c = c * r
    swap = (b & 0x40000000) != 0
    return tl.where(swap, s, c), tl.where(swap, c, s)


@triton.jit
def normal_block(block, key, step, stream, FAST: tl.constexpr):
    """The four normals of every counter in `block`; key is what sample_key gives."""
    w0, w1, w2, w3 = philox4x32(block, key[2], step, stream, key[0], key[1])
    z0, z1 = box_muller(w0, w1, FAST)
    z2, z3 = box_muller(w2, w3, FAST)
    return z0, z1, z2, z3


@triton.jit
def normal_tile(
    first_block,
    key,
    step,
    stream,
    FAST: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normals of BLOCK consecutive elements, the first of which is 4 * first_block.

    NEIGHBOURS (4 or 8) elements come from one thread. With the count that a 16-byte access of the
    kernel's tensors holds they are born where they are needed; else they travel through shared
    memory. The values do not depend on it.
    """
    if NEIGHBOURS == 4:
        q = first_block + tl.arange(0, BLOCK // 4).to(tl.uint32)
        z0, z1, z2, z3 = normal_block(q, key, step, stream, FAST)
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    else:
        q = first_block + tl.arange(0, BLOCK // 8).to(tl.uint32) * 2
        z0, z1, z2, z3 = normal_block(q, key, step, stream, FAST)
        z4, z5, z6, z7 = normal_block(q + 1, key, step, stream, FAST)
        even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
        odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
        z = tl.join(even, odd)
    return tl.reshape(z, (BLOCK,))


@triton.jit
def low_word(pointer, index: tl.constexpr):
    """The low half of an int64 in memory; a counter takes no more of it.

    Words of their own, not halves of 64-bit values, else the compiler computes with 64 bits.
    """
    return tl.load(pointer.to(tl.pointer_type(tl.uint32), bitcast=True) + 2 * index)


@triton.jit
def sample_key(keys, seed_low, seed_high, sample_offset, b):
    """(seed low, seed high, sample) of batch entry b, from the tensor if there is one."""
    if keys is None:
        key = (
            seed_low.to(tl.uint32),
            seed_high.to(tl.uint32),
            (sample_offset + b).to(tl.uint32),
        )
    else:
        pair = (keys + b) + b
        words = pair.to(tl.pointer_type(tl.uint32), bitcast=True)
        key = (tl.load(words), tl.load(words + 1), tl.load(words + 2))
    return key


def halves(seed: int) -> tuple[int, int]:
    """The low and the high word of a seed, for the arguments that sample_key takes."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
