"""The time of short launches: by events around a replayed graph on a GPU, by the clock on a CPU.

watch = stopwatch("cuda")
measure = watch.prepare(calls, seconds=2e-3)    # calls in turn, recorded once
measure()                                       # seconds a call, and again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

__all__ = ["GraphWatch", "HostWatch", "Measure", "Stopwatch", "stopwatch"]

Call = Callable[[], object]
Measure = Callable[[], float]
_MOST_CALLS = 2000  # of one graph
_WARM_UPS = 3
_SPIN_CYCLES = 200_000  # 0.1 ms, while the host submits what is measured


class Stopwatch(Protocol):
    """Measures calls that leave their work on one device."""

    def prepare(self, calls: Sequence[Call], seconds: float) -> Measure:
        """A function that runs the calls in turn for about `seconds`; seconds a call."""

    def plain(self, call: Call, count: int) -> tuple[float, float]:
        """Seconds a call as users make it: until the device is done, and of the host alone."""

    def wait(self) -> None:
        """Until the device has nothing left to do."""


def _rounds(calls: Sequence[Call], each: float, seconds: float) -> int:
    """How many times through all calls take about `seconds`."""
    wanted = int(seconds / max(each, 1e-8) / len(calls))
    return max(1, min(wanted, _MOST_CALLS // len(calls)))


class HostWatch:
    """The clock of the host, for work that is done when a call returns."""

    def prepare(self, calls: Sequence[Call], seconds: float) -> Measure:
        for call in calls[:_WARM_UPS]:
            call()
        begin = time.perf_counter()
        for call in calls:
            call()
        rounds = _rounds(calls, (time.perf_counter() - begin) / len(calls), seconds)

        def measure() -> float:
            begin = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            return (time.perf_counter() - begin) / (rounds * len(calls))

        return measure

    def plain(self, call: Call, count: int) -> tuple[float, float]:
        call()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        each = (time.perf_counter() - begin) / count
        return each, each

    def wait(self) -> None:
        pass


class GraphWatch:
    """Events around the replay of a CUDA graph of many calls: no host time between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def prepare(self, calls: Sequence[Call], seconds: float) -> Measure:
        side, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiled and loaded before anything is recorded
            for call in calls[:_WARM_UPS]:
                call()
        current.wait_stream(side)
        self.wait()
        graph = self._recorded(calls, 1)
        graph.replay()
        each = min(self._seconds(graph) for _ in range(2)) / len(calls)
        rounds = _rounds(calls, each, seconds)
        if rounds > 1:
            graph = self._recorded(calls, rounds)
            graph.replay()
            self.wait()
        return lambda: self._seconds(graph) / (rounds * len(calls))

    def _recorded(self, calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return graph

    def _seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the GPU spins, the host submits all of the following, so none of it waits.
        torch.cuda._sleep(_SPIN_CYCLES)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def plain(self, call: Call, count: int) -> tuple[float, float]:
        call()
        self.wait()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        host = time.perf_counter() - start
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / count, host / count


def stopwatch(device: torch.device | str) -> Stopwatch:
    """The one for a device."""
    device = torch.device(device)
    return GraphWatch(device) if device.type == "cuda" else HostWatch()
