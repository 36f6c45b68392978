"""Known answers of the noise contract, for installations that do not carry the tests' file."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["KNOWN", "KnownNoise"]


class KnownNoise(NamedTuple):
    """n normals of one sample from element `first` on: the first four, and the sum of all.

    Attributes:
        bits: float32 patterns of the first four.
        total: sum of all n patterns as unsigned 32-bit integers.
    """

    seed: int
    sample: int
    step: int
    stream: int
    first: int
    n: int
    bits: tuple[int, ...]
    total: int


KNOWN = (
    KnownNoise(
        0,
        0,
        0,
        0,
        0,
        16,
        (0xBF6CB6AF, 0xBF7DBB33, 0xBF1E1B9F, 0x3EF6D1B2),
        27670564635,
    ),
    KnownNoise(
        1,
        0,
        0,
        0,
        0,
        4096,
        (0xBE97B1BE, 0xBEC2C3E5, 0xBF807DBD, 0xBE7F370D),
        8566371809427,
    ),
    KnownNoise(
        42,
        7,
        3,
        1,
        0,
        4096,
        (0x3EA9211E, 0x3DCF9CEB, 0x3E7776D1, 0x3F20B8EE),
        8777920791159,
    ),
    KnownNoise(
        1311768467294899695,
        0,
        49,
        1,
        0,
        65536,
        (0xBF978857, 0xBF387500, 0x3F810047, 0x3F7E69C6),
        139222193978160,
    ),
    KnownNoise(
        9223372036854775807,
        4294967295,
        999,
        2,
        4000,
        4096,
        (0x3FA281E4, 0x3D6DB95A, 0x3F8E2543, 0x3F21A3DA),
        8711168730045,
    ),
    KnownNoise(
        123456789,
        3,
        0,
        0,
        17179869120,
        64,
        (0xBCF2357E, 0xBF3F2A15, 0x3EB3DEE6, 0x3E9A1F2B),
        149184121729,
    ),
)
