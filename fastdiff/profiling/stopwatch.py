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
# While the host submits what is measured the GPU spins: 0.1 ms, and twice what a replay takes to
# start, which grows with the graph.
_SPIN_CYCLES = 200_000
_CYCLES_A_SECOND = 2e9  # no GPU's clock is much faster


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
        with torch.cuda.device(self._device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # compiled and loaded before anything is recorded
                for call in calls[:_WARM_UPS]:
                    call()
            current.wait_stream(side)
            graph, spin = self._recorded(calls, 1, side)
            each = min(self._seconds(graph, spin) for _ in range(2)) / len(calls)
            rounds = _rounds(calls, each, seconds)
            if rounds > 1:
                graph, spin = self._recorded(calls, rounds, side)
        return lambda: self._seconds(graph, spin) / (rounds * len(calls))

    def _recorded(
        self, calls: Sequence[Call], rounds: int, side: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, int]:
        """The graph of all calls, and cycles to spin for before it: longer than it takes to start.

        It is recorded on a stream of this device: PyTorch's own for captures is of the device that
        captured first.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()  # uploads it
        self.wait()
        begin = time.perf_counter()
        graph.replay()
        host = time.perf_counter() - begin
        self.wait()
        return graph, _SPIN_CYCLES + int(2 * host * _CYCLES_A_SECOND)

    def _seconds(self, graph: torch.cuda.CUDAGraph, spin: int) -> float:
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the GPU spins, the host submits all of the following, so none of it waits.
            torch.cuda._sleep(spin)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def plain(self, call: Call, count: int) -> tuple[float, float]:
        call()
        self.wait()
        with torch.cuda.device(self._device):
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
