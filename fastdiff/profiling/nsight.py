"""Other people's profilers on one launch: counters of Nsight Compute, a trace of torch.profiler.

    counters(Case("q_sample"), "triton", (64, 3, 256, 256))     # {"dram__bytes_read.sum": ...}
    trace(Path("trace.json"), [Case("q_sample")], ["triton"], (64, 3, 256, 256))

Nsight Compute starts this module as a program of its own; clocks stay as they are.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastdiff
from fastdiff.files import check_writable
from fastdiff.profiling.agreement import copied, launch
from fastdiff.profiling.cases import Case, cases
from fastdiff.profiling.gpu_state import find_tool

__all__ = ["METRICS", "ProfilerError", "counters", "main", "parse", "trace"]

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
)
_SECONDS = 120


class ProfilerError(RuntimeError):
    """The profiler is not here or does not work; the message says which and why."""


def counters(case: Case, backend: str, shape: tuple[int, ...]) -> dict[str, float]:
    """What Nsight Compute counts in one launch of a case on the GPU, by the names of METRICS.

    Raises ProfilerError where there is no `ncu`, or it may not read the counters.
    """
    program = find_tool("ncu")
    if program is None:
        raise ProfilerError("ncu (Nsight Compute) is not on PATH nor in the CUDA toolkit's folder")
    command = [
        program, "--csv", "--page", "raw", "--metrics", ",".join(METRICS),
        "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all",
        sys.executable, "-m", "fastdiff.profiling.nsight",
        json.dumps({"case": case.id, "backend": backend, "shape": shape}),
    ]  # fmt: skip
    root = str(Path(fastdiff.__file__).absolute().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS,
            stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ProfilerError(f"ncu was not done after {_SECONDS} s") from None
    found = parse(done.stdout)
    if not found:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = next((line for line in lines if "ERR" in line or "Error" in line), lines[-1:])
        raise ProfilerError(f"ncu counted nothing: {reason}")
    return found


def parse(text: str) -> dict[str, float]:
    """The first kernel's numbers in what `ncu --csv --page raw` prints, in base units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if len(rows) < 3:  # names, units, values
        return {}
    names, units, values = rows[:3]
    scale = {
        "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3,
        "ms": 1e-3, "nsecond": 1e-9, "ns": 1e-9,
    }  # fmt: skip
    found = {}
    for name, unit, value in zip(names, units, values, strict=False):
        if name in METRICS:
            try:
                found[name] = float(value.replace(",", "")) * scale.get(unit, 1.0)
            except ValueError:
                continue
    return found


def trace(
    path: Path,
    chosen: Sequence[Case],
    backends: Sequence[str],
    shape: tuple[int, ...],
    device: torch.device | str = "cuda",
) -> Path:
    """Writes torch.profiler's trace of three launches of each case, for a trace viewer.

    Raises ValueError for a path that cannot be written to, ProfilerError where the profiler fails.
    """
    check_writable(path)
    from torch.profiler import ProfilerActivity, profile, record_function

    device = torch.device(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    calls = []
    for case in chosen:
        arguments = copied(case.arguments(shape, device), device)
        for backend in backends:
            launch(case, backend, arguments)  # compiled before the trace begins
            calls.append((f"{case.id}, {backend}", case, backend, arguments))
    try:
        with profile(activities=activities) as profiler:
            for name, case, backend, arguments in calls:
                with record_function(name):
                    for _ in range(3):
                        launch(case, backend, arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        profiler.export_chrome_trace(str(path))
    except RuntimeError as error:
        raise ProfilerError(f"torch.profiler does not work here: {error}") from None
    return path


def main(argv: Sequence[str]) -> int:
    """One launch between the marks that profilers look for: what `counters` has ncu start."""
    wanted = json.loads(argv[0])
    case = next(case for case in cases() if case.id == wanted["case"])
    arguments = copied(case.arguments(tuple(wanted["shape"]), "cuda"), "cuda")
    launch(case, wanted["backend"], arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    launch(case, wanted["backend"], arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
