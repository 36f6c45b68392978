"""Timing on a machine that others use too: interleaved rounds, ratios within a round."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Timing", "interleaved", "keep_memory", "machine", "processor"]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one per round, of one contestant."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def best(self) -> float:
        return float(self.seconds.min())

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """How many times longer `other` takes: (p10, median, p90) over rounds."""
        low, middle, high = np.percentile(other.seconds / self.seconds, [10, 50, 90])
        return float(low), float(middle), float(high)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    seconds: float = 0.02,
    budget: float = 20.0,
) -> dict[str, Timing]:
    """Times every contestant once a round, in turn, so that a drifting clock hits all alike.

    Args:
        contestants: calls without arguments; each is warmed up first.
        rounds: rounds at most.
        seconds: least length of one measurement; short calls are repeated to reach it.
        budget: seconds after which no further round starts (five rounds are always run).
    """
    repeats = {}
    for name, call in contestants.items():
        call()
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > budget:
            break
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: Timing(np.array(values)) for name, values in times.items()}


def keep_memory() -> bool:
    """Makes glibc keep freed memory instead of giving its pages back; False where it cannot.

    With the default allocator every large result costs a page fault per 4 KiB, about as much as
    computing it, whoever computes it. "Warm memory" figures are taken after this call.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_max = -1, -4
        return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """What a figure must carry: processor, versions, threads."""
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
