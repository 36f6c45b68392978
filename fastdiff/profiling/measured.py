"""What the kernels reach on the GPU that is here.

    report = profile("cuda", seconds=60)
    print(table(report))

Every launch is checked before it is timed. Time is that of a graph of many launches between two
events, with cold caches (the launches go round over more copies of their tensors than the L2 holds)
and hot ones. Its measure is a copy of as many bytes, timed in the same rounds; of what PyTorch and
Triton copy with, the faster counts. Clocks, power and temperature are read, never set.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import backends
from fastdiff.profiling import gpu_state, opponents
from fastdiff.profiling.agreement import (
    copied,
    difference,
    is_exact,
    results,
    written_by,
)
from fastdiff.profiling.cases import Case, cases
from fastdiff.profiling.report import new_report
from fastdiff.profiling.stopwatch import Measure, Stopwatch, stopwatch

__all__ = ["LARGE", "SMALL", "ordered", "profile", "table"]

LARGE = (64, 3, 256, 256)  # time is bytes and instructions
SMALL = (16, 4, 64, 64)  # time is starting a launch
Row = dict[str, Any]

_REPLAY_SECONDS = 1e-3  # of one measurement
_CACHES = 3  # times the L2: what a launch finds there is not its own
_MOST_COPIES = 128
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 40
_COPY_BLOCKS = (1024, 4096)
_COPY_UNIT = 4096  # float32 elements; every copy is a multiple of it
# First of all, since the time may not suffice: what users run most, and one of each kind.
_FIRST = ("randn", "q_sample", "ddpm_clipped", "ddim_guided", "ddim", "dpmpp_2m")
_COMPILE_SECONDS = 20  # that torch.compile may take for one case


def ordered(chosen: Sequence[Case]) -> list[Case]:
    """Cases in order of worth, for a profile that may run out of time."""

    def worth(case: Case) -> tuple[bool, ...]:
        return (
            case.name not in _FIRST,
            case.mixed,
            case.dtype == torch.float16,
            case.dtype != torch.float32,
        )

    return sorted(chosen, key=worth)


@dataclass
class _Contestant:
    """Something to time: its calls, in turn over copies of the tensors, or one over and over."""

    calls: list[Callable[[], object]]
    measure: Measure
    seconds: list[float]


def profile(
    device: torch.device | str = "cuda",
    cases: Sequence[Case] | None = None,
    backends: Sequence[str] | None = None,
    shape: tuple[int, ...] = LARGE,
    seconds: float = 120.0,
    *,
    compiled: Sequence[Case] = (),
    l2: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Times launches of the fused operations.

    Args:
        cases: which; every case of fastdiff/profiling/cases.py unless given.
        backends: which; those of the device unless given. "reference" is the definition as it
            runs eagerly; "eager" rows beside them are the update as people write it.
        shape: of the samples, (B, C, H, W).
        seconds: for everything; cases that do not fit are listed under left_out.
        compiled: cases of which torch.compile of the definition is timed too, at the end.
        l2: bytes of the cache to be missed; the device's unless given.
        tell: told the id of each case as it begins.
        keep: given the report after each case, for a process that may be killed.

    Returns:
        The report: kind "measured", machine, versions, rows, left_out; table() prints it. A row
        has case, backend, shape, bytes (of an element) and either error, a sentence, or figures:
        us (p10, median, p90 of a launch, cold), hot_us, call_us and host_us (a plain call and the
        host's part of it), gelem_s, gb_s, of_copy (the copy's time over the launch's).

    Raises:
        ValueError: the device is not there, or a backend does not exist.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and PyTorch finds no GPU")
    return _Profile(device, shape, l2).run(cases, compiled, backends, seconds, tell, keep)


class _Profile:
    def __init__(self, device: torch.device, shape: tuple[int, ...], l2: int | None) -> None:
        self.device, self.shape = device, shape
        self.watch: Stopwatch = stopwatch(device)
        about: dict[str, Any] = {}
        if device.type == "cuda":
            about = gpu_state.describe(device)
        self.l2 = l2 or int(about.get("l2") or 0) or 64 * 2**20
        self.report: dict[str, Any] = new_report("measured", [])
        self.report["machine"] |= {**about, "device": str(device)}
        if torch.version.cuda:
            self.report["versions"]["cuda"] = torch.version.cuda
        self.report |= {"state_before": gpu_state.state(device), "left_out": []}
        self._best_copy: dict[int, str] = {}

    def run(
        self,
        chosen: Sequence[Case] | None,
        compiled: Sequence[Case],
        names: Sequence[str] | None,
        seconds: float,
        tell: Callable[[str], None],
        keep: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        todo = ordered(list(cases()) if chosen is None else chosen)
        self.names = list(names) if names is not None else list(backends.order(self.device.type))
        refused = {}
        for name in self.names:
            reason = backends.probe(name, self.device, torch.float32)
            if reason is not None:
                refused[name] = reason
        self.report["refused"] = refused
        self.names = [name for name in self.names if name not in refused]
        end = time.monotonic() + seconds  # not counting a library that a probe has built
        for index, case in enumerate(todo):
            left = end - time.monotonic()
            if left <= 0 and index:
                self.report["left_out"] = [case.id for case in todo[index:]]
                break
            tell(case.id)
            try:
                with _range(case.id, self.device), torch.no_grad():
                    self._case(case, max(left / (len(todo) - index), 0.2))
            except RuntimeError as error:
                if "CUDA error" in str(error):
                    raise  # after such an error nothing in this process can work
                reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
                self._row(case, "any", {"error": f"it could not be measured: {reason}"})
            keep(self.report)
        for case in compiled:
            if end - time.monotonic() > _COMPILE_SECONDS:
                tell(f"{case.id}, torch.compile")
                self._compiled(case)
                keep(self.report)
        self.report["state_after"] = gpu_state.state(self.device)
        return self.report

    # One case

    def _case(self, case: Case, seconds: float) -> None:
        arguments = case.arguments(self.shape, self.device)
        elements = math.prod(self.shape)
        volume = case.bytes_per_element * elements
        expected = results(case, "reference", copied(arguments, self.device))
        right = []
        for name in self.names:
            wrong = None
            if name != "reference":
                try:
                    actual = results(case, name, copied(arguments, self.device))
                    wrong = difference(actual, expected, exact=is_exact(case, name, self.device))
                except RuntimeError as error:
                    wrong = f"{type(error).__name__}: {str(error).strip()[:200]}"
            if wrong is None:
                right.append(name)
            else:
                self._row(case, name, {"error": wrong})
        del expected
        count = max(2, min(_MOST_COPIES, math.ceil(_CACHES * self.l2 / volume)))
        copies = [copied(arguments, self.device) for _ in range(count)]
        fused = [name for name in right if name != "reference"]
        contestants: dict[str, _Contestant] = {}
        for name in fused:
            calls = [_call(case, name, copy) for copy in copies]
            contestants[name] = self._contestant(calls)
            contestants[f"{name}, hot"] = self._contestant(calls[:1])
        copy_name = self._copy_of(volume)
        contestants["copy"] = self._contestant(self._copies(copy_name, volume))
        self._rounds(case, contestants, arguments, copies, seconds)
        copy_seconds = np.array(contestants["copy"].seconds)
        for name in fused:
            cold = np.array(contestants[name].seconds)
            call, host = self.watch.plain(_call(case, name, copies[0]), 30)
            self._row(case, name, {
                "us": _percentiles(cold),
                "hot_us": _percentiles(np.array(contestants[f"{name}, hot"].seconds)),
                "call_us": call * 1e6,
                "host_us": host * 1e6,
                **self._rates(case, float(np.median(cold))),
                "of_copy": float(np.median(copy_seconds / cold)),
                "copy": copy_name,
                "rounds": len(cold),
            })  # fmt: skip
        if "reference" in right:
            self._plain_row(case, "reference", _call(case, "reference", copies[0]), 2)
        form = opponents.eager(case, arguments)
        if form is not None:
            tensors = opponents.inputs(case, copies[0])
            self._plain_row(case, "eager", lambda: form(*tensors), 10)

    def _plain_row(self, case: Case, name: str, call: Callable[[], object], count: int) -> None:
        """What is many launches, as it runs: the host is part of its time."""
        times = np.array([self.watch.plain(call, count) for _ in range(3)])
        median = float(np.median(times[:, 0]))
        self._row(case, name, {
            "us": _percentiles(times[:, 0]),
            "host_us": float(np.median(times[:, 1])) * 1e6,
            **self._rates(case, median),
        })  # fmt: skip

    def _rates(self, case: Case, seconds: float) -> dict[str, float]:
        elements = math.prod(self.shape)
        volume = case.bytes_per_element * elements
        return {"gelem_s": elements / seconds / 1e9, "gb_s": volume / seconds / 1e9}

    def _contestant(self, calls: list[Callable[[], object]]) -> _Contestant:
        return _Contestant(calls, self.watch.prepare(calls, _REPLAY_SECONDS), [])

    def _rounds(
        self,
        case: Case,
        contestants: dict[str, _Contestant],
        arguments: Sequence[Any],
        copies: Sequence[Sequence[Any]],
        seconds: float,
    ) -> None:
        """Every contestant once a round, in turn, so that a drifting clock meets all alike."""
        end = time.monotonic() + seconds
        for done in range(_MOST_ROUNDS):
            if done >= _LEAST_ROUNDS and time.monotonic() > end:
                break
            for contestant in contestants.values():
                _restore(case, arguments, copies)
                contestant.seconds.append(contestant.measure())

    def _row(self, case: Case, backend: str, figures: Row) -> None:
        row = {"case": case.id, "backend": backend, "shape": list(self.shape)}
        self.report["rows"].append({**row, "bytes": case.bytes_per_element, **figures})

    # Copies of as many bytes

    def _copies(self, name: str, volume: int) -> list[Callable[[], object]]:
        count = max(2, min(_MOST_COPIES, math.ceil(_CACHES * self.l2 / volume)))
        n = max(1, round(volume / 8 / _COPY_UNIT)) * _COPY_UNIT
        pairs = [
            (torch.ones(n, device=self.device), torch.zeros(n, device=self.device))
            for _ in range(count)
        ]
        if name == "torch":
            return [_torch_copy(source, target) for source, target in pairs]
        from fastdiff.kernels.probes import copy

        block = int(name.split()[-1])
        return [copy(source, target, block) for source, target in pairs]

    def _copy_of(self, volume: int) -> str:
        """The fastest way to copy half of `volume` bytes, found once."""
        if volume not in self._best_copy:
            names = ["torch"]
            if "triton" in self.names and self.device.type == "cuda":
                names += [f"triton {block}" for block in _COPY_BLOCKS]
            times = {}
            for name in names:
                measure = self.watch.prepare(self._copies(name, volume), _REPLAY_SECONDS)
                times[name] = min(measure() for _ in range(3))
            self._best_copy[volume] = min(times, key=lambda name: times[name])
        return self._best_copy[volume]

    # torch.compile

    def _compiled(self, case: Case) -> None:
        arguments = copied(case.arguments(self.shape, self.device), self.device)
        try:
            with torch.no_grad():
                function = opponents.compiled_reference(case)
                begin = time.perf_counter()
                function(*arguments)
                self.watch.wait()
                spent = time.perf_counter() - begin
                self._plain_row(case, "compiled", partial(function, *arguments), 10)
            self.report["rows"][-1]["compile_s"] = spent
        except Exception as error:  # a compiler, on a machine that is new to it
            reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            self.report["refused"][f"torch.compile of {case.id}"] = reason


def _torch_copy(source: Tensor, target: Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source)


def _call(case: Case, backend: str, arguments: Sequence[Any]) -> Callable[[], object]:
    device = written_by(case, arguments)[0].device
    operation = backends.operation(case.op, device, torch.float32, backend)
    return lambda: operation(*arguments)


def _restore(case: Case, arguments: Sequence[Any], copies: Sequence[Sequence[Any]]) -> None:
    """The states that launches overwrite: a step done a thousand times in place would overflow."""
    if case.op == "step":
        for copy in copies:
            for tensor, original in zip(copy[0], arguments[0], strict=True):
                if any(tensor is out for out in written_by(case, copy)):
                    tensor.copy_(original)


def _percentiles(seconds: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(seconds * 1e6, [10, 50, 90])]


@contextlib.contextmanager
def _range(name: str, device: torch.device) -> Iterator[None]:
    """A named range for profilers that look on (NVTX)."""
    if device.type != "cuda" or torch.version.hip is not None:
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def table(report: dict[str, Any]) -> str:
    """The report as text: a line for each case and backend."""
    about = report["machine"]
    lines = [
        f"{about.get('gpu', about['processor'])}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        f"{'case':<28}{'by':<11}{'us':>9}{'p10..p90':>16}{'hot us':>9}{'host us':>9}"
        f"{'Gelem/s':>9}{'GB/s':>8}{'of copy':>9}{'predicted':>11}",
    ]
    for row in report["rows"]:
        start = f"{row['case']:<28}{row['backend']:<11}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        low, middle, high = row["us"]
        hot = f"{row['hot_us'][1]:.1f}" if "hot_us" in row else ""
        share = f"{100 * row['of_copy']:.0f} %" if "of_copy" in row else ""
        predicted = f"{row['predicted_gelem_s']:.0f}" if "predicted_gelem_s" in row else ""
        lines.append(
            f"{start}{middle:>9.1f}{f'{low:.1f}..{high:.1f}':>16}{hot:>9}{row['host_us']:>9.1f}"
            f"{row['gelem_s']:>9.1f}{row['gb_s']:>8.0f}{share:>9}{predicted:>11}"
        )
    if report["left_out"]:
        lines.append(f"the time ran out for {len(report['left_out'])}: {report['left_out'][0]} ...")
    for name, reason in report["refused"].items():
        lines.append(f"{name} does not serve here: {reason}")
    return "\n".join(lines)
