"""How full a GPU gets, how fast a kernel can be there, and what holds it back.

    occupancy("sm_90", threads=256, registers=40, shared=0)        # 0.75
    predict(gpu, classes={"alu": 12.0, ...}, bytes_per_element=8)

The model. Memory: bytes of an element at the bandwidth that a copy reaches. Each pipe: instructions
of an element over its lanes, of which a kernel reaches REACH. The slowest of these is the bound. No
latency is in it: where little is resident, or the tensors fit the L2, it says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastdiff.profiling.gpus import ARCHITECTURES, Gpu

__all__ = ["REACH", "Prediction", "occupancy", "occupancy_limit", "predict"]

# The share of a pipe's peak that kernels like these reach. Calibrated on what others report, and
# roughly: generators of random numbers on an H20 at 0.43 to 0.58 of the issue bound.
REACH = 0.55


def _resident(target: str, threads: int, registers: int, shared: int) -> dict[str, int]:
    """Blocks of `threads` that fit a multiprocessor, by what limits them."""
    arch = ARCHITECTURES[target]
    warps = -(-threads // arch.warp)
    rounded = max(arch.unit, -(-registers // arch.unit) * arch.unit)
    # Each scheduler has its share of the registers, and gives them out by the warp.
    per_scheduler = arch.registers // arch.schedulers // (rounded * arch.warp)
    limits = {
        "threads": arch.threads // (warps * arch.warp),
        "blocks": arch.blocks,
        "registers": arch.schedulers * per_scheduler // warps,
    }
    if shared + arch.reserved:
        limits["shared memory"] = arch.shared // (shared + arch.reserved)
    return limits


def occupancy(target: str, threads: int, registers: int, shared: int) -> float:
    """Resident threads over the most that a multiprocessor holds.

    Args:
        threads: of a block; registers: of a thread; shared: bytes of a block.
    """
    arch = ARCHITECTURES[target]
    blocks = min(_resident(target, threads, registers, shared).values())
    return min(1.0, blocks * -(-threads // arch.warp) * arch.warp / arch.threads)


def occupancy_limit(target: str, threads: int, registers: int, shared: int) -> str:
    """What keeps more blocks out: threads, blocks, registers or shared memory."""
    limits = _resident(target, threads, registers, shared)
    return min(limits, key=lambda name: limits[name])


@dataclass(frozen=True)
class Prediction:
    """What to expect of a kernel on a GPU.

    Attributes:
        limits: 10^9 elements a second that memory and each pipe allow, pipes at REACH.
        bytes_per_element: of memory traffic.
    """

    limits: Mapping[str, float]
    bytes_per_element: int

    @property
    def bound(self) -> str:
        """The lowest limit: memory or a pipe."""
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def gelem_s(self) -> float:
        """10^9 elements a second."""
        return self.limits[self.bound]

    @property
    def gb_s(self) -> float:
        return self.gelem_s * self.bytes_per_element


def predict(gpu: Gpu, classes: Mapping[str, float], bytes_per_element: int) -> Prediction:
    """The prediction for a kernel of so many instructions an element, by class of gpus.CLASSES."""
    limits = {"memory": 1000 * gpu.copy / bytes_per_element}
    for pipe, lanes in ARCHITECTURES[gpu.target].pipes.items():
        cycles = sum(count / lanes[name] for name, count in classes.items() if name in lanes)
        if cycles:
            limits[pipe] = REACH * gpu.multiprocessors * gpu.clock / cycles
    return Prediction(limits, bytes_per_element)
