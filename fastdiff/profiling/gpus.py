"""What is known of GPUs: limits and rates of architectures, and a row for every GPU.

A new GPU is one row of GPUS, a new architecture one of ARCHITECTURES beside it.

Sources. "guide": NVIDIA's CUDA programming guide, its tables of technical specifications and of the
throughput of arithmetic instructions by compute capability, from memory; IMAD.WIDE may run at half
the rate of IMAD that stands here, and integers on sm_120 at twice. "CDNA": AMD's white papers and
instruction set documents of CDNA 2, 3 and 4. "data sheet": the vendor's for that product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "CLASSES", "GPUS", "TARGETS", "Architecture", "Gpu", "gpus_of"]

# Classes of instructions that counts are kept by; what is in each: sass.py and amdgcn.py.
CLASSES = ("fp32", "imad", "alu", "mufu", "memory", "other")


@dataclass(frozen=True)
class Architecture:
    """One compilation target.

    Attributes:
        threads, blocks: resident on a multiprocessor at most.
        registers: 32-bit registers of a multiprocessor.
        unit: registers that a thread's count is rounded up to.
        shared: bytes of shared memory of a multiprocessor; reserved: of which each block costs
            that many more.
        warp: threads that run together; schedulers: parts a multiprocessor is divided into.
        pipes: what instructions wait for: by name, lanes per clock of each class that uses it.
        source: where the figures are from.
    """

    threads: int
    blocks: int
    registers: int
    unit: int
    shared: int
    reserved: int
    warp: int
    schedulers: int
    pipes: Mapping[str, Mapping[str, float]]
    source: str


def _nvidia(
    threads: int, blocks: int, shared: int, fp32: int, reserved: int = 1024
) -> Architecture:
    """65536 registers, 4 schedulers of one instruction a clock, FMA pipes shared with IMAD."""
    pipes: dict[str, dict[str, float]] = {
        "issue": dict.fromkeys(CLASSES, 128),
        "fma": {"fp32": fp32, "imad": fp32},
        "imad": {"imad": 64},
        "alu": {"alu": 64},
        "mufu": {"mufu": 16},
    }
    return Architecture(threads, blocks, 65536, 8, shared << 10, reserved, 32, 4, pipes, "guide")


def _cdna(shared: int) -> Architecture:
    """Wavefronts of 64 on four SIMDs of 16 lanes; scalar and memory instructions issue beside."""
    vector = {"fp32": 64.0, "alu": 64.0, "imad": 16.0, "mufu": 16.0}
    return Architecture(2048, 32, 131072, 8, shared << 10, 0, 64, 4, {"vector": vector}, "CDNA")


ARCHITECTURES: dict[str, Architecture] = {
    #          threads, blocks, shared KiB, fp32 lanes
    "sm_75": _nvidia(1024, 16, 64, 64, reserved=0),
    "sm_80": _nvidia(2048, 32, 164, 64),
    "sm_86": _nvidia(1536, 16, 100, 128),
    "sm_89": _nvidia(1536, 24, 100, 128),
    "sm_90": _nvidia(2048, 32, 228, 128),
    "sm_100": _nvidia(2048, 32, 228, 128),
    "sm_103": _nvidia(2048, 32, 228, 128),
    "sm_120": _nvidia(1536, 24, 100, 128),
    "gfx90a": _cdna(64),
    "gfx942": _cdna(64),
    "gfx950": _cdna(160),
}
TARGETS = tuple(ARCHITECTURES)


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        multiprocessors: SMs, or compute units.
        clock: GHz, the boost clock.
        bandwidth: of its memory in TB/s, as the vendor states it.
        copy: TB/s that a copy reaches; 0.9 of the bandwidth unless known better.
        l2: MB of the last cache before memory.
        source: where the figures are from, and how `copy` is known.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    l2: float
    copy: float
    source: str


def _gpu(
    name: str, target: str, multiprocessors: int, clock: float, bandwidth: float, l2: float,
    copy: float | None = None, source: str = "data sheet; copy assumed at 0.9 of it",
) -> Gpu:  # fmt: skip
    copy = round(0.9 * bandwidth, 3) if copy is None else copy
    return Gpu(name, target, multiprocessors, clock, bandwidth, l2, copy, source)


_ASSUMED = "data sheet; copy assumed"
GPUS: tuple[Gpu, ...] = (
    #  name, target, multiprocessors, GHz, TB/s, L2 MB, TB/s of a copy
    _gpu("T4", "sm_75", 40, 1.59, 0.320, 4),
    _gpu("A100 SXM 80GB", "sm_80", 108, 1.41, 2.04, 40, 1.80, _ASSUMED),
    _gpu("A100 40GB", "sm_80", 108, 1.41, 1.555, 40),
    _gpu("A10", "sm_86", 72, 1.695, 0.600, 6),
    _gpu("RTX 3090", "sm_86", 82, 1.695, 0.936, 6),
    _gpu("RTX 4090", "sm_89", 128, 2.52, 1.008, 72, 0.93, _ASSUMED),
    _gpu("L4", "sm_89", 58, 2.04, 0.300, 48),
    _gpu("L40S", "sm_89", 142, 2.52, 0.864, 96),
    _gpu("H100 SXM", "sm_90", 132, 1.755, 3.35, 50, 3.00, "data sheet (clock up to 1.98); "
         "copy reported by others"),
    _gpu("H100 PCIe", "sm_90", 114, 1.755, 2.04, 50),
    _gpu("H200", "sm_90", 132, 1.755, 4.80, 50, 4.30, "data sheet; copy reported by others"),
    _gpu("GH200 96GB", "sm_90", 132, 1.755, 4.00, 50),
    _gpu("B200", "sm_100", 148, 1.85, 8.00, 126, 7.00, _ASSUMED),
    _gpu("B300", "sm_103", 148, 1.85, 8.00, 126, 7.00, "data sheet; multiprocessors, clock and "
         "copy assumed as of B200"),
    _gpu("RTX 5090", "sm_120", 170, 2.41, 1.792, 96, 1.65, _ASSUMED),
    _gpu("MI250X, one die", "gfx90a", 110, 1.70, 1.638, 8),
    _gpu("MI300X", "gfx942", 304, 2.10, 5.30, 256),
    _gpu("MI355X", "gfx950", 256, 2.40, 8.00, 256),
)  # fmt: skip


def gpus_of(target: str) -> list[Gpu]:
    """The GPUs that machine code for `target` runs on, the best known first."""
    return [gpu for gpu in GPUS if gpu.target == target]
