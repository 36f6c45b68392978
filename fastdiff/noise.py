"""The noise contract: normals as a pure function of (seed, sample, step, stream, element).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter
into four 32-bit words; a Box-Muller transform built from float32 adds, multiplies and one IEEE
square root turns two words into two normals. Nothing in it depends on a libm, on FMA contraction
or on the order in which elements are visited, so every backend gives the same bits.

    key     = (seed low, seed high)
    counter = (block, sample, step, stream)         block = element // 4
    element 4*block + k of a sample is z_k          (z0, z1) = bm(w0, w1), (z2, z3) = bm(w2, w3)

`element` is the row-major index inside the sample, whatever the memory layout. This module is the
definition, in PyTorch; csrc/include and kernels/noise.py are the same arithmetic for CPU and GPU.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

__all__ = [
    "STREAM_BITS_CHAIN",
    "STREAM_BITS_Q_SAMPLE",
    "STREAM_BITS_REVERSE",
    "STREAM_CHAIN",
    "STREAM_INITIAL",
    "STREAM_Q_SAMPLE",
    "STREAM_STEP",
    "STREAM_STEP_SECOND",
    "normals",
    "philox4x32",
    "sample_keys",
    "words",
]

# The one list of streams: what a draw is for. Draws of one sample never collide.
STREAM_INITIAL = 0  # initial latent (step 0)
STREAM_STEP = 1  # first draw of a solver step (step = absolute row of the plan)
STREAM_Q_SAMPLE = 2  # q_sample (step = the caller's, usually the training iteration)
STREAM_STEP_SECOND = 3  # second draw of a solver step
STREAM_CHAIN = 4  # forward chain (step = t)
STREAM_BITS_REVERSE = 5  # reverse step of bits (step = t; their beginning is step T)
STREAM_BITS_Q_SAMPLE = 6  # q_sample of bits (step = the caller's)
STREAM_BITS_CHAIN = 7  # forward step of bits (step = t)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _floats(hex_words: str) -> tuple[float, ...]:
    return tuple(struct.unpack(">f", bytes.fromhex(word))[0] for word in hex_words.split())


# float32 bits, ascending powers. LOG: -2 ln(1 + t) = horner(LOG, t) * t on [-1/3, 1/3).
# SIN, COS: sin and cos of pi/4 y on [-1, 1), in y^2.
(_MINUS_2_LN2,) = _floats("bfb17218")
_LOG = _floats("bffffffd 3f7ffffd bf2ab0e7 3f0005c7 becaaed2 3ea8b1fa beaf4fa0 3e9a9710")
_SIN = _floats("3f490fdb bda55df6 3b233591 b817ad0e")
_COS = _floats("3f7fffff be9de9bf 3c81d666 b9a6fe9c")


def _mulhilo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned product; int64 wraps, which keeps all 64 bits."""
    product = a * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold uint32 values; shapes broadcast.

    Source: Salmon et al. 2011, section 3.3; multipliers and increments of Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mulhilo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    acc = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        acc = acc * x + coefficient
    return acc


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two words (int64 holding uint32) to two float32 normals."""
    u = (a >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32
    ix = u.view(torch.int32) - 0x3F2AAAAB
    e = (ix >> 23).to(torch.float32)
    t = ((ix & 0x7FFFFF) + 0x3F2AAAAB).view(torch.float32) - 1.0
    # float64 sqrt rounded to float32 is the IEEE result; torch.sqrt(float32) on CPU is not.
    r = (e * _MINUS_2_LN2 + _horner(_LOG, t) * t).double().sqrt().float()
    y = (b << 2).to(torch.int32).to(torch.float32) * 2.0**-31
    y2 = y * y
    s = _horner(_SIN, y2) * y
    c = _horner(_COS, y2)
    c = (c.view(torch.int32) ^ (b & 0x80000000).to(torch.int32)).view(torch.float32)
    s, c = s * r, c * r
    swap = (b & 0x40000000) != 0
    return torch.where(swap, s, c), torch.where(swap, c, s)


def sample_keys(
    keys: Tensor | None, seed: int, sample_offset: int, batch: int, device: torch.device
) -> Tensor:
    """(seed, sample) of every batch entry, int64 (batch, 2); `keys` itself when given."""
    if keys is not None:
        return keys
    samples = torch.arange(sample_offset, sample_offset + batch, device=device)
    return torch.stack([torch.full_like(samples, seed), samples], dim=1)


def normals(
    keys: Tensor, step: Tensor | int, stream: Tensor | int, n: int, first_block: int = 0
) -> Tensor:
    """Elements 4*first_block .. 4*first_block + n-1 of every sample's noise.

    Args:
        keys: int64 (B, 2), (seed, sample) per batch entry; a seed is its 64 bits.
        step: int or int64 (B,) or (1,).
        stream: int or int64 (B,) or (1,).
        n: elements per sample.
        first_block: where to begin, in blocks of four elements.

    Returns:
        float32 (B, n).
    """
    w0, w1, w2, w3 = _blocks(keys, step, stream, n, first_block)
    z = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)
    return z.reshape(keys.shape[0], -1)[:, :n]


def words(keys: Tensor, step: Tensor | int, stream: Tensor | int, n: int) -> Tensor:
    """The Philox words that bits are drawn with: word k of a block is that of element 4*block + k.

    Arguments as in normals(). Returns int64 (B, n) that holds uint32 values.
    """
    blocks = torch.stack(_blocks(keys, step, stream, n, 0), dim=-1)
    return blocks.reshape(keys.shape[0], -1)[:, :n]


def _blocks(
    keys: Tensor, step: Tensor | int, stream: Tensor | int, n: int, first_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of every block that n elements take, (B, blocks) each."""
    block = torch.arange(first_block, first_block + (n + 3) // 4, device=keys.device)[None, :]

    def column(value: Tensor | int) -> Tensor:
        if isinstance(value, Tensor):
            return value[:, None] & _MASK
        return torch.full_like(block[:, :1], value)

    seed, sample = keys[:, :1], keys[:, 1:] & _MASK
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return philox4x32((block, sample, column(step), column(stream)), key)
