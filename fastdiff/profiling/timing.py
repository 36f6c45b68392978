"""Timing on a machine that others use too: interleaved rounds, ratios within a round."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

__all__ = [
    "Prepared",
    "Timing",
    "conditions",
    "cores",
    "interleaved",
    "keep_memory",
    "machine",
    "processor",
]

T = TypeVar("T")

_LONG = 0.1  # seconds; a longer call is warm after one


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """A contestant that cannot be called twice as it is: `run(prepare())`, and only run is timed.

    A run of a scheduler, say: prepare sets its timesteps, run takes its steps.
    """

    prepare: Callable[[], T]
    run: Callable[[T], object]

    def __call__(self) -> object:
        return self.run(self.prepare())


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

    @property
    def spread(self) -> tuple[float, float, float]:
        """(p10, median, p90) over rounds."""
        low, middle, high = np.percentile(self.seconds, [10, 50, 90])
        return float(low), float(middle), float(high)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """How many times longer `other` takes: (p10, median, p90) over rounds."""
        low, middle, high = np.percentile(other.seconds / self.seconds, [10, 50, 90])
        return float(low), float(middle), float(high)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    seconds: float = 0.02,
    budget: float = 20.0,
    least: int = 5,
) -> dict[str, Timing]:
    """Times every contestant once a round, in turn, so that a drifting clock hits all alike.

    Args:
        contestants: calls without arguments; each is warmed up first.
        rounds: rounds at most.
        seconds: least length of one measurement; short calls are repeated to reach it.
        budget: seconds after which no further round starts.
        least: rounds that are run whatever the budget.
    """
    repeats = {}
    for name, call in contestants.items():
        spent = _seconds(call, 1)
        if spent < _LONG:
            call()
            spent = _seconds(call, 1)
        repeats[name] = max(1, int(seconds / max(spent, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - begin > budget:
            break
        for name, call in contestants.items():
            times[name].append(_seconds(call, repeats[name]))
    return {name: Timing(np.array(values)) for name, values in times.items()}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call, over calls one after the other."""
    if isinstance(call, Prepared):
        spent = 0.0
        for _ in range(repeats):
            ready = call.prepare()
            start = time.perf_counter()
            call.run(ready)
            spent += time.perf_counter() - start
        return spent / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


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


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def conditions() -> dict[str, float | None]:
    """What disturbs figures: the load of the last minute, and the clock of the cores in MHz.

    None where the system does not say. A virtual machine's clock is what its host claims.
    """
    try:
        load = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    clocks = []
    try:
        with open("/proc/cpuinfo") as file:
            clocks = [float(line.split(":")[1]) for line in file if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        pass
    return {"load": load, "mhz": round(float(np.mean(clocks))) if clocks else None}


def machine() -> dict[str, str]:
    """What a figure must carry of the machine: processor, cores, system."""
    return {
        "processor": processor(),
        "cores": str(cores()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
